"""Watch linear layers: hand each layer's inputs and output gradients to a function, in one backward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from iprox.errors import InputError
from iprox.models.compiled import wire_of
from iprox.models.cpu.attention import fast_attention

# (layer name, inputs h [B, L, n], output gradients δ = ∂Σℓ/∂y [B, L, m]). For a layer that sees only some tokens (an
# expert), L is the most that any one example sent it, and shorter examples are filled with zeros.
Sink = Callable[[str, Tensor, Tensor], None]


@dataclass(frozen=True, slots=True)
class _Routing:
    """The tokens that a layer is given.

    Attributes:
        tokens: their positions among all tokens of the batch, ascending [T].
        total: tokens in the batch, B·L.
        tokens_per_row: L.
    """

    tokens: Tensor
    total: int
    tokens_per_row: int


_routing: ContextVar[_Routing | None] = ContextVar("iprox_routing", default=None)


@contextmanager
def routed_rows(tokens: Tensor, total: int, tokens_per_row: int) -> Iterator[None]:
    """Note that layers called inside the block see only these tokens of the batch (see `_Routing`)."""
    before = _routing.set(_Routing(tokens, total, tokens_per_row))
    try:
        yield
    finally:
        _routing.reset(before)


@contextmanager
def observe(
    layers: Mapping[str, nn.Module], sink: Sink, counted: Tensor | None = None, positions: Sequence[int] = ()
) -> Iterator[None]:
    """Call `sink(name, h, delta)` for each layer as the backward pass reaches it.

    The layer's input is kept alive until then and freed right after. No weight gradient is formed: with
    frozen weights (see `frozen`) autograd itself skips every weight GEMM, a third of a backward pass.

    Args:
        layers: layers to watch, by name.
        sink: function to call.
        counted: positions that count, bool [B, L]; h and δ of the others are zero. None counts all.
        positions: B and L once they are known, by which layers that are given [B·L, n] are told apart.

    Raises:
        InputError: in the backward pass: a layer is used twice, or its rows cannot be told apart by example.
    """

    seen: set[str] = set()

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor | None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            if not torch.is_grad_enabled():
                return None
            starts = not output.requires_grad
            if starts:
                output.requires_grad_(True)  # with frozen weights the graph starts at the first watched layer
            h, routing = inputs[0].detach(), _routing.get()
            output.register_hook(partial(told, name, h, routing=routing))
            # What follows may be written in place, which a tensor that starts a graph does not allow.
            return output.clone() if starts else None

        return hook

    def told(name: str, h: Tensor, delta: Tensor, routing: _Routing | None = None) -> None:
        if name in seen:
            raise InputError(
                f"{name}: is used more than once in a pass, and its gradient is a sum over all uses, which iprox does "
                "not form; it scores models that use each linear layer once"
            )
        seen.add(name)
        h, delta = (_by_example(name, x, routing, counted, positions) for x in (h, delta))
        sink(name, h, delta)

    with ExitStack() as stack:
        for name, layer in layers.items():
            if (wire := wire_of(layer)) is not None:
                wire.watchers[layer] = partial(told, name)
                stack.callback(wire.watchers.pop, layer)
            else:
                stack.callback(layer.register_forward_hook(watch(name)).remove)
        yield


def _by_example(
    name: str, x: Tensor, routing: _Routing | None, counted: Tensor | None, positions: Sequence[int]
) -> Tensor:
    """Return rows of a layer as [B, L, n], those that do not count zero.

    Some models flatten the input of a layer ([B·L, n]), others give it one head ([B, 1, L, n]): dimensions of size 1
    next to B and L change nothing.

    Raises:
        InputError: the layer has neither one row per example nor one per position.
    """
    if routing is not None:
        if counted is not None:
            x = x * counted.flatten()[routing.tokens, None]
        return _padded(x, routing)
    if len(positions) == 2 and tuple(x.shape[:-1]) != tuple(positions):
        x = _unfolded(name, x, *positions)
    elif x.ndim == 2:
        x = x.unsqueeze(1)  # no positions
        return x
    if counted is None:
        return x
    if x.shape[:-1] != counted.shape:
        raise InputError(
            f"{name}: is given {x.shape[1]} rows, not one per token, of examples of {counted.shape[1]} tokens"
        )
    return x * counted[..., None]


def _unfolded(name: str, x: Tensor, examples: int, length: int) -> Tensor:
    """Return rows of a layer in another shape as [B, L, n], or as [B, any, n] where they are fewer or more.

    Raises:
        InputError: it is not clear which example a row belongs to.
    """
    seen, kept, flat = (
        [size for size in sizes if size != 1] for sizes in (x.shape[:-1], (examples, length), (examples * length,))
    )
    if seen in (kept, flat):
        return x.reshape(examples, length, x.shape[-1])
    if x.ndim == 2 and len(x) == examples:
        return x.unsqueeze(1)  # no positions
    if x.ndim == 3 and len(x) == examples:
        return x
    raise InputError(
        f"{name}: is given rows of the shape {list(x.shape)} for {examples} examples of {length} tokens, so that its "
        "gradients cannot be told apart by example"
    )


def _padded(x: Tensor, routing: _Routing) -> Tensor:
    """Return rows [T, n] of some tokens as [B, most of one example, n], padded with zeros."""
    rows = routing.tokens // routing.tokens_per_row
    counts = torch.bincount(rows, minlength=routing.total // routing.tokens_per_row)
    starts = counts.cumsum(0) - counts
    slots = torch.arange(len(rows), device=rows.device) - starts[rows]
    padded = x.new_zeros(len(counts), int(counts.max()), x.shape[-1])
    padded[rows, slots] = x
    return padded


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Turn off gradients of parameters and dropout inside the block; attention has a first derivative only.

    Restores every `requires_grad` flag, the training mode and the attention afterwards.
    """
    was_training = model.training
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.eval()
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        with fast_attention(model):
            yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)
        model.train(was_training)


def watched_backward(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    losses: Callable[[], Tensor],
    sink: Sink,
    counted: Tensor | None = None,
) -> Tensor:
    """Run `losses()` and the backward pass of its sum, feeding `sink`. Call inside `frozen(model)`.

    The examples of a batch do not mix, so the gradient of the sum holds each example's own δ.

    Returns:
        The per-example losses [B], detached.

    Raises:
        InputError: a layer is used twice, or its rows cannot be told apart by example.
    """
    positions: list[int] = []

    def note(_module: nn.Module, _arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        positions[:] = options["input_ids"].shape if "input_ids" in options else ()

    handle = model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        with torch.enable_grad(), observe(layers, sink, counted, positions):
            per_example = losses()
            per_example.sum().backward()
    finally:
        handle.remove()
    return per_example.detach()
