"""Rank correlation (Spearman, 1904)."""

from __future__ import annotations

import numpy as np


def spearman(x: np.ndarray, y: np.ndarray) -> float:
    """Pearson's correlation of the ranks of two samples [N], equal values at their mean rank; NaN if one is constant.

    What scipy's `spearmanr` gives, without its checks: intervals ask for it a thousand times of a few hundred rows,
    for which those take longer than the figure.
    """
    from scipy import stats

    with np.errstate(invalid="ignore", divide="ignore"):
        return float(np.corrcoef(stats.rankdata([x, y], axis=1))[0, 1])
