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
            if not output.requires_grad:
                return
            h = inputs[0].detach()
            output.register_hook(lambda delta: sink(name, h, delta))

        return hook

    with ExitStack() as stack:
        for name, layer in layers.items():
            stack.callback(layer.register_forward_hook(watch(name)).remove)
        yield


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """No parameter asks for a gradient, dropout is off, and gradients still flow from the embeddings on.

    Restores every `requires_grad` flag and the training mode afterwards.
    """
    was_training = model.training
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    embeddings = getattr(model, "get_input_embeddings", lambda: None)()
    model.eval()
    for parameter in trainable:
        parameter.requires_grad_(False)
    with ExitStack() as stack:
        if embeddings is not None:
            # The embedding's output is a leaf now; asking it for a gradient starts the graph there.
            stack.callback(embeddings.register_forward_hook(lambda _m, _i, out: out.requires_grad_(True)).remove)
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
