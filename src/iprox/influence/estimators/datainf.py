"""DataInf: influence functions with the mean of inverses in place of the inverse of the mean (arXiv:2310.00902).

Each example's curvature g gᵀ has rank one, so its damped inverse has a closed form (`datainf_weights`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from iprox.influence.estimators.base import GradientEstimator, Inputs, QueryTokens
from iprox.influence.estimators.ekfac import check_solved
from iprox.influence.gradients import LayerGradient, ModelGradient, contract, squared_norms, summed_gradient
from iprox.kronecker.sample import SampleSettings, read_sample
from iprox.models import flops
from iprox.models.layers import has_bias, weight_shape
from iprox.models.loss import LossFn


class DataInf(GradientEstimator):
    """DataInf. Its inverse is applied to a task's mean gradient, so it has no scores by validation example."""

    def precondition(self, means: dict[str, ModelGradient], inputs: Inputs) -> dict[str, ModelGradient]:
        """Return the mean of (λI + g gᵀ)⁻¹ Ḡ over the sample, for every task.

        Raises:
            FloatingPointError: a result is not finite (the message names the layer).
        """
        layers = inputs.layers
        solved = datainf(inputs.source, layers, means, inputs.sample, inputs.settings.damping, inputs.loss_fn)
        check_solved(means, solved)
        return solved

    def query_flops(self, model: nn.Module, read: QueryTokens) -> float:
        """Return the FLOPs of validation gradients and two passes over the sample.

        Each pass computes norms (at most 2mn per token); the second adds 4mn per token and task.
        """
        reading = 2 * flops.forward_pass_flops(model, read.curvature_tokens, read.curvature_supervised)
        weights = read.curvature_tokens * flops.contraction_flops(model)
        return super().query_flops(model, read) + 2 * reading + (2 + 2 * read.tasks) * weights


def datainf(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    queries: Mapping[str, ModelGradient],
    batches: Sequence[Any],
    damping: float,
    loss_fn: LossFn,
) -> dict[str, ModelGradient]:
    """Return the mean over examples of (λI + g gᵀ)⁻¹ Ḡ, layer by layer. Memory: mn floats per layer and task.

    Args:
        model: model that the gradients were taken on.
        layers: its layers, by name.
        queries: mean validation gradients Ḡ by task.
        batches: batches of the sample that g comes from, with the data's labels; read twice.
        damping: λ as a share of the mean eigenvalue of each layer's curvature.
        loss_fn: per-example losses, for a model that is not a language model.
    """
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


def datainf_weights(products: Tensor, squared_norms: Tensor, ridge: float) -> Tensor:
    """Return the multiple of each example's gradient that DataInf subtracts from Ḡ: ⟨G(z), Ḡ⟩ / (λ + ‖G(z)‖²).

    By Sherman and Morrison, (λI + g gᵀ)⁻¹ v = (v - g · ⟨g, v⟩ / (λ + ‖g‖²)) / λ, and DataInf (Kwon et al.,
    arXiv:2310.00902) takes its mean over examples, with λ a share of the mean eigenvalue E‖G(z)‖² / (mn).
    """
    return products / (ridge + squared_norms)


def _combined(one: LayerGradient, other: LayerGradient, factor: float) -> LayerGradient:
    bias = None if one.bias is None or other.bias is None else one.bias + factor * other.bias
    return LayerGradient(one.weight + factor * other.weight, bias)
