"""The curvature of one linear layer in the eigenbases of its Kronecker factors, and its inverse: K-FAC and EK-FAC.

The curvature is the Fisher F = E[vec G(z) vec G(z)ᵀ] of a layer, G(z) an example's gradient [m, n], with the bias as
one more column of G (its input is 1). An influence function needs (F + λI)⁻¹ Ḡ, and F has (mn)² entries, so:

- K-FAC (Martens and Grosse, arXiv:1503.05671): F ≈ C_δ ⊗ C_h, inverted in the eigenbases U of C_δ and V of C_h:
  U ((Uᵀ Ḡ V) / (Λ + λ)) Vᵀ with Λ_ij = λ_δ,i · λ_h,j.
- EK-FAC (George et al., arXiv:1806.03884): the same bases with Λ_ij = E[(Uᵀ G(z) V)²_ij], the optimal diagonal.

Damping. λ is a share of the mean eigenvalue of the layer's F, which is E‖G(z)‖² / (mn) (Grosse et al.,
arXiv:2308.03296).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from iprox.kronecker.moments import (
    MEMORY,
    LayerMoments,
    MomentSettings,
    append_ones,
    collect_moments,
    layer_groups,
)
from iprox.kronecker.sample import Labels, read_sample
from iprox.kronecker.second_moment import ExactMoment, SecondMoment
from iprox.models.layers import has_bias, weight_shape
from iprox.models.loss import LossFn, causal_lm_losses


@dataclass(slots=True)
class EigenBasis:
    """A layer's curvature, diagonal in a Kronecker basis.

    Attributes:
        left: U [m, m].
        right: V [n, n], where n includes the bias.
        eigenvalues: Λ [m, n].
    """

    left: Tensor
    right: Tensor
    eigenvalues: Tensor

    def squares(self, h: Tensor, delta: Tensor) -> Tensor:
        """Return Σ_z (Uᵀ G(z) V)² [m, n] over a batch: 2T(m² + n² + mn) FLOPs, a few examples' gradients at a time.

        Args:
            h: inputs [B, L, n].
            delta: output gradients [B, L, m], zero on padding.
        """
        h, delta = h.to(self.right.dtype) @ self.right, delta.to(self.left.dtype) @ self.left
        m, n = self.eigenvalues.shape
        at_once = max(1, h.numel() // (m * n))  # no more memory than the inputs
        total = torch.zeros_like(self.eigenvalues)
        for x, d in zip(h.split(at_once), delta.split(at_once), strict=True):
            total += (d.mT @ x).square().sum(0)
        return total

    def solve(self, gradient: Tensor, damping: float) -> Tensor | None:
        """Return (F + λI)⁻¹ Ḡ [m, n], λ = damping · mean(Λ), or None if Λ is zero. 4mn(m + n) FLOPs.

        Args:
            gradient: Ḡ [m, n], where n includes the bias.
            damping: share of the mean eigenvalue, above 0.
        """
        ridge = damping * self.eigenvalues.mean()
        if ridge == 0:  # all gradients were zero
            return None
        rotated = self.left.mT @ gradient.to(self.left.dtype) @ self.right
        return self.left @ (rotated / (self.eigenvalues + ridge)) @ self.right.mT


def curvature_groups(layers: Mapping[str, nn.Module], memory: int = MEMORY) -> list[list[str]]:
    """Return the layers in groups that are measured together: two moments, their bases and the eigenvalues each."""

    def numbers(layer: nn.Module) -> int:
        m, n = weight_shape(layer)
        return 2 * (m**2 + n**2) + m * n

    return layer_groups({name: numbers(layer) for name, layer in layers.items()}, memory)


def kronecker_curvature(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    batches: Sequence[Any],
    *,
    corrected: bool = True,
    labels: Labels = "sampled",
    seed: int = 0,
    loss_fn: LossFn = causal_lm_losses,
    memory: int = MEMORY,
) -> Iterator[dict[str, EigenBasis]]:
    """Yield the K-FAC curvature of each layer, or the EK-FAC curvature if `corrected`, a group of layers at a time.

    Args:
        model: model to run; unchanged afterwards.
        layers: layers to measure, by name.
        batches: batches of the sample; read twice for EK-FAC.
        corrected: whether to measure the eigenvalues in the eigenbasis.
        labels: `sampled` from the model (true Fisher) or from the `data` (empirical Fisher).
        seed: seed for sampled labels; both passes draw the same.
        loss_fn: per-example losses, for a model that is not a language model.
        memory: bytes per group; the sample is read once, or twice, per group.

    Yields:
        The curvature by layer name, without layers whose gradients are all zero.
    """
    settings = MomentSettings(labels, balanced=False, seed=seed, kfac=True)
    for group in curvature_groups(layers, memory):
        yield _of_group(model, {name: layers[name] for name in group}, batches, corrected, settings, loss_fn)


def together(groups: Iterable[Mapping[str, EigenBasis]]) -> dict[str, EigenBasis]:
    """Return the curvature of all groups of layers, by layer name."""
    return {name: basis for group in groups for name, basis in group.items()}


def _of_group(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    batches: Sequence[Any],
    corrected: bool,
    settings: MomentSettings,
    loss_fn: LossFn,
) -> dict[str, EigenBasis]:
    """Return the curvature of layers that are measured together."""
    moments, read = collect_moments(model, layers, batches, settings, loss_fn)
    bases = {name: _eigenbasis(each) for name, each in moments.items() if each.reached}
    if corrected:
        for basis in bases.values():
            basis.eigenvalues.zero_()

        def correct(name: str, h: Tensor, delta: Tensor) -> None:
            if name in bases:
                squares = bases[name].squares(append_ones(h, delta, has_bias(layers[name])), delta)
                bases[name].eigenvalues += squares / read.examples

        read_sample(model, layers, batches, correct, loss_fn, settings)
    return {name: basis for name, basis in bases.items() if basis.eigenvalues.any()}


def _eigenbasis(moments: LayerMoments) -> EigenBasis:
    """Return the eigenbasis of a layer, with K-FAC eigenvalues."""
    (squares_out, U), (squares_in, V) = _eigh(moments.gradients), _eigh(moments.inputs)
    return EigenBasis(U, V, squares_out[:, None] * squares_in)


def _eigh(moment: SecondMoment) -> tuple[Tensor, Tensor]:
    """Return eigenvalues, clamped at 0, and eigenvectors, in the moment's dtype.

    That is float32 or better: errors of 1e-7 of the largest eigenvalue are far below the damping, and float64 would
    take twice as long (0.8 s at 1,536 on one core).
    """
    assert isinstance(moment, ExactMoment)
    values, vectors = torch.linalg.eigh(moment.matrix)
    # Contiguous, as when it is read from a file: products with another layout are rounded differently.
    return values.clamp(min=0), vectors.contiguous()
