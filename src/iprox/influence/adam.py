"""Influence of a step that Adam would take (LESS, Xia et al., arXiv:2402.04333, section 3.1).

Fine-tuning takes Adam's steps, not SGD's, so the candidate's gradient is replaced by the direction Γ(z) in which Adam
would move with it, from the moments that the warm-up left: I(z; V) = ⟨Γ(z), Ḡ(V)⟩. To first order a step of learning
rate η on z alone lowers the validation loss by η·I(z; V).

Γ divides element by element, so no contraction gives it: a candidate's gradient is formed, layer by layer and a few
candidates at a time. That is 2mn FLOPs a token as a contraction with a whole gradient costs, and about ten passes
over mn numbers a candidate and layer, which memory bounds.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from iprox.errors import InputError
from iprox.influence.estimators import BatchScorer, Normalize, TaskQuery, has_bias
from iprox.influence.gradients import LayerGradient
from iprox.influence.queries import LayerQuery
from iprox.models.flops import contraction_flops
from iprox.models.layers import weight_shape
from iprox.models.loss import LossFn, causal_lm_losses
from iprox.models.optimizer_state import AdamState, Moments
from iprox.models.precision import accumulation_dtype


def adam_direction(gradient: Tensor, moments: Moments, state: AdamState) -> Tensor:
    """Γ of gradients [B, ...] of one parameter: the step that Adam takes next with each alone, for a rate of 1.

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
    """Γ of the candidates of a batch in one layer, a few at a time: weight [B', m, n] and bias [B', m].

    Args:
        h: inputs [B, L, n].
        delta: output gradients [B, L, m], zero on padding.
        name: of the layer.
        bias: whether it has one.
        state: of the warm-up's optimizer.
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
            raise InputError(f"the optimizer's state has no moments for {name}: it is of another model")


class AdamScorer(BatchScorer):
    """A `BatchScorer` of Adam's directions instead of gradients.

    Args:
        model: a model, or a proxy of one, whose layers stand for the target's.
        queries: as for `BatchScorer`, of the space `weight`.
        state: of the warm-up's optimizer at this checkpoint.
        normalize: `none`, or `cosine` as in LESS: divide by ‖Γ(z)‖·‖Ḡ(V)‖.
        loss_fn: as for `BatchScorer`.

    Raises:
        InputError: the state is of another model (the layer is named).
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
        super().__init__(model, queries, gradient="weight", normalize=normalize, loss_fn=loss_fn)
        self.state = state
        check_state(state, self.layers)
        self.contraction_flops = contraction_flops(model, "weight")

    def norm_flops(self, lengths: Sequence[int]) -> float:
        """None to speak of: directions are formed whole."""
        return 0.0

    def by_token(self, batch: Any) -> Tensor:
        """Not to be had: Adam's direction is no sum over tokens."""
        raise TypeError("Adam's direction of a candidate is no sum over its tokens")

    def _query_dtype(self, layer: nn.Module) -> torch.dtype:
        return accumulation_dtype(next(layer.parameters()))  # Γ is in float32

    def _meet(self, name: str, h: Tensor, delta: Tensor, by_token: bool) -> tuple[Tensor, Tensor]:
        columns: list[Tensor] = []
        norms: list[Tensor] = []
        query = self._queries[name]
        assert isinstance(query, LayerQuery)  # examples in shared bases are of gradients
        for step in adam_steps(h, delta, name, has_bias(self.layers[name]), self.state):
            columns.append(query.inner(step))
            squares = step.weight.square().sum((1, 2))
            norms.append(squares if step.bias is None else squares + step.bias.square().sum(1))
        return torch.cat(columns), torch.cat(norms)
