"""Charts of an audit: how the proxy's scores of the sampled rows agree with the target's."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go

from iprox.audits.removal import top_rows
from iprox.report import formats
from iprox.report.charts.base import ACCENT, FAINT, INK, NEUTRAL, Chart, Key, axis, escape_label, make_chart
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


def overlap_chart(mean: Mapping[str, Any]) -> Chart | None:
    """Draw the overlap of the tops by their size (`mean` of audit.json); return None if it was not measured."""
    overlap, bounds = mean.get("overlap", {}), mean.get("intervals", {}).get("overlap", {})
    shares = sorted((share for share, value in overlap.items() if value is not None), key=float)
    if len(shares) < 2:
        return None
    x, y = [float(share) for share in shares], [overlap[share] for share in shares]
    names = [formats.percent(share, 0) for share in x]
    traces, keys = [], [Key("accent line", "proxy"), Key("neutral line", "chance")]
    if all(share in bounds for share in shares):
        low, high = ([bounds[share][side] for share in shares] for side in (0, 1))
        around = {"x": [*x, *reversed(x)], "y": [*high, *reversed(low)]}
        traces.append(go.Scatter(**around, mode="lines", fill="toself", line_width=0, meta=FAINT, hoverinfo="skip"))
        keys.append(Key("faint", "95 % interval"))
    traces.append(go.Scatter(x=x, y=x, mode="lines", line={"dash": "dash"}, meta=NEUTRAL, hoverinfo="skip"))
    found = [f"top {name}<br>{formats.percent(value, 0)} found" for name, value in zip(names, y, strict=True)]
    traces.append(go.Scatter(x=x, y=y, mode="lines+markers", meta=ACCENT, hoverinfo="text", hovertext=found))
    at = ", ".join(f"{formats.percent(value, 0)} of the top {name}" for name, value in zip(names, y, strict=True))
    return make_chart(
        traces,
        id="chart-overlap",
        title="Top rows found",
        caption="The share of the target's best rows that are also among the proxy's best; mean over tasks.",
        label=f"Curve of the overlap of the top rows by their share of the sample: {at}.",
        height=300,
        keys=keys,
        xaxis=axis("top share of the sample", type="log", tickvals=x, ticktext=names),
        yaxis=axis("found", range=[0, 1.03], tickformat=".0%"),
    )
