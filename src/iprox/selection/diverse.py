"""Diverse selection: good rows whose gradients point in different ways.

A determinantal point process with kernel L = diag(q) S diag(q), S the cosine of two rows' gradients and q² = exp of the
standardised score, prefers sets with a large determinant: rows that are good and unlike each other. The greedy
choice of the largest determinant (Chen, Zhang and Zhou, NeurIPS 2018, arXiv:1709.05135) adds the row with the largest
q² times the share of its gradient that the rows taken do not span, kept up to date by one row of a Cholesky factor.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from iprox.selection.strategies import standardised, top

# Candidates for each row taken: the choice is among the best by score, so no diversity is bought with a useless row.
AMONG = 4
# Rows taken of one block of candidates: the choice costs blocks · picks² · AMONG · (D + picks / 2).
PICKS = 512

# Row numbers [M] -> their gradient features [M, D].
Features = Callable[[np.ndarray], np.ndarray]


def diverse(influence: np.ndarray, limit: int, features: Features) -> np.ndarray:
    """Choose among the best `AMONG` × `limit` rows.

    Candidates are dealt to blocks by rank, so each block holds good and less good rows alike and gives the same
    share; so the cost is linear in `limit`, and memory is one block's features.

    Args:
        influence: float64 [N], NaN where a row is not to be taken.
        limit: how many, if there are as many.
        features: gradient features, such as those of `iprox index`.

    Returns:
        int64 [<= limit] row numbers, best score first.
    """
    candidates = top(influence, AMONG * limit)
    limit = min(limit, len(candidates))
    quality = np.zeros(len(influence))
    quality[candidates] = standardised(influence[candidates])
    blocks = -(-limit // PICKS)
    chosen = [
        block[greedy_determinant(features(block), quality[block], share)]
        for block, share in (
            (candidates[number::blocks], limit // blocks + (number < limit % blocks)) for number in range(blocks)
        )
    ]
    rows = np.sort(np.concatenate([*chosen, np.empty(0, np.int64)]).astype(np.int64))
    return rows[np.argsort(-influence[rows], kind="stable")]


def greedy_determinant(features: np.ndarray, log_quality: np.ndarray, count: int) -> np.ndarray:
    """The greedy maximum of det L over sets of `count` rows, as positions in the order taken.

    Once the rows taken span all of what is left, the best by quality follow.

    Args:
        features: [M, D]; a row of zeros is like no other.
        log_quality: log q² [M].
        count: at most M.
    """
    norms = np.linalg.norm(features, axis=1, keepdims=True)
    unit = (features / np.where(norms > 0, norms, 1)).astype(np.float64)
    factor = np.zeros((count, len(unit)))  # rows of the Cholesky factor of S, for all candidates
    left = np.ones(len(unit))  # squared share of each gradient that the rows taken do not span
    open_rows = np.ones(len(unit), bool)
    taken = np.empty(count, np.int64)
    for step in range(count):
        gain = np.where(left > 1e-9, np.log(np.maximum(left, 1e-9)), -1e9) + log_quality
        best = int(np.where(open_rows, gain, -np.inf).argmax())
        taken[step] = best
        open_rows[best] = False
        if left[best] > 1e-9:
            row = unit @ unit[best] - factor[:step].T @ factor[:step, best]
            factor[step] = row / np.sqrt(left[best])
            left = np.maximum(left - factor[step] ** 2, 0)
    return taken
