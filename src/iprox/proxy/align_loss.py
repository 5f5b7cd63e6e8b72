"""The alignment loss: the distance of a proxy's gradients, logits and hidden states from its target's on a batch.

Source: arXiv:2602.17835, section 4.2. By the chain rule, a weight gradient ∇_W [m, n] gives the gradients of the
factors of W = up·down as ∇_up = ∇_W downᵀ and ∇_down = upᵀ ∇_W. The loss of a batch is

    gradient_weight · mean over low-rank layers of
        d(∇_up ℓ, sg(∇_W ℓ_target) downᵀ) + d(∇_down ℓ, upᵀ sg(∇_W ℓ_target))
    + kl_weight · τ² · KL(target ‖ proxy) of the logits at temperature τ on supervised tokens
    + hidden_weight · mean over decoder layers of the relative squared distance of their outputs,

with d the cosine distance, ℓ the batch's mean per-example loss and sg the stop-gradient. Only the first part needs
second derivatives. For a model that is not a language model, the relative squared distance of its outputs takes the
place of the KL.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from iprox.distributed import average, processes
from iprox.errors import InputError
from iprox.models.layers import LowRankLinear, decoder_layers
from iprox.models.loss import LossFn, causal_lm_logits, causal_lm_losses, mean_by_row
from iprox.models.observe import frozen, watched_backward
from iprox.models.precision import accumulation_dtype
from iprox.settings import AlignSection

# τ of the KL of the logits.
TEMPERATURE = 2.0


@dataclass(frozen=True, slots=True)
class Signals:
    """The target's gradients, logits and hidden states on a batch, without a graph.

    Attributes:
        gradients: ∇_W ℓ_target [m, n] by layer name.
        logits: logits [N, V] that predict supervised tokens, or the outputs of another model.
        hidden: output of each decoder layer [B, L, d]; empty if hidden states are not matched.
    """

    gradients: dict[str, Tensor]
    logits: Tensor
    hidden: list[Tensor]

    def to(self, device: torch.device) -> Signals:
        """Return the signals on another device."""
        return Signals(
            {name: gradient.to(device) for name, gradient in self.gradients.items()},
            self.logits.to(device),
            [state.to(device) for state in self.hidden],
        )


@dataclass(frozen=True, slots=True)
class Losses:
    """The total loss of a batch and its parts, scalars with their graph; a part without weight is None."""

    whole: Tensor
    gradient: Tensor | None
    kl: Tensor
    hidden: Tensor | None


def cosine_distance(x: Tensor, y: Tensor) -> Tensor:
    """Return 1 - cos of two matrices as vectors, a scalar."""
    return 1 - F.cosine_similarity(x.flatten(), y.flatten(), dim=0)


def frobenius_distance(x: Tensor, y: Tensor) -> Tensor:
    """Return ‖x - y‖² / ‖y‖² of two matrices, a scalar; unlike the cosine, it depends on their norms."""
    return (x - y).square().sum() / y.square().sum().clamp(min=torch.finfo(y.dtype).tiny)


def outputs_and_losses(model: nn.Module, batch: Any, loss_fn: LossFn) -> tuple[Tensor, Tensor]:
    """Return the outputs of a model to match, logits [N, V] for a language model, and the losses of its examples [B].

    Raises:
        InputError: the model returns neither a tensor nor `logits`.
    """
    if loss_fn is causal_lm_losses:
        logits, targets, rows = causal_lm_logits(model, batch)
        token_losses = F.cross_entropy(logits.to(accumulation_dtype(logits)), targets, reduction="none")
        return logits, mean_by_row(token_losses, rows, batch.input_ids.shape[0])
    returned: list[Any] = []
    with model.register_forward_hook(lambda _module, _inputs, output: returned.append(output)):
        losses = loss_fn(model, batch)
    outputs = [getattr(each, "logits", each[0] if isinstance(each, tuple) else each) for each in returned]
    if not outputs or not all(isinstance(each, Tensor) for each in outputs):
        raise InputError(
            f"align: {type(model).__name__} must be called by loss_fn and return a tensor, a tuple that starts with "
            "one, or an object with logits; its outputs are what is matched"
        )
    return torch.cat([each.flatten() for each in outputs]), losses


def kl_divergence(target_logits: Tensor, proxy_logits: Tensor, temperature: float) -> Tensor:
    """Return τ² KL(target ‖ proxy) at temperature τ, per row of logits [N, V]: [N] in float32 or better."""
    dtype = accumulation_dtype(proxy_logits)
    reference = F.log_softmax(target_logits.to(dtype) / temperature, dim=-1)
    log_q = F.log_softmax(proxy_logits.to(dtype) / temperature, dim=-1)
    return temperature**2 * F.kl_div(log_q, reference, reduction="none", log_target=True).sum(-1)


def mean_of_all(values: Tensor) -> Tensor:
    """Return the mean of some values [N]; of several processes, one whose average over them is the mean of all."""
    if processes() == 1:
        return values.mean()
    count = torch.tensor(float(len(values)), device=values.device)
    average((count,))
    return values.sum() / count


def gradient_distance(layers: Mapping[str, LowRankLinear], loss: Tensor, target: Mapping[str, Tensor]) -> Tensor:
    """Return the gradient part of the alignment loss, differentiable in the factors (second order).

    Args:
        layers: the proxy's low-rank layers.
        loss: ℓ of the proxy on the batch, a scalar with its graph.
        target: ∇_W ℓ_target [m, n] by layer name, without a graph.
    """
    seen = factor_gradients(layers, loss)
    distances = []
    with torch.autocast(loss.device.type, enabled=False):  # products of float32 factors and gradients stay in float32
        for name, (grad_up, grad_down) in seen.items():
            if name not in target:
                continue  # an expert without tokens of this batch on the target
            up, down = layers[name].factors
            G = target[name].to(up.dtype)
            distances.append(cosine_distance(grad_up, G @ down.mT) + cosine_distance(grad_down, up.mT @ G))
    if not distances:
        return loss * 0  # no low-rank layer has a gradient on this batch
    return torch.stack(distances).mean()


def factor_gradients(layers: Mapping[str, LowRankLinear], loss: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Return ∇_up [m, r] and ∇_down [r, n] of a loss by layer name, with their graph, without unused layers."""
    factors = [weight for layer in layers.values() for weight in (layer.up.weight, layer.down.weight)]
    gradients = torch.autograd.grad(loss, factors, create_graph=True, allow_unused=True)
    pairs = zip(layers, gradients[::2], gradients[1::2], strict=True)
    return {name: (up.flatten(1), down.flatten(1)) for name, up, down in pairs if up is not None and down is not None}


def hidden_distance(proxy: list[Tensor], target: list[Tensor], lengths: Tensor) -> Tensor:
    """Return the mean over decoder layers of ‖h - h_target‖² / ‖h_target‖² over all real tokens, a scalar."""
    real = torch.arange(target[0].shape[1], device=lengths.device) < lengths[:, None]
    dtype = accumulation_dtype(proxy[0])
    pairs = zip(proxy, target, strict=True)
    return torch.stack([frobenius_distance(h[real].to(dtype), t[real].to(dtype)) for h, t in pairs]).mean()


def alignment_loss(
    proxy: nn.Module,
    layers: Mapping[str, LowRankLinear],
    batch: Any,
    signals: Signals,
    weights: AlignSection,
    loss_fn: LossFn = causal_lm_losses,
) -> Losses:
    """Return the loss of one batch.

    The gradient part needs the `math` attention kernel, the only one with a second derivative.

    Args:
        proxy: proxy in evaluation mode.
        layers: low-rank layers of the proxy.
        batch: batch on the proxy's device.
        signals: signals to match, on the proxy's device.
        weights: weights of the parts.
        loss_fn: per-example losses, for a model that is not a language model.
    """
    kernel = sdpa_kernel(SDPBackend.MATH) if weights.gradient_weight else nullcontext()
    with kernel, layer_outputs(proxy, bool(signals.hidden)) as hidden:
        outputs, losses = outputs_and_losses(proxy, batch, loss_fn)
        outputs = outputs.to(accumulation_dtype(outputs))
        if loss_fn is causal_lm_losses:
            kl = mean_of_all(kl_divergence(signals.logits, outputs, TEMPERATURE))
        else:
            kl = frobenius_distance(outputs, signals.logits.to(outputs.dtype))
        whole = weights.kl_weight * kl
        apart = hidden_distance(hidden, signals.hidden, batch.lengths) if signals.hidden else None
        if apart is not None:
            whole = whole + weights.hidden_weight * apart
        gradient = None
        if weights.gradient_weight:
            gradient = gradient_distance(layers, losses.mean(), signals.gradients)
            whole = whole + weights.gradient_weight * gradient
    return Losses(whole, gradient, kl, apart)


def target_signals(
    target: nn.Module,
    layers: Mapping[str, LowRankLinear],
    batch: Any,
    weights: AlignSection,
    loss_fn: LossFn = causal_lm_losses,
) -> Signals:
    """Return the signals to match on a batch; without a gradient weight there is no backward pass."""
    with layer_outputs(target, weights.hidden_weight > 0) as hidden:
        if not weights.gradient_weight:
            with frozen(target), torch.no_grad():
                outputs, _ = outputs_and_losses(target, batch, loss_fn)
                return Signals({}, outputs, [state.detach() for state in hidden])
        watched = {name: target.get_submodule(name) for name in layers}
        gradients: dict[str, Tensor] = {}
        kept: list[Tensor] = []

        def losses() -> Tensor:
            outputs, found = outputs_and_losses(target, batch, loss_fn)
            kept.append(outputs.detach())
            return found

        def sink(name: str, h: Tensor, delta: Tensor) -> None:
            rows = delta.reshape(-1, delta.shape[-1]).to(accumulation_dtype(delta))
            gradients[name] = rows.mT @ h.reshape(-1, h.shape[-1]).to(rows.dtype) / len(h)

        with frozen(target):
            watched_backward(target, watched, losses, sink)
        return Signals(gradients, kept[0], [state.detach() for state in hidden])


@contextmanager
def layer_outputs(model: nn.Module, wanted: bool) -> Iterator[list[Tensor]]:
    """Collect the output of each decoder layer while the model runs, or nothing if not wanted."""
    states: list[Tensor] = []

    def keep(_module: nn.Module, _inputs: Any, output: Any) -> None:
        states.append(output[0] if isinstance(output, tuple) else output)

    handles = [layer.register_forward_hook(keep) for layer in decoder_layers(model)[1]] if wanted else []  # pyright: ignore[reportArgumentType]
    try:
        yield states
    finally:
        for handle in handles:
            handle.remove()
