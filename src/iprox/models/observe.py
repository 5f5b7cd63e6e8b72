"""Watch linear layers: hand each layer's inputs and output gradients to a function, in one backward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from iprox.models.attention import fast_attention
from iprox.models.compiled import Watcher, wire_of

# (layer name, inputs h [B, L, n], output gradients δ = ∂Σℓ/∂y [B, L, m]). For a layer that sees only some tokens (an
# expert), L is the most that any one example sent it, and shorter examples are filled with zeros.
Sink = Callable[[str, Tensor, Tensor], None]


@dataclass(frozen=True, slots=True)
class _Routing:
    """Which tokens a layer is being given.

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
    """Say that layers called inside see only these tokens of the batch (see `_Routing`)."""
    before = _routing.set(_Routing(tokens, total, tokens_per_row))
    try:
        yield
    finally:
        _routing.reset(before)


@contextmanager
def observe(layers: Mapping[str, nn.Module], sink: Sink, counted: Tensor | None = None) -> Iterator[None]:
    """Call `sink(name, h, delta)` for each layer as the backward pass reaches it.

    The layer's input is kept alive until then and freed right after. No weight gradient is formed: with
    frozen weights (see `frozen`) autograd itself skips every weight GEMM, a third of a backward pass.

    Args:
        layers: what to watch, by name.
        sink: what to call.
        counted: positions that count, bool [B, L]; h and δ of the others are zero. None counts all.
    """

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            if not torch.is_grad_enabled():
                return
            if not output.requires_grad:
                output.requires_grad_(True)  # with frozen weights the graph starts at the first watched layer
            h, routing = inputs[0].detach(), _routing.get()
            output.register_hook(
                lambda delta: sink(name, _by_example(h, routing, counted), _by_example(delta, routing, counted))
            )

        return hook

    def wired_watch(name: str) -> Watcher:
        return lambda h, delta: sink(name, _by_example(h, None, counted), _by_example(delta, None, counted))

    with ExitStack() as stack:
        for name, layer in layers.items():
            if (wire := wire_of(layer)) is not None:
                wire.watchers[layer] = wired_watch(name)
                stack.callback(wire.watchers.pop, layer)
            else:
                stack.callback(layer.register_forward_hook(watch(name)).remove)
        yield


def _by_example(x: Tensor, routing: _Routing | None, counted: Tensor | None) -> Tensor:
    """Rows of a layer as [B, L, n], those that do not count zero."""
    if routing is not None:
        if counted is not None:
            x = x * counted.flatten()[routing.tokens, None]
        return _padded(x, routing)
    if x.ndim == 2:
        return x.unsqueeze(1)  # a model without positions
    return x if counted is None else x * counted[..., None]


def _padded(x: Tensor, routing: _Routing) -> Tensor:
    """Rows [T, n] of some tokens as [B, most of one example, n], filled up with zeros."""
    rows = routing.tokens // routing.tokens_per_row
    counts = torch.bincount(rows, minlength=routing.total // routing.tokens_per_row)
    starts = counts.cumsum(0) - counts
    slots = torch.arange(len(rows), device=rows.device) - starts[rows]
    padded = x.new_zeros(len(counts), int(counts.max()), x.shape[-1])
    padded[rows, slots] = x
    return padded


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """No parameter asks for a gradient, dropout is off, and attention has a first derivative only.

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
    """
    with torch.enable_grad(), observe(layers, sink, counted):
        per_example = losses()
        per_example.sum().backward()
    return per_example.detach()
