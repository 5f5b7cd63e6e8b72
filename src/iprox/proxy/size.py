"""The size of a proxy, and the budget that it leaves for the layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass

from torch import nn

from iprox.errors import InputError
from iprox.models import flops
from iprox.models.layers import compressible_layers, weight_shape


class OutOfReachError(InputError):
    """A size that leaves less than one rank per layer."""


@dataclass(frozen=True, slots=True)
class Size:
    """The size of a proxy; exactly one of these is given.

    Attributes:
        sparsity: share of the compressible parameters to remove, in (0, 1).
        flops: FLOPs of a token's forward pass through linear layers and head, as a share of the target's, in (0, 1).
    """

    sparsity: float | None = None
    flops: float | None = None

    def __post_init__(self) -> None:
        given = self.as_dict()
        if len(given) != 1:
            raise InputError(f"give exactly one of sparsity and flops, not {' and '.join(given) or 'none'}")
        for name, value in given.items():
            if not 0 < value < 1:
                raise InputError(f"{name} is {value}; it must lie between 0 and 1, both excluded")

    def as_dict(self) -> dict[str, float]:
        """Return the given size by name."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    def budget(self, model: nn.Module, dense: float) -> float:
        """Return the largest cost of the compressible layers, in the unit of `Prices`.

        Args:
            model: target, with or without weights.
            dense: cost of its compressible layers.
        """
        if self.sparsity is not None:
            return (1 - self.sparsity) * dense
        assert self.flops is not None
        head = flops.head_flops(model) / 2
        return self.flops * (dense + head) - head


@dataclass(frozen=True, slots=True)
class Prices:
    """Costs of a model's compressible layers in the unit of a size, by their shapes.

    Attributes:
        by_layer: price of one parameter of each layer: 1, or for FLOPs the share of tokens that use the layer.
        dense: cost of all layers when dense.
        least: cost of all layers at rank 1.
    """

    by_layer: Mapping[str, float]
    dense: float
    least: float

    @classmethod
    def of(cls, model: nn.Module, size: Size) -> Prices:
        """Return the prices for a model, with or without weights."""
        shapes = {name: weight_shape(layer) for name, layer in compressible_layers(model).items()}
        by_layer = dict.fromkeys(shapes, 1.0) if size.flops is None else flops.layer_shares(model, shapes)
        dense = sum(m * n * by_layer[name] for name, (m, n) in shapes.items())
        least = sum((m + n) * by_layer[name] for name, (m, n) in shapes.items())
        return cls(by_layer, dense, least)

    def budget(self, model: nn.Module, size: Size) -> float:
        """Return the largest cost of the layers.

        Raises:
            OutOfReachError: rank 1 in every layer costs more; the message gives the bound.
        """
        budget = size.budget(model, self.dense)
        if self.least <= budget:
            return budget
        if size.sparsity is not None:
            bound = f"sparsity {size.sparsity} leaves less than one rank per layer; the largest is"
            raise OutOfReachError(f"{bound} {1 - self.least / self.dense:.4f}")
        head = flops.head_flops(model) / 2
        least = (self.least + head) / (self.dense + head)
        raise OutOfReachError(f"flops {size.flops} leaves less than one rank per layer; the smallest is {least:.4f}")
