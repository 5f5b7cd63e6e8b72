"""Compile decoder layers with `torch.compile`, once for all of them, so that their linear layers can be observed.

In a small model, norms, rotary embeddings, activations and residual sums cost more than the GEMMs; compiling fuses
them. Hooks do not work in compiled code, so every linear layer is replaced by a port: one opaque operator that looks
the layer up by number. All decoder layers then have the same code, whatever their ranks, so it is compiled once, and
`watched_backward` can watch a layer from inside the operator (`Wire.watcher`).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from iprox.models.cpu.shapes import round_columns
from iprox.models.layers import (
    LowRankLinear,
    compressible_layers,
    decoder_layers,
    dense_weight,
    first_graded,
    layer_bias,
    low_rank_layers,
    replace_module,
    weight_shape,
)
from iprox.models.loss import plain_logits

# (inputs h [B, L, n], output gradients δ [B, L, m]) of one layer.
Watcher = Callable[[Tensor, Tensor], None]


@dataclass(eq=False)  # without slots: weakly referenced
class Wire:
    """The link from a port's operator to its linear layer; it lives as long as the port.

    Attributes:
        number: number by which the operators find it.
        module: linear layer.
        watcher: function that is called with the layer's inputs and output gradients in the backward pass.
        factors: up [m, R] and down [R, n] of a low-rank layer, with the rank padded to R so that layers share shapes
            (see `round_columns`); None for a dense layer.
    """

    number: int
    module: nn.Module
    watcher: Watcher | None = None
    factors: tuple[Tensor, Tensor] | None = None


# Operators take only tensors and numbers, so they find their layer here.
_wires: WeakValueDictionary[int, Wire] = WeakValueDictionary()
_numbers = itertools.count()
ATTRIBUTE = "_iprox_wire"
# Limit of compiled versions of a decoder layer: one per kind of layer, and for batches of one row or one token.
PIECES = 64


def wire_of(module: nn.Module) -> Wire | None:
    """Return the wire of a layer in a compiled model, if any."""
    return module.__dict__.get(ATTRIBUTE)


class Port(nn.Module):
    """A stand-in for a linear layer in compiled code; all ports have the same code."""

    def __init__(self, wire: Wire) -> None:
        super().__init__()
        self.wire = wire
        self.number = torch.tensor(wire.number)
        self.out_features = weight_shape(wire.module)[0]

    def forward(self, x: Tensor) -> Tensor:
        """Run the layer as one operator."""
        return _linear(x, self.number, self.out_features)


@torch.library.custom_op("iprox::linear", mutates_args=())
def _linear(x: Tensor, number: Tensor, out_features: int) -> Tensor:
    wire = _wires[int(number)]
    with torch.no_grad():
        if wire.factors is None:
            return wire.module(x)
        up, down = wire.factors
        return nn.functional.linear(nn.functional.linear(x, down), up, layer_bias(wire.module))


@_linear.register_fake
def _(x: Tensor, number: Tensor, out_features: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], out_features)


@torch.library.custom_op("iprox::linear_backward", mutates_args=())
def _linear_backward(x: Tensor, delta: Tensor, number: Tensor) -> Tensor:
    wire = _wires[int(number)]
    with torch.no_grad():
        if wire.watcher is not None:
            wire.watcher(x, delta)
        if wire.factors is None:
            return delta @ dense_weight(wire.module)
        up, down = wire.factors
        return delta @ up @ down


@_linear_backward.register_fake
def _(x: Tensor, delta: Tensor, number: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, int], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])


def _backward(ctx: Any, delta: Tensor) -> tuple[Tensor, None, None]:
    x, number = ctx.saved_tensors
    return _linear_backward(x, delta.contiguous(), number), None, None


_linear.register_autograd(_backward, setup_context=_setup_context)


def why_not_compiled(model: nn.Module) -> str | None:
    """Return why a model's decoder layers cannot be compiled; None if they can."""
    if not isinstance(model, PreTrainedModel):
        return "it is not a transformers model"
    if any(type(layer) not in (nn.Linear, Conv1D) for layer in compressible_layers(model).values()):
        return "it has linear layers of an unknown type"
    if any(name.endswith("experts") for name, _ in model.named_modules()):
        return "its experts see tokens chosen at run time"
    return None


def why_compiling_failed(trial: Callable[[], object]) -> str:
    """Run what compiles when it is first called; return why it could not be compiled, or an empty string."""
    from torch._dynamo.exc import TorchDynamoException  # 1.5 s of CPU, and only compiling needs it

    try:
        trial()
    except TorchDynamoException as error:  # no compiler, or code it cannot follow
        return " ".join(str(error).split())[:300]
    return ""


def compile_blocks(blocks: nn.ModuleList) -> None:
    """Compile decoder layers, for batches of any size."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, PIECES)
    for block in blocks:
        block.compile(dynamic=True, fullgraph=True)


def uncompile_blocks(blocks: nn.ModuleList) -> None:
    """Undo `compile_blocks`."""
    for block in blocks:
        block._compiled_call_impl = None


def compile_layers(model: PreTrainedModel) -> None:
    """Compile the decoder layers of a model, in place; its linear layers can still be observed.

    The first batches compile, for up to a minute the first time and then seconds, as torch keeps a cache on disk.
    Shapes are dynamic, so batches of any size run the same code. Ports replace the linear layers until
    `uncompile_layers`, so look layers up by name before.

    Args:
        model: model for which `why_not_compiled` returns None.
    """
    plain_logits(model)  # tried on a few tokens, which would be compiled too
    blocks = decoder_layers(model)[1]
    for name, layer in {**compressible_layers(model), **low_rank_layers(model)}.items():
        wire = Wire(next(_numbers), layer)
        if isinstance(layer, LowRankLinear):
            up, down = layer.up.weight.detach(), layer.down.weight.detach()
            wire.factors = round_columns(up), round_columns(down.mT).mT.contiguous()
        _wires[wire.number] = wire
        layer.__dict__[ATTRIBUTE] = wire
        replace_module(model, name, Port(wire))
    first = first_graded(model)
    # With frozen weights, the graph starts at the embeddings, or at the lowest layer whose gradients are compared.
    if first == 0:
        model.enable_input_require_grads()
    compile_blocks(blocks)
    if first > 0:
        run = blocks[first]._compiled_call_impl
        assert run is not None
        blocks[first]._compiled_call_impl = _starting(run)


def _starting(run: Callable[..., Any]) -> Callable[..., Any]:
    """Return a compiled decoder layer whose input starts the autograd graph."""

    def call(hidden: Tensor, *arguments: Any, **options: Any) -> Any:
        if torch.is_grad_enabled():
            hidden = hidden.detach().requires_grad_()
        return run(hidden, *arguments, **options)

    return call


def uncompile_layers(model: PreTrainedModel) -> None:
    """Undo `compile_layers`."""
    if first_graded(model) == 0:
        model.disable_input_require_grads()
    uncompile_blocks(decoder_layers(model)[1])
    for name, port in list(model.named_modules()):
        if isinstance(port, Port):
            layer = port.wire.module
            del layer.__dict__[ATTRIBUTE]
            replace_module(model, name, layer)


@contextmanager
def compiled(model: PreTrainedModel) -> Iterator[None]:
    """Compile the decoder layers inside the block."""
    compile_layers(model)
    try:
        yield
    finally:
        uncompile_layers(model)
