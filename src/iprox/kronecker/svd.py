"""The thin SVD, by an eigendecomposition of the smaller Gram matrix (pure maths)."""

from __future__ import annotations

import torch
from torch import Tensor


def thin_svd(S: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return U [m, k], σ [k] descending and Vᵀ [k, n] with S = U diag(σ) Vᵀ, for S [m, n] and k = min(m, n).

    About 4mnk + 9k³ FLOPs, most of them in GEMMs; LAPACK's SVD takes about 14mnk, half of them memory-bound.
    A Gram matrix squares the condition number, so σ and U come from the images S V, not from its eigenvalues. Then
    U diag(σ) Vᵀ = S V Vᵀ is as exact as V is orthogonal; only directions with σ below about 1e-8 σ_max (float64) are
    not separated exactly, and their U is not orthogonal.

    Args:
        S: matrix in float64.
    """
    if S.shape[0] < S.shape[1]:
        V, sigma, Uh = thin_svd(S.mT)
        return Uh.mT, sigma, V.mT
    _, V = torch.linalg.eigh(S.mT @ S)
    return along(S, V)


def along(S: Tensor, V: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return S V Vᵀ as (images of unit length [m, k], their lengths [k] descending, Vᵀ [k, n]).

    V [n, k] is orthonormal. Images of length zero stay zero. 2mnk FLOPs.
    """
    images = S @ V
    lengths, order = images.norm(dim=0).sort(descending=True)
    return images[:, order] / lengths.clamp(min=torch.finfo(S.dtype).tiny), lengths, V[:, order].mT
