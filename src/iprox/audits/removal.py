"""The removal test: what does a ranking's top hold that random rows of like length do not?

Train on all N rows, without the k rows that a ranking puts first, and without k random rows; compare the validation
losses. Counterfactual evaluation by removal: Ilyas et al. 2022 (datamodels, arXiv:2202.00622), Park et al. 2023 (TRAK,
arXiv:2303.14186), Bae et al. 2024 (SOURCE, arXiv:2405.12186).

A row acts in training through the sum of its supervised tokens' gradients, so leaving out long rows leaves out more
training, whatever they teach. The random rows therefore have the lengths of the top rows: as many of them come from
each tenth of the rows by supervised tokens. A ranking by length alone then gains nothing.
"""

from __future__ import annotations

import numpy as np

LENGTH_STRATA = 10


def removed_count(rows: int, fraction: float) -> int:
    """Return the number of rows that a share is, at least one."""
    return max(1, round(fraction * rows))


def trainings_without(tasks: int) -> int:
    """Return how many trainings leave rows out in a repeat: top and random ones, by proxy and target, for each task."""
    return 4 * tasks


def top_rows(scores: np.ndarray, count: int) -> np.ndarray:
    """Return which rows have the highest scores, as booleans [N]; of equal scores the earlier rows."""
    chosen = np.zeros(len(scores), bool)
    chosen[np.argsort(-scores, kind="stable")[:count]] = True
    return chosen


def length_strata(supervised: np.ndarray) -> np.ndarray:
    """Return which tenth of the rows by supervised tokens each row is in [N], 0 the shortest."""
    strata = np.empty(len(supervised), np.int64)
    for stratum, rows in enumerate(np.array_split(np.argsort(supervised, kind="stable"), LENGTH_STRATA)):
        strata[rows] = stratum
    return strata


def random_rows(top: np.ndarray, strata: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Return random rows of like length, among all rows, the top ones too.

    Args:
        top: which rows are to be matched, booleans [N].
        strata: stratum of each row [N].
        order: a random order of all rows [N]; in each stratum the first ones of it are taken.

    Returns:
        Booleans [N], with as many rows in each stratum as `top` has.
    """
    chosen = np.zeros(len(top), bool)
    for stratum in np.unique(strata[top]):
        within = order[strata[order] == stratum]
        chosen[within[: np.sum(top & (strata == stratum))]] = True
    return chosen


def removal_effect(everything: np.ndarray, without_top: np.ndarray, without_random: np.ndarray) -> dict[str, float]:
    """Compare validation losses over R ≥ 2 repeats.

    Args:
        everything: loss after training on all rows [R].
        without_top: loss after training without the top rows [R].
        without_random: loss after training without random rows [R].

    Returns:
        `top` and `random`, the mean rises of the loss against training on all rows; their `difference`, positive where
        the ranking puts rows first that matter more than others; and its `standard_error`, the standard deviation of
        the difference over repeats (with R − 1) by √R.
    """
    differences = without_top - without_random
    return {
        "top": float(np.mean(without_top - everything)),
        "random": float(np.mean(without_random - everything)),
        "difference": float(np.mean(differences)),
        "standard_error": float(np.std(differences, ddof=1) / np.sqrt(len(differences))),
    }
