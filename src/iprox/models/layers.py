"""Linear layers: those to compress, their low-rank replacement, and those whose gradients are compared.

A convolution is linear in its unfolded input, the patches [B, L, n] that its kernel meets at its L positions, with
n = channels × size of the kernel. Its weight as a matrix is [m, n], m the output channels.
"""

from __future__ import annotations

import copy
import inspect
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from iprox.errors import InputError
from iprox.models.quantized import dequantized, is_quantized, products_in

Model = TypeVar("Model", bound=nn.Module)

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class LowRankLinear(nn.Module):
    """y = up(down(x)) + bias: a linear layer of rank r as two ordinary `nn.Linear` children.

    `down` maps n inputs to r, `up` maps r to m outputs and has the bias, so that tools that hook `nn.Linear` (PEFT,
    kronfluence, bergson) work on a proxy. It costs r(m+n) multiplications per token; the dense layer costs mn.

    Args:
        in_features: n.
        out_features: m.
        rank: r, at least 1.
        bias: whether `up` has a bias.
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
        self.down = nn.Linear(in_features, rank, bias=False, device=device, dtype=dtype)
        self.up = nn.Linear(rank, out_features, bias=bias, device=device, dtype=dtype)

    @classmethod
    def from_factors(cls, up: Tensor, down: Tensor, bias: Tensor | None, dtype: torch.dtype) -> LowRankLinear:
        """Return a layer with up [m, r], down [r, n] and an optional bias [m], stored as `dtype`."""
        layer = cls(down.shape[1], up.shape[0], up.shape[1], bias is not None, device=up.device, dtype=dtype)
        layer.fill(up, down, bias)
        return layer

    @torch.no_grad()
    def fill(self, up: Tensor, down: Tensor, bias: Tensor | None) -> None:
        """Set up [m, r], down [r, n] and the bias [m], if the layer has one."""
        self.up.weight.copy_(up.reshape(self.up.weight.shape))
        self.down.weight.copy_(down.reshape(self.down.weight.shape))
        if bias is not None:
            self.up.bias.copy_(bias)  # pyright: ignore[reportOptionalMemberAccess]

    @property
    def factors(self) -> tuple[Tensor, Tensor]:
        """The factors as matrices: up [m, r] and down [r, n]."""
        return self.up.weight.flatten(1), self.down.weight.flatten(1)

    @property
    def weight(self) -> Tensor:
        """The dense weight up·down [m, n] (some model code reads `layer.weight`)."""
        up, down = self.factors
        return up @ down

    @property
    def bias(self) -> Tensor | None:
        """The bias [m], if any."""
        return self.up.bias

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., n] to [..., m]."""
        return self.up(self.down(x))

    def extra_repr(self) -> str:
        """Return the sizes, for `print(model)`."""
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}"


class LowRankConv(LowRankLinear):
    """A convolution of rank r as two: `down` has the kernel of the dense one and r outputs, `up` a kernel of size 1.

    Args:
        dense: convolution that it replaces.
        rank: r, at least 1.
    """

    def __init__(self, dense: nn.Conv1d | nn.Conv2d | nn.Conv3d, rank: int) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = weight_shape(dense)
        self.rank = rank
        kind: Any = next(each for each in CONVOLUTIONS if isinstance(dense, each))
        where = {"device": dense.weight.device, "dtype": dense.weight.dtype}
        same = {name: getattr(dense, name) for name in ("stride", "padding", "dilation", "padding_mode")}
        self.down = kind(dense.in_channels, rank, dense.kernel_size, bias=False, **same, **where)
        self.up = kind(rank, dense.out_channels, 1, bias=dense.bias is not None, **where)


def low_rank_like(dense: nn.Module, rank: int, dtype: torch.dtype | None = None) -> LowRankLinear:
    """Return a low-rank layer without values that can replace a dense one, in its dtype by default."""
    if isinstance(dense, CONVOLUTIONS):
        return LowRankConv(dense, rank)
    (m, n), weight = weight_shape(dense), dense.weight
    assert isinstance(weight, Tensor)
    return LowRankLinear(n, m, rank, has_bias(dense), device=weight.device, dtype=dtype or weight.dtype)


def compressible_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the dense linear layers that may be compressed, in model order, by module name.

    Excludes the output head, which determines the loss directly and is often tied to the embeddings, routers of
    experts, and `unread_convolutions`.

    Raises:
        InputError: the model has no such layer, one with quantized weights, or one that shares its weights with another
            module.
    """
    head = output_head(model)
    inside = {
        id(child) for module in model.modules() if isinstance(module, LowRankLinear) for child in module.children()
    }
    layers: dict[str, nn.Module] = {
        name: _readable(name, module)
        for name, module in model.named_modules()
        if (isinstance(module, nn.Linear | Conv1D) or _is_plain_convolution(module))
        and module is not head
        and id(module) not in inside
        and not type(module).__name__.endswith("Router")
    }
    weights: dict[int, str] = {}
    for name, layer in layers.items():
        weights.setdefault(id(layer.weight), name)
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            one = weights.get(id(parameter), name)
            if one != name and module is not head:
                other, this = (name, one) if name in layers else (one, name)
                raise InputError(
                    f"{other}: shares its weights with {this}, so their gradients cannot be separated; iprox scores "
                    "only models whose linear layers share no weights"
                )
    if not layers and not low_rank_layers(model):
        raise InputError(
            f"{type(model).__name__} has no linear layer to compress or score (nn.Linear or a convolution, except the "
            "output head)"
        )
    return layers


def _is_plain_convolution(module: nn.Module) -> bool:
    """Return whether a module is a convolution that its unfolded input and its own weight determine."""
    if not isinstance(module, CONVOLUTIONS) or is_parametrized(module):
        return False
    kind = next(each for each in CONVOLUTIONS if isinstance(module, each))
    return module.groups == 1 and type(module).forward is kind.forward


def unread_convolutions(model: nn.Module) -> list[str]:
    """Return the names of convolutions that are neither compressed nor scored.

    These have groups, are transposed, or compute their weight from other parameters (weight normalization).
    """
    read = {id(child) for module in model.modules() if isinstance(module, LowRankConv) for child in module.children()}
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.modules.conv._ConvNd) and not _is_plain_convolution(module) and id(module) not in read
    ]


def _readable(name: str, layer: nn.Module) -> nn.Module:
    """Return the layer; refuse quantized weights, which some kinds of nn.Linear have, except those of bitsandbytes."""
    weight = layer.weight
    if is_quantized(layer):
        return layer
    readable = isinstance(weight, Tensor) and weight.is_floating_point() and weight.dtype.itemsize > 1
    if not readable or (weight.ndim != 2 and not isinstance(layer, CONVOLUTIONS)):
        raise InputError(
            f"{name}: its weights are quantized ({type(layer).__name__}), which iprox cannot read; load the model "
            "without quantization (e.g. in bfloat16)"
        )
    return layer


def low_rank_layers(model: nn.Module) -> dict[str, LowRankLinear]:
    """Return the low-rank layers of a proxy, in model order, by module name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LowRankLinear)}


def influence_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the layers whose weight gradients make up influence, by name.

    These are all dense compressible layers, and all low-rank layers, with the gradients that they would have if they
    were dense. For a proxy with a depth below 1, only the layers in its upper decoder layers count.
    """
    layers = {**compressible_layers(model), **low_rank_layers(model)}
    first = first_graded(model)
    if first == 0:
        return layers
    assert isinstance(model, PreTrainedModel)
    blocks = f"{decoder_layers(model)[0]}."
    lower = tuple(f"{blocks}{number}." for number in range(first))
    return {name: layer for name, layer in layers.items() if not name.startswith(lower)}


def first_graded(model: nn.Module) -> int:
    """Return the number of the lowest decoder layer whose gradients are compared: 0 unless a proxy's depth is below 1.

    The top layer is always compared.
    """
    config = getattr(model, "config", None)
    own = getattr(config, "iprox", None)  # of a proxy with the quantized weights of its target
    depth = own["depth"] if own else getattr(getattr(config, "quantization_config", None), "depth", 1.0)
    if depth == 1:
        return 0
    assert isinstance(model, PreTrainedModel)
    count = model.config.get_text_config().num_hidden_layers
    return count - max(1, round(depth * count))


def output_head(model: nn.Module) -> nn.Module | None:
    """Return the module that maps hidden states to logits, or None if the model has none."""
    get_head = getattr(model, "get_output_embeddings", None)
    return get_head() if get_head is not None else None


def decoder_layers(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """Return the name of the model's list of decoder layers, and the list.

    Raises:
        InputError: the model has no such list.
    """
    depth = model.config.get_text_config().num_hidden_layers
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth and not name.endswith("experts"):
            return name, module
    raise InputError(f"{type(model).__name__} has no list of {depth} decoder layers")


def copied(model: Model, memo: dict[int, Any] | None = None) -> Model:
    """Return a deep copy whose forward pass runs the copy.

    A trainer leaves a wrapper of the class's forward pass on the model that it trained, and a copy of the wrapper would
    still run that model, so it is left out.

    Args:
        model: model to copy.
        memo: objects that take the place of copies, by the id of what is copied.
    """
    made = copy.deepcopy(model, memo)
    own = vars(made).get("forward")
    wraps = own is not None and inspect.unwrap(own) is inspect.unwrap(type(made).forward)
    if wraps and not hasattr(made, "_hf_hook"):  # Accelerate's, for a model on several devices
        del vars(made)["forward"]
    return made


def weight_shape(layer: nn.Module) -> tuple[int, int]:
    """Return the shape (m, n) of a layer's dense weight."""
    if isinstance(layer, Conv1D):
        return layer.nf, layer.nx
    if isinstance(layer, CONVOLUTIONS):
        return layer.weight.shape[0], layer.weight[0].numel()
    assert isinstance(layer, nn.Linear | LowRankLinear)
    return layer.out_features, layer.in_features


def dense_weight(layer: nn.Module) -> Tensor:
    """Return W [m, n] of a layer: a view of its parameter, the product of its factors, or a dequantized copy."""
    if is_quantized(layer):
        return dequantized(layer)
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight.mT if isinstance(layer, Conv1D) else weight.flatten(1)


def signal_like(layer: nn.Module) -> Tensor:
    """Return a tensor of the dtype and on the device that a layer's inputs and output gradients have."""
    weight = next(layer.parameters())
    return weight.new_empty(0, dtype=products_in(layer)) if is_quantized(layer) else weight


def unfolding(layer: nn.Module) -> tuple[Any, ...]:
    """Return what determines how a layer unfolds its input; () for a layer that does not."""
    conv = layer.down if isinstance(layer, LowRankConv) else layer
    if not isinstance(conv, CONVOLUTIONS):
        return ()
    return conv.kernel_size, conv.stride, conv.dilation, conv.padding_mode, *conv._reversed_padding_repeated_twice


def as_rows(layer: nn.Module, h: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
    """Return the inputs [..., n] and output gradients [..., m] of a layer that multiplies each row by its weight.

    Those of a convolution, [B, channels, *sizes], become [B, L, n] and [B, L, m] for its L positions.
    """
    if not (how := unfolding(layer)):
        return h, delta
    sizes, strides, dilations, mode, *padding = how
    if any(padding):
        h = nn.functional.pad(h, padding, mode="constant" if mode == "zeros" else mode)
    for axis, (size, stride, dilation) in enumerate(zip(sizes, strides, dilations, strict=True), start=2):
        h = h.unfold(axis, dilation * (size - 1) + 1, stride)[..., ::dilation]
    places = len(sizes)  # [B, C, *positions, *kernel] -> [B, *positions, C, *kernel]
    h = h.movedim(1, places + 1)
    return h.reshape(len(h), -1, h.shape[places + 1 :].numel()), delta.flatten(2).mT


def layer_bias(layer: nn.Module) -> Tensor | None:
    """Return the bias [m] of a layer, if it has one."""
    bias = layer.bias
    assert bias is None or isinstance(bias, Tensor)
    return bias


def has_bias(layer: nn.Module) -> bool:
    """Return whether a linear layer has a bias."""
    return getattr(layer, "bias", None) is not None


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Replace the module called `name`."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
