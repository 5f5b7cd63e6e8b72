"""Validation gradients ready to contract with, low-rank or dense (pure maths).

The mean validation gradient Ḡ [m, n] of a layer is close to low-rank. Ḡ ≈ L Rᵀ of rank k costs 2k(m+n) FLOPs a token
where Ḡ costs 2mn, and all tasks share two GEMMs, so many tasks cost little more than one. Which directions of a mean
gradient are kept is chosen over all layers together, in `truncation.py`; single examples are cut here, as they come.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from iprox.influence.gradients import LayerGradient, LowRankGradient, contract
from iprox.models.cpu.shapes import round_columns
from iprox.models.precision import accumulation_dtype

# Up to this width a whole spectrum is cheap beside reading a pool; above it the leading directions are sketched.
WHOLE_GRAM = 1024
FIRST_SKETCH = 64


@dataclass(frozen=True, slots=True)
class LayerQuery:
    """All tasks' gradients of one layer, ready to contract with.

    Attributes:
        dense: one gradient a task, where low rank would not be cheaper; else None.
        left: [m, K], the tasks' left factors side by side; K is Σ ranks rounded up, the rest is zero.
        right: [n, K].
        ranks: of each task.
        biases: [T, m], or None for a layer without a bias; never truncated.
        flops: of one token: 2(m+n) a direction of each task, the rounding up left out, or 2Tmn.
        stacked: the weights of `dense`, which are views of it [T, m, n].
    """

    dense: list[LayerGradient] | None
    left: Tensor | None
    right: Tensor | None
    ranks: tuple[int, ...]
    biases: Tensor | None
    flops: float
    stacked: Tensor | None = None

    def contract(self, h: Tensor, delta: Tensor, by_token: bool = False) -> Tensor:
        """⟨G(z), Ḡ_task⟩ for every example z of a batch. Returns [B, T].

        Args:
            h: inputs [B, L, n].
            delta: output gradients [B, L, m], zero on padding.
            by_token: leave the sum over tokens to the caller, and return its terms [B, L, T].
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
        """⟨G, Ḡ_task⟩ of whole gradients, weight [B, m, n] and bias [B, m]. Returns [B, T]."""
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
        """Sums over each task's own ranks: [..., K] -> [..., T]."""
        parts = products[..., : sum(self.ranks)].split(self.ranks, dim=-1)
        return torch.stack([part.sum(-1) for part in parts], dim=-1)


def layer_query(gradients: Sequence[LayerGradient | LowRankGradient], dtype: torch.dtype) -> LayerQuery:
    """The query of one layer for several tasks, or for several examples of one.

    Args:
        gradients: one a column of scores: all of them low-rank, or all whole.
        dtype: of the products.
    """
    low_rank = [gradient for gradient in gradients if isinstance(gradient, LowRankGradient)]
    if not low_rank:
        whole = [gradient.to(dtype) for gradient in gradients if isinstance(gradient, LayerGradient)]
        stacked = torch.stack([gradient.weight for gradient in whole])
        views = [LayerGradient(weight, each.bias) for weight, each in zip(stacked, whole, strict=True)]
        _, m, n = stacked.shape
        return LayerQuery(views, None, None, (min(m, n),) * len(whole), None, 2.0 * stacked.numel(), stacked)
    if len(low_rank) < len(gradients):
        raise ValueError("gradients of one layer are low-rank all, or whole all")
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


def example_gradient(h: Tensor, delta: Tensor, bias: bool, keep: float) -> LowRankGradient:
    """The gradient of one example, whose rank is at most the number of its tokens, without forming it.

    With hᵀ = Q R, G = (δᵀ Rᵀ) Qᵀ, and the left factor is no longer than the example: 2Ln² + 2L²m FLOPs.

    Args:
        h: inputs [L, n].
        delta: output gradients [L, m].
        bias: whether the layer has one.
        keep: share of the Frobenius norm that a truncation keeps at least, in (0, 1]; 1 keeps it whole.
    """
    dtype = accumulation_dtype(h)
    seen = (delta != 0).any(1)
    h, delta = h[seen].to(dtype), delta[seen].to(dtype)
    if not len(h):
        h, delta = h.new_zeros(1, h.shape[1]), delta.new_zeros(1, delta.shape[1])
    whole_bias = delta.sum(0) if bias else None
    right, triangle = torch.linalg.qr(h.mT)
    left = delta.mT @ triangle.mT
    lost = left.new_zeros(())
    if keep < 1:
        left, inner, lost = truncated(left, keep)
        right = right @ inner
    return LowRankGradient(left, right, whole_bias, lost)


def truncated(weight: Tensor, keep: float) -> tuple[Tensor, Tensor, Tensor]:
    """The leading singular directions of a matrix that hold `keep` of its Frobenius norm.

    Args:
        weight: [m, n].
        keep: in (0, 1).

    Returns:
        left [m, k] and right [n, k] with left rightᵀ ≈ weight, and the squared norm that is lost. k ≥ 1.
    """
    if weight.shape[0] < weight.shape[1]:
        left, right, lost = truncated(weight.mT, keep)
        return right, left, lost
    total = weight.square().sum(dtype=torch.float64)
    size = weight.shape[1]
    sketched = size if size <= WHOLE_GRAM else FIRST_SKETCH
    while True:
        squares, basis = leading_directions(weight, sketched)
        lost = (total - squares.cumsum(0)).clamp(min=0)
        enough = (lost <= (1 - keep**2) * total).nonzero()
        if len(enough) or sketched == size:
            rank = int(enough[0]) + 1 if len(enough) else size
            right = basis[:, :rank].to(weight.dtype)
            return weight @ right, right, lost[rank - 1].to(weight.dtype)
        sketched = min(size, 2 * sketched)


def leading_directions(weight: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The leading `count` right singular directions of a matrix [m, n] in float64.

    All of them from the eigenvectors of WᵀW (2mn² FLOPs and about 9n³; half the digits of an SVD, of which there are
    plenty in float64, at a fraction of its time); a few by a range finder with two power iterations (Halko,
    Martinsson and Tropp 2011, algorithm 4.4), 10·m·n·count FLOPs, seeded, so that the same gradient always gives the
    same query.

    Returns:
        The squared norms that they hold [count], descending, and the directions [n, count].
    """
    W = weight.double()
    if count >= weight.shape[1]:
        squares, basis = torch.linalg.eigh(W.mT @ W)
        return squares.flip(0).clamp(min=0), basis.flip(1)
    noise = torch.randn(weight.shape[0], count, generator=torch.Generator().manual_seed(0), dtype=W.dtype)
    basis, _ = torch.linalg.qr(W.mT @ noise.to(weight.device))
    for _ in range(2):
        images, _ = torch.linalg.qr(W @ basis)
        basis, _ = torch.linalg.qr(W.mT @ images)
    images = W @ basis
    squares, rotation = torch.linalg.eigh(images.mT @ images)
    return squares.flip(0).clamp(min=0), basis @ rotation.flip(1)
