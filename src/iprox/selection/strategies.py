"""Selection strategies: which rows of a scores table to train on."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from iprox.errors import InputError
from iprox.influence.scores import AGGREGATE, TASK_PREFIX

STRATEGIES = ("top", "round-robin")


@dataclass(frozen=True, slots=True)
class Selection:
    """The chosen rows of a scores table.

    Attributes:
        rows: int64 [K], row numbers, best first.
        strategy: how they were chosen.
        fraction: the share asked for, if a share was.
        threshold: the lowest `influence` chosen by `top`; None for a strategy that does not cut at a score.
    """

    rows: np.ndarray
    strategy: str
    fraction: float | None
    threshold: float | None

    def as_dict(self) -> dict[str, object]:
        """Plain data for JSON."""
        return {
            "strategy": self.strategy,
            "count": len(self.rows),
            "fraction": self.fraction,
            "threshold": self.threshold,
            "rows": self.rows.tolist(),
        }


def select_rows(
    scores: pa.Table, *, fraction: float | None = None, count: int | None = None, strategy: str = "top"
) -> Selection:
    """Choose rows of a scores table, best first.

    Ties go to the earlier row. A row without a score is never chosen.

    Args:
        scores: a scores table.
        fraction: share of all rows to choose, in (0, 1]; rounded to the nearest row, at least one.
        count: number of rows to choose. Exactly one of `fraction` and `count`.
        strategy: `top`: the highest `influence`; `round-robin`: the tasks take turns.

    Raises:
        InputError: not exactly one of fraction and count, out of range, unknown strategy, or more rows asked for
            than have a score.
    """
    if strategy not in STRATEGIES:
        raise InputError(f"unknown strategy {strategy!r}; known: {', '.join(STRATEGIES)}")
    if (fraction is None) == (count is None):
        raise InputError("give exactly one of fraction and count")
    if fraction is not None:
        if not 0 < fraction <= 1:
            raise InputError(f"the fraction to select is {fraction}; it must be above 0 and at most 1")
        count = max(1, round(fraction * scores.num_rows))
    assert count is not None
    if count < 1:
        raise InputError(f"the number of rows to select is {count}; it must be at least 1")
    influence = scores[AGGREGATE].to_numpy(zero_copy_only=False).astype(np.float64)
    scored = int(np.isfinite(influence).sum())
    if count > scored:
        raise InputError(f"{count} rows asked for, but only {scored} of {scores.num_rows} have a score")
    if strategy == "top":
        rows = top(influence, count)
        return Selection(rows, strategy, fraction, float(influence[rows[-1]]))
    tasks = [scores[name] for name in scores.column_names if name.startswith(TASK_PREFIX)]
    return Selection(round_robin(tasks, count), strategy, fraction, None)


def top(influence: np.ndarray, count: int) -> np.ndarray:
    """The `count` highest scores, best first, ties to the earlier row; NaN last. O(n + k log k).

    Args:
        influence: float64 [N], NaN where there is no score.
        count: at most the number of scores that are not NaN.

    Returns:
        int64 [count] row numbers.
    """
    loss = np.where(np.isnan(influence), np.inf, -influence)
    if count < len(loss):
        cut = np.partition(loss, count - 1)[count - 1]
        better = np.flatnonzero(loss < cut)
        equal = np.flatnonzero(loss == cut)[: count - len(better)]
        candidates = np.sort(np.concatenate([better, equal]))
    else:
        candidates = np.arange(len(loss))
    return candidates[np.argsort(loss[candidates], kind="stable")]


def round_robin(tasks: Sequence[pa.ChunkedArray], count: int) -> np.ndarray:
    """The tasks take turns: each, in order, takes the best row for it that none has taken, until there are enough.

    Every task gets its share, however large its scores. With each validation example as a task of its own
    the selection is as varied as they are, where the mean over them would follow the largest and most common kind.
    A task has no need to look beyond its best `count` rows, so this is O(T·(n + k log k)) for T tasks.

    Args:
        tasks: scores of each task, N rows, null where there is none.
        count: at most the number of rows with a score.

    Returns:
        int64 [count] row numbers, in the order taken.
    """
    best = [iter(top(task.to_numpy(zero_copy_only=False).astype(np.float64), count).tolist()) for task in tasks]
    taken: dict[int, None] = {}  # keeps its order
    for queue in itertools.cycle(best):
        if len(taken) == count:
            break
        row = next((row for row in queue if row not in taken), None)
        if row is not None:
            taken[row] = None
    return np.fromiter(taken, dtype=np.int64, count=count)
