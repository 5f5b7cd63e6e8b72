"""The linear datamodeling score (LDS): do scores predict what training on a subset does?

Park et al. 2023 (TRAK, arXiv:2303.14186), section 4.1: train on many random subsets S; the LDS is the Spearman
correlation, over subsets, of what the scores predict, Σ_{i∈S} I(z_i), with what came of it. Influence is positive
where training lowers the validation loss, so what came of it is the loss with its sign turned.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from iprox.audits.agreement import bootstrap_intervals, spearman


def draw_subsets(rows: int, subsets: int, fraction: float, seed: int) -> np.ndarray:
    """Random subsets of equal size, each with a stream of its own: the first ones stay as more are drawn.

    Args:
        rows: N to draw from.
        subsets: M.
        fraction: of the rows in each, at least one row.
        seed: of the draw.

    Returns:
        Booleans [M, N].
    """
    members = np.zeros((subsets, rows), bool)
    size = max(1, round(fraction * rows))
    for number in range(subsets):
        members[number, np.random.default_rng([seed, number]).permutation(rows)[:size]] = True
    return members


def datamodeling_score(scores: np.ndarray, members: np.ndarray, losses: np.ndarray) -> dict[str, Any]:
    """The LDS of one task's scores.

    Args:
        scores: [N], positive where training lowers the loss.
        members: which rows each subset has [M, N].
        losses: the task's validation loss after training on each subset [M].

    Returns:
        `lds`, -1 to 1, NaN where either side is constant, and its `interval` at 95 %, by resampling subsets.
    """
    predicted = members @ scores

    def lds(subsets: np.ndarray) -> dict[str, float]:
        return {"lds": spearman(predicted[subsets], -losses[subsets])}

    measured = lds(np.arange(len(losses)))["lds"]
    return {"lds": measured, "interval": bootstrap_intervals(lds, len(losses))["lds"]}
