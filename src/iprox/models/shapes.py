"""Shapes that repeat: oneDNN generates code for every new shape of a bfloat16 product.

That takes longer than a small product itself. The layers of a proxy all have ranks of their own, so without rounding
most products of a batch would be of a new shape.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import pad

# Ranks are rounded up to a multiple of this; it is also a tile of AMX and of tensor cores.
RANK_STEP = 16


def round_columns(matrix: Tensor) -> Tensor:
    """A matrix [m, r] with columns of zeros up to the next multiple of `RANK_STEP`; products stay as they are."""
    missing = -matrix.shape[1] % RANK_STEP
    return pad(matrix, (0, missing)) if missing else matrix
