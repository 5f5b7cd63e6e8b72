"""From scores of checkpoints, validation examples and tasks to one column that selection uses (pure maths on tables).

In this order: the sum over checkpoints, then over a task's validation examples, then over tasks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa

from iprox.influence.scores import example_matrix, score_matrix, scores_table, supervised_column, task_names

OverExamples = Literal["mean", "max"]

# A spread below this share of the mean is rounding of that mean: divided by it, equal scores would drown other tasks.
ROUNDING = 1e-12


@dataclass(frozen=True, slots=True)
class Aggregation:
    """How the scores of a task's validation examples become one.

    Attributes:
        examples: of a task's validation examples: `mean`, the influence on the task's validation loss, or `max`, on
            the one example that the candidate helps most (LESS, arXiv:2402.04333, has the maximum over subtasks).
        keep_examples: keep the scores by validation example beside their aggregate.
    """

    examples: OverExamples = "mean"
    keep_examples: bool = False

    @property
    def by_example(self) -> bool:
        """Whether candidates have to meet validation examples one by one; else their mean gradient does."""
        return self.examples == "max" or self.keep_examples


def over_tasks(scores: np.ndarray, spread: TaskSpread) -> np.ndarray:
    """Return the mean [N] of scores [N, tasks] divided by their spread; NaN where a score is.

    So every task counts alike, whatever the size of its gradients. The scores of a single task stay as they are.
    """
    return scores[:, 0] if scores.shape[1] == 1 else (scores / spread.deviation()).mean(axis=1)


def weighted(scores: np.ndarray, weights: Sequence[float]) -> np.ndarray:
    """The weighted mean of standardized scores: Σ_t w_t s_t/σ_t / Σ_t w_t, σ_t over the rows that have scores.

    Args:
        scores: float64 [N, tasks].
        weights: of each task, not all 0. Equal ones give what `over_tasks` does.

    Returns:
        float64 [N]; NaN where a score is.
    """
    spread, shares = TaskSpread(), np.asarray(weights, dtype=np.float64)
    spread.add(scores)
    return (scores / spread.deviation()) @ (shares / shares.sum())


def by_task(tables: Sequence[pa.Table], learning_rates: Sequence[float], how: Aggregation) -> np.ndarray:
    """TracIn over checkpoints: Σ_c η_c · scores_c of the same rows by task, float64 [N, tasks]."""
    if how.examples == "mean":
        return sum(rate * score_matrix(table) for table, rate in zip(tables, learning_rates, strict=True))  # pyright: ignore
    return np.stack([matrix.max(axis=1) for matrix in by_example(tables, learning_rates)], axis=1)


def by_example(tables: Sequence[pa.Table], learning_rates: Sequence[float]) -> list[np.ndarray]:
    """Of each task, the sum over checkpoints of scores by validation example, float64 [N, V]."""
    return [
        sum(rate * example_matrix(table, task) for table, rate in zip(tables, learning_rates, strict=True))  # pyright: ignore
        for task in task_names(tables[0])
    ]


class TaskSpread:
    """Running mean, variance (Chan's update), lowest and highest of each task's scores over a pool."""

    def __init__(self) -> None:
        self.count, self.mean, self.squares = 0, 0.0, 0.0
        self.lowest, self.highest = np.inf, -np.inf

    def add(self, scores: np.ndarray) -> None:
        """Count scores [N, tasks] in; rows without a score are left out."""
        scores = scores[np.isfinite(scores).all(axis=1)]
        if not len(scores):
            return
        count, mean = len(scores), scores.mean(axis=0)
        shift, total = mean - self.mean, self.count + count
        self.squares = self.squares + ((scores - mean) ** 2).sum(axis=0) + shift**2 * self.count * count / total
        self.mean = self.mean + shift * count / total
        self.count = total
        self.lowest = np.minimum(self.lowest, scores.min(axis=0))
        self.highest = np.maximum(self.highest, scores.max(axis=0))

    def deviation(self) -> np.ndarray:
        """Standard deviation of each task's scores; 1 for a task whose scores are all alike, to rounding."""
        deviation = np.sqrt(np.atleast_1d(self.squares) / max(self.count, 1))
        return np.where(deviation > ROUNDING * np.abs(self.mean), deviation, 1.0)


def combine(
    tables: Sequence[pa.Table],
    learning_rates: Sequence[float],
    how: Aggregation,
    spread: TaskSpread,
    metadata: Mapping | None = None,
) -> pa.Table:
    """One scores table of the scores of the same rows at several checkpoints.

    Args:
        tables: one a checkpoint, same rows in the same order.
        learning_rates: η of each checkpoint.
        how: how a task's scores by example become one.
        spread: of the scores of the whole pool.
        metadata: kept in the table.
    """
    first = tables[0]
    total = by_task(tables, learning_rates, how)
    examples = by_example(tables, learning_rates) if how.keep_examples else ()
    ids, sources, tokens = (first[name].to_pylist() for name in ("id", "source", "tokens"))
    influence = over_tasks(total, spread)
    return scores_table(
        *(ids, sources, tokens, total, task_names(first), metadata),
        influence=influence,
        examples=examples,
        supervised=supervised_column(first),
    )
