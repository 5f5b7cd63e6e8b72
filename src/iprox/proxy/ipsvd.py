"""IPSVD, the closed form (pure maths): the best rank-r factors under K-FAC-weighted error.

Source: arXiv:2602.17835, section 4 and Prop. 4.1. A change E of a weight W [m, n] moves an example's
loss by Σ_t δ_tᵀ E h_t to first order. With the K-FAC approximation its mean square is

    ‖C_δ^{1/2} E C_h^{1/2}‖_F²,   C_h = E[h hᵀ] [n, n],  C_δ = E[δ δᵀ] [m, m].

The best E = W - AB of rank r under this norm comes from the SVD of S = C_δ^{1/2} W C_h^{1/2}.

Any square root will do: with C = R Rᵀ the norm is ‖R_δᵀ E R_h‖_F, the singular values of R_δᵀ W R_h are those of S,
and A = R_δ^{-ᵀ} U_r Σ_r^{1/2}, B = Σ_r^{1/2} V_rᵀ R_h^{-1} are the very same factors (the roots differ by rotations
that cancel). Roots, and the ridge that makes them invertible over the whole space, are in `second_moment.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from iprox.proxy.second_moment import Root
from iprox.proxy.thin_svd import thin_svd


@dataclass(frozen=True, slots=True)
class Spectrum:
    """One layer's SVD in its weighted space, from which factors of any rank are cut.

    Attributes:
        left: R_δ^{-ᵀ} U [m, k], k = min(m, n).
        singular_values: σ [k], descending; the weighted squared error of rank r is Σ_{i≥r} σ_i².
        right: Vᵀ R_h^{-1} [k, n].
    """

    left: Tensor
    singular_values: Tensor
    right: Tensor

    def tail(self, rank: int) -> float:
        """Share of the weighted squared norm lost at this rank, 0 to 1."""
        squares = self.singular_values.double().square()
        return float(squares[rank:].sum() / squares.sum().clamp(min=torch.finfo(torch.float64).tiny))

    def cut(self, rank: int) -> Spectrum:
        """The first `rank` directions with all singular values, stored as float32."""
        return Spectrum(self.left[:, :rank].float(), self.singular_values, self.right[:rank].float())

    def factors(self, rank: int) -> tuple[Tensor, Tensor]:
        """A [m, rank] and B [rank, n], balanced: each carries half of Σ, then both the same Frobenius norm.

        The paper's Σ^{1/2} on either side is only balanced in the weighted space, where the scale of C_δ (the
        loss's units, squared) is arbitrary; in the plain space it would make ∂ℓ/∂A or ∂ℓ/∂B vanish beside the
        other. One scalar, which leaves AB alone, evens that out.
        """
        root = self.singular_values[:rank].sqrt()
        A = self.left[:, :rank] * root
        B = root[:, None] * self.right[:rank]
        norm_A, norm_B = A.norm(), B.norm()
        if norm_A > 0 and norm_B > 0:  # an all-zero weight has all-zero factors
            scale = (norm_B / norm_A).sqrt()
            A, B = A * scale, B / scale
        return A, B


def weighted_svd(weight: Tensor, root_out: Root | None, root_in: Root | None) -> Spectrum:
    """SVD of a weight in the space weighted by C_δ = R_δ R_δᵀ on the left and C_h = R_h R_hᵀ on the right.

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
