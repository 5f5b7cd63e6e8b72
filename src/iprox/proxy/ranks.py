"""Choose the ranks of the layers under a budget (pure maths).

A budget is a cost: parameters, or FLOPs per token (twice the parameters that a token uses). The two differ for experts,
of which a token uses only some; `LayerCost.price` accounts for this.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class LayerCost:
    """The cost of one layer and of its ranks.

    Attributes:
        shape: (m, n).
        price: cost of one parameter.
    """

    shape: tuple[int, int]
    price: float

    @property
    def dense_cost(self) -> float:
        """Cost of the dense layer: mn parameters."""
        return self.shape[0] * self.shape[1] * self.price

    @property
    def rank_cost(self) -> float:
        """Cost of one rank: m + n parameters."""
        return (self.shape[0] + self.shape[1]) * self.price

    @property
    def largest_rank(self) -> int:
        """Largest rank whose factors cost less than the dense layer; at least 1."""
        m, n = self.shape
        return max(1, min(m, n, (m * n - 1) // (m + n)))


@dataclass(frozen=True, slots=True)
class ErrorCurve(LayerCost):
    """The error of one layer by rank, and the cost of its ranks.

    Attributes:
        singular_values: σ [min(m, n)], descending; keeping a direction saves an error of σ².
    """

    singular_values: np.ndarray


def total_cost(layers: Mapping[str, LayerCost]) -> float:
    """Return the cost of all layers when dense."""
    return sum(layer.dense_cost for layer in layers.values())


def least_cost(layers: Mapping[str, LayerCost]) -> float:
    """Return the cost of all layers at rank 1."""
    return sum(layer.rank_cost for layer in layers.values())


def kept_cost(layers: Mapping[str, LayerCost], ranks: Mapping[str, int | None]) -> float:
    """Return the cost of the layers at these ranks; None stands for a dense layer."""
    return sum(
        layer.dense_cost if (rank := ranks[name]) is None else rank * layer.rank_cost for name, layer in layers.items()
    )


def uniform_ranks(layers: Mapping[str, LayerCost], budget: float) -> dict[str, int]:
    """Return ranks at which every layer keeps the same share of its parameters: r = share · mn/(m+n), at least 1.

    This is the paper's rule. Layers whose share is less than one rank get rank 1, and the others share the rest. Ranks
    are rounded down, and the rest of the budget goes to the layers that lost most by rounding. The result costs at most
    `budget`, if that is at least `least_cost`, and falls short of it by less than one rank of the largest layer, unless
    every layer is at its largest rank.
    """
    exact: dict[str, float] = {}
    sharing = dict(layers)
    while sharing:
        rest = budget - sum(layer.rank_cost for name, layer in layers.items() if name not in sharing)
        share = rest / total_cost(sharing)
        exact = {name: share * layer.dense_cost / layer.rank_cost for name, layer in layers.items()}
        floored = [name for name in sharing if exact[name] < 1]
        if not floored:
            break
        for name in floored:
            del sharing[name]
    ranks = {name: max(1, min(layer.largest_rank, int(exact[name]))) for name, layer in layers.items()}
    left = budget - kept_cost(layers, ranks)
    for name in sorted(layers, key=lambda name: ranks[name] - exact[name]):
        layer = layers[name]
        if ranks[name] < layer.largest_rank and layer.rank_cost <= left:
            ranks[name] += 1
            left -= layer.rank_cost
    return ranks


def global_ranks(layers: Mapping[str, ErrorCurve], budget: float) -> dict[str, int | None]:
    """Return ranks that spend the budget where it saves the most error per cost, over all layers at once.

    The weighted squares σ² of all layers estimate the same quantity, a squared change of the loss, so they are
    comparable. A layer's error falls by σ²_{r+1} with each rank, and to zero at the cost of the dense layer, which a
    square layer reaches at half its ranks. Steps along the lower convex hull of that curve (single ranks, then one
    jump to dense) are taken by error saved per cost, largest first; a step that does not fit is skipped in favor of
    smaller ones. Every layer keeps at least rank 1. O(K log K) for K singular values.
    """
    names = list(layers)
    ranks: list[int | None] = [1] * len(names)
    spent = least_cost(layers)
    hulls = [_hull(layers[name]) for name in names]
    for worth in (_hull_worth, _rank_worth):
        steps = [(-value, i, grown) for i, name in enumerate(names) for value, grown in worth(layers[name], hulls[i])]
        # Ties go to the earlier layer, so that the result is the same on every machine.
        for _, i, grown in sorted(steps, key=lambda step: step[:2]):
            layer, rank = layers[names[i]], ranks[i]
            if rank is None:
                continue
            price = layer.dense_cost - rank * layer.rank_cost if grown is None else layer.rank_cost
            if spent + price <= budget and (grown is None or grown == rank + 1):
                ranks[i] = grown
                spent += price
    return dict(zip(names, ranks, strict=True))


def _hull(layer: ErrorCurve) -> int:
    """Return the rank from which the jump to dense saves more error per cost than one more rank."""
    squares = layer.singular_values.astype(np.float64) ** 2
    ranks = np.arange(1, layer.largest_rank + 1)
    tails = np.cumsum(squares[::-1])[::-1]
    tails = np.append(tails, 0.0)[ranks]
    gains = np.append(squares, 0.0)[ranks]
    gains[-1] = 0.0  # past the largest rank there is only the dense layer
    jump = tails / (layer.dense_cost - ranks * layer.rank_cost)
    return int(ranks[np.argmax(jump >= gains / layer.rank_cost)])


def _hull_worth(layer: ErrorCurve, hull: int) -> list[tuple[float, int | None]]:
    """Return the steps along the hull: (error saved per cost, rank reached or None for dense)."""
    squares = layer.singular_values.astype(np.float64) ** 2
    steps: list[tuple[float, int | None]] = [(squares[r] / layer.rank_cost, r + 1) for r in range(1, hull)]
    return [*steps, (squares[hull:].sum() / (layer.dense_cost - hull * layer.rank_cost), None)]


def _rank_worth(layer: ErrorCurve, hull: int) -> list[tuple[float, int | None]]:
    """Return the single ranks past the hull, for a layer whose jump to dense did not fit."""
    squares = layer.singular_values.astype(np.float64) ** 2
    return [(squares[r] / layer.rank_cost, r + 1) for r in range(hull, layer.largest_rank)]


RULES = {"uniform": uniform_ranks, "global": global_ranks}
