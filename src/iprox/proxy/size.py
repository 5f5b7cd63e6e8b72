"""How large a proxy may be, as users say it, and what that leaves for its layers."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from torch import nn

from iprox.errors import InputError
from iprox.models import flops


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
