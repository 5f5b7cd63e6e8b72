"""IPSVD (pure maths): the closed form of the best rank-r factors under a K-FAC-weighted error.

Source: arXiv:2602.17835, section 4 and Prop. 4.1. A change E of a weight W [m, n] changes an example's loss by
Σ_t δ_tᵀ E h_t to first order. Under the K-FAC approximation its mean square is

    ‖C_δ^{1/2} E C_h^{1/2}‖_F²,   C_h = E[h hᵀ] [n, n],  C_δ = E[δ δᵀ] [m, m].

The best E = W - up·down of rank r under this norm comes from the SVD of S = C_δ^{1/2} W C_h^{1/2}.

Any square root gives the same factors: with C = R Rᵀ the norm is ‖R_δᵀ E R_h‖_F, the singular values of R_δᵀ W R_h are
those of S, and up = R_δ^{-ᵀ} U_r Σ_r^{1/2}, down = Σ_r^{1/2} V_rᵀ R_h^{-1} (roots differ by rotations, which cancel).
`iprox.kronecker` has the roots, and the ridge that makes them invertible.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from iprox.kronecker.roots import Root
from iprox.kronecker.svd import thin_svd

# Share of the mean eigenvalue that is added to every direction of a moment; `auto` is `SecondMoment.shrinkage`.
Ridge = float | Literal["auto"]


@dataclass(frozen=True, slots=True)
class Spectrum:
    """One layer's SVD in its weighted space, from which factors of any rank are made.

    Attributes:
        left: R_δ^{-ᵀ} U [m, k], k = min(m, n).
        singular_values: σ [k], descending; the weighted squared error of rank r is Σ_{i≥r} σ_i².
        right: Vᵀ R_h^{-1} [k, n].
        ridge_in: ridge of the input moment, as a share of its mean eigenvalue; None without a moment.
        ridge_out: ridge of the gradient moment, likewise.
    """

    left: Tensor
    singular_values: Tensor
    right: Tensor
    ridge_in: float | None = None
    ridge_out: float | None = None

    def tail(self, rank: int) -> float:
        """Return the share of the weighted squared norm that is lost at this rank, from 0 to 1."""
        squares = self.singular_values.double().square()
        return float(squares[rank:].sum() / squares.sum().clamp(min=torch.finfo(torch.float64).tiny))

    @property
    def comparable(self) -> Tensor:
        """The singular values on the same scale for all layers, whatever their ridges.

        A ridge λ inflates the trace of a moment by 1 + λ. Without this correction, layers whose moments come from few
        or unequal examples, which get the largest ridges, would seem most important.
        """
        inflation = (1 + (self.ridge_in or 0.0)) * (1 + (self.ridge_out or 0.0))
        return self.singular_values / inflation**0.5

    def cut(self, rank: int) -> Spectrum:
        """Return the first `rank` directions with all singular values, stored as float32."""
        return replace(self, left=self.left[:, :rank].float(), right=self.right[:rank].float())

    def factors(self, rank: int) -> tuple[Tensor, Tensor]:
        """Return up [m, rank] and down [rank, n], each with Σ^{1/2}, and scaled to the same Frobenius norm.

        The paper's Σ^{1/2} on either side is balanced only in the weighted space, where the scale of C_δ (the squared
        units of the loss) is arbitrary; in the plain space ∂ℓ/∂up or ∂ℓ/∂down would vanish next to the other. One
        scalar corrects this and leaves up·down unchanged.
        """
        root = self.singular_values[:rank].sqrt()
        up = self.left[:, :rank] * root
        down = root[:, None] * self.right[:rank]
        norm_up, norm_down = up.norm(), down.norm()
        if norm_up > 0 and norm_down > 0:  # an all-zero weight has all-zero factors
            scale = (norm_down / norm_up).sqrt()
            up, down = up * scale, down / scale
        return up, down


def weighted_svd(weight: Tensor, root_out: Root | None, root_in: Root | None) -> Spectrum:
    """Return the SVD of a weight in the space weighted by C_δ = R_δ R_δᵀ on the left and C_h = R_h R_hᵀ on the right.

    Args:
        weight: W [m, n], in float64.
        root_out: R_δ, or None for the identity.
        root_in: R_h, or None for the identity.
    """
    S = weight
    if root_out is not None:
        S = root_out.weigh(S)
    if root_in is not None:
        S = root_in.weigh(S.mT).mT
    U, sigma, Vh = thin_svd(S)
    if root_out is not None:
        U = root_out.unweigh(U)
    if root_in is not None:
        Vh = root_in.unweigh(Vh.mT).mT
    return Spectrum(U, sigma, Vh)
