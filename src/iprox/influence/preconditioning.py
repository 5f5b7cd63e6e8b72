"""Influence functions: I(z; V) = ⟨G(z), (F + λI)⁻¹ Ḡ(V)⟩, block-diagonal over layers (Koh and Liang, arXiv:1703.04730).

The inverse is taken of the few validation gradients, once; candidates then meet the result as they would meet Ḡ itself
under TracIn, so a pool costs not one FLOP more. The curvature is measured on a sample of the pool.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from iprox.influence.estimators import ModelGradient, has_bias
from iprox.influence.gradients import LayerGradient, contract, squared_norms, summed_gradient
from iprox.kronecker.eigen import EigenBasis, kronecker_curvature
from iprox.kronecker.sample import Labels, SampleSettings, read_sample
from iprox.models.layers import GradientSpace, influence_layers, weight_shape
from iprox.models.loss import LossFn, causal_lm_losses

# What is scored: TracIn, of gradients or of Adam's directions, or an influence function by one of three inverses.
InfluenceEstimator = Literal["tracin", "adam", "influence-function", "datainf"]
KroneckerCurvature = Literal["ek-fac", "k-fac"]
Curvature = Literal["ek-fac", "k-fac", "datainf"]


def precondition(
    model: nn.Module,
    queries: Mapping[str, ModelGradient],
    batches: Sequence[Any],
    curvature: Curvature = "ek-fac",
    *,
    damping: float = 0.1,
    gradient: GradientSpace = "weight",
    loss_fn: LossFn = causal_lm_losses,
    seed: int = 0,
) -> dict[str, ModelGradient]:
    """(F + λI)⁻¹ Ḡ of every task.

    K-FAC reads the sample once, EK-FAC and DataInf twice. Memory, floats a layer: m² + n², and mn more for EK-FAC;
    DataInf takes mn a task.

    Args:
        model: where the gradients were taken.
        queries: mean validation gradients by task, from `mean_gradient`.
        batches: the sample that curvature is measured on.
        curvature: K-FAC and EK-FAC take labels sampled from the model (the true Fisher), as kronfluence does; DataInf
            takes the data's, as its paper does.
        damping: λ as a share of the mean eigenvalue of each layer's curvature.
        gradient: the space the queries are in.
        loss_fn: per-example losses of a model that is no language model; its labels cannot be sampled, so the data's
            are taken.
        seed: of sampled labels.

    Raises:
        FloatingPointError: a result is not finite (the layer is named).
        ValueError: no example, an unknown curvature, or a damping that is not above 0.
    """
    if damping <= 0:
        raise ValueError(f"damping must be above 0, not {damping}")
    if curvature not in get_args(Curvature):
        raise ValueError(f"unknown curvature {curvature!r}; known: {', '.join(get_args(Curvature))}")
    if not batches:
        raise ValueError("the curvature needs a sample")
    if curvature == "datainf":
        layers = influence_layers(model, gradient)
        solved = _datainf(model, layers, queries, batches, damping, loss_fn)
    else:
        bases = curvature_of(model, batches, curvature, gradient=gradient, loss_fn=loss_fn, seed=seed)
        solved = {
            task: {name: divided(part, bases[name], damping) if name in bases else part for name, part in query.items()}
            for task, query in queries.items()
        }
    unmoved = sorted({name for task, query in queries.items() for name in query if solved[task][name] is query[name]})
    warn_of_unmoved(unmoved)
    for query in solved.values():
        for name, part in query.items():
            if not torch.isfinite(part.squared_norm()):
                raise FloatingPointError(
                    f"the preconditioned gradient of {name} is not finite; try --set dtype=float32"
                )
    return solved


def warn_of_unmoved(layers: Sequence[str]) -> None:
    """Warn of layers that no example of the curvature sample moved, so that there is nothing to divide by."""
    if layers:
        warnings.warn(
            f"no example of the curvature sample moved {layers[0]} ({len(layers)} layers in all): their validation "
            "gradients are used as they are; take more curvature examples",
            stacklevel=3,
        )


def curvature_of(
    model: nn.Module,
    batches: Sequence[Any],
    curvature: KroneckerCurvature = "ek-fac",
    *,
    gradient: GradientSpace = "weight",
    loss_fn: LossFn = causal_lm_losses,
    seed: int = 0,
) -> dict[str, EigenBasis]:
    """The curvature of each layer, with labels as `precondition` has them.

    Args:
        model: left as it was.
        batches: the sample that curvature is measured on.
        curvature: `ek-fac` or `k-fac`.
        gradient: the space of the layers.
        loss_fn: as for `precondition`.
        seed: seed for sampled labels.
    """
    labels: Labels = "sampled" if loss_fn is causal_lm_losses else "data"
    return kronecker_curvature(
        model,
        influence_layers(model, gradient),
        batches,
        corrected=curvature == "ek-fac",
        labels=labels,
        seed=seed,
        loss_fn=loss_fn,
    )


def _datainf(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    queries: Mapping[str, ModelGradient],
    batches: Sequence[Any],
    damping: float,
    loss_fn: LossFn,
) -> dict[str, ModelGradient]:
    """The mean over examples of (λI + g gᵀ)⁻¹ Ḡ, layer by layer."""
    squares: dict[str, float] = {}

    def measure(name: str, h: Tensor, delta: Tensor) -> None:
        squares[name] = squares.get(name, 0.0) + float(squared_norms(h, delta, has_bias(layers[name])).sum())

    settings = SampleSettings(balanced=False)
    examples = read_sample(model, layers, batches, measure, loss_fn, settings).examples
    ridges: dict[str, float] = {}
    for name, total in squares.items():
        m, n = weight_shape(layers[name])
        numbers = m * n + (m if has_bias(layers[name]) else 0)
        ridges[name] = damping * total / examples / numbers
    taken: dict[str, ModelGradient] = {task: {} for task in queries}

    def project(name: str, h: Tensor, delta: Tensor) -> None:
        if ridges[name] == 0:
            return
        bias = has_bias(layers[name])
        norms = squared_norms(h, delta, bias)
        for task, query in queries.items():
            if name not in query:
                continue
            weights = datainf_weights(contract(h, delta, query[name].to(h.dtype)), norms, ridges[name])
            part = summed_gradient(h, delta * weights[:, None, None].to(delta.dtype), bias)
            before = taken[task].get(name)
            taken[task][name] = part if before is None else _combined(before, part, 1.0)

    read_sample(model, layers, batches, project, loss_fn, settings)
    solved: dict[str, ModelGradient] = {}
    for task, query in queries.items():
        solved[task] = {}
        for name, part in query.items():
            if name in taken[task]:
                ridge = ridges[name]
                part = _combined(part, taken[task][name], -1 / examples)
                part = LayerGradient(part.weight / ridge, None if part.bias is None else part.bias / ridge)
            solved[task][name] = part
    return solved


def divided(gradient: LayerGradient, basis: EigenBasis, damping: float) -> LayerGradient:
    """Return (F + λI)⁻¹ Ḡ of one layer, or Ḡ itself where the curvature is zero."""
    solved = basis.solve(as_matrix(gradient), damping)
    return gradient if solved is None else as_gradient(solved.to(gradient.weight.dtype), gradient.bias is not None)


def as_matrix(gradient: LayerGradient) -> Tensor:
    """Return a layer's gradient with that of the bias as its last column."""
    if gradient.bias is None:
        return gradient.weight
    return torch.cat([gradient.weight, gradient.bias[:, None]], dim=1)


def as_gradient(matrix: Tensor, bias: bool) -> LayerGradient:
    """Return the inverse of `as_matrix`."""
    return LayerGradient(matrix[:, :-1], matrix[:, -1]) if bias else LayerGradient(matrix, None)


def datainf_weights(products: Tensor, squared_norms: Tensor, ridge: float) -> Tensor:
    """Return how much of each example's gradient DataInf takes out of Ḡ: ⟨G(z), Ḡ⟩ / (λ + ‖G(z)‖²), any equal shapes.

    DataInf (Kwon et al., arXiv:2310.00902) takes the mean of inverses for the inverse of the mean. By Sherman and
    Morrison (λI + g gᵀ)⁻¹ v = (v - g · ⟨g, v⟩ / (λ + ‖g‖²)) / λ, and DataInf is its mean over examples, λ a share of
    the mean eigenvalue E‖G(z)‖² / (mn).
    """
    return products / (ridge + squared_norms)


def _combined(one: LayerGradient, other: LayerGradient, factor: float) -> LayerGradient:
    bias = None if one.bias is None or other.bias is None else one.bias + factor * other.bias
    return LayerGradient(one.weight + factor * other.weight, bias)
