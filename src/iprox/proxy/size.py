"""How large a proxy may be, as users say it, and what that leaves for its layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass

from torch import nn

from iprox.errors import InputError
from iprox.models import flops
from iprox.models.layers import compressible_layers, weight_shape


class OutOfReachError(InputError):
    """A size that is less than one rank a layer."""


@dataclass(frozen=True, slots=True)
class Size:
    """How large the proxy may be; exactly one is given.

    Attributes:
        sparsity: share of the compressible parameters to remove, in (0, 1).
        parameters: of the whole proxy, embeddings and head included.
        flops: of a token's forward pass through linear layers and head, as a share of the target's, in (0, 1).
    """

    sparsity: float | None = None
    parameters: int | None = None
    flops: float | None = None

    def __post_init__(self) -> None:
        given = [name for name in ("sparsity", "parameters", "flops") if getattr(self, name) is not None]
        if len(given) != 1:
            raise InputError(f"give exactly one of sparsity, parameters and flops, not {' and '.join(given) or 'none'}")
        for name in ("sparsity", "flops"):
            value = getattr(self, name)
            if value is not None and not 0 < value < 1:
                raise InputError(f"{name} is {value}; it must lie between 0 and 1, both excluded")

    def as_dict(self) -> dict[str, float]:
        """What was given."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    def budget(self, model: nn.Module, dense: float) -> float:
        """The cost that the compressible layers may have, in the units of their `LayerSpectrum.weight`.

        Args:
            model: the target.
            dense: their cost now.
        """
        if self.sparsity is not None:
            return (1 - self.sparsity) * dense
        if self.parameters is not None:
            return self.parameters - (sum(p.numel() for p in model.parameters()) - dense)
        assert self.flops is not None
        head = flops.head_flops(model) / 2
        return self.flops * (dense + head) - head

    def refusal(self, model: nn.Module, dense: float, least: float) -> OutOfReachError:
        """What to say where even rank 1 everywhere costs more than the budget."""
        if self.sparsity is not None:
            most = 1 - least / dense
            return OutOfReachError(
                f"sparsity {self.sparsity} leaves less than one rank per layer; the most is {most:.4f}"
            )
        if self.parameters is not None:
            fewest = sum(p.numel() for p in model.parameters()) - dense + least
            return OutOfReachError(
                f"{self.parameters:,} parameters are too few for this model; the fewest are {fewest:,.0f}"
            )
        head = flops.head_flops(model) / 2
        fewest = (least + head) / (dense + head)
        return OutOfReachError(f"flops {self.flops} leaves less than one rank per layer; the least is {fewest:.4f}")


@dataclass(frozen=True, slots=True)
class Prices:
    """What the compressible layers of a model cost, by which a size is met: known from their shapes alone.

    Attributes:
        by_layer: price of a parameter of each layer: 1, or of FLOPs the share of tokens that pass through it.
        dense: cost of all layers as they are.
        least: of all at rank 1.
    """

    by_layer: Mapping[str, float]
    dense: float
    least: float

    @classmethod
    def of(cls, model: nn.Module, size: Size) -> Prices:
        """Of a model, with or without weights, in the unit of a size."""
        shapes = {name: weight_shape(layer) for name, layer in compressible_layers(model).items()}
        # A budget of FLOPs charges a parameter for the share of tokens that use it; the others for what is stored.
        shares = flops.active_shares(model) if size.flops is not None else {}
        by_layer = {name: shares.get(name, 1.0) for name in shapes}
        dense = sum(m * n * by_layer[name] for name, (m, n) in shapes.items())
        least = sum((m + n) * by_layer[name] for name, (m, n) in shapes.items())
        return cls(by_layer, dense, least)

    def refuse_out_of_reach(self, model: nn.Module, size: Size) -> None:
        """Refuse a size that even rank 1 everywhere does not meet.

        Raises:
            OutOfReachError: it is one; the message has the bound.
        """
        if self.least > size.budget(model, self.dense):
            raise size.refusal(model, self.dense, self.least)
