"""Influence functions: I(z; V) = ⟨G(z), (F + λI)⁻¹ Ḡ(V)⟩, block-diagonal over layers (Koh and Liang, arXiv:1703.04730).

The inverse is applied once, to the few validation gradients; candidates are contracted with the result as with Ḡ in
TracIn, so scoring a pool costs no more than TracIn. The curvature is measured on a sample of the pool: K-FAC, or EK-FAC
with corrected eigenvalues.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from iprox.influence.estimators.base import GradientEstimator, Inputs, QueryTokens
from iprox.influence.gradients import LayerGradient, ModelGradient
from iprox.kronecker.eigen import EigenBasis, curvature_groups, kronecker_curvature, together
from iprox.kronecker.kept import KeptCurvature, is_kept, keep_curvature
from iprox.models import flops
from iprox.models.layers import influence_layers
from iprox.models.loss import causal_lm_losses


class KroneckerInfluence(GradientEstimator):
    """Influence functions with K-FAC curvature, or with EK-FAC curvature if `corrected`."""

    def __init__(self, *, corrected: bool) -> None:
        self.corrected = corrected

    def curvature(self, inputs: Inputs) -> Mapping[str, EigenBasis]:
        """Return the curvature of each layer, with labels sampled from the model (true Fisher), as in kronfluence.

        A model that is not a language model uses the labels of the data, as its labels cannot be sampled.
        """
        folder = inputs.curvature
        if folder is None:
            return together(self.measured(inputs, inputs.layers))
        if not is_kept(folder):
            keep_curvature(self.measured(inputs, influence_layers(inputs.source)), folder)
        return KeptCurvature(folder, next(inputs.source.parameters()).device)

    def measured(self, inputs: Inputs, layers: Mapping[str, nn.Module]) -> Iterator[dict[str, EigenBasis]]:
        """Measure the curvature of some layers, and yield it a group at a time."""
        return kronecker_curvature(
            inputs.source,
            layers,
            inputs.sample,
            corrected=self.corrected,
            labels="sampled" if inputs.loss_fn is causal_lm_losses else "data",
            seed=inputs.seed,
            loss_fn=inputs.loss_fn,
        )

    def precondition(self, means: dict[str, ModelGradient], inputs: Inputs) -> dict[str, ModelGradient]:
        """Return (F + λI)⁻¹ Ḡ of every task. Memory: m² + n² floats per layer, and mn more for EK-FAC.

        Raises:
            FloatingPointError: a result is not finite (the message names the layer).
        """
        bases, damping = self.curvature(inputs), inputs.settings.damping
        solved = {task: dict(mean) for task, mean in means.items()}
        for name in inputs.layers:
            if (basis := bases.get(name)) is not None:
                for task, mean in means.items():
                    solved[task][name] = divided(mean[name], basis, damping)
        check_solved(means, solved)
        return solved

    def bases(self, inputs: Inputs) -> Mapping[str, EigenBasis]:
        """Return the curvature, by which single examples are divided when they are put in shared bases."""
        bases = self.curvature(inputs)
        warn_of_unmoved(sorted(name for name in inputs.layers if name not in bases))
        return bases

    def query_flops(self, model: nn.Module, read: QueryTokens) -> float:
        """Return the FLOPs of validation gradients, of the curvature and of applying its inverse.

        K-FAC: a forward pass to sample labels, a forward and a backward pass, and 2m² + 2n² per layer and token; then
        two eigendecompositions, 9m³ + 9n³, and 4mn(m+n) per task. EK-FAC: the same passes and products again, in the
        eigenbasis, and 2mn per token.
        """
        solves = read.tasks * sum(4.0 * m * n * (m + n) for m, n, _ in flops.layers_of(model))
        return super().query_flops(model, read) + solves + self.curvature_flops(model, read)

    def curvature_flops(self, model: nn.Module, read: QueryTokens) -> float:
        """Return the FLOPs of measuring the curvature; 0 where an earlier stage has measured it."""
        if not (tokens := read.curvature_tokens):
            return 0.0
        layers = flops.layers_of(model)
        groups = len(curvature_groups(influence_layers(model)))
        drawing = groups * flops.forward_pass_flops(model, tokens, read.curvature_supervised)
        squares = sum(2.0 * (m**2 + n**2) * share for m, n, share in layers)
        once = 3 * drawing + tokens * squares
        measured = 2 * once + tokens * flops.contraction_flops(model) if self.corrected else once
        return measured + sum(9.0 * (m**3 + n**3) for m, n, _ in layers)


def divided(gradient: LayerGradient, basis: EigenBasis, damping: float) -> LayerGradient:
    """Return (F + λI)⁻¹ Ḡ of one layer, or Ḡ itself if the curvature is zero."""
    solved = basis.solve(as_matrix(gradient), damping)
    if solved is None:
        return gradient
    solved = solved.to(gradient.weight.dtype)
    return LayerGradient(solved, None) if gradient.bias is None else LayerGradient(solved[:, :-1], solved[:, -1])


def as_matrix(gradient: LayerGradient) -> Tensor:
    """Return a layer's gradient with the bias gradient as its last column."""
    if gradient.bias is None:
        return gradient.weight
    return torch.cat([gradient.weight, gradient.bias[:, None]], dim=1)


def check_solved(means: Mapping[str, ModelGradient], solved: Mapping[str, ModelGradient]) -> None:
    """Warn about layers without curvature, and refuse results that are not finite.

    Raises:
        FloatingPointError: a result is not finite (the message names the layer).
    """
    warn_of_unmoved(sorted({name for task, mean in means.items() for name in mean if solved[task][name] is mean[name]}))
    for mean in solved.values():
        for name, part in mean.items():
            if not torch.isfinite(part.squared_norm()):
                raise FloatingPointError(
                    f"the preconditioned gradient of {name} is not finite; try --set dtype=float32"
                )


def warn_of_unmoved(layers: Sequence[str]) -> None:
    """Warn about layers whose gradients are zero on the whole curvature sample, so that they have no curvature."""
    if layers:
        warnings.warn(
            f"the curvature sample has no gradient for {layers[0]} ({len(layers)} layers in all): their validation "
            "gradients are used as they are; use more curvature examples",
            stacklevel=3,
        )
