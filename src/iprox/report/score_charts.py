"""Charts of the scores and of what was selected by them: histograms, shares by source, lengths."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import plotly.graph_objects as go

from iprox.report import formats
from iprox.report.binning import bin_edges, count_into
from iprox.report.charts import ACCENT, MARGIN, NEUTRAL, Chart, Key, axis, escape_label, make_chart

SHARE_KEYS = (Key("neutral", "pool"), Key("accent line", "selection"))


def _spans(edges: np.ndarray, values: np.ndarray) -> list[str]:
    """Names each bin; the end bins say so where they hold what lies beyond them."""
    names = [f"{formats.score(a)} to {formats.score(b)}" for a, b in pairwise(edges)]
    if values.min() < edges[0]:
        names[0] = f"below {formats.score(edges[1])}"
    if values.max() > edges[-1]:
        names[-1] = f"{formats.score(edges[-2])} and above"
    return names


def score_histogram(
    values: np.ndarray, chosen: np.ndarray, cut: float | None, *, id: str, title: str, caption: str
) -> Chart:
    """Draws a histogram of scores, the selected rows in the accent color.

    Args:
        values: scores [N], NaN where a row has none; at least one is finite.
        chosen: selected rows, indices into `values`.
        cut: threshold to mark, or None.
        id: unique in the page.
        title: above the chart.
        caption: what is to be seen.

    Returns:
        The chart; its size does not depend on N.
    """
    finite = values[np.isfinite(values)]
    edges = bin_edges(finite, cut, 60)
    total = count_into(finite, edges)
    picked = values[chosen]
    selected = count_into(picked[np.isfinite(picked)], edges)
    hover = [
        f"Influence {span}<br>{formats.rows(int(n))}, {s:,} selected"
        for span, n, s in zip(_spans(edges, finite), total, selected, strict=True)
    ]
    common = {"x": (edges[:-1] + edges[1:]) / 2, "width": np.diff(edges) * 0.94}
    traces = [
        go.Bar(y=total - selected, meta=NEUTRAL, hoverinfo="skip", **common),
        go.Bar(y=selected, meta=ACCENT, hovertext=hover, hoverinfo="text", **common),
    ]
    shapes, annotations = [], []
    if cut is not None:
        shapes = [{"type": "line", "x0": cut, "x1": cut, "y0": 0, "y1": 1, "yref": "paper", "line": {"dash": "dot"}}]
        # The text stays inside the chart if it runs from the line towards the middle.
        side = "right" if cut > (edges[0] + edges[-1]) / 2 else "left"
        text = f"cut at {formats.score(cut)}"
        annotations = [
            {"x": cut, "y": 1, "yref": "paper", "yanchor": "bottom", "xanchor": side, "text": text, "showarrow": False}
        ]
    beyond = int(((finite < edges[0]) | (finite > edges[-1])).sum())
    if beyond:
        caption += f" The end bars also hold the {formats.rows(beyond)} beyond them."
    quartiles = np.quantile(finite, [0.25, 0.5, 0.75])
    label = (
        f"Histogram of {title} over {formats.rows(len(finite))}. Quartiles "
        f"{', '.join(formats.score(q) for q in quartiles)}; lowest {formats.score(finite.min())}, "
        f"highest {formats.score(finite.max())}. Selected: {formats.rows(int(selected.sum()))}."
    )
    return make_chart(
        traces,
        id=id,
        title=title,
        caption=caption,
        label=label,
        height=330,
        keys=(Key("neutral", "pool, not selected"), Key("accent", "selected")) if len(chosen) else (),
        barmode="stack",
        hovermode="x",
        shapes=shapes,
        annotations=annotations,
        margin=MARGIN | {"t": 24},
        xaxis=axis("influence", nticks=9),
        yaxis=axis("rows", tickformat=",", nticks=6),
    )


def share_traces(
    edges: np.ndarray, spans: Sequence[str], everything: np.ndarray, picked: np.ndarray
) -> list[go.Bar | go.Scatter]:
    """Draws two distributions over the same bins: all rows as bars, the selected ones as a stepped line.

    Counts would hide a small selection under a large pool, so each is a share of its own rows.
    """
    pool, selected = count_into(everything, edges), count_into(picked, edges)
    in_pool, in_selection = pool / len(everything), selected / max(len(picked), 1)
    hover = [
        f"{span}<br>pool: {formats.percent(in_pool[i])} ({formats.rows(int(pool[i]))})<br>"
        f"selection: {formats.percent(in_selection[i])} ({formats.rows(int(selected[i]))})"
        for i, span in enumerate(spans)
    ]
    traces: list[go.Bar | go.Scatter] = [
        go.Bar(
            x=(edges[:-1] + edges[1:]) / 2,
            y=100 * in_pool,
            width=np.diff(edges) * 0.94,
            meta=NEUTRAL,
            hovertext=hover,
            hoverinfo="text",
        )
    ]
    if len(picked):
        # A step starts at each edge, so the last height is given twice to draw the last bin whole.
        heights = 100 * np.append(in_selection, in_selection[-1])
        line = {"shape": "hv", "width": 2.5}
        traces.append(go.Scatter(x=edges, y=heights, mode="lines", line=line, meta=ACCENT, hoverinfo="skip"))
    return traces


def task_histogram(task: str, values: np.ndarray, chosen: np.ndarray, *, id: str) -> Chart:
    """Draws how one task's scores spread over all rows and over the selected rows; one of several side by side.

    Args:
        task: the task's name.
        values: its scores [N], NaN where a row has none; at least one is finite.
        chosen: selected rows.
        id: unique in the page.

    Returns:
        The chart.
    """
    finite = values[np.isfinite(values)]
    picked = values[chosen]
    picked = picked[np.isfinite(picked)]
    edges = bin_edges(finite, None, 30)
    caption = f"Mean: all rows {formats.score(finite.mean())}"
    caption += f", selected {formats.score(picked.mean())}." if len(picked) else "."
    return make_chart(
        share_traces(edges, [f"Influence {span}" for span in _spans(edges, finite)], finite, picked),
        id=id,
        title=task,
        caption=caption,
        label=f"Histogram of the influence on {task}, pool against selection. {caption}",
        height=220,
        hovermode="x",
        xaxis=axis("influence", nticks=5),
        yaxis=axis("share of rows (%)", rangemode="tozero", nticks=5),
    )


@dataclass(frozen=True, slots=True)
class SourceShare:
    """One source: its rows in the pool and in the selection, and both as shares of the whole."""

    name: str
    pool: int
    selected: int
    pool_share: float
    selected_share: float

    @property
    def gain(self) -> float:
        """Share of the selection less share of the pool."""
        return self.selected_share - self.pool_share


def source_shares(codes: np.ndarray, names: Sequence[str | None], chosen: np.ndarray) -> list[SourceShare]:
    """Counts rows by source, largest gain first.

    Args:
        codes: source of each pool row [N], index into `names`.
        names: distinct sources; None for rows that name none.
        chosen: selected rows, at least one.

    Returns:
        One entry a source, sorted by gain, falling.
    """
    pool = np.bincount(codes, minlength=len(names))
    selected = np.bincount(codes[chosen], minlength=len(names))
    shares = [
        SourceShare("(no source)" if n is None else n, int(p), int(s), p / len(codes), s / len(chosen))
        for n, p, s in zip(names, pool, selected, strict=True)
    ]
    return sorted(shares, key=lambda share: (-share.gain, share.name))


def source_chart(shares: Sequence[SourceShare], most: int = 24) -> Chart:
    """Draws the share of each source in pool and selection, largest gain on top.

    Args:
        shares: as `source_shares` gives them.
        most: how many sources to show; of more, those that gain and those that lose most.

    Returns:
        The chart.
    """
    shown = list(shares)
    left_out = len(shown) - most
    if left_out > 0:
        shown = shown[: most // 2] + shown[-(most // 2) :]
    # Plotly draws upwards, and the largest gain belongs on top. Numbers, not names, place the bars: two long names
    # may be cut to the same label.
    shown.reverse()
    hover = [
        f"<b>{escape_label(s.name)}</b><br>pool: {formats.percent(s.pool_share)} ({s.pool:,} rows)<br>"
        f"selection: {formats.percent(s.selected_share)} ({s.selected:,} rows)<br>"
        f"change: {formats.points(s.gain)} points"
        for s in shown
    ]
    places = np.arange(len(shown))
    common = {"y": places, "orientation": "h", "hovertext": hover, "hoverinfo": "text", "width": 0.38}
    traces = [
        go.Bar(x=[100 * s.pool_share for s in shown], meta=NEUTRAL, offset=0.02, **common),
        go.Bar(x=[100 * s.selected_share for s in shown], meta=ACCENT, offset=-0.4, **common),
    ]
    best, worst = shown[-1], shown[0]
    caption = "Sorted by gain: sources at the top are chosen more often than their part of the pool, the lowest less."
    if left_out > 0:
        caption += f" {left_out:,} sources in between are left out."
    label = (
        f"Grouped bars: share of each source in the pool and in the selection. {best.name} goes from "
        f"{formats.percent(best.pool_share)} to {formats.percent(best.selected_share)}; {worst.name} from "
        f"{formats.percent(worst.pool_share)} to {formats.percent(worst.selected_share)}."
    )
    return make_chart(
        traces,
        id="chart-sources",
        title="Share by source",
        caption=caption,
        label=label,
        height=90 + 30 * len(shown),
        keys=(Key("neutral", "pool"), Key("accent", "selection")),
        hovermode="closest",
        xaxis=axis("share of rows (%)", rangemode="tozero", nticks=6),
        yaxis=axis(
            tickvals=places,
            ticktext=[escape_label(formats.shorten(s.name, 18)) for s in shown],
            range=[-0.6, len(shown) - 0.4],
            showgrid=False,
            zeroline=False,
        ),
    )
