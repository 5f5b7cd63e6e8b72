"""Confidence intervals by resampling rows (the bootstrap: Efron, 1979)."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import TypeVar

import numpy as np

Key = TypeVar("Key", bound=Hashable)

RESAMPLES = 500
LEVEL = 0.95


def bootstrap_intervals(
    measure: Callable[[np.ndarray], Mapping[Key, float]], count: int, seed: int = 0
) -> dict[Key, list[float]]:
    """Percentile intervals at 95 % of some figures of a sample.

    Args:
        measure: positions in the sample [count], some more than once -> figures by name.
        count: size of the sample.
        seed: of the resampling.

    Returns:
        By name the lower and the upper bound, in a list as JSON has it; NaN for a figure that no resample has.
    """
    generator = np.random.default_rng(seed)
    drawn = [measure(generator.integers(0, count, count)) for _ in range(RESAMPLES)]
    tails = ((1 - LEVEL) / 2, (1 + LEVEL) / 2)
    bounds = {}
    for name in drawn[0]:
        values = np.array([figures[name] for figures in drawn])
        known = values[np.isfinite(values)]
        low, high = np.quantile(known, tails) if len(known) else (np.nan, np.nan)
        bounds[name] = [float(low), float(high)]
    return bounds
