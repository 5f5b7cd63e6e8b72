"""The size of a proxy, and the budget that it leaves for the layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass

from torch import nn

from iprox.errors import InputError
from iprox.models import flops
from iprox.models.layers import CONVOLUTIONS, compressible_layers, weight_shape
from iprox.proxy.ranks import LayerCost, least_cost, total_cost


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
        """Return the largest cost of the compressible layers, in the unit of `layer_costs`.

        Args:
            model: target, with or without weights.
            dense: cost of its compressible layers.
        """
        if self.sparsity is not None:
            return (1 - self.sparsity) * dense
        assert self.flops is not None
        head = flops.head_flops(model) / 2
        return self.flops * (dense + head) - head


def layer_costs(model: nn.Module, size: Size) -> dict[str, LayerCost]:
    """Return the costs of a model's compressible layers in the unit of a size; the model may be without weights.

    The price of a parameter is 1, or for FLOPs the share of tokens that use the layer.

    Raises:
        InputError: the size is in FLOPs, and a layer is a convolution, whose FLOPs depend on the size of its input.
    """
    layers = compressible_layers(model)
    convolution = next((name for name, layer in layers.items() if isinstance(layer, CONVOLUTIONS)), None)
    if size.flops is not None and convolution is not None:
        raise InputError(f"{convolution} is a convolution, whose FLOPs depend on the size of its input; give sparsity=")
    shares = flops.layer_shares(model, layers) if size.flops is not None else {}
    return {name: LayerCost(weight_shape(layer), shares.get(name, 1.0)) for name, layer in layers.items()}


def reachable_budget(model: nn.Module, size: Size, costs: Mapping[str, LayerCost]) -> float:
    """Return the largest cost of the layers.

    Raises:
        OutOfReachError: rank 1 in every layer costs more; the message gives the bound.
    """
    dense, least = total_cost(costs), least_cost(costs)
    budget = size.budget(model, dense)
    if least <= budget:
        return budget
    if size.sparsity is not None:
        bound = f"sparsity {size.sparsity} leaves less than one rank per layer; the largest is"
        raise OutOfReachError(f"{bound} {1 - least / dense:.4f}")
    head = flops.head_flops(model) / 2
    smallest = (least + head) / (dense + head)
    raise OutOfReachError(f"flops {size.flops} leaves less than one rank per layer; the smallest is {smallest:.4f}")
