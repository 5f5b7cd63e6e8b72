"""LESS: influence of a step that Adam would take (Xia et al., arXiv:2402.04333, section 3.1).

Fine-tuning takes Adam's steps, not SGD's, so the candidate's gradient is replaced by the direction Γ(z) in which Adam
would move with it, from the moments that the warm-up left: I(z; V) = ⟨Γ(z), Ḡ(V)⟩. To first order a step of learning
rate η on z alone lowers the validation loss by η·I(z; V).

Γ divides element by element, so no contraction gives it: a candidate's gradient is formed, layer by layer and a few
candidates at a time. That is 2mn FLOPs per token as a contraction with a whole gradient costs, and about ten passes
over mn numbers per candidate and layer, which memory bounds.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from iprox.errors import InputError
from iprox.influence.estimators.base import GradientEstimator, Inputs
from iprox.influence.gradients import LayerGradient
from iprox.influence.query import LayerQuery
from iprox.influence.scorer import BatchScorer, Normalize, TaskQuery
from iprox.models.checkpoint import candidate_losses
from iprox.models.flops import contraction_flops
from iprox.models.layers import has_bias, weight_shape
from iprox.models.loss import LossFn, causal_lm_losses
from iprox.models.observe import frozen, watched_backward
from iprox.models.optimizer_state import AdamState, Moments
from iprox.models.precision import accumulation_dtype


def adam_direction(gradient: Tensor, moments: Moments, state: AdamState) -> Tensor:
    """Return Γ of gradients [B, ...] of one parameter: the step that Adam takes next with each alone, for a rate of 1.

    m̂ / (√v̂ + ε), m̂ and v̂ the averages with the gradient counted in, bias-corrected; without the decay of
    weights, which all candidates share. Overwrites `gradient`.
    """
    beta1, beta2 = state.betas
    step = state.step + 1
    mean, square = (moment.to(gradient.dtype) for moment in (moments.mean, moments.square))
    scale = gradient.square().mul_(1 - beta2).add_(square, alpha=beta2)
    scale = scale.div_(1 - beta2**step).sqrt_().add_(state.eps)
    return gradient.mul_(1 - beta1).add_(mean, alpha=beta1).div_(1 - beta1**step).div_(scale)


def adam_steps(h: Tensor, delta: Tensor, name: str, bias: bool, state: AdamState) -> Iterator[LayerGradient]:
    """Yield Γ of the candidates of a batch in one layer, a few at a time: weight [B', m, n] and bias [B', m].

    Args:
        h: inputs [B, L, n].
        delta: output gradients [B, L, m], zero on padding.
        name: the layer's name.
        bias: whether it has one.
        state: state of the warm-up's optimizer.
    """
    dtype = accumulation_dtype(h)
    at_once = max(1, h.numel() // (h.shape[2] * delta.shape[2]))  # no more numbers than the inputs themselves
    for x, d in zip(h.split(at_once), delta.split(at_once), strict=True):
        step = LayerGradient(adam_direction((d.mT @ x).to(dtype), state.weights[name], state), None)
        if bias:
            step.bias = adam_direction(d.sum(1, dtype=dtype), state.biases[name], state)
        yield step


def check_state(state: AdamState, layers: Mapping[str, nn.Module]) -> None:
    """Refuse the state of another model.

    Raises:
        InputError: it has no moments of a layer (which is named).
    """
    for name, layer in layers.items():
        known = state.weights.get(name)
        if known is None or tuple(known.mean.shape) != weight_shape(layer):
            raise InputError(f"the optimizer's state has no moments for {name}: it belongs to another model")


class LessScorer(BatchScorer):
    """A `BatchScorer` of Adam's directions instead of gradients.

    Args:
        model: a model, or a proxy of one, whose layers stand for the target's.
        queries: as for `BatchScorer`; single examples one by one.
        state: state of the warm-up's optimizer at this checkpoint.
        normalize: `none`, or `cosine` as in LESS: divide by ‖Γ(z)‖·‖Ḡ(V)‖.
        loss_fn: as for `BatchScorer`.

    Raises:
        InputError: the state belongs to another model (the layer is named).
    """

    def __init__(
        self,
        model: nn.Module,
        queries: Mapping[str, TaskQuery],
        state: AdamState,
        *,
        normalize: Normalize = "none",
        loss_fn: LossFn = causal_lm_losses,
    ) -> None:
        super().__init__(model, queries, normalize=normalize, loss_fn=loss_fn)
        self.state = state
        check_state(state, self.layers)
        self.contraction_flops = contraction_flops(model)

    def norm_flops(self, lengths: Sequence[int]) -> float:
        """Return 0: directions are formed whole, so that their norms cost next to nothing."""
        return 0.0

    def __call__(self, batch: Any, *, by_token: bool = False) -> tuple[Tensor, Tensor]:
        """Score one batch, as `BatchScorer` does.

        Raises:
            TypeError: scores by token are asked for.
        """
        if by_token:
            raise TypeError("Adam's direction of a candidate is no sum over its tokens")
        columns: dict[str, list[Tensor]] = {}
        norms: list[Tensor] = []

        def sink(name: str, h: Tensor, delta: Tensor) -> None:
            (query,) = self._queries[name]
            assert isinstance(query, LayerQuery)  # examples in shared bases are of gradients
            parts, squares = [], []
            for step in adam_steps(h, delta, name, has_bias(self.layers[name]), self.state):
                parts.append(query.inner(step))
                own = step.weight.square().sum((1, 2))
                squares.append(own if step.bias is None else own + step.bias.square().sum(1))
            columns[name] = [torch.cat(parts)]
            norms.append(torch.cat(squares))

        model = self.model
        assert model is not None
        with frozen(model):
            losses = watched_backward(model, self.layers, lambda: self.loss_fn(model, batch), sink)
        return self._normalized(columns, norms, losses.shape), losses

    def _query_dtype(self, layer: nn.Module) -> torch.dtype:
        return accumulation_dtype(next(layer.parameters()))  # Γ is in float32


class Less(GradientEstimator):
    """LESS, whose candidates are whole steps, so that low-rank mean gradients would save nothing."""

    def example_norm(self, inputs: Inputs) -> float:
        """Return the share of the norm that single examples keep: they are contracted with one by one."""
        return inputs.kept_norm

    def scorer(self, inputs: Inputs) -> BatchScorer:
        """Return the scorer.

        Raises:
            InputError: there is no state of the optimizer, or it belongs to another model.
        """
        if inputs.optimizer is None:
            raise InputError(f"the estimator {self.name} needs the state of the warm-up's optimizer")
        return LessScorer(
            inputs.scored,
            self.validation_gradients(inputs),
            inputs.optimizer,
            normalize=inputs.settings.normalize,
            loss_fn=candidate_losses(inputs.scored, inputs.loss_fn),
        )
