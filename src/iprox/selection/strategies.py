"""The ranking by one score. A ranking by turns is in `iprox.selection.turns`.

A ranking orders rows best first and breaks ties by the earlier row. A longer one begins with the shorter one, so
whoever takes rows may ask for as many as it turns out to need.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

# How many rows to rank -> their numbers, best first (fewer where fewer have a score).
Ranking = Callable[[int], np.ndarray]


def top(influence: np.ndarray, limit: int) -> np.ndarray:
    """The `limit` highest scores, best first. O(n + k log k).

    Args:
        influence: float64 [N], NaN where a row is not to be taken.
        limit: how many, if there are as many.

    Returns:
        int64 [<= limit] row numbers.
    """
    loss = np.where(np.isnan(influence), np.inf, -influence)
    limit = min(limit, int(np.isfinite(influence).sum()))
    if limit == 0:
        return np.empty(0, np.int64)
    if limit < len(loss):
        cut = np.partition(loss, limit - 1)[limit - 1]
        better = np.flatnonzero(loss < cut)
        equal = np.flatnonzero(loss == cut)[: limit - len(better)]
        candidates = np.sort(np.concatenate([better, equal]))
    else:
        candidates = np.arange(len(loss))
    return candidates[np.argsort(loss[candidates], kind="stable")]
