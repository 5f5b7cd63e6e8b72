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
class LayerQuery:
    """All tasks' gradients of one layer, prepared for contraction.

    Attributes:
        dense: one gradient per task, where low rank would not be cheaper; else None.
        left: [m, K], the tasks' left factors concatenated; K is Σ ranks rounded up, padded with zeros.
        right: [n, K].
        ranks: rank of each task.
        biases: [T, m], or None for a layer without a bias; never truncated.
        flops: FLOPs per token: 2(m+n) per direction, not counting the padding, or 2Tmn.
        stacked: [T, m, n]; the weights of `dense` are views of it.
    """

    dense: list[LayerGradient] | None
    left: Tensor | None
    right: Tensor | None
    ranks: tuple[int, ...]
    biases: Tensor | None
    flops: float
    stacked: Tensor | None = None

    def contract(self, h: Tensor, delta: Tensor, by_token: bool = False) -> Tensor:
        """Return ⟨G(z), Ḡ_task⟩ for every example z of a batch, [B, T].

        Args:
            h: inputs [B, L, n].
            delta: output gradients [B, L, m], zero on padding.
            by_token: return the terms of the sum over tokens, [B, L, T].
        """
        if self.dense is not None:
            return torch.stack([contract(h, delta, gradient, by_token) for gradient in self.dense], dim=-1)
        assert self.left is not None
        assert self.right is not None
        dtype = accumulation_dtype(h)
        products = (delta @ self.left) * (h @ self.right)
        products = products.to(dtype) if by_token else products.sum(1, dtype=dtype)
        scores = self._by_task(products)
        if self.biases is not None:
            gradients = delta.to(dtype) if by_token else delta.sum(1, dtype=dtype)
            scores = scores + gradients @ self.biases.mT.to(dtype)
        return scores

    def inner(self, gradients: LayerGradient) -> Tensor:
        """Return ⟨G, Ḡ_task⟩ for dense gradients, weight [B, m, n] and bias [B, m], as [B, T]."""
        if self.dense is not None:
            assert self.stacked is not None
            scores = gradients.weight.flatten(1) @ self.stacked.flatten(1).mT
            biases = [each.bias for each in self.dense if each.bias is not None]
        else:
            assert self.left is not None
            assert self.right is not None
            products = ((gradients.weight @ self.right) * self.left).sum(1)
            scores = self._by_task(products)
            biases = list(self.biases) if self.biases is not None else []
        if gradients.bias is not None:
            scores = scores + gradients.bias @ torch.stack(biases).mT
        return scores

    def _by_task(self, products: Tensor) -> Tensor:
        """Sum over each task's ranks: [..., K] -> [..., T]."""
        parts = products[..., : sum(self.ranks)].split(self.ranks, dim=-1)
        return torch.stack([part.sum(-1) for part in parts], dim=-1)


def layer_query(gradients: Sequence[LayerGradient | LowRankGradient], dtype: torch.dtype) -> LayerQuery:
    """Return the query of one layer for several tasks, or for several examples of one task.

    Args:
        gradients: one gradient per column of scores, all low-rank or all dense.
        dtype: dtype of the products.
    """
    low_rank = [gradient for gradient in gradients if isinstance(gradient, LowRankGradient)]
    if not low_rank:
        whole = [gradient.to(dtype) for gradient in gradients if isinstance(gradient, LayerGradient)]
        stacked = torch.stack([gradient.weight for gradient in whole])
        views = [LayerGradient(weight, each.bias) for weight, each in zip(stacked, whole, strict=True)]
        _, m, n = stacked.shape
        return LayerQuery(views, None, None, (min(m, n),) * len(whole), None, 2.0 * stacked.numel(), stacked)
    if len(low_rank) < len(gradients):
        raise ValueError("the gradients of a layer must be all low-rank or all dense")
    ranks = tuple(gradient.left.shape[1] for gradient in low_rank)
    left = torch.cat([gradient.left for gradient in low_rank], dim=1)
    right = torch.cat([gradient.right for gradient in low_rank], dim=1)
    biases = [gradient.bias for gradient in low_rank if gradient.bias is not None]
    return LayerQuery(
        None,
        round_columns(left).to(dtype),
        round_columns(right).to(dtype),
        ranks,
        torch.stack(biases) if biases else None,
        2.0 * sum(ranks) * (len(left) + len(right)),
    )
