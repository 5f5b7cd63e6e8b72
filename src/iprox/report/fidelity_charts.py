"""Charts of the audit: proxy scores against target scores on the sampled rows."""

from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go

from iprox.report import formats
from iprox.report.charts import ACCENT, INK, NEUTRAL, Chart, Key, axis, escape_label, make_chart

TOP_SHARE = 0.05
# Keeps the page small and quick where somebody audits a very large sample.
MOST_DOTS = 2000

FIDELITY_KEYS = (
    Key("accent dot", "top 5 % by both models"),
    Key("ink ring", "top 5 % by one model only"),
    Key("neutral dot", "the rest of the sample"),
)


def top_rows(values: np.ndarray, share: float) -> np.ndarray:
    """Marks the best share of the values, at least one.

    Args:
        values: finite scores [S].
        share: between 0 and 1.

    Returns:
        Booleans [S].
    """
    marked = np.zeros(len(values), dtype=bool)
    marked[np.argsort(-values, kind="stable")[: max(1, round(share * len(values)))]] = True
    return marked


def fidelity_chart(
    task: str,
    proxy: np.ndarray,
    target: np.ndarray,
    ids: Sequence[str],
    sources: Sequence[str | None],
    *,
    id: str,
    caption: str,
) -> Chart | None:
    """Draws one task's proxy scores against its target scores.

    Args:
        task: the task's name.
        proxy: proxy scores [S], NaN where a row has none.
        target: target scores [S].
        ids: S ids, for hovering.
        sources: S sources.
        id: unique in the page.
        caption: agreement in numbers.

    Returns:
        The chart, or None where no sampled row has both scores.
    """
    both = np.flatnonzero(np.isfinite(proxy) & np.isfinite(target))
    if not len(both):
        return None
    x, y = target[both], proxy[both]
    top_target, top_proxy = top_rows(x, TOP_SHARE), top_rows(y, TOP_SHARE)
    agree, differ = top_target & top_proxy, top_target ^ top_proxy
    plain = np.flatnonzero(~(top_target | top_proxy))
    if len(plain) > MOST_DOTS:
        # Evenly spaced rows of a random sample are again a random sample.
        plain = plain[:: -(-len(plain) // MOST_DOTS)]
        caption += f" {len(plain):,} of the other points are drawn."

    def dots(where: np.ndarray, colour: dict[str, str], marker: dict[str, object]) -> go.Scatter:
        return go.Scatter(
            x=x[where],
            y=y[where],
            mode="markers",
            marker=marker,
            meta=colour,
            hoverinfo="text",
            hovertext=[
                f"<b>{escape_label(formats.shorten(ids[row], 40))}</b><br>"
                f"{escape_label(formats.shorten(sources[row] or '(no source)', 40))}<br>"
                f"target {formats.score(target[row])}<br>proxy {formats.score(proxy[row])}"
                for row in map(int, both[where])
            ],
        )

    traces = [
        dots(plain, NEUTRAL, {"size": 5, "opacity": 0.6}),
        dots(np.flatnonzero(differ), INK, {"size": 7, "symbol": "circle-open", "line": {"width": 1.5}}),
        dots(np.flatnonzero(agree), ACCENT, {"size": 8}),
    ]
    label = (
        f"Scatter of proxy against target scores for {task} on {len(both):,} rows. "
        f"{int(agree.sum())} rows are in the top 5 % of both models. {caption}"
    )
    return make_chart(
        traces,
        id=id,
        title=task,
        caption=caption,
        label=label,
        height=320,
        hovermode="closest",
        xaxis=axis("target score", nticks=5, zeroline=True),
        yaxis=axis("proxy score", nticks=5, zeroline=True),
    )
