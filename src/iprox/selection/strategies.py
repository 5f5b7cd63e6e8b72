"""Selection strategies: in which order rows of a scores table are worth taking.

Each ranks rows best first and breaks ties by the earlier row. Asked for a longer ranking it gives the same one, further
on, so whoever takes rows may ask for as many as it turns out to need.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence

import numpy as np

from iprox.influence.aggregate import ROUNDING

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

    def next_task(_row: int | None) -> int:
        task = waiting[0][1]
        had[task] += 1
        heapq.heapreplace(waiting, (had[task] / weights[task], task))
        return task

    return _by_turns(tasks, limit, next_task)


def balanced(tasks: Sequence[np.ndarray], limit: int) -> np.ndarray:
    """The task that the rows taken so far have served least takes its best row next (BIDS, arXiv:2501.12147).

    Scores are standardised by task over the rows that may be taken. What a task has been served is the sum of its
    standardised scores over the rows taken, whoever took them: a row that helps several tasks counts for all.
    O(T·(n + k log k)).

    Args:
        tasks: as for `round_robin`.
        limit: as for `round_robin`.

    Returns:
        int64 [<= limit] row numbers, in the order taken.
    """
    scores = np.stack([standardised(task) for task in tasks])
    served = np.zeros(len(tasks))

    def next_task(row: int | None) -> int:
        if row is not None:
            served[:] += scores[:, row]
        return int(served.argmin())

    return _by_turns(tasks, limit, next_task)


def _by_turns(tasks: Sequence[np.ndarray], limit: int, next_task: Callable[[int | None], int]) -> np.ndarray:
    """Each turn's task takes its best row that is left; `next_task` is told the row taken last."""
    queues = [iter(top(task, limit).tolist()) for task in tasks]
    limit = min(limit, int(np.isfinite(tasks[0]).sum()))
    taken: dict[int, None] = {}  # keeps its order
    row = None
    while len(taken) < limit:
        queue = queues[next_task(row)]
        row = next(row for row in queue if row not in taken)
        taken[row] = None
    return np.fromiter(taken, dtype=np.int64, count=limit)


def sampled(influence: np.ndarray, limit: int, temperature: float, seed: int) -> np.ndarray:
    """Drawn without replacement, with chances ∝ exp(standardised score / temperature); in the order drawn.

    The largest scores plus independent Gumbel noise are such a draw (the Gumbel-top-k trick, arXiv:1903.06059).
    A low temperature is `top`, a high one uniform. O(n + k log k).

    Args:
        influence: float64 [N], NaN where a row is not to be taken.
        limit: how many, if there are as many.
        temperature: in standard deviations of the score, above 0.
        seed: of the noise.
    """
    noise = np.random.default_rng(seed).gumbel(size=len(influence))
    return top(standardised(influence) / temperature + noise, limit)


def standardised(scores: np.ndarray) -> np.ndarray:
    """Scores [N] less their mean, over their standard deviation; NaN stays. Equal scores all become 0, to rounding."""
    mean, deviation = np.nanmean(scores), np.nanstd(scores)
    return (scores - mean) / (deviation if deviation > ROUNDING * abs(mean) else 1.0)
