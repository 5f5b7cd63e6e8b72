"""Bins for histograms: counted here, so that the page never holds one point per row."""

import numpy as np


def bin_edges(values: np.ndarray, cut: float | None, bins: int) -> np.ndarray:
    """Chooses histogram edges for scores, which have long tails.

    Edges span the middle 99.6 % of the values, and at most five interquartile ranges beyond the quartiles: a few
    extreme rows must not squeeze all others into one bar. Whoever counts puts what lies outside into the end bins.
    One edge falls on the cut (without one, on 0), so that no bar mixes both sides of it.

    Args:
        values: finite scores [N], N >= 1.
        cut: the selection threshold, or None.
        bins: about how many bins.

    Returns:
        Rising edges, float64 [about bins + 1].
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
    """Counts values per bin [edges[i], edges[i+1]); what lies outside goes into the end bins."""
    bins = len(edges) - 1
    position = np.clip(np.searchsorted(edges, values, side="right") - 1, 0, bins - 1)
    return np.bincount(position, minlength=bins)
