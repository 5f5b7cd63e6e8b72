"""Influence functions: I(z; V) = ⟨G(z), (F + λI)⁻¹ Ḡ(V)⟩, block-diagonal over layers (Koh and Liang, arXiv:1703.04730).

The inverse is taken of the few validation gradients, once; candidates are then contracted with the result as with Ḡ
itself in TracIn, so a pool costs not one FLOP more. The curvature is measured on a sample of the pool: K-FAC, or EK-FAC
with its corrected eigenvalues.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from iprox.data import Batch
from iprox.influence.curvature import EigenBasis, KroneckerMoments, with_ones
from iprox.influence.estimators.base import GradientEstimator, Inputs, QueryTokens
from iprox.influence.gradients import ModelGradient
from iprox.models import flops
from iprox.models.layers import has_bias, influence_layers
from iprox.models.loss import LossFn, causal_lm_losses
from iprox.models.observe import Sink, frozen, watched_backward
from iprox.proxy.moments import Labels, counted_tokens, sampled_labels


class KroneckerInfluence(GradientEstimator):
    """Influence functions with the K-FAC curvature, or with `corrected` the EK-FAC one."""

    def __init__(self, name: str, *, corrected: bool) -> None:
        super().__init__(name)
        self.corrected = corrected

    def curvature(self, inputs: Inputs) -> dict[str, EigenBasis]:
        """Return the curvature of each layer: with labels sampled from the model (the true Fisher), as kronfluence.

        The labels of a model that is no language model cannot be sampled, so the data's are taken.
        """
        return kronecker_curvature(
            inputs.source,
            influence_layers(inputs.source),
            inputs.sample,
            corrected=self.corrected,
            labels="sampled" if inputs.loss_fn is causal_lm_losses else "data",
            seed=inputs.seed,
            loss_fn=inputs.loss_fn,
        )

    def precondition(self, means: dict[str, ModelGradient], inputs: Inputs) -> dict[str, ModelGradient]:
        """Return (F + λI)⁻¹ Ḡ of every task. Memory, floats per layer: m² + n², and mn more for EK-FAC.

        Raises:
            FloatingPointError: a result is not finite (the layer is named).
        """
        bases, damping = self.curvature(inputs), inputs.settings.damping
        solved = {
            task: {name: bases[name].solve(part, damping) if name in bases else part for name, part in mean.items()}
            for task, mean in means.items()
        }
        check_solved(means, solved)
        return solved

    def bases(self, inputs: Inputs) -> dict[str, EigenBasis]:
        """Return the curvature, which single examples are divided by on the way into their shared bases."""
        bases = self.curvature(inputs)
        layers = influence_layers(inputs.source)
        warn_of_unmoved(sorted(name for name in layers if name not in bases or not bases[name].eigenvalues.any()))
        return bases

    def query_flops(self, model: nn.Module, read: QueryTokens) -> float:
        """Return the FLOPs of validation gradients, and of the curvature and its division.

        K-FAC: a forward pass to draw labels, a forward and a backward pass, 2m² + 2n² per layer and token; then two
        eigendecompositions, 9m³ + 9n³, and 4mn(m+n) per task. EK-FAC: the same passes and products again, in the basis,
        and 2mn.
        """
        layers, tokens = flops.layers_of(model), read.curvature_tokens
        drawing = flops.forward_pass_flops(model, tokens, read.curvature_supervised)
        squares = sum(2.0 * (m**2 + n**2) * share for m, n, share in layers)
        bases = sum(9.0 * (m**3 + n**3) for m, n, _ in layers)
        solves = read.tasks * sum(4.0 * m * n * (m + n) for m, n, _ in layers)
        once = 3 * drawing + tokens * squares
        measured = 2 * once + tokens * flops.contraction_flops(model) if self.corrected else once
        return super().query_flops(model, read) + bases + solves + measured


def kronecker_curvature(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    batches: Sequence[Any],
    *,
    corrected: bool = True,
    labels: Labels = "sampled",
    seed: int = 0,
    loss_fn: LossFn = causal_lm_losses,
) -> dict[str, EigenBasis]:
    """Return the K-FAC curvature of each layer, or with `corrected` the EK-FAC one.

    Args:
        model: left as it was.
        layers: from `influence_layers`.
        batches: the sample; read twice for EK-FAC.
        corrected: measure the eigenvalues in the basis.
        labels: `sampled` from the model (true Fisher) or the `data`'s (empirical).
        seed: seed for sampled labels; both readings draw the same.
        loss_fn: per-example losses of a model that is no language model.

    Returns:
        By layer name; layers that no token reached are left out.
    """
    moments: dict[str, KroneckerMoments] = {}

    def measure(name: str, h: Tensor, delta: Tensor) -> None:
        moments.setdefault(name, KroneckerMoments()).add(with_ones(h, has_bias(layers[name])), delta)

    examples = read_sample(model, layers, batches, measure, loss_fn, labels, seed)
    bases = {name: each.basis(examples) for name, each in moments.items()}
    if corrected:
        for basis in bases.values():
            basis.eigenvalues.zero_()

        def correct(name: str, h: Tensor, delta: Tensor) -> None:
            basis = bases[name]
            basis.eigenvalues += basis.squares(with_ones(h, has_bias(layers[name])), delta) / examples

        read_sample(model, layers, batches, correct, loss_fn, labels, seed)
    return bases


def check_solved(means: Mapping[str, ModelGradient], solved: Mapping[str, ModelGradient]) -> None:
    """Warn of layers without curvature, and refuse results that are not finite.

    Raises:
        FloatingPointError: a result is not finite (the layer is named).
    """
    warn_of_unmoved(sorted({name for task, mean in means.items() for name in mean if solved[task][name] is mean[name]}))
    for mean in solved.values():
        for name, part in mean.items():
            if not torch.isfinite(part.squared_norm()):
                raise FloatingPointError(f"the preconditioned gradient of {name} is not finite; try --dtype float32")


def warn_of_unmoved(layers: Sequence[str]) -> None:
    """Warn of layers that no example of the curvature sample moved, so that there is nothing to divide by."""
    if layers:
        warnings.warn(
            f"no example of the curvature sample moved {layers[0]} ({len(layers)} layers in all): their validation "
            "gradients are used as they are; take more curvature examples",
            stacklevel=3,
        )


def read_sample(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    batches: Sequence[Any],
    sink: Sink,
    loss_fn: LossFn,
    labels: Labels = "data",
    seed: int = 0,
) -> int:
    """Feed the sample's inputs and output gradients to `sink`. Returns the number of examples."""
    generator = torch.Generator().manual_seed(seed)
    count = 0
    with frozen(model):
        for batch in batches:
            counted = None
            if isinstance(batch, Batch):
                if labels == "sampled":
                    batch = sampled_labels(model, batch, generator)
                counted = counted_tokens(batch, "all")
            losses = watched_backward(model, layers, lambda batch=batch: loss_fn(model, batch), sink, counted)
            count += len(losses)
    return count
