"""Charts of lengths: of the answers that rows are trained on, with the medians to compare, or of whole rows."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from iprox.report import formats
from iprox.report.charts import MARGIN, Chart, axis, escape_label, make_chart
from iprox.report.score_charts import SHARE_KEYS, share_traces

# Height of the text of one mark, in pixels, and the tasks that have a mark each; of more the two ends have.
LINE, MARKED = 16, 4


@dataclass(frozen=True, slots=True)
class Mark:
    """A median to mark on the axis of lengths."""

    name: str
    tokens: float
    dash: str


def answer_length_chart(supervised: np.ndarray, chosen: np.ndarray, validation: Mapping[str, float]) -> Chart:
    """Draws the distribution of supervised tokens in pool and selection, with medians of these and the validation sets.

    Args:
        supervised: supervised tokens of each pool row [N]; rows without any are left out: nothing is trained on them.
        chosen: selected rows, at least one.
        validation: by task that was selected for, the median of its validation examples.

    Returns:
        The chart.
    """
    pool, selected = supervised[supervised > 0], supervised[chosen]
    marks = [Mark("pool", float(np.median(pool)), "dash"), Mark("selection", float(np.median(selected)), "solid")]
    marks += [Mark(f"validation {task}", median, "dot") for task, median in _shown(validation).items()]
    medians = [f"{formats.count(mark.tokens)} in the {mark.name}" for mark in marks[:2]]
    medians += [f"{formats.count(mark.tokens)} in {mark.name}" for mark in marks[2:]]
    if len(_shown(validation)) < len(validation):
        medians[-1] += f" (the shortest and the longest of {len(validation)} tasks)"
    return _chart(
        (pool, selected),
        marks,
        title="Length of the answers",
        unit="supervised tokens",
        caption=f"Tokens that a row is trained on. Median: {', '.join(medians)}.",
    )


def _shown(validation: Mapping[str, float]) -> dict[str, float]:
    """The medians to mark: of many tasks those of the shortest and the longest."""
    if len(validation) <= MARKED:
        return dict(validation)
    ends = (pick(validation, key=lambda task: validation[task]) for pick in (min, max))
    return {task: validation[task] for task in ends}


def row_length_chart(tokens: np.ndarray, chosen: np.ndarray) -> Chart:
    """Draws the distribution of lengths in pool and selection, each as a share of its own rows.

    Args:
        tokens: tokens of each pool row [N].
        chosen: selected rows, at least one.

    Returns:
        The chart.
    """
    selected = tokens[chosen]
    caption = (
        f"Mean length: {tokens.mean():,.0f} tokens in the pool, {selected.mean():,.0f} in the selection; "
        f"median {np.median(tokens):,.0f} and {np.median(selected):,.0f}."
    )
    return _chart((tokens, selected), (), title="Length of the rows", unit="tokens", caption=caption)


def _chart(
    lengths: tuple[np.ndarray, np.ndarray], marks: Sequence[Mark], *, title: str, unit: str, caption: str
) -> Chart:
    """Draws the lengths of pool and selection over the same bins, and the marks above them."""
    pool, selected = lengths
    top = max(int(np.quantile(pool, 0.995)), int(pool.min()) + 1, *(int(mark.tokens) + 1 for mark in marks))
    width = max(1, -(-top // 30))
    edges = np.arange(0, top + width, width)
    longest = int(pool.max())
    spans = [f"{a:,} to {b - 1:,} {unit}" if width > 1 else f"{a:,} {unit}" for a, b in pairwise(edges)]
    if longest >= edges[-1]:
        spans[-1] = f"{edges[-2]:,} {unit} and more"
        caption += f" The last bar also holds longer rows (longest: {longest:,})."
    return make_chart(
        share_traces(edges, spans, pool, selected),
        id="chart-lengths",
        title=title,
        caption=caption,
        label=f"Histogram of lengths in {unit}, pool against selection. {caption}",
        height=300 + LINE * len(marks),
        keys=SHARE_KEYS,
        hovermode="x",
        margin=MARGIN | {"t": MARGIN["t"] + LINE * len(marks)},
        shapes=[_line(mark) for mark in marks],
        # Shortest on top, so that texts that run to the right are clear of the marks that follow.
        annotations=[_text(mark, place, edges) for place, mark in enumerate(sorted(marks, key=_falling))],
        xaxis=axis(f"length ({unit})", tickformat=",", rangemode="tozero", range=[0, int(edges[-1])]),
        yaxis=axis("share of rows (%)", rangemode="tozero", nticks=6),
    )


def _falling(mark: Mark) -> float:
    return -mark.tokens


def _line(mark: Mark) -> dict[str, Any]:
    at = {"x0": mark.tokens, "x1": mark.tokens, "y0": 0, "y1": 1, "yref": "paper"}
    return {"type": "line", **at, "line": {"dash": mark.dash}}


def _text(mark: Mark, place: int, edges: np.ndarray) -> dict[str, Any]:
    """The name of a mark, on a line of its own: marks may be close to each other."""
    # The text stays inside the chart if it runs from the mark towards the middle.
    side = "right" if mark.tokens > edges[-1] / 2 else "left"
    text = f"{escape_label(formats.shorten(mark.name, 30))}: {formats.count(mark.tokens)}"
    above = {"y": 1, "yref": "paper", "yanchor": "bottom", "yshift": LINE * place}
    return {"x": mark.tokens, **above, "xanchor": side, "text": text, "showarrow": False}
