"""Find the smallest proxy whose lower confidence bound reaches a given fidelity, by sparsity or by depth."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from iprox.errors import InputError
from iprox.proxy.compress import CompressionReport, MakeProxy
from iprox.proxy.size import OutOfReachError, Size

# Smallest and largest sparsity to try, and the precision of the result.
LEAST, MOST, CLOSENESS = 0.05, 0.95, 0.02
# Fidelity whose cost is reported too.
FURTHER = 0.95


@dataclass(frozen=True, slots=True)
class Try:
    """A size that was tried.

    Attributes:
        sparsity: share of the compressible parameters removed; with the method target, share of the decoder layers
            whose gradients are left out.
        relative_flops: FLOPs of a token, as a fraction of the target's.
        fidelity: fidelity on held-out rows.
        lower: lower confidence bound of the fidelity.
    """

    sparsity: float
    relative_flops: float
    fidelity: float
    lower: float


# A proxy -> its fidelity and the lower confidence bound of that.
MeasureFidelity = Callable[[PreTrainedModel], tuple[float, float]]


def smallest_faithful(
    make: MakeProxy, asked: float, measure: MeasureFidelity, progress: Callable[[int], None] | None = None
) -> tuple[PreTrainedModel, CompressionReport, list[Try]]:
    """Bisect what is left out for the smallest proxy whose lower confidence bound reaches a fidelity.

    Fidelity falls as sparsity grows, up to noise, which the bound covers. Moments and spectra are measured once; each
    try chooses ranks, refits the norms and scores the held-out rows.

    Args:
        make: function from `proxies_of` that makes a proxy of a size.
        asked: fidelity to reach, in (0, 1).
        measure: function that measures a proxy's fidelity and its lower confidence bound.
        progress: function called with 1 after each try.

    Returns:
        The proxy, its report, and all tries in order of sparsity.

    Raises:
        InputError: not even the largest proxy reaches the fidelity.
    """
    tries: list[Try] = []

    def look(sparsity: float) -> tuple[PreTrainedModel, CompressionReport] | None:
        proxy, report = make(Size(sparsity=sparsity))
        fidelity, lower = measure(proxy)
        tries.append(Try(sparsity, report.relative_flops, fidelity, lower))
        if progress is not None:
            progress(1)
        return (proxy, report) if lower >= asked else None

    best = look(LEAST)
    if best is None:
        (found,) = tries
        raise InputError(
            f"the most faithful proxy, which leaves out {LEAST:.0%}, reaches a fidelity of {found.fidelity:.3f} "
            f"(at least {found.lower:.3f}), not {asked}: lower the fidelity, or give more held-out examples for a "
            "tighter bound"
        )
    low, high = LEAST, MOST
    while high - low > CLOSENESS:
        middle = (low + high) / 2
        try:
            found = look(middle)
        except OutOfReachError:  # less than one rank per layer
            found = None
        if found is None:
            high = middle
        else:
            low, best = middle, found
    return (*best, sorted(tries, key=lambda each: each.sparsity))


def most_tries() -> int:
    """Return the largest number of tries of a search."""
    return 1 + math.ceil(math.log2((MOST - LEAST) / CLOSENESS))


def cost_of(fidelity: float, tries: list[Try]) -> dict[str, Any] | None:
    """Return the cost of a fidelity, interpolated between the tries on either side; None if there are not two."""
    for smaller, larger in zip(tries[1:], tries, strict=False):
        if smaller.lower <= fidelity <= larger.lower:
            at = [smaller.lower, larger.lower]
            return {
                "fidelity": fidelity,
                "sparsity": float(np.interp(fidelity, at, [smaller.sparsity, larger.sparsity])),
                "relative_flops": float(np.interp(fidelity, at, [smaller.relative_flops, larger.relative_flops])),
            }
    return None
