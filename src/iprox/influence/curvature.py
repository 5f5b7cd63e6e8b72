"""Curvature of one linear layer and its inverse (pure maths): K-FAC, EK-FAC and DataInf.

The curvature is the Fisher F = E[vec G(z) vec G(z)ᵀ] of a layer, G(z) an example's gradient [m, n], with the bias as
one more column of G (its input is 1). An influence function wants (F + λI)⁻¹ Ḡ, and F has (mn)² entries, so:

- K-FAC (Martens and Grosse, arXiv:1503.05671): F ≈ C_δ ⊗ C_h, inverted in the eigenbases U of C_δ and V of C_h:
  U ((Uᵀ Ḡ V) / (Λ + λ)) Vᵀ with Λ_ij = λ_δ,i · λ_h,j.
- EK-FAC (George et al., arXiv:1806.03884): the same bases, Λ_ij = E[(Uᵀ G(z) V)²_ij], the best diagonal there is.
- DataInf (Kwon et al., arXiv:2310.00902): the mean of inverses for the inverse of the mean, each example's rank one.

Damping. λ is a share of the mean eigenvalue of the layer's F, which is E‖G(z)‖² / (mn): one rule for all three
(DataInf's own; for EK-FAC, Grosse et al., arXiv:2308.03296).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from iprox.influence.gradients import LayerGradient
from iprox.models.precision import accumulation_dtype


@dataclass(slots=True)
class KroneckerMoments:
    """Running second moments of a layer's inputs and output gradients.

    Attributes:
        inputs: Σ_t h hᵀ [n, n], with the bias's 1 as the last entry of h.
        gradients: Σ_t δ δᵀ [m, m].
        tokens: tokens counted in.
    """

    inputs: Tensor | float = 0.0
    gradients: Tensor | float = 0.0
    tokens: int = 0

    def add(self, h: Tensor, delta: Tensor) -> None:
        """Count a batch in: 2T(m² + n²) FLOPs for T tokens.

        Args:
            h: inputs [B, L, n], zero where there is no token.
            delta: output gradients [B, L, m], zero there too.
        """
        dtype = accumulation_dtype(h)
        h, delta = h.flatten(0, 1).to(dtype), delta.flatten(0, 1).to(dtype)
        self.inputs += h.mT @ h
        self.gradients += delta.mT @ delta
        self.tokens += int((h != 0).any(-1).sum())

    def basis(self, examples: int) -> EigenBasis:
        """K-FAC: for independent tokens F is the expected number of them times E[δ δᵀ] ⊗ E[h hᵀ].

        Args:
            examples: how many the moments are of.
        """
        squares_in, V = _eigh(self.inputs / max(self.tokens, 1))
        squares_out, U = _eigh(self.gradients / examples)
        return EigenBasis(U, V, squares_out[:, None] * squares_in)


@dataclass(slots=True)
class EigenBasis:
    """A layer's curvature, diagonal in a Kronecker basis.

    Attributes:
        left: U [m, m].
        right: V [n, n], n counting the bias.
        eigenvalues: Λ [m, n].
    """

    left: Tensor
    right: Tensor
    eigenvalues: Tensor

    def squares(self, h: Tensor, delta: Tensor) -> Tensor:
        """Σ_z (Uᵀ G(z) V)² [m, n] over a batch: 2T(m² + n² + mn) FLOPs, a few examples' gradients at a time.

        Args:
            h: inputs [B, L, n].
            delta: output gradients [B, L, m], zero on padding.
        """
        h, delta = h.to(self.right.dtype) @ self.right, delta.to(self.left.dtype) @ self.left
        m, n = self.eigenvalues.shape
        at_once = max(1, h.numel() // (m * n))  # no more numbers than the inputs themselves
        total = torch.zeros_like(self.eigenvalues)
        for x, d in zip(h.split(at_once), delta.split(at_once), strict=True):
            total += (d.mT @ x).square().sum(0)
        return total

    def solve(self, gradient: LayerGradient, damping: float) -> LayerGradient:
        """(F + λI)⁻¹ Ḡ, λ = damping · mean(Λ).

        Args:
            gradient: Ḡ.
            damping: as a share of the mean eigenvalue, above 0.
        """
        G = as_matrix(gradient).to(self.left.dtype)
        ridge = damping * self.eigenvalues.mean()
        if ridge == 0:  # no example moved the layer: there is no curvature, nor a scale to damp by
            return gradient
        solved = self.left @ ((self.left.mT @ G @ self.right) / (self.eigenvalues + ridge)) @ self.right.mT
        return as_gradient(solved.to(gradient.weight.dtype), gradient.bias is not None)


def with_ones(h: Tensor, bias: bool) -> Tensor:
    """Inputs [B, L, n] with the bias's own input, 1 where there is a token, as one more column, if there is a bias."""
    return torch.cat([h, (h != 0).any(-1, keepdim=True).to(h.dtype)], dim=-1) if bias else h


def as_matrix(gradient: LayerGradient) -> Tensor:
    """A layer's gradient with that of the bias as its last column."""
    if gradient.bias is None:
        return gradient.weight
    return torch.cat([gradient.weight, gradient.bias[:, None]], dim=1)


def as_gradient(matrix: Tensor, bias: bool) -> LayerGradient:
    """The inverse of `as_matrix`."""
    return LayerGradient(matrix[:, :-1], matrix[:, -1]) if bias else LayerGradient(matrix, None)


def datainf_weights(products: Tensor, squared_norms: Tensor, ridge: float) -> Tensor:
    """How much of each example's gradient DataInf takes out of Ḡ: ⟨G(z), Ḡ⟩ / (λ + ‖G(z)‖²), any shapes that agree.

    By Sherman and Morrison (λI + g gᵀ)⁻¹ v = (v - g · ⟨g, v⟩ / (λ + ‖g‖²)) / λ; DataInf is its mean over examples.
    """
    return products / (ridge + squared_norms)


def _eigh(moment: Tensor | float) -> tuple[Tensor, Tensor]:
    """Return eigenvalues, none below 0, and eigenvectors, in the moment's own dtype.

    That is float32 or better: errors of 1e-7 of the largest eigenvalue are nothing next to the damping, and float64
    would take twice the time (0.8 s at 1,536 on one core).
    """
    assert isinstance(moment, Tensor)
    values, vectors = torch.linalg.eigh(moment)
    return values.clamp(min=0), vectors
