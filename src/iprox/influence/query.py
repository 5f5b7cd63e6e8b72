"""Validation gradients in the form that candidates are contracted with, low-rank or dense (pure maths).

The mean validation gradient Ḡ [m, n] of a layer is close to low-rank. Ḡ ≈ L Rᵀ of rank k costs 2k(m+n) FLOPs per
token, Ḡ itself 2mn, and all tasks share two GEMMs, so many tasks cost little more than one. `low_rank.py` chooses the
directions to keep.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from iprox.influence.gradients import LayerGradient, LowRankGradient, contract
from iprox.models.cpu.shapes import round_columns
from iprox.models.precision import accumulation_dtype


@dataclass(frozen=True, slots=True)
class DenseQuery:
    """All tasks' gradients of one layer, where low rank would not be cheaper.

    Attributes:
        stacked: weights of all tasks [T, m, n].
        tasks: one gradient per task; its weight is a view of `stacked`.
    """

    stacked: Tensor
    tasks: list[LayerGradient]

    @property
    def flops(self) -> float:
        """FLOPs per token: 2Tmn."""
        return 2.0 * self.stacked.numel()

    def contract(self, h: Tensor, delta: Tensor, by_token: bool = False) -> Tensor:
        """Return ⟨G(z), Ḡ_task⟩ for every example z of a batch, [B, T].

        Args:
            h: inputs [B, L, n].
            delta: output gradients [B, L, m], zero on padding.
            by_token: return the terms of the sum over tokens, [B, L, T].
        """
        return torch.stack([contract(h, delta, gradient, by_token) for gradient in self.tasks], dim=-1)

    def inner(self, gradients: LayerGradient) -> Tensor:
        """Return ⟨G, Ḡ_task⟩ for dense gradients, weight [B, m, n] and bias [B, m], as [B, T]."""
        scores = gradients.weight.flatten(1) @ self.stacked.flatten(1).mT
        if gradients.bias is not None:
            biases = [each.bias for each in self.tasks if each.bias is not None]
            scores = scores + gradients.bias @ torch.stack(biases).mT
        return scores


@dataclass(frozen=True, slots=True)
class LowRankQuery:
    """All tasks' low-rank gradients of one layer.

    Attributes:
        left: [m, K], the tasks' left factors concatenated; K is Σ ranks rounded up, padded with zeros.
        right: [n, K].
        ranks: rank of each task.
        biases: [T, m], or None for a layer without a bias; never truncated.
    """

    left: Tensor
    right: Tensor
    ranks: tuple[int, ...]
    biases: Tensor | None

    @property
    def flops(self) -> float:
        """FLOPs per token: 2(m+n) per direction, not counting the padding."""
        return 2.0 * sum(self.ranks) * (len(self.left) + len(self.right))

    def contract(self, h: Tensor, delta: Tensor, by_token: bool = False) -> Tensor:
        """Return what `DenseQuery.contract` returns."""
        dtype = accumulation_dtype(h)
        products = (delta @ self.left) * (h @ self.right)
        scores = self._by_task(products.to(dtype) if by_token else products.sum(1, dtype=dtype))
        if self.biases is not None:
            gradients = delta.to(dtype) if by_token else delta.sum(1, dtype=dtype)
            scores = scores + gradients @ self.biases.mT.to(dtype)
        return scores

    def inner(self, gradients: LayerGradient) -> Tensor:
        """Return what `DenseQuery.inner` returns."""
        scores = self._by_task(((gradients.weight @ self.right) * self.left).sum(1))
        if gradients.bias is not None:
            assert self.biases is not None
            scores = scores + gradients.bias @ self.biases.mT
        return scores

    def _by_task(self, products: Tensor) -> Tensor:
        """Sum over each task's ranks: [..., K] -> [..., T]."""
        parts = products[..., : sum(self.ranks)].split(self.ranks, dim=-1)
        return torch.stack([part.sum(-1) for part in parts], dim=-1)


def layer_query(gradients: Sequence[LayerGradient | LowRankGradient], dtype: torch.dtype) -> DenseQuery | LowRankQuery:
    """Return the query of one layer for several tasks, or for several examples of one task.

    Args:
        gradients: one gradient per column of scores, all low-rank or all dense.
        dtype: dtype of the products.
    """
    low_rank = [gradient for gradient in gradients if isinstance(gradient, LowRankGradient)]
    if not low_rank:
        whole = [gradient.to(dtype) for gradient in gradients if isinstance(gradient, LayerGradient)]
        stacked = torch.stack([gradient.weight for gradient in whole])
        return DenseQuery(
            stacked, [LayerGradient(weight, each.bias) for weight, each in zip(stacked, whole, strict=True)]
        )
    if len(low_rank) < len(gradients):
        raise ValueError("the gradients of a layer must be all low-rank or all dense")
    left = torch.cat([gradient.left for gradient in low_rank], dim=1)
    right = torch.cat([gradient.right for gradient in low_rank], dim=1)
    biases = [gradient.bias for gradient in low_rank if gradient.bias is not None]
    return LowRankQuery(
        round_columns(left).to(dtype),
        round_columns(right).to(dtype),
        tuple(gradient.left.shape[1] for gradient in low_rank),
        torch.stack(biases) if biases else None,
    )
