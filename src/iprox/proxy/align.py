"""Stage 2: tune the factors until the proxy's gradients match the target's and its logits stay anchored.

Source: arXiv:2602.17835, section 4.2; design 2. By the chain rule a weight gradient ∇_W [m, n] is seen from the
factors of W = AB as ∇_A = ∇_W Bᵀ and ∇_B = Aᵀ ∇_W. The loss of a batch is

    gradient_weight · mean over aligned layers of  d(∇_A ℓ, sg(∇_W ℓ_target) Bᵀ) + d(∇_B ℓ, Aᵀ sg(∇_W ℓ_target))
    + kl_weight · τ² · KL(target ‖ proxy) of the logits at temperature τ on supervised tokens,

d the cosine distance, ℓ the batch's mean per-example loss, sg the stop-gradient. Only factors train. With a
gradient_weight of 0 only the logits are distilled: first-order, at a third of the cost.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from iprox.data.batching import Batch
from iprox.errors import InputError
from iprox.models.layers import LowRankLinear, low_rank_layers
from iprox.models.loss import causal_lm_logits, mean_by_row
from iprox.models.memory import RELEASE_EVERY, release_memory
from iprox.models.observe import frozen, watched_backward
from iprox.models.precision import accumulation_dtype, cast_parameters


@dataclass(frozen=True, slots=True)
class AlignmentStep:
    """One optimiser step: the whole loss, its gradient part, its KL part (per token, nats), the learning rate.

    The gradient part is None where it has no weight, and so was not computed.
    """

    step: int
    loss: float
    gradient: float | None
    kl: float
    learning_rate: float


@dataclass(slots=True)
class AlignmentHistory:
    """What alignment did; written beside the proxy as `alignment.json`."""

    steps: list[AlignmentStep] = field(default_factory=list)
    tokens: int = 0
    seconds: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


def cosine_distance(x: Tensor, y: Tensor) -> Tensor:
    """1 - cos of two matrices seen as vectors, a scalar."""
    return 1 - F.cosine_similarity(x.flatten(), y.flatten(), dim=0)


def kl_divergence(target_logits: Tensor, proxy_logits: Tensor, temperature: float) -> Tensor:
    """τ² KL(target ‖ proxy) at temperature τ, per row of logits [N, V]. Returns [N] in float32 or better."""
    dtype = accumulation_dtype(proxy_logits)
    reference = F.log_softmax(target_logits.to(dtype) / temperature, dim=-1)
    log_q = F.log_softmax(proxy_logits.to(dtype) / temperature, dim=-1)
    return temperature**2 * F.kl_div(log_q, reference, reduction="none", log_target=True).sum(-1)


def gradient_distance(layers: dict[str, LowRankLinear], loss: Tensor, target: dict[str, Tensor]) -> Tensor:
    """The gradient part of the alignment loss, differentiable in the factors (second order).

    Args:
        layers: the proxy's low-rank layers.
        loss: ℓ of the proxy on the batch, a scalar with its graph.
        target: ∇_W ℓ_target [m, n] by layer name, without a graph.
    """
    names = list(layers)
    factors = [weight for name in names for weight in (layers[name].A.weight, layers[name].B.weight)]
    gradients = torch.autograd.grad(loss, factors, create_graph=True, allow_unused=True)
    distances = []
    for name, grad_A, grad_B in zip(names, gradients[::2], gradients[1::2], strict=True):
        if grad_A is None or grad_B is None or name not in target:
            continue  # an expert that no token of the batch was routed to, on the proxy or on the target
        A, B = layers[name].A.weight, layers[name].B.weight
        G = target[name].to(A.dtype)
        distances.append(cosine_distance(grad_A, G @ B.mT) + cosine_distance(grad_B, A.mT @ G))
    return torch.stack(distances).mean()


def alignment_loss(
    proxy: nn.Module,
    layers: dict[str, LowRankLinear],
    batch: Batch,
    target_gradients: dict[str, Tensor],
    target_logits: Tensor,
    *,
    gradient_weight: float = 1.0,
    kl_weight: float,
    temperature: float,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """The whole loss of one batch, its gradient part (None without weight) and its KL part, scalars with their graph.

    For the gradient part the proxy runs with the `math` attention kernel: it is the one with a second derivative.
    """
    with sdpa_kernel(SDPBackend.MATH) if gradient_weight else nullcontext():
        logits, targets, rows = causal_lm_logits(proxy, batch)
        logits = logits.to(accumulation_dtype(logits))
        count = batch.input_ids.shape[0]
        kl = kl_divergence(target_logits, logits, temperature).mean()
        if not gradient_weight:
            return kl_weight * kl, None, kl
        losses = mean_by_row(F.cross_entropy(logits, targets, reduction="none"), rows, count)
        gradient = gradient_distance(layers, losses.mean(), target_gradients)
    return gradient_weight * gradient + kl_weight * kl, gradient, kl


def target_signals(target: nn.Module, layer_names: Sequence[str], batch: Batch) -> tuple[dict[str, Tensor], Tensor]:
    """What the proxy is to match on a batch: ∇_W of the mean loss by layer name, and the logits [N, V].

    Without layers there is no backward pass.
    """
    if not layer_names:
        with frozen(target), torch.no_grad():
            return {}, causal_lm_logits(target, batch)[0]
    layers = {name: target.get_submodule(name) for name in layer_names}
    gradients: dict[str, Tensor] = {}
    kept: list[Tensor] = []
    count = batch.input_ids.shape[0]

    def losses() -> Tensor:
        logits, targets, rows = causal_lm_logits(target, batch)
        kept.append(logits.detach())
        logits = logits.to(accumulation_dtype(logits))
        return mean_by_row(F.cross_entropy(logits, targets, reduction="none"), rows, count)

    def sink(name: str, h: Tensor, delta: Tensor) -> None:
        rows = delta.reshape(-1, delta.shape[-1]).to(accumulation_dtype(delta))
        gradients[name] = rows.mT @ h.reshape(-1, h.shape[-1]).to(rows.dtype) / count

    with frozen(target):
        watched_backward(target, layers, losses, sink)
    return gradients, kept[0]


def align(
    proxy: nn.Module,
    target: nn.Module,
    batches: Sequence[Batch],
    *,
    steps: int,
    learning_rate: float = 1e-4,
    gradient_weight: float = 1.0,
    kl_weight: float = 0.1,
    temperature: float = 2.0,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> AlignmentHistory:
    """Align a proxy with its target, in place.

    AdamW without weight decay on float32 master copies of the factors, a tenth of the steps as warm-up, cosine
    decay, gradient norm clipped to 1. Adam's steps have unit size whatever the factor's scale, so the learning
    rate of each factor is `learning_rate` times its own root mean square over the mean root mean square of all:
    every factor moves by the same share of itself.

    Cost per token: target 6P, proxy about 16P′ FLOPs (forward, backward, and the backward of both); without the
    gradient part 2P and 6P′.

    Args:
        proxy: the model to tune; its dtype is restored at the end.
        target: the model to match; left as it was.
        batches: the alignment batches; each is one optimiser step.
        steps: optimiser steps; batches are taken in a new seeded order each time round.
        learning_rate: peak step size of a factor of average scale.
        gradient_weight: of the gradient part; 0 leaves it out.
        kl_weight: λ_KL.
        temperature: τ.
        seed: of the order.
        progress: called with 1 after each step.

    Raises:
        InputError: the proxy has no low-rank layer, there is nothing to align on, or both weights are 0.
        FloatingPointError: the loss is not finite (the step is named).
    """
    started = time.perf_counter()
    layers = low_rank_layers(proxy)
    if not layers:
        raise InputError(
            "the proxy has no low-rank layer, so there is nothing to align; was it made by iprox compress?"
        )
    if not batches:
        raise InputError("no supervised example to align on")
    if not gradient_weight and not kl_weight:
        raise InputError("gradient_weight and kl_weight are both 0, so there is nothing to align by")
    dtype = next(iter(layers.values())).A.weight.dtype
    history = AlignmentHistory()
    training = proxy.training
    flags = {id(parameter): parameter.requires_grad for parameter in proxy.parameters()}
    proxy.eval()  # dropout would make the proxy's gradient noisy against the target's
    proxy.requires_grad_(False)
    cast_parameters(proxy, torch.promote_types(dtype, torch.float32))
    trainable = [factor for layer in layers.values() for factor in (layer.A.weight, layer.B.weight)]
    for factor in trainable:
        factor.requires_grad_(True)
    scales = torch.stack([factor.detach().square().mean().sqrt() for factor in trainable])
    rates = (scales / scales.mean()).tolist()
    optimizer = torch.optim.AdamW(
        [{"params": [factor], "scale": rate} for factor, rate in zip(trainable, rates, strict=True)],
        lr=learning_rate,
        weight_decay=0.0,
    )
    generator = torch.Generator().manual_seed(seed)
    rounds = (torch.randperm(len(batches), generator=generator).tolist() for _ in itertools.count())
    order = itertools.islice(itertools.chain.from_iterable(rounds), steps)
    try:
        for step, index in enumerate(order, start=1):
            batch = batches[index]
            if step % RELEASE_EVERY == 0:
                release_memory()
            gradients, logits = target_signals(target, list(layers) if gradient_weight else (), batch)
            loss, gradient, kl = alignment_loss(
                proxy,
                layers,
                batch,
                gradients,
                logits,
                gradient_weight=gradient_weight,
                kl_weight=kl_weight,
                temperature=temperature,
            )
            if not torch.isfinite(loss):
                raise FloatingPointError(f"the alignment loss is {loss.item()} at step {step} (batch {index})")
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trainable, 1.0)
            rate = learning_rate * schedule(step, steps)
            for group in optimizer.param_groups:
                group["lr"] = rate * group["scale"]
            optimizer.step()
            history.steps.append(
                AlignmentStep(step, loss.item(), None if gradient is None else gradient.item(), kl.item(), rate)
            )
            history.tokens += int(batch.lengths.sum())
            if progress is not None:
                progress(1)
    finally:
        cast_parameters(proxy, dtype)
        proxy.train(training)
        for parameter in proxy.parameters():
            parameter.requires_grad_(flags.get(id(parameter), True))
    history.seconds = time.perf_counter() - started
    return history


def schedule(step: int, total: int) -> float:
    """Share of the peak learning rate at a step (1-based): linear over the first tenth, then cosine to 0."""
    warm = max(1, total // 10)
    if step <= warm:
        return step / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, total - warm)))
