"""Aggregate scores over checkpoints and tasks, and refuse scores that rank nothing."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa

from iprox.errors import InputError
from iprox.scores import example_matrix, example_widths, score_matrix, scores_table, supervised_column, task_names
from iprox.settings import ESTIMATORS

# A spread below this fraction of the mean is rounding error; dividing by it would let equal scores dominate.
ROUNDING = 1e-12
# Scores that differ by less than this fraction of the largest count as equal, as sums in float32 round that much.
EQUAL = 1e-6


def over_tasks(scores: np.ndarray, spread: TaskSpread) -> np.ndarray:
    """Return the mean over tasks of scores [N, tasks] divided by their spread [N]; NaN if any score is NaN.

    Dividing by the spread gives every task the same weight, whatever the size of its gradients. With one task the
    scores are returned unchanged.
    """
    return scores[:, 0] if scores.shape[1] == 1 else (scores / spread.deviation()).mean(axis=1)


def weighted(scores: np.ndarray, weights: Sequence[float]) -> np.ndarray:
    """Return the weighted mean of standardized scores [N]: Σ_t w_t s_t/σ_t / Σ_t w_t; NaN if any score is NaN.

    Args:
        scores: float64 [N, tasks]; σ_t is the spread over the rows that have scores.
        weights: one per task, not all 0. Equal weights give the result of `over_tasks`.
    """
    spread, shares = TaskSpread(), np.asarray(weights, dtype=np.float64)
    spread.add(scores)
    return (scores / spread.deviation()) @ (shares / shares.sum())


def over_checkpoints(tables: Sequence[pa.Table], learning_rates: Sequence[float]) -> np.ndarray:
    """Return TracIn's sum over checkpoints, Σ_c η_c · scores_c, by task: float64 [N, tasks]."""
    return sum(rate * score_matrix(table) for table, rate in zip(tables, learning_rates, strict=True))  # pyright: ignore


class TaskSpread:
    """Running mean, variance (Chan's update), minimum and maximum of each task's scores over a pool."""

    def __init__(self) -> None:
        self.count, self.mean, self.squares = 0, 0.0, 0.0
        self.lowest, self.highest = np.inf, -np.inf

    def add(self, scores: np.ndarray) -> None:
        """Add scores [N, tasks]; rows with NaN are left out."""
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
        """Return the standard deviation of each task's scores; 1 for a task whose scores are equal up to rounding."""
        deviation = np.sqrt(np.atleast_1d(self.squares) / max(self.count, 1))
        return np.where(deviation > ROUNDING * np.abs(self.mean), deviation, 1.0)


def combine(
    tables: Sequence[pa.Table],
    learning_rates: Sequence[float],
    spread: TaskSpread | None = None,
    metadata: Mapping | None = None,
) -> pa.Table:
    """Return one scores table from those of several checkpoints.

    Args:
        tables: one per checkpoint, with the same rows in the same order.
        learning_rates: η of each checkpoint.
        spread: spread of the scores over the whole pool; None if these rows are the whole pool.
        metadata: metadata of the table.
    """
    first = tables[0]
    total = over_checkpoints(tables, learning_rates)
    if spread is None:
        spread = TaskSpread()
        spread.add(total)
    rated = list(zip(tables, learning_rates, strict=True))
    examples = [sum(rate * example_matrix(table, task) for table, rate in rated) for task in example_widths(first)]
    ids, sources, tokens = (first[name].to_pylist() for name in ("id", "source", "tokens"))
    return scores_table(
        *(ids, sources, tokens, total, task_names(first), metadata),
        influence=over_tasks(total, spread),
        examples=examples,  # pyright: ignore[reportArgumentType]
        supervised=supervised_column(first),
    )


def all_equal(lowest: np.ndarray | float, highest: np.ndarray | float) -> np.ndarray:
    """Return, by column, whether scores between `lowest` and `highest` are all equal up to rounding."""
    lowest, highest = np.asarray(lowest), np.asarray(highest)
    return highest - lowest <= EQUAL * np.maximum(np.abs(lowest), np.abs(highest))


def equal_scores(scores: np.ndarray) -> bool:
    """Return whether two or more finite scores [N] are all equal up to rounding."""
    known = scores[np.isfinite(scores)]
    return len(known) > 1 and bool(all_equal(known.min(), known.max()))


def refuse_unranked(spread: TaskSpread, rows: int, estimator: object = None, lengths: TaskSpread | None = None) -> None:
    """Refuse scores that do not rank a pool; warn where the rows themselves seem to be equal.

    Args:
        spread: spread of the scores.
        rows: number of rows that were scored.
        estimator: name of the estimator.
        lengths: spread of the rows' tokens and supervised tokens.

    Raises:
        InputError: no row has a score, or all scores are equal.
    """
    if not spread.count:
        raise no_scores(rows)
    if spread.count > 1 and all_equal(spread.lowest, spread.highest).all():
        error = nothing_ranked(spread.count, float(np.max(spread.highest)), estimator)
        traits = ESTIMATORS.get(str(estimator))
        alike = lengths is not None and bool(all_equal(lengths.lowest, lengths.highest).all())
        if not (alike and traits is not None and traits.by_task and np.any(spread.highest)):
            raise error
        warnings.warn(f"{str(error).partition(':')[0]}: the rows seem to be copies of one row", stacklevel=2)


def no_scores(rows: int) -> InputError:
    """Return the error for a pool without any score."""
    return InputError(
        f"none of the {rows:,} rows has a score, because none has a supervised token; check that the rows have "
        "answers, and that the maximum length leaves some of them"
    )


def nothing_ranked(scored: int, value: float, estimator: object = None) -> InputError:
    """Return the error for `scored` scores that all equal `value`."""
    said = f"the scores of all {scored:,} rows are equal ({value:.6g}), so none ranks above another"
    traits = ESTIMATORS.get(str(estimator))
    if traits is not None and not traits.by_task:
        return InputError(f"{said}: {estimator} does not distinguish these rows; choose another influence.estimator")
    return InputError(
        f"{said}: the model that was scored has probably collapsed; look at its training losses, lower "
        "warmup.learning_rate and proxy.align.learning_rate, or remove less of it (proxy.sparsity)"
    )
