"""Low-rank validation gradients (pure maths): which singular directions of which layers to keep.

Contracting with k directions of a layer [m, n] costs 2k(m+n) FLOPs per token (`query.py`). The directions of all
layers are therefore ranked together by squared norm per cost, σ²/(m+n), and kept until they hold the requested share
of the gradient's norm. Truncating each layer by itself would cost about twice as much for the same scores
(`benchmarks/queries.py`), because layers with a small share of the gradient would be kept just as precisely.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from iprox.influence.gradients import LayerGradient, LowRankGradient, ModelGradient, TruncatedGradient

# Directions of a layer are computed until the rest holds this fraction of the squared norm that may be lost; one
# threshold for all layers then chooses among them.
UNSEEN = 0.25

# Up to this width a full spectrum is cheap next to scoring a pool; above it the leading directions are sketched.
WHOLE_GRAM = 1024
FIRST_SKETCH = 64


@dataclass(frozen=True, slots=True)
class Directions:
    """The leading singular directions of one layer's gradient.

    Attributes:
        left: [m, k].
        right: [n, k]; left rightᵀ approximates the gradient.
        squares: squared norm of each direction [k], descending.
        total: squared norm of the whole gradient.
    """

    left: Tensor
    right: Tensor
    squares: Tensor
    total: Tensor

    @classmethod
    def of(cls, weight: Tensor, keep: float) -> Directions:
        """Return the directions of a gradient [m, n], more than `keep` requires of the layer by itself."""
        left, right, _ = truncated(weight, math.sqrt(1 - UNSEEN * (1 - keep**2)))
        # One factor is orthonormal; the other includes the singular values.
        squares = left.square().sum(0) * right.square().sum(0)
        return cls(left, right, squares, weight.square().sum())

    def cut(self, gradient: LayerGradient, rank: int) -> LowRankGradient:
        """Return the gradient truncated to its first `rank` directions."""
        lost = (self.total - self.squares[:rank].sum()).clamp(min=0)
        return LowRankGradient(self.left[:, :rank], self.right[:, :rank], gradient.bias, lost)


def low_rank_queries(queries: Mapping[str, ModelGradient], keep: float) -> dict[str, TruncatedGradient]:
    """Return each task's gradient in the cheapest low-rank form that keeps a share of its norm; biases stay exact.

    Layers stay dense where low rank would not be cheaper. Cost: 4mnk + 9k³ per layer and task, k = min(m, n); for wide
    layers 10·m·n·r per sketch of r directions, doubling r until they are enough.

    Args:
        queries: mean validation gradients by task, in float32 or better.
        keep: smallest share of the Frobenius norm over all layers to keep, in (0, 1).
    """
    first, *others = queries.values()
    names = [name for name in first if all(name in other for other in others)]  # layers that all tasks have
    found = {task: [Directions.of(query[name].weight, keep) for name in names] for task, query in queries.items()}
    ranks = {task: chosen_ranks(each, keep) for task, each in found.items()}
    result: dict[str, TruncatedGradient] = {task: {} for task in queries}
    for place, name in enumerate(names):
        m, n = first[name].weight.shape
        cheaper = sum(each[place] for each in ranks.values()) * (m + n) < len(queries) * m * n
        for task, query in queries.items():
            cut = found[task][place].cut(query[name], ranks[task][place]) if cheaper else query[name]
            result[task][name] = cut
    return result


def chosen_ranks(layers: Sequence[Directions], keep: float) -> list[int]:
    """Return the number of directions to keep per layer so that together they hold `keep`² of the squared norm.

    No other choice of these directions holds more at the same cost.
    """
    squares = torch.cat([each.squares for each in layers])
    worth = torch.cat([each.squares / (len(each.left) + len(each.right)) for each in layers])
    order = worth.argsort(descending=True, stable=True)
    total = torch.stack([each.total for each in layers]).sum(dtype=torch.float64)
    held = squares[order].cumsum(0, dtype=torch.float64)
    enough = (held >= keep**2 * total).nonzero()
    count = int(enough[0]) + 1 if len(enough) else len(order)
    taken = torch.zeros_like(order, dtype=torch.bool)
    taken[order[:count]] = bool(total > 0)
    # A layer's directions descend in worth, so the ones kept are its first.
    return [int(part.sum()) for part in taken.split([len(each.squares) for each in layers])]


def truncated(weight: Tensor, keep: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return the leading singular directions of a matrix that hold `keep` of its Frobenius norm.

    Args:
        weight: [m, n].
        keep: in (0, 1).

    Returns:
        left [m, k] and right [n, k] with left rightᵀ ≈ weight and k ≥ 1, and the squared norm that is lost.
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
    """Return the leading `count` right singular directions of a matrix [m, n] in float64.

    All of them come from the eigenvectors of WᵀW (2mn² FLOPs and about 9n³; half the digits of an SVD, which float64
    can spare, in a fraction of the time). A few come from a range finder with two power iterations (Halko, Martinsson
    and Tropp 2011, algorithm 4.4), 10·m·n·count FLOPs, seeded so that the same gradient gives the same query.

    Returns:
        Their squared singular values [count], descending, and the directions [n, count].
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
