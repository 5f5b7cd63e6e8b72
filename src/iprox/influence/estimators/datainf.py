"""DataInf: influence functions with the mean of inverses in place of the inverse of the mean.

Source: Kwon et al., arXiv:2310.00902. Each example's curvature g gᵀ has rank one, so by Sherman and Morrison its damped
inverse has a closed form, (λI + g gᵀ)⁻¹ v = (v - g · ⟨g, v⟩ / (λ + ‖g‖²)) / λ.
"""

from __future__ import annotations

from torch import Tensor, nn

from iprox.influence.estimators.base import GradientEstimator, Inputs, QueryTokens
from iprox.influence.estimators.ekfac import check_solved
from iprox.influence.gradients import ModelGradient, contract, squared_norms, summed_gradient
from iprox.kronecker.sample import Counts, SampleSettings, read_sample
from iprox.models import flops
from iprox.models.layers import has_bias, weight_shape
from iprox.models.observe import Sink


class DataInf(GradientEstimator):
    """DataInf. Its inverse is applied to a task's mean gradient, so it has no scores by validation example."""

    def precondition(self, means: dict[str, ModelGradient], inputs: Inputs) -> dict[str, ModelGradient]:
        """Return the mean over the sample of (λI + g gᵀ)⁻¹ Ḡ, for every task and layer.

        λ is a share of the mean eigenvalue of the layer's curvature, E‖g‖² / (mn). The sample is read twice, with the
        data's labels. Memory: mn floats per layer and task.

        Raises:
            FloatingPointError: a result is not finite (the message names the layer).
        """
        layers = inputs.layers
        squares: dict[str, float] = {}

        def read(sink: Sink) -> Counts:
            settings = SampleSettings(balanced=False)
            return read_sample(inputs.source, layers, inputs.sample, sink, inputs.loss_fn, settings)

        def measure(name: str, h: Tensor, delta: Tensor) -> None:
            squares[name] = squares.get(name, 0.0) + float(squared_norms(h, delta, has_bias(layers[name])).sum())

        examples = read(measure).examples
        ridges: dict[str, float] = {}
        for name, total in squares.items():
            m, n = weight_shape(layers[name])
            ridges[name] = inputs.settings.damping * total / examples / (m * (n + has_bias(layers[name])))
        taken: dict[str, ModelGradient] = {task: {} for task in means}

        def project(name: str, h: Tensor, delta: Tensor) -> None:
            if ridges[name] == 0:
                return
            bias = has_bias(layers[name])
            norms = squared_norms(h, delta, bias)
            for task, mean in means.items():
                if name not in mean:
                    continue
                weights = contract(h, delta, mean[name].to(h.dtype)) / (ridges[name] + norms)
                part = summed_gradient(h, delta * weights[:, None, None].to(delta.dtype), bias)
                before = taken[task].get(name)
                taken[task][name] = part if before is None else before.plus(part)

        read(project)
        solved = {task: dict(mean) for task, mean in means.items()}
        for task, parts in taken.items():
            for name, part in parts.items():
                solved[task][name] = means[task][name].plus(part, -1 / examples).over(ridges[name])
        check_solved(means, solved)
        return solved

    def query_flops(self, model: nn.Module, read: QueryTokens) -> float:
        """Return the FLOPs of validation gradients and two passes over the sample.

        Each pass computes norms (at most 2mn per token); the second adds 4mn per token and task.
        """
        reading = 2 * flops.forward_pass_flops(model, read.curvature_tokens, read.curvature_supervised)
        weights = read.curvature_tokens * flops.contraction_flops(model)
        return super().query_flops(model, read) + 2 * reading + (2 + 2 * read.tasks) * weights
