"""Observe linear layers: call a function with each layer's inputs and output gradients, in one backward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from iprox.errors import InputError
from iprox.models.compiled import wire_of
from iprox.models.cpu.attention import fast_attention

# (layer name, inputs h [B, L, n], output gradients δ = ∂Σℓ/∂y [B, L, m]). For a layer that gets only some tokens (an
# expert), L is the largest number of them in any example, and other examples are padded with zeros.
Sink = Callable[[str, Tensor, Tensor], None]


_routed: ContextVar[Tensor | None] = ContextVar("iprox_routed", default=None)


@contextmanager
def routed_to(tokens: Tensor) -> Iterator[None]:
    """Declare that layers called inside the block get only tokens [T]: positions among all B·L, ascending."""
    before = _routed.set(tokens)
    try:
        yield
    finally:
        _routed.reset(before)


def _by_example(
    name: str, x: Tensor, routed: Tensor | None, counted: Tensor | None, positions: Sequence[int]
) -> Tensor:
    """Return rows of a layer as [B, L, n], with zeros for those that do not count.

    Some models flatten the input of a layer ([B·L, n]), others add dimensions of size 1 ([B, 1, L, n]).
    """
    if routed is not None:
        if len(positions) != 2:
            raise InputError(
                f"{name}: is an expert, which iprox watches only if the model is called with input_ids=..."
            )
        if counted is not None:
            x = x * counted.flatten()[routed, None]
        return _padded(x, routed, *positions)
    if len(positions) == 2 and tuple(x.shape[:-1]) != tuple(positions):
        x = _unfolded(name, x, *positions)
    elif x.ndim == 2:
        return x.unsqueeze(1)  # no positions
    if counted is None:
        return x
    if x.shape[:-1] != counted.shape:
        raise InputError(
            f"{name}: gets {x.shape[1]} rows per example, not one per token, for examples of {counted.shape[1]} tokens"
        )
    return x * counted[..., None]


def _unfolded(name: str, x: Tensor, examples: int, length: int) -> Tensor:
    """Return rows of a layer in another shape as [B, L, n], or as [B, any, n] if their number is not L."""
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
        f"{name}: gets rows of the shape {list(x.shape)} for {examples} examples of {length} tokens, so its gradients "
        "cannot be assigned to examples"
    )


def _padded(x: Tensor, tokens: Tensor, examples: int, length: int) -> Tensor:
    """Return rows [T, n] of some tokens as [B, largest number per example, n], padded with zeros."""
    rows = tokens // length
    counts = torch.bincount(rows, minlength=examples)
    starts = counts.cumsum(0) - counts
    slots = torch.arange(len(rows), device=rows.device) - starts[rows]
    padded = x.new_zeros(len(counts), int(counts.max()), x.shape[-1])
    padded[rows, slots] = x
    return padded


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Turn off gradients of parameters and dropout inside the block; attention has only a first derivative there.

    Restores all `requires_grad` flags, the training mode and the attention afterwards.
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
    """Run `losses()` and the backward pass of its sum, and call `sink(name, h, delta)` when it reaches each layer.

    The examples of a batch do not interact, so the gradient of the sum has each example's δ. A layer's input is kept
    until the backward pass reaches it. Call this inside `frozen(model)`, where autograd skips the weight GEMMs, a third
    of a backward pass.

    Args:
        model: model to run.
        layers: layers to watch, by name.
        losses: function that runs the model and returns the losses of the examples [B].
        sink: function to call.
        counted: positions that count, bool [B, L]; h and δ of the others are zero. None counts all.

    Returns:
        The per-example losses [B], detached.

    Raises:
        InputError: a layer is used twice, or its rows cannot be assigned to examples.
    """
    seen: set[str] = set()
    positions: list[int] = []  # B and L, to reshape the inputs of layers that get [B·L, n] or only some tokens

    def note(_module: nn.Module, _arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        positions[:] = options["input_ids"].shape if "input_ids" in options else ()

    def watch(name: str, _module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        if not torch.is_grad_enabled():
            return None
        starts = not output.requires_grad
        if starts:
            output.requires_grad_(True)  # with frozen weights the graph starts at the first watched layer
        output.register_hook(partial(tell, name, inputs[0].detach(), routed=_routed.get()))
        # Later code may write in place, which is not allowed for a leaf of the graph.
        return output.clone() if starts else None

    def tell(name: str, h: Tensor, delta: Tensor, routed: Tensor | None = None) -> None:
        if name in seen:
            raise InputError(
                f"{name}: is used more than once per pass, so its gradient is a sum over uses, which iprox does not "
                "support; it scores models that use each linear layer once"
            )
        seen.add(name)
        h, delta = (_by_example(name, x, routed, counted, positions) for x in (h, delta))
        sink(name, h, delta)

    with ExitStack() as stack:
        stack.enter_context(model.register_forward_pre_hook(note, with_kwargs=True))
        for name, layer in layers.items():
            if (wire := wire_of(layer)) is not None:
                wire.watcher = partial(tell, name)
                stack.callback(setattr, wire, "watcher", None)
            else:
                stack.enter_context(layer.register_forward_hook(partial(watch, name)))
        with torch.enable_grad():
            per_example = losses()
            per_example.sum().backward()
    return per_example.detach()
