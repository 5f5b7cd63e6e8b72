"""Charts of an audit: how the proxy's scores of the sampled rows agree with the target's."""

from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go

from iprox.audits.removal import top_rows
from iprox.report import formats
from iprox.report.charts.base import ACCENT, INK, NEUTRAL, Chart, Key, axis, escape_label, make_chart
from iprox.settings import NAMED_SHARE

# Keeps the page small and quick for a very large sample.
MOST_DOTS = 2000

FIDELITY_KEYS = (
    Key("accent dot", "top 5 % by both models"),
    Key("ink ring", "top 5 % by one model only"),
    Key("neutral dot", "the rest of the sample"),
)


def fidelity_chart(
    task: str,
    proxy: np.ndarray,
    target: np.ndarray,
    ids: Sequence[str],
    sources: Sequence[str | None],
    *,
    spearman: float | None,
    id: str = "chart-fidelity",
) -> Chart | None:
    """Draw one task's proxy scores against its target scores [S]; return None if no row has both.

    `ids` and `sources` are shown on hovering, and `spearman` in the caption.
    """
    both = np.flatnonzero(np.isfinite(proxy) & np.isfinite(target))
    if not len(both):
        return None
    x, y = target[both], proxy[both]
    top_target, top_proxy = (top_rows(scores, max(1, round(NAMED_SHARE * len(both)))) for scores in (x, y))
    agree, differ = top_target & top_proxy, top_target ^ top_proxy
    plain = np.flatnonzero(~(top_target | top_proxy))
    caption = f"Spearman {formats.decimal(spearman)}."
    if len(plain) > MOST_DOTS:
        # Evenly spaced rows of a random sample are a random sample too.
        plain = plain[:: -(-len(plain) // MOST_DOTS)]
        caption += f" {len(plain):,} of the other points are drawn."

    def dots(where: np.ndarray, color: dict[str, str], marker: dict[str, object]) -> go.Scatter:
        hover = [
            f"<b>{escape_label(formats.shorten(ids[row], 40))}</b><br>"
            f"{escape_label(formats.shorten(sources[row] or '(no source)', 40))}<br>"
            f"target {formats.score(target[row])}<br>proxy {formats.score(proxy[row])}"
            for row in map(int, both[where])
        ]
        return go.Scatter(
            x=x[where], y=y[where], mode="markers", marker=marker, meta=color, hoverinfo="text", hovertext=hover
        )

    return make_chart(
        [
            dots(plain, NEUTRAL, {"size": 5, "opacity": 0.6}),
            dots(np.flatnonzero(differ), INK, {"size": 7, "symbol": "circle-open", "line": {"width": 1.5}}),
            dots(np.flatnonzero(agree), ACCENT, {"size": 8}),
        ],
        id=id,
        title=task,
        caption=caption,
        label=f"Scatter of proxy against target scores for {task} on {len(both):,} rows. "
        f"{int(agree.sum())} rows are in the top 5 % of both models.",
        height=320,
        hovermode="closest",
        xaxis=axis("target score", nticks=5, zeroline=True),
        yaxis=axis("proxy score", nticks=5, zeroline=True),
    )
