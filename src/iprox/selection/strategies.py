"""Selection strategies: in which order rows of a scores table are worth taking.

Each ranks rows best first and breaks ties by the earlier row. Asked for a longer ranking it gives the same one, further
on, so whoever takes rows may ask for as many as it turns out to need.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence

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


def round_robin(tasks: Sequence[np.ndarray], limit: int, weights: Sequence[float] | None = None) -> np.ndarray:
    """The tasks take turns: each, in order, takes the best row for it that none has taken, until there are enough.

    With weights the next turn is of the task that has had the fewest for its weight, the earlier one of two (stride
    scheduling: Waldspurger and Weihl, 1995); equal weights are turns in order.

    Every task gets its share, however large its scores. With each validation example as a task of its own
    the selection is as varied as they are, where the mean over them would follow the largest and most common kind.
    A task has no need to look beyond its best `limit` rows, so this is O(T·(n + k log k)) for T tasks.

    Args:
        tasks: scores of each task, float64 [N], NaN where a row is not to be taken.
        limit: how many, if there are as many.
        weights: of each task, 0 or more, not all 0; None weighs them alike.

    Returns:
        int64 [<= limit] row numbers, in the order taken.
    """
    weights = [1.0] * len(tasks) if weights is None else weights
    # By turns had over weight, then place.
    waiting = [(0.0, task) for task, weight in enumerate(weights) if weight > 0]
    had = [0] * len(tasks)

    queues = [iter(top(task, limit).tolist()) for task in tasks]
    limit = min(limit, int(np.isfinite(tasks[0]).sum()))
    taken: dict[int, None] = {}  # keeps its order
    while len(taken) < limit:
        task = waiting[0][1]
        had[task] += 1
        heapq.heapreplace(waiting, (had[task] / weights[task], task))
        row = next(row for row in queues[task] if row not in taken)
        taken[row] = None
    return np.fromiter(taken, dtype=np.int64, count=limit)
