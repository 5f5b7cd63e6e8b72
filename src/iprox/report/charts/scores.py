"""Charts of the scores and of what was selected by them: histograms, shares by source, lengths."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import plotly.graph_objects as go

from iprox.report import formats
from iprox.report.charts.base import ACCENT, MARGIN, NEUTRAL, Chart, Key, axis, escape_label, make_chart

SHARE_KEYS = (Key("neutral", "pool"), Key("accent line", "selection"))

# Height of a line of text above the chart of lengths, in pixels, and the largest number of tasks marked there.
LINE, MARKED = 16, 4


def bin_edges(values: np.ndarray, cut: float | None, bins: int) -> np.ndarray:
    """Return rising histogram edges for scores [N ≥ 1], which have long tails; about `bins` + 1 of them.

    The edges span the middle 99.6 % of the values, and at most five interquartile ranges beyond the quartiles, so that
    a few extreme rows do not squeeze all others into one bar; `count_into` puts these rows into the end bins. One edge
    falls on the cut, or on 0 if there is none, so that no bar mixes both sides of it.
    """
    low, first, third, high = np.quantile(values, [0.002, 0.25, 0.75, 0.998])
    if third > first:
        reach = 5 * (third - first)
        low, high = max(low, first - reach), min(high, third + reach)
    if cut is not None:
        low, high = min(low, cut), max(high, cut)
    width = (high - low) / bins
    # Equal values, or so close that edges would fall on the same float: one bin around them.
    if not width > 1e-9 * max(abs(low), abs(high)):
        half = max(abs(low), abs(high), 1.0) / 20
        return np.array([low - half, high + half])
    anchor = 0.0 if cut is None else cut
    start = anchor + width * np.floor((low - anchor) / width)
    steps = int(np.ceil((high - start) / width + 1e-9))
    return start + width * np.arange(max(steps, 1) + 1)


def count_into(values: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Count values per bin [edges[i], edges[i+1]); values outside go into the end bins."""
    bins = len(edges) - 1
    position = np.clip(np.searchsorted(edges, values, side="right") - 1, 0, bins - 1)
    return np.bincount(position, minlength=bins)


def _spans(edges: np.ndarray, values: np.ndarray) -> list[str]:
    """Return a name for each bin; the end bins say so if they hold values beyond them."""
    names = [f"Influence {formats.score(a)} to {formats.score(b)}" for a, b in pairwise(edges)]
    if values.min() < edges[0]:
        names[0] = f"Influence below {formats.score(edges[1])}"
    if values.max() > edges[-1]:
        names[-1] = f"Influence {formats.score(edges[-2])} and above"
    return names


def _bars(edges: np.ndarray, heights: np.ndarray, color: dict[str, str], hover: Sequence[str] | None = None) -> go.Bar:
    shown = {"hoverinfo": "skip"} if hover is None else {"hovertext": hover, "hoverinfo": "text"}
    return go.Bar(x=(edges[:-1] + edges[1:]) / 2, y=heights, width=np.diff(edges) * 0.94, meta=color, **shown)


def _mark(x: float, text: str, dash: str, middle: float, line: int = 0) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return a vertical line and its text above the chart, in one of several lines of text."""
    shape = {"type": "line", "x0": x, "x1": x, "y0": 0, "y1": 1, "yref": "paper", "line": {"dash": dash}}
    # The text stays inside the chart if it runs from the line towards the middle.
    above = {"x": x, "y": 1, "yref": "paper", "yanchor": "bottom", "xanchor": "right" if x > middle else "left"}
    return shape, {**above, "yshift": LINE * line, "text": text, "showarrow": False}


def score_histogram(
    values: np.ndarray,
    chosen: np.ndarray | Sequence[int] = (),
    cut: float | None = None,
    *,
    title: str,
    caption: str = "",
    id: str = "chart-influence",
) -> Chart:
    """Draw a histogram of scores [N], NaN where a row has none, with the selected rows in the accent color.

    `chosen` are the selected rows, and `cut` is the lowest selected score, which is marked. The size of the chart does
    not depend on N.
    """
    finite = values[np.isfinite(values)]
    edges = bin_edges(finite, cut, 60)
    total = count_into(finite, edges)
    picked = values[np.asarray(chosen, dtype=np.int64)]
    selected = count_into(picked[np.isfinite(picked)], edges)
    rows = zip(_spans(edges, finite), total, selected, strict=True)
    hover = [f"{span}<br>{formats.rows(int(n))}" + (f", {s:,} selected" if len(picked) else "") for span, n, s in rows]
    traces = [_bars(edges, total - selected, NEUTRAL, None if len(picked) else hover)]
    if len(picked):
        traces.append(_bars(edges, selected, ACCENT, hover))
    marks = () if cut is None else (_mark(cut, f"cut at {formats.score(cut)}", "dot", (edges[0] + edges[-1]) / 2),)
    beyond = int(((finite < edges[0]) | (finite > edges[-1])).sum())
    if beyond:
        caption += f" The end bars also hold the {formats.rows(beyond)} beyond them."
    quartiles = ", ".join(formats.score(q) for q in np.quantile(finite, [0.25, 0.5, 0.75]))
    return make_chart(
        traces,
        id=id,
        title=title,
        caption=caption.strip(),
        label=f"Histogram of {title} over {formats.rows(len(finite))}. Quartiles {quartiles}; lowest "
        f"{formats.score(finite.min())}, highest {formats.score(finite.max())}. "
        f"Selected: {formats.rows(int(selected.sum()))}.",
        height=330,
        keys=(Key("neutral", "pool, not selected"), Key("accent", "selected")) if len(picked) else (),
        barmode="stack",
        hovermode="x",
        shapes=[shape for shape, _ in marks],
        annotations=[text for _, text in marks],
        margin=MARGIN | {"t": 24},
        xaxis=axis("influence", nticks=9),
        yaxis=axis("rows", tickformat=",", nticks=6),
    )


def _share_traces(edges: np.ndarray, spans: Sequence[str], everything: np.ndarray, picked: np.ndarray) -> list[Any]:
    """Draw two distributions over the same bins: all rows as bars, the selected rows as a stepped line.

    Counts would hide a small selection behind a large pool, so each is a share of its own rows.
    """
    pool, selected = count_into(everything, edges), count_into(picked, edges)
    in_pool, in_selection = pool / len(everything), selected / max(len(picked), 1)
    hover = [
        f"{span}<br>pool: {formats.percent(in_pool[i])} ({formats.rows(int(pool[i]))})<br>"
        f"selection: {formats.percent(in_selection[i])} ({formats.rows(int(selected[i]))})"
        for i, span in enumerate(spans)
    ]
    traces: list[Any] = [_bars(edges, 100 * in_pool, NEUTRAL, hover)]
    if len(picked):
        # A step starts at each edge, so the last height is given twice to draw the last bin whole.
        heights = 100 * np.append(in_selection, in_selection[-1])
        line = {"shape": "hv", "width": 2.5}
        traces.append(go.Scatter(x=edges, y=heights, mode="lines", line=line, meta=ACCENT, hoverinfo="skip"))
    return traces


def task_histogram(task: str, values: np.ndarray, chosen: np.ndarray, *, id: str) -> Chart:
    """Draw the distribution of one task's scores [N] over all rows and over the selected rows."""
    finite = values[np.isfinite(values)]
    picked = values[chosen]
    picked = picked[np.isfinite(picked)]
    edges = bin_edges(finite, None, 30)
    caption = f"Mean: all rows {formats.score(finite.mean())}"
    return make_chart(
        _share_traces(edges, _spans(edges, finite), finite, picked),
        id=id,
        title=task,
        caption=f"{caption}, selected {formats.score(picked.mean())}." if len(picked) else f"{caption}.",
        label=f"Histogram of the influence on {task}, pool against selection.",
        height=220,
        hovermode="x",
        xaxis=axis("influence", nticks=5),
        yaxis=axis("share of rows (%)", rangemode="tozero", nticks=5),
    )


@dataclass(frozen=True, slots=True)
class SourceCount:
    """One source: its rows in the pool and in the selection, and both as shares of the whole."""

    name: str
    pool: int
    selected: int
    pool_share: float
    selected_share: float

    @property
    def gain(self) -> float:
        """Share of the selection minus share of the pool."""
        return self.selected_share - self.pool_share


def source_counts(codes: np.ndarray, names: Sequence[str | None], chosen: np.ndarray) -> list[SourceCount]:
    """Count rows by source, largest gain first.

    `codes` [N] are indices into the distinct sources `names`; None names rows without a source.
    """
    pool = np.bincount(codes, minlength=len(names))
    selected = np.bincount(codes[chosen], minlength=len(names))
    counts = [
        SourceCount("(no source)" if n is None else n, int(p), int(s), p / len(codes), s / len(chosen))
        for n, p, s in zip(names, pool, selected, strict=True)
    ]
    return sorted(counts, key=lambda count: (-count.gain, count.name))


def source_chart(counts: Sequence[SourceCount], most: int = 24) -> Chart:
    """Draw the share of each source in pool and selection, largest gain on top; of more than `most`, the extremes."""
    shown = list(counts)
    left_out = len(shown) - most
    if left_out > 0:
        shown = shown[: most // 2] + shown[-(most // 2) :]
    # Plotly draws upwards, and the largest gain belongs on top. Numbers, not names, place the bars: two long names may
    # be cut to the same label.
    shown.reverse()
    hover = [
        f"<b>{escape_label(s.name)}</b><br>pool: {formats.percent(s.pool_share)} ({s.pool:,} rows)<br>"
        f"selection: {formats.percent(s.selected_share)} ({s.selected:,} rows)<br>"
        f"change: {formats.points(s.gain)} points"
        for s in shown
    ]
    places = np.arange(len(shown))
    common = {"y": places, "orientation": "h", "hovertext": hover, "hoverinfo": "text", "width": 0.38}
    caption = "Sorted by gain: the top sources are selected more often than their share of the pool."
    if left_out > 0:
        caption += f" {left_out:,} sources in between are left out."
    ends = "; ".join(
        f"{s.name} changes from {formats.percent(s.pool_share)} to {formats.percent(s.selected_share)}"
        for s in (shown[-1], shown[0])
    )
    return make_chart(
        [
            go.Bar(x=[100 * s.pool_share for s in shown], meta=NEUTRAL, offset=0.02, **common),
            go.Bar(x=[100 * s.selected_share for s in shown], meta=ACCENT, offset=-0.4, **common),
        ],
        id="chart-sources",
        title="Share by source",
        caption=caption,
        label=f"Grouped bars: share of each source in the pool and in the selection. {ends}.",
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


def answer_length_chart(supervised: np.ndarray, chosen: np.ndarray, validation: Mapping[str, float]) -> Chart:
    """Draw the numbers of supervised tokens in pool and selection, and mark the medians of pool, selection and tasks.

    Of many tasks the shortest and the longest are marked.
    """
    pool, selected = supervised[supervised > 0], supervised[chosen]
    marked = dict(validation)
    if len(validation) > MARKED:
        ends = (pick(validation, key=lambda task: validation[task]) for pick in (min, max))
        marked = {task: validation[task] for task in ends}
    marks = [("pool", float(np.median(pool)), "dash"), ("selection", float(np.median(selected)), "solid")]
    medians = [f"{formats.count(tokens)} in the {name}" for name, tokens, _ in marks]
    marks += [(f"validation {task}", median, "dot") for task, median in marked.items()]
    medians += [f"{formats.count(tokens)} in {name}" for name, tokens, _ in marks[2:]]
    caption = f"Number of tokens that each row is trained on. Median: {', '.join(medians)}"
    if len(marked) < len(validation):
        caption += f" (the shortest and the longest of {len(validation)} tasks)"
    caption += "."
    top = max(int(np.quantile(pool, 0.995)), int(pool.min()) + 1, *(int(tokens) + 1 for _, tokens, _ in marks))
    width = max(1, -(-top // 30))
    edges = np.arange(0, top + width, width)
    longest = int(pool.max())
    spans = [f"{a:,} to {b - 1:,} tokens" if width > 1 else f"{a:,} tokens" for a, b in pairwise(edges)]
    if longest >= edges[-1]:
        spans[-1] = f"{edges[-2]:,} tokens and more"
        caption += f" The last bar also holds longer rows (longest: {longest:,})."
    # The shortest on the highest line, so that texts that run to the right are clear of the marks that follow.
    drawn = [
        _mark(tokens, f"{escape_label(formats.shorten(name, 30))}: {formats.count(tokens)}", dash, edges[-1] / 2, line)
        for line, (name, tokens, dash) in enumerate(sorted(marks, key=lambda mark: -mark[1]))
    ]
    return make_chart(
        _share_traces(edges, spans, pool, selected),
        id="chart-lengths",
        title="Length of the answers",
        caption=caption,
        label="Histogram of supervised tokens per row, pool against selection.",
        height=300 + LINE * len(marks),
        keys=SHARE_KEYS,
        hovermode="x",
        margin=MARGIN | {"t": MARGIN["t"] + LINE * len(marks)},
        shapes=[shape for shape, _ in drawn],
        annotations=[text for _, text in drawn],
        xaxis=axis("length (supervised tokens)", tickformat=",", rangemode="tozero", range=[0, int(edges[-1])]),
        yaxis=axis("share of rows (%)", rangemode="tozero", nticks=6),
    )
