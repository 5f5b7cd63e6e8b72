"""Gradients of single validation examples, for scores that do not average over a task's examples."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from iprox.influence.estimators import ExampleGradient, has_bias
from iprox.influence.gradients import LowRankGradient
from iprox.influence.queries import example_gradient
from iprox.models.layers import GradientSpace, influence_layers, low_rank_layers, weight_shape
from iprox.models.loss import LossFn, causal_lm_losses
from iprox.models.observe import frozen, watched_backward


def example_gradients(
    model: nn.Module,
    batches: Iterable[Any],
    gradient: GradientSpace = "factors",
    keep: float = 1.0,
    loss_fn: LossFn = causal_lm_losses,
) -> list[ExampleGradient]:
    """The gradient of every example of a set by itself, low-rank, in the order of the set.

    They are kept in the model's dtype: Σ k(m+n) numbers an example, k at most its tokens.

    Args:
        model: where they are taken.
        batches: whose `indices` say which examples of the set they hold; those without a supervised token are in none.
        gradient: which gradient of a proxy's low-rank layers.
        keep: share of the norm of each layer's gradient that is kept; 1 is exact.
        loss_fn: per-example losses of a model that is no language model.

    Raises:
        FloatingPointError: a gradient is not finite (the layer is named).
        ValueError: no example.
    """
    layers = influence_layers(model, gradient)
    found: dict[int, ExampleGradient] = {}
    current: list[ExampleGradient] = []

    def sink(name: str, h: Tensor, delta: Tensor) -> None:
        for example, x, d in zip(current, h, delta, strict=True):
            if not torch.isfinite(d).all():
                raise FloatingPointError(f"the gradient of {name} is not finite; try --set dtype=float32")
            example[name] = _stored(example_gradient(x, d, has_bias(layers[name]), keep), h.dtype)

    with frozen(model):
        for batch in batches:
            current = [{} for _ in batch.indices]
            watched_backward(model, layers, lambda batch=batch: loss_fn(model, batch), sink)
            found.update(zip(batch.indices, current, strict=True))
    if not found:
        raise ValueError("no example with a supervised token")
    for name, layer in layers.items():
        for example in found.values():
            if name not in example:  # an expert that none of the batch's tokens was routed to
                m, n = weight_shape(layer)
                weight = next(layer.parameters())
                zeros = example_gradient(weight.new_zeros(1, n), weight.new_zeros(1, m), has_bias(layer), 1.0)
                example[name] = _stored(zeros, weight.dtype)
    return [found[index] for index in sorted(found)]


def example_seen_from(example: ExampleGradient, proxy: nn.Module, space: GradientSpace) -> ExampleGradient:
    """A target's gradient of one example as its proxy's layers see it (see `iprox.influence.estimators.seen_from`).

    What a truncation lost is not known in the space of factors, and counts as nothing there.
    """
    seen: ExampleGradient = {}
    low_rank = low_rank_layers(proxy)
    for name in influence_layers(proxy, "weight"):
        part = example[name]
        if name in low_rank and space == "factors":
            factors = low_rank[name].up, low_rank[name].down
            up, down = (factor.weight.detach().to(part.left.dtype) for factor in factors)
            nothing = torch.zeros_like(part.lost)
            seen[f"{name}.up"] = LowRankGradient(part.left, down @ part.right, part.bias, nothing)
            seen[f"{name}.down"] = LowRankGradient(up.mT @ part.left, part.right, None, nothing)
        else:
            seen[name] = part
    return seen


def _stored(gradient: LowRankGradient, dtype: torch.dtype) -> LowRankGradient:
    """The factors in the dtype that they will be multiplied in; the rest in float32 or better."""
    return LowRankGradient(gradient.left.to(dtype), gradient.right.to(dtype), gradient.bias, gradient.lost)
