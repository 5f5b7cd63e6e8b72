"""Watch linear layers: hand each layer's inputs and output gradients to a function, in one backward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

# (layer name, inputs h [B, L, n], output gradients δ = ∂Σℓ/∂y [B, L, m])
Sink = Callable[[str, Tensor, Tensor], None]


@contextmanager
def observe(layers: Mapping[str, nn.Module], sink: Sink) -> Iterator[None]:
    """Call `sink(name, h, delta)` for each layer as the backward pass reaches it.

    The layer's input is kept alive until then and freed right after. No weight gradient is formed: with
    frozen weights (see `frozen`) autograd itself skips every weight GEMM, a third of a backward pass.
    """

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            if not torch.is_grad_enabled():
                return
            if not output.requires_grad:
                output.requires_grad_(True)  # with frozen weights the graph starts at the first watched layer
            h = _with_positions(inputs[0].detach())
            output.register_hook(lambda delta: sink(name, h, _with_positions(delta)))

        return hook

    with ExitStack() as stack:
        for name, layer in layers.items():
            stack.callback(layer.register_forward_hook(watch(name)).remove)
        yield


def _with_positions(x: Tensor) -> Tensor:
    """[B, n] of a model without positions as [B, 1, n]."""
    return x.unsqueeze(1) if x.ndim == 2 else x


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """No parameter asks for a gradient, and dropout is off.

    Restores every `requires_grad` flag and the training mode afterwards.
    """
    was_training = model.training
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.eval()
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)
        model.train(was_training)


def watched_backward(
    model: nn.Module, layers: Mapping[str, nn.Module], losses: Callable[[], Tensor], sink: Sink
) -> Tensor:
    """Run `losses()` and the backward pass of its sum, feeding `sink`. Call inside `frozen(model)`.

    The examples of a batch do not mix, so the gradient of the sum holds each example's own δ.

    Returns:
        The per-example losses [B], detached.
    """
    with torch.enable_grad(), observe(layers, sink):
        per_example = losses()
        per_example.sum().backward()
    return per_example.detach()
