"""What new shapes cost on a CPU: code that oneDNN generates for each, and holes in the heap."""

from __future__ import annotations

import ctypes
import sys

from torch import Tensor
from torch.nn.functional import pad

# Ranks are rounded up to a multiple of this; it is also a tile of AMX and of tensor cores.
RANK_STEP = 16
# Batches between two calls of `release_memory` in a loop. Calling it after every batch costs time on a tiny model, and
# the peak grows with the number between.
RELEASE_EVERY = 4


def round_columns(matrix: Tensor) -> Tensor:
    """Return a matrix [m, r] with columns of zeros up to the next multiple of `RANK_STEP`; products stay as they are.

    oneDNN generates code for every new shape of a bfloat16 product, which takes longer than a small product itself. The
    layers of a proxy all have ranks of their own, so without rounding most products of a batch would be of a new shape.
    """
    missing = -matrix.shape[1] % RANK_STEP
    return pad(matrix, (0, missing)) if missing else matrix


def release_memory() -> None:
    """Return the heap's free pages to the system, where the C library can (glibc).

    Every batch has another shape, so every tensor has another size, and the holes that freed tensors leave are seldom
    reused: without this the resident memory of a long run on a CPU grows to several times what is in use.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
