"""The refusal of scores that rank nothing: there are none, or they are all equal."""

from __future__ import annotations

import numpy as np

from iprox.errors import InputError
from iprox.settings import ALIKE

# Scores closer than this share of the largest are equal: float32, in which models run, rounds sums of many terms so.
ROUNDING = 1e-6


def all_equal(lowest: np.ndarray | float, highest: np.ndarray | float) -> np.ndarray:
    """Return whether scores between a lowest and a highest one are all equal to rounding, by column."""
    lowest, highest = np.asarray(lowest), np.asarray(highest)
    return highest - lowest <= ROUNDING * np.maximum(np.abs(lowest), np.abs(highest))


def equal_scores(scores: np.ndarray) -> bool:
    """Return whether two or more finite scores [N] are all equal to rounding."""
    known = scores[np.isfinite(scores)]
    return len(known) > 1 and bool(all_equal(known.min(), known.max()))


def no_scores(rows: int) -> InputError:
    """Return the error of a pool without any score."""
    return InputError(
        f"none of the {rows:,} rows has a score, as none has a supervised token: see whether the rows have answers, "
        "and whether the maximum length leaves any of them"
    )


def nothing_ranked(scored: int, value: float, estimator: object = None) -> InputError:
    """Return the error of scores that are all equal.

    Args:
        scored: number of rows that have a score.
        value: the score that they all have.
        estimator: what made the scores, if that is known.
    """
    said = f"the scores of all {scored:,} rows are equal ({value:.6g}), so none ranks above another"
    if estimator in ALIKE:
        return InputError(f"{said}: by {estimator} the rows are all alike; choose another influence.estimator")
    return InputError(
        f"{said}: the model that was scored has probably collapsed; look at its training losses, lower "
        "warmup.learning_rate and proxy.align.learning_rate, or remove less of it (proxy.sparsity)"
    )
