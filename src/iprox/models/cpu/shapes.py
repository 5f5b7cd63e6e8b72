"""Reduce the cost of new shapes on a CPU: oneDNN generates code for each, and the heap becomes fragmented."""

from __future__ import annotations

import ctypes
import sys

from torch import Tensor
from torch.nn.functional import pad

# Ranks are rounded up to a multiple of this, which is also a tile size of AMX and tensor cores.
RANK_STEP = 16
# Number of batches per call of `release_memory` in a loop: fewer cost time on a tiny model, more raise the peak.
RELEASE_EVERY = 4


def round_columns(matrix: Tensor) -> Tensor:
    """Return a matrix [m, r] padded with columns of zeros to a multiple of `RANK_STEP`; products do not change.

    oneDNN generates code for every new shape of a bfloat16 product, which takes longer than a small product. The layers
    of a proxy have different ranks, so without padding most products of a batch would have a new shape.
    """
    missing = -matrix.shape[1] % RANK_STEP
    return pad(matrix, (0, missing)) if missing else matrix


def release_memory() -> None:
    """Return the heap's free pages to the system, if the C library can (glibc).

    Batches have different shapes, so the gaps that freed tensors leave are rarely reused, and the resident memory of a
    long run on a CPU would grow to several times the memory in use.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
