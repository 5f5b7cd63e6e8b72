"""A proxy sized by the fidelity that it must reach: the smallest whose lower confidence bound does."""

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

# Least and largest sparsity that is tried, and the precision of the one found.
LEAST, MOST, CLOSENESS = 0.05, 0.95, 0.02
# The cost of this fidelity is reported too.
FURTHER = 0.95


@dataclass(frozen=True, slots=True)
class Try:
    """A size that was tried.

    Attributes:
        sparsity: share of the compressible parameters removed.
        relative_flops: FLOPs of a token's forward pass over the target's.
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
    """Bisect the sparsity for the smallest proxy whose lower confidence bound reaches a fidelity.

    Fidelity falls as sparsity grows, except for noise that the bound allows for. Moments and spectra are measured once;
    each try cuts the ranks, refits the norms and scores the held-out rows.

    Args:
        make: function that makes a proxy of a size, from `proxies_of`.
        asked: fidelity to reach, in (0, 1).
        measure: function that measures the fidelity of a proxy.
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
            f"the most faithful proxy, of sparsity {LEAST}, reaches a fidelity of {found.fidelity:.3f} (at least "
            f"{found.lower:.3f}), not {asked}: ask for less, or give more held-out examples, which narrows the bound"
        )
    low, high = LEAST, MOST
    while high - low > CLOSENESS:
        middle = (low + high) / 2
        try:
            found = look(middle)
        except OutOfReachError:  # less than one rank per layer: smaller than any proxy
            found = None
        if found is None:
            high = middle
        else:
            low, best = middle, found
    return (*best, sorted(tries, key=lambda each: each.sparsity))


def most_tries() -> int:
    """Return the largest number of sizes that a search tries."""
    return 1 + math.ceil(math.log2((MOST - LEAST) / CLOSENESS))


def cost_of(fidelity: float, tries: list[Try]) -> dict[str, Any] | None:
    """Return the cost of a fidelity, interpolated between the tries on either side; None where there are not two."""
    for smaller, larger in zip(tries[1:], tries, strict=False):
        if smaller.lower <= fidelity <= larger.lower:
            at = [smaller.lower, larger.lower]
            return {
                "fidelity": fidelity,
                "sparsity": float(np.interp(fidelity, at, [smaller.sparsity, larger.sparsity])),
                "relative_flops": float(np.interp(fidelity, at, [smaller.relative_flops, larger.relative_flops])),
            }
    return None
