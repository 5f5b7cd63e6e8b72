"""The linear datamodeling score (LDS): do scores predict what training on a subset does?

Park et al. 2023 (TRAK, arXiv:2303.14186), section 4.1: train on many random subsets S; the LDS is the Spearman
correlation, over subsets, of the prediction Σ_{i∈S} I(z_i) with the outcome. Positive influence lowers the validation
loss, so the outcome is the negative loss.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from iprox.audits.agreement import bootstrap_intervals, spearman


def draw_subsets(rows: int, subsets: int, fraction: float, seed: int) -> np.ndarray:
    """Return M random subsets of N rows as booleans [M, N], each with its own random stream.

    Larger M keeps the first subsets unchanged. Each has `fraction` of the rows, at least one.
    """
    members = np.zeros((subsets, rows), bool)
    size = max(1, round(fraction * rows))
    for number in range(subsets):
        members[number, np.random.default_rng([seed, number]).permutation(rows)[:size]] = True
    return members


def datamodeling_score(scores: np.ndarray, members: np.ndarray, losses: np.ndarray) -> dict[str, Any]:
    """Return the LDS of one task's scores.

    Args:
        scores: scores [N], positive where training lowers the loss.
        members: rows of each subset, booleans [M, N].
        losses: validation loss of the task after training on each subset [M].

    Returns:
        `lds`, -1 to 1 (NaN if one side is constant), and its 95 % `interval` from resampling subsets.
    """
    predicted = members @ scores

    def lds(subsets: np.ndarray) -> dict[str, float]:
        return {"lds": spearman(predicted[subsets], -losses[subsets])}

    measured = lds(np.arange(len(losses)))["lds"]
    return {"lds": measured, "interval": bootstrap_intervals(lds, len(losses))["lds"]}
