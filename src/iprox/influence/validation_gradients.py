"""Gradients of a validation set: their mean, or one low-rank gradient per example."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from iprox.data.batching import Batch
from iprox.influence.gradients import (
    ExampleGradient,
    LowRankGradient,
    ModelGradient,
    squared_norms,
    summed_gradient,
)
from iprox.influence.low_rank import truncated
from iprox.kronecker.moments import layer_groups
from iprox.models.experts import expert_layers
from iprox.models.layers import has_bias, influence_layers, signal_like, weight_shape
from iprox.models.loss import LossFn, causal_lm_losses, examples_with_loss
from iprox.models.observe import frozen, watched_backward
from iprox.models.precision import accumulation_dtype

# Bytes that the gradients of one task's examples may take at once.
MEMORY = 2 << 30


def mean_gradient(
    model: nn.Module,
    batches: Iterable[Any],
    loss_fn: LossFn = causal_lm_losses,
    layers: Mapping[str, nn.Module] | None = None,
) -> ModelGradient:
    """Return the mean per-example gradient over a set, Ḡ(V), in float32 or better.

    Forward, backward and one weight GEMM per layer: 6P FLOPs per token, P the parameters of the layers.

    Raises:
        FloatingPointError: a gradient is not finite (the message names the layer).
        ValueError: no example has a supervised token.
    """
    layers = influence_layers(model) if layers is None else layers
    total: ModelGradient = {}
    count = 0

    def sink(name: str, h: Tensor, delta: Tensor) -> None:
        part = summed_gradient(h, delta, has_bias(layers[name]))
        if name in total:
            total[name].weight += part.weight
            if part.bias is not None:
                total[name].bias += part.bias  # pyright: ignore[reportOperatorIssue]
        else:
            total[name] = part

    with frozen(model):
        for batch in batches:
            losses = watched_backward(model, layers, lambda batch=batch: loss_fn(model, batch), sink)
            count += int(examples_with_loss(batch, losses).sum())
    if count == 0:
        raise ValueError("no example with a supervised token")
    _warn_of_silent(model, [name for name in layers if name not in total])
    for name, layer in layers.items():
        if name not in total:  # not called, or an expert without tokens
            (m, n), like = weight_shape(layer), signal_like(layer)
            total[name] = summed_gradient(like.new_zeros(1, n), like.new_zeros(1, m), has_bias(layer))
    for name, part in total.items():
        part.weight /= count
        if part.bias is not None:
            part.bias /= count
        if not torch.isfinite(part.squared_norm()):
            raise FloatingPointError(f"the gradient of {name} is not finite; try --set dtype=float32")
    return total


def _warn_of_silent(model: nn.Module, layers: Iterable[str]) -> None:
    """Warn about layers without a gradient that are no experts."""
    silent = [name for name in layers if name not in expert_layers(model)]
    if silent:
        warnings.warn(
            f"{silent[0]} ({len(silent)} layers in all) was never called as a module in the forward pass, so scores "
            "leave out its gradient",
            stacklevel=3,
        )


def example_gradients(
    model: nn.Module,
    batches: Iterable[Any],
    keep: float = 1.0,
    loss_fn: LossFn = causal_lm_losses,
    layers: Mapping[str, nn.Module] | None = None,
) -> list[ExampleGradient]:
    """Return the low-rank gradient of every example of a set, in the order of the set.

    They are kept in the model's dtype: Σ k(m+n) numbers per example, k at most its number of tokens.

    Args:
        model: model to take the gradients on.
        batches: batches of the set; those of text have the positions of their examples in `indices`.
        keep: share of the norm of each layer's gradient to keep; 1 is exact.
        loss_fn: per-example losses, for a model that is not a language model.
        layers: layers to take gradients of; all influence layers by default.

    Raises:
        FloatingPointError: a gradient is not finite (the message names the layer).
        ValueError: no example has a supervised token.
    """
    layers = influence_layers(model) if layers is None else layers
    found: dict[int, ExampleGradient] = {}
    current: list[ExampleGradient] = []

    def sink(name: str, h: Tensor, delta: Tensor) -> None:
        current.extend({} for _ in range(len(h) - len(current)))  # at the first layer
        for example, x, d in zip(current, h, delta, strict=True):
            if not torch.isfinite(d).all():
                raise FloatingPointError(f"the gradient of {name} is not finite; try --set dtype=float32")
            example[name] = _stored(example_gradient(x, d, has_bias(layers[name]), keep), h.dtype)

    with frozen(model):
        for batch in batches:
            current = []
            watched_backward(model, layers, lambda batch=batch: loss_fn(model, batch), sink)
            places = batch.indices if isinstance(batch, Batch) else range(len(found), len(found) + len(current))
            found.update(zip(places, current, strict=True))
    if not found:
        raise ValueError("no example with a supervised token")
    _warn_of_silent(model, [name for name in layers if not any(name in example for example in found.values())])
    for name, layer in layers.items():
        for example in found.values():
            if name not in example:  # an expert without tokens in the batch
                m, n = weight_shape(layer)
                weight = signal_like(layer)
                zeros = example_gradient(weight.new_zeros(1, n), weight.new_zeros(1, m), has_bias(layer), 1.0)
                example[name] = _stored(zeros, weight.dtype)
    return [found[index] for index in sorted(found)]


def gradients_in_turn(
    model: nn.Module,
    batches: Sequence[Any],
    loss_fn: LossFn = causal_lm_losses,
    layers: Mapping[str, nn.Module] | None = None,
    memory: int = MEMORY,
) -> tuple[Tensor, Iterable[list[ExampleGradient]]]:
    """Return the examples' squared norms over all layers [V], and their exact gradients, some layers at a time.

    Gradients of all layers take Σ L(m+n) numbers for examples of L tokens: 64 of 250 tokens take 10 GB on SmolLM2-135M
    in bfloat16. Where they would take more than `memory` bytes in float32, one pass finds the norms and one each the
    gradients of a group of layers, from the top. The FLOPs in `run.json` count one pass.

    Raises:
        FloatingPointError: a gradient is not finite (the message names the layer).
        ValueError: no example has a supervised token.
    """
    layers = influence_layers(model) if layers is None else layers
    tokens = sum(int(batch.lengths.sum()) for batch in batches if isinstance(batch, Batch))
    groups = layer_groups({name: tokens * sum(weight_shape(layers[name])) for name in reversed([*layers])}, memory)
    if len(groups) < 2:
        whole = example_gradients(model, batches, 1.0, loss_fn, layers)
        return torch.stack([_squared_norm(each) for each in whole]), [whole]
    some = ({name: layers[name] for name in group} for group in groups)
    parts = (example_gradients(model, batches, 1.0, loss_fn, group) for group in some)
    return _squared_norms(model, batches, loss_fn, layers), parts


def _squared_norm(gradient: ExampleGradient) -> Tensor:
    return torch.stack([part.squared_norm() for part in gradient.values()]).sum()


def _squared_norms(
    model: nn.Module, batches: Iterable[Batch], loss_fn: LossFn, layers: Mapping[str, nn.Module]
) -> Tensor:
    """Return ‖G‖² of every example over all layers [V], without keeping the gradients."""
    found: dict[int, Tensor] = {}

    with frozen(model):
        for batch in batches:
            parts: list[Tensor] = []

            def sink(name: str, h: Tensor, delta: Tensor, parts: list[Tensor] = parts) -> None:
                parts.append(squared_norms(h, delta, has_bias(layers[name])))

            watched_backward(model, layers, lambda batch=batch: loss_fn(model, batch), sink)
            found.update(zip(batch.indices, torch.stack(parts).sum(0), strict=True))
    return torch.stack([found[index] for index in sorted(found)])


def example_gradient(h: Tensor, delta: Tensor, bias: bool, keep: float) -> LowRankGradient:
    """Return the gradient of one example as a product, without forming it. Its rank is at most its number of tokens.

    Exact gradients of up to n tokens are δᵀ h as they are. Otherwise, with hᵀ = Q R, G = (δᵀ Rᵀ) Qᵀ: 2Ln² + 2L²m
    FLOPs, and those of truncating it.

    Args:
        h: inputs [L, n].
        delta: output gradients [L, m].
        bias: whether the layer has a bias.
        keep: smallest share of the Frobenius norm to keep, in (0, 1]; 1 is exact.
    """
    dtype = accumulation_dtype(h)
    seen = (delta != 0).any(1)
    h, delta = h[seen], delta[seen]
    if not len(h):
        h, delta = h.new_zeros(1, h.shape[1]), delta.new_zeros(1, delta.shape[1])
    whole_bias = delta.sum(0, dtype=dtype) if bias else None
    lost = h.new_zeros((), dtype=dtype)
    if keep >= 1 and len(h) <= h.shape[1]:
        return LowRankGradient(delta.mT, h.mT, whole_bias, lost)
    right, triangle = torch.linalg.qr(h.mT.to(dtype))
    left = delta.mT.to(dtype) @ triangle.mT
    if keep < 1:
        left, inner, lost = truncated(left, keep)
        right = right @ inner
    return LowRankGradient(left, right, whole_bias, lost)


def _stored(gradient: LowRankGradient, dtype: torch.dtype) -> LowRankGradient:
    """Return the gradient with its factors in the dtype of the products; the rest stays in float32 or better."""
    return LowRankGradient(gradient.left.to(dtype), gradient.right.to(dtype), gradient.bias, gradient.lost)
