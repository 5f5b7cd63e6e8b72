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
from iprox.models.layers import as_rows

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
    name: str, x: Tensor, examples: int, routed: Tensor | None, counted: Tensor | None, positions: Sequence[int]
) -> Tensor:
    """Return rows of a layer as [B, L, n], with zeros for those that do not count.

    Some models flatten the input of a layer ([B·L, n]), others add dimensions ([B, 1, L, n], [B, H, W, n]). An example
    may also have several rows of tokens, one after the other.
    """
    x = _by_row(name, x, routed, counted, positions)
    if len(x) == examples and x.ndim == 3:
        return x
    if x.shape[:-1].numel() % examples:
        raise InputError(
            f"{name}: gets rows of the shape {list(x.shape)} for {examples} examples, so its gradients cannot be "
            "assigned to examples"
        )
    return x.reshape(examples, -1, x.shape[-1])


def _by_row(name: str, x: Tensor, routed: Tensor | None, counted: Tensor | None, positions: Sequence[int]) -> Tensor:
    """Return rows of a layer as [rows of tokens, L, n] if the model reads tokens, with zeros where none count."""
    if routed is not None:
        if len(positions) != 2:
            raise InputError(
                f"{name}: is an expert, which iprox watches only if the model is called with input_ids=..."
            )
        if counted is not None:
            x = x * counted.flatten()[routed, None]
        return _padded(x, routed, *positions)
    if len(positions) == 2 and tuple(x.shape[:-1]) != tuple(positions):
        x = _in_rows(name, x, *positions)
    if counted is None:
        return x
    if x.shape[:-1] != counted.shape:
        raise InputError(
            f"{name}: gets {x.shape[1]} rows per example, not one per token, for examples of {counted.shape[1]} tokens"
        )
    return x * counted[..., None]


def _in_rows(name: str, x: Tensor, examples: int, length: int) -> Tensor:
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

    Restores all `requires_grad` flags, the training mode and the attention afterwards. torch's own transformer layers
    take no short cut around their linear layers inside.
    """
    was_training, shortcut = model.training, torch.backends.mha.get_fastpath_enabled()
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.eval()
    for parameter in trainable:
        parameter.requires_grad_(False)
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with fast_attention(model):
            yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)
        torch.backends.mha.set_fastpath_enabled(shortcut)
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
        InputError: a layer is used twice, its input is overwritten, its rows cannot be assigned to examples, or
            `losses` does not return one loss per example.
    """
    seen: set[str] = set()
    examples = 0
    positions: list[int] = []  # B and L, to reshape the inputs of layers that get [B·L, n] or only some tokens

    def note(_module: nn.Module, _arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        positions[:] = options["input_ids"].shape if "input_ids" in options else ()

    def watch(name: str, _module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        if not torch.is_grad_enabled():
            return None
        starts = not output.requires_grad
        if starts:
            output.requires_grad_(True)  # with frozen weights the graph starts at the first watched layer
        h = inputs[0].detach()
        output.register_hook(partial(tell, name, h, version=h._version, routed=_routed.get()))
        # Later code may write in place, which is not allowed for a leaf of the graph.
        return output.clone() if starts else None

    def tell(name: str, h: Tensor, delta: Tensor, version: int | None = None, routed: Tensor | None = None) -> None:
        if name in seen:
            raise InputError(
                f"{name}: is used more than once per pass, so its gradient is a sum over uses, which iprox does not "
                "support; it scores models that use each linear layer once"
            )
        seen.add(name)
        if version is not None and h._version != version:
            raise InputError(f"{name}: its input is overwritten later in the forward pass; use inplace=False there")
        rows = as_rows(layers[name], h, delta)
        sink(name, *(_by_example(name, x, examples, routed, counted, positions) for x in rows))

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
            if per_example.ndim != 1:
                shape = list(per_example.shape)
                raise InputError(f"the loss must be one number per example, [B], not {shape}; use reduction='none'")
            examples = len(per_example)
            per_example.sum().backward()
    return per_example.detach()


def check_examples_apart(model: nn.Module, layers: Mapping[str, nn.Module], losses: Callable[[], Tensor]) -> None:
    """Refuse a model whose rows in some layer are not those of its examples in order, or whose examples interact.

    The loss of the first example of a batch must have no gradient at the rows of the others. Costs one forward and one
    backward pass.

    Args:
        model: model to run.
        layers: layers to check, by name.
        losses: function that runs the model on a batch and returns the losses of its examples [B].

    Raises:
        InputError: it has one; the message names the layer.
    """

    def of_first() -> Tensor:
        every = losses()
        return torch.cat([every[:1], every[1:] * 0]) if every.ndim == 1 else every

    def sink(name: str, _h: Tensor, delta: Tensor) -> None:
        if delta[1:].any():
            raise InputError(
                f"{name}: the loss of one example has a gradient at rows of others, so gradients cannot be assigned to "
                "examples; the first dimension must be that of the batch (batch_first=True), and a loss must not "
                "depend on other examples"
            )

    with frozen(model):
        watched_backward(model, layers, of_first, sink)
