"""The removal test: how much more do a ranking's top rows matter than random rows of similar length?

Train on all N rows, without the k top rows of a ranking, and without k random rows; compare the validation losses.
Counterfactual evaluation by removal: Ilyas et al. 2022 (datamodels, arXiv:2202.00622), Park et al. 2023 (TRAK,
arXiv:2303.14186), Bae et al. 2024 (SOURCE, arXiv:2405.12186).

A row acts through the sum of its supervised tokens' gradients, so removing long rows removes more training, whatever
they teach. The random rows are therefore drawn to match the top rows in length: as many come from each tenth of the
rows by supervised tokens. A ranking by length alone then gains nothing.
"""

from __future__ import annotations

import numpy as np

LENGTH_STRATA = 10


def removed_count(rows: int, fraction: float) -> int:
    """Return the number of rows to remove, at least one."""
    return max(1, round(fraction * rows))


def trainings_without(tasks: int) -> int:
    """Return the number of trainings per repeat that leave rows out: top and random, for proxy and target, per task."""
    return 4 * tasks


def top_rows(scores: np.ndarray, count: int) -> np.ndarray:
    """Return which rows have the `count` highest scores, as booleans [N]; ties go to the earlier rows."""
    chosen = np.zeros(len(scores), bool)
    chosen[np.argsort(-scores, kind="stable")[:count]] = True
    return chosen


def length_strata(supervised: np.ndarray) -> np.ndarray:
    """Return the tenth of the rows by supervised tokens that each row is in [N], 0 for the shortest."""
    strata = np.empty(len(supervised), np.int64)
    for stratum, rows in enumerate(np.array_split(np.argsort(supervised, kind="stable"), LENGTH_STRATA)):
        strata[rows] = stratum
    return strata


def random_rows(top: np.ndarray, strata: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Return random rows with the length distribution of the top rows, as booleans [N].

    Args:
        top: the rows to match, booleans [N]; they may be drawn too.
        strata: stratum of each row [N].
        order: random order of all rows [N], which decides the draw.
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
        `top` and `random`, the mean increases of the loss; their `difference`, which is positive if the top rows matter
        more; and its `standard_error` over repeats.
    """
    differences = without_top - without_random
    return {
        "top": float(np.mean(without_top - everything)),
        "random": float(np.mean(without_random - everything)),
        "difference": float(np.mean(differences)),
        "standard_error": float(np.std(differences, ddof=1) / np.sqrt(len(differences))),
    }
