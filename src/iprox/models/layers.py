"""Linear layers: which ones may be compressed, what replaces them, which ones carry influence."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from iprox.errors import InputError


class LowRankLinear(nn.Module):
    """y = A(B(x)) + bias: a linear layer of rank r in two ordinary `nn.Linear` children.

    `B` maps n inputs to r, `A` maps r to m outputs and carries the bias, so that any tool that hooks
    `nn.Linear` (PEFT, kronfluence, bergson) works on a proxy unchanged. It costs r(m+n) multiplications a
    token where the dense layer costs mn.

    Args:
        in_features: n.
        out_features: m.
        rank: r, at least 1.
        bias: whether `A` has a bias.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.rank = rank
        self.B = nn.Linear(in_features, rank, bias=False, device=device, dtype=dtype)
        self.A = nn.Linear(rank, out_features, bias=bias, device=device, dtype=dtype)

    @classmethod
    def from_factors(cls, A: Tensor, B: Tensor, bias: Tensor | None, dtype: torch.dtype) -> LowRankLinear:
        """Build a layer from A [m, r], B [r, n] and an optional bias [m], stored as `dtype`."""
        layer = cls(B.shape[1], A.shape[0], A.shape[1], bias is not None, device=A.device, dtype=dtype)
        with torch.no_grad():
            layer.A.weight.copy_(A)
            layer.B.weight.copy_(B)
            if bias is not None:
                layer.A.bias.copy_(bias)
        return layer

    @property
    def weight(self) -> Tensor:
        """The dense weight [m, n] that the factors stand for (some model code reads `layer.weight`)."""
        return self.A.weight @ self.B.weight

    @property
    def bias(self) -> Tensor | None:
        """The bias [m], if any."""
        return self.A.bias

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., n] to [..., m]."""
        return self.A(self.B(x))

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}"


def compressible_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The dense linear layers that may be compressed, in model order, by module name.

    Embeddings and the output head are left out: the head decides the loss directly, and in small models it
    is tied to the embedding. So are routers to experts, where they are linear layers.

    Raises:
        InputError: the model has no such layer, one whose weights are packed, or two that share their weights.
    """
    head = output_head(model)
    inside = {
        id(child) for module in model.modules() if isinstance(module, LowRankLinear) for child in module.children()
    }
    layers: dict[str, nn.Module] = {
        name: _readable(name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
        and module is not head
        and id(module) not in inside
        and not type(module).__name__.endswith("Router")
    }
    owners: dict[int, str] = {}
    for name, module in layers.items():
        first = owners.setdefault(id(module.weight), name)
        if first != name:
            raise InputError(
                f"{name}: shares its weights with {first}, so that neither has a gradient of its own; iprox scores "
                "models whose linear layers are their own"
            )
    if not layers and not low_rank_layers(model):
        raise InputError(
            f"{type(model).__name__} has no linear layer to compress or score (nn.Linear, the output head left out)"
        )
    return layers


def _readable(name: str, layer: nn.Module) -> nn.Module:
    """The layer, if its weight holds one number an entry, which subclasses of nn.Linear need not (bitsandbytes)."""
    weight = layer.weight
    readable = isinstance(weight, Tensor) and weight.is_floating_point() and weight.dtype.itemsize > 1
    if not readable or weight.ndim != 2:
        raise InputError(
            f"{name}: its weights are quantized ({type(layer).__name__}), which iprox cannot read; load the model "
            "without quantization (e.g. in bfloat16)"
        )
    return layer


def low_rank_layers(model: nn.Module) -> dict[str, LowRankLinear]:
    """The low-rank layers of a proxy, in model order, by module name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LowRankLinear)}


def influence_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules whose weight gradients make up influence, by name.

    Every dense compressible layer counts as itself, and a low-rank layer as one layer with the gradient that it would
    have if it were dense.
    """
    return {**compressible_layers(model), **low_rank_layers(model)}


def output_head(model: nn.Module) -> nn.Module | None:
    """The module that maps hidden states to logits, or None where the model has none."""
    get_head = getattr(model, "get_output_embeddings", None)
    return get_head() if get_head is not None else None


def decoder_layers(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """The list of the model's decoder layers, and its name.

    Raises:
        InputError: the model has no such list.
    """
    depth = model.config.get_text_config().num_hidden_layers
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth and not name.endswith("experts"):
            return name, module
    raise InputError(f"{type(model).__name__} has no list of {depth} decoder layers to take the first few of")


def weight_shape(layer: nn.Module) -> tuple[int, int]:
    """(m, n) of a layer's weight, as if dense."""
    if isinstance(layer, Conv1D):
        return layer.nf, layer.nx
    assert isinstance(layer, nn.Linear | LowRankLinear)
    return layer.out_features, layer.in_features


def dense_weight(layer: nn.Module) -> Tensor:
    """W [m, n] of a layer: a view of its parameter, or the product of its factors."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight.mT if isinstance(layer, Conv1D) else weight


def layer_bias(layer: nn.Module) -> Tensor | None:
    """The bias [m] of a layer, if it has one."""
    bias = layer.bias
    assert bias is None or isinstance(bias, Tensor)
    return bias


def has_bias(layer: nn.Module) -> bool:
    """Return whether a linear layer carries a bias."""
    return getattr(layer, "bias", None) is not None


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` where `name` was."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
