"""Rank budgets (pure maths): how many singular values each layer may keep."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class LayerSpectrum:
    """What the budget needs of one layer: its shape (m, n) and its singular values, descending [min(m, n)]."""

    shape: tuple[int, int]
    singular_values: np.ndarray

    @property
    def dense_cost(self) -> int:
        """Parameters of the dense layer, mn."""
        return self.shape[0] * self.shape[1]

    @property
    def rank_cost(self) -> int:
        """Parameters of one rank, m + n."""
        return self.shape[0] + self.shape[1]

    @property
    def largest_rank(self) -> int:
        """The last rank whose factors cost less than the dense layer; at least 1."""
        return max(1, min(min(self.shape), (self.dense_cost - 1) // self.rank_cost))


def kept_parameters(layers: Mapping[str, LayerSpectrum], ranks: Mapping[str, int | None]) -> int:
    """Parameters of the compressible layers at these ranks; None is a layer left dense."""
    total = 0
    for name, layer in layers.items():
        rank = ranks[name]
        total += layer.dense_cost if rank is None else rank * layer.rank_cost
    return total


def uniform_ranks(layers: Mapping[str, LayerSpectrum], sparsity: float) -> dict[str, int | None]:
    """Every layer loses the same share of its parameters (the paper's rule): r = (1-ρ)·mn/(m+n), at least 1."""
    return {
        name: max(1, min(layer.largest_rank, int((1 - sparsity) * layer.dense_cost / layer.rank_cost)))
        for name, layer in layers.items()
    }


def global_ranks(layers: Mapping[str, LayerSpectrum], sparsity: float) -> dict[str, int | None]:
    """Keep the singular values that save the most error per parameter, over all layers at once.

    The weighted squares σ² of every layer estimate the same thing, a squared change of the loss, so they compare
    across layers. Values are taken by σ²/(m+n), largest first, until the budget is spent. A layer that would
    pass the rank at which its factors cost as much as the dense layer stays dense: no error at that price.
    Every layer keeps rank 1 at least. O(K log K) for K singular values.

    Raises:
        ValueError: the budget is below one rank per layer.
    """
    names = list(layers)
    budget = (1 - sparsity) * sum(layer.dense_cost for layer in layers.values())
    spent = sum(layer.rank_cost for layer in layers.values())
    if spent > budget:
        raise ValueError(
            f"sparsity {sparsity} leaves less than one rank per layer; the most is {largest_sparsity(layers):.4f}"
        )
    owner = np.concatenate([np.full(len(layers[n].singular_values) - 1, i) for i, n in enumerate(names)])
    worth = np.concatenate([layers[n].singular_values[1:].astype(np.float64) ** 2 / layers[n].rank_cost for n in names])
    ranks: list[int | None] = [1] * len(names)
    # Stable, so ties go to the earlier layer and the result is the same on every machine.
    for k in np.argsort(-worth, kind="stable"):
        i = int(owner[k])
        layer, rank = layers[names[i]], ranks[i]
        if rank is None:
            continue
        grown = rank + 1
        if grown > layer.largest_rank:
            price = layer.dense_cost - rank * layer.rank_cost
            grown = None
        else:
            price = layer.rank_cost
        if spent + price <= budget:
            ranks[i] = grown
            spent += price
    return dict(zip(names, ranks, strict=True))


def largest_sparsity(layers: Mapping[str, LayerSpectrum]) -> float:
    """The sparsity at rank 1 everywhere."""
    dense = sum(layer.dense_cost for layer in layers.values())
    return 1 - sum(layer.rank_cost for layer in layers.values()) / dense


RULES = {"uniform": uniform_ranks, "global": global_ranks}
