"""Validation gradients made low-rank (pure maths): which directions of which layers to keep.

A low-rank gradient L Rᵀ is cheap to contract with (`queries.py`): k directions of a layer [m, n] cost 2k(m+n) FLOPs a
token. So over all layers together directions are taken in the order of what they hold for what they cost, σ²/(m+n),
until they hold the asked share of the gradient's norm. Cut each by itself, they would cost about twice as
much for the same scores (`benchmarks/queries.py`): layers that hold little of the gradient are then kept as finely as
the others.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from iprox.influence.estimators import ModelGradient, TruncatedGradient
from iprox.influence.gradients import LayerGradient, LowRankGradient
from iprox.influence.queries import truncated

# Of each layer directions are found until what is left is this part of the share of its squared norm that may be lost;
# the one threshold then chooses among them.
UNSEEN = 0.25


@dataclass(frozen=True, slots=True)
class Directions:
    """The leading singular directions of one layer's gradient.

    Attributes:
        left: [m, k].
        right: [n, k]; the gradient is about left rightᵀ.
        squares: what each holds of the squared norm [k], descending.
        total: the whole squared norm.
    """

    left: Tensor
    right: Tensor
    squares: Tensor
    total: Tensor

    @classmethod
    def of(cls, weight: Tensor, keep: float) -> Directions:
        """Those of a gradient [m, n]: more than it needs to keep the share by itself."""
        left, right, _ = truncated(weight, math.sqrt(1 - UNSEEN * (1 - keep**2)))
        # One of the two is orthonormal, the other carries the singular values.
        squares = left.square().sum(0) * right.square().sum(0)
        return cls(left, right, squares, weight.square().sum())

    def cut(self, gradient: LayerGradient, rank: int) -> LowRankGradient:
        """The first `rank` directions in the place of the gradient."""
        lost = (self.total - self.squares[:rank].sum()).clamp(min=0)
        return LowRankGradient(self.left[:, :rank], self.right[:, :rank], gradient.bias, lost)


class QueryDirections:
    """The singular directions of each task's gradient: found once, cut as coarsely as is wanted.

    Cost: 4mnk + 9k³ a layer and task, k = min(m, n); for wide layers 10·m·n·r for each sketch of r directions, of which
    there are twice as many until they do.

    Args:
        queries: mean validation gradients by task, in float32 or better.
        finest: largest share of the Frobenius norm that a cut will keep, in (0, 1).
    """

    def __init__(self, queries: Mapping[str, ModelGradient], finest: float) -> None:
        first, *others = queries.values()
        self.queries = queries
        # Only the layers that all tasks have are met by candidates.
        self.names = [name for name in first if all(name in other for other in others)]
        self.found = {
            task: {name: Directions.of(query[name].weight, finest) for name in self.names}
            for task, query in queries.items()
        }

    def cut(self, keep: float) -> dict[str, TruncatedGradient]:
        """Each task's gradient with as cheap directions as hold a share of its norm; biases are kept whole.

        Layers where that would not be cheaper stay whole.

        Args:
            keep: share of the Frobenius norm, all layers together, that is kept at least; no more than the finest.
        """
        ranks = {
            task: dict(zip(self.names, chosen_ranks(list(each.values()), keep), strict=True))
            for task, each in self.found.items()
        }
        result: dict[str, TruncatedGradient] = {task: {} for task in self.queries}
        for name in self.names:
            m, n = next(iter(self.queries.values()))[name].weight.shape
            cheaper = sum(each[name] for each in ranks.values()) * (m + n) < len(self.queries) * m * n
            for task, query in self.queries.items():
                rank = ranks[task][name]
                result[task][name] = self.found[task][name].cut(query[name], rank) if cheaper else query[name]
        return result


def low_rank_queries(queries: Mapping[str, ModelGradient], keep: float) -> dict[str, TruncatedGradient]:
    """`QueryDirections` cut to one share."""
    return QueryDirections(queries, keep).cut(keep)


def chosen_ranks(layers: Sequence[Directions], keep: float) -> list[int]:
    """How many directions of each layer to keep so that all together hold `keep`² of the squared norm.

    No other choice among those given that costs as little holds more.
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
    # A layer's directions descend in worth, so those taken are its first ones.
    return [int(part.sum()) for part in taken.split([len(each.squares) for each in layers])]
