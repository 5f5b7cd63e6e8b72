"""From scores of checkpoints and tasks to the one column that selection uses (pure maths on tables)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import pyarrow as pa

from iprox.influence.scores import score_matrix, scores_table, task_names

Aggregate = Literal["standardised", "mean"]


def over_checkpoints(tables: Sequence[pa.Table], learning_rates: Sequence[float]) -> np.ndarray:
    """TracIn over checkpoints: Σ_c η_c · scores_c of the same rows, float64 [N, tasks]."""
    return sum(rate * score_matrix(table) for table, rate in zip(tables, learning_rates, strict=True))  # pyright: ignore


class TaskSpread:
    """Running mean and variance of each task's scores (Chan's update), to weigh tasks against each other."""

    def __init__(self) -> None:
        self.count, self.mean, self.squares = 0, 0.0, 0.0

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

    def weights(self, aggregate: Aggregate) -> np.ndarray | None:
        """Weights of the tasks in the aggregate: 1 over the standard deviation, or none (`mean`, or one task)."""
        deviation = np.sqrt(np.atleast_1d(self.squares) / max(self.count, 1))
        if aggregate == "mean" or len(deviation) == 1:
            return None
        return 1 / np.where(deviation > 0, deviation, 1.0)


def combine(
    tables: Sequence[pa.Table],
    learning_rates: Sequence[float],
    metadata: Mapping | None = None,
    weights: np.ndarray | None = None,
) -> pa.Table:
    """One scores table of the scores of the same rows at several checkpoints.

    Args:
        tables: one a checkpoint, same rows in the same order.
        learning_rates: η of each checkpoint.
        metadata: kept in the table.
        weights: of the tasks in the aggregate, from `TaskSpread`.
    """
    first = tables[0]
    total = over_checkpoints(tables, learning_rates)
    ids, sources, tokens = (first[name].to_pylist() for name in ("id", "source", "tokens"))
    return scores_table(ids, sources, tokens, total, task_names(first), metadata, weights)
