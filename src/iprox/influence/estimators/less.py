"""LESS: the influence of an Adam step (Xia et al., arXiv:2402.04333, section 3.1).

Fine-tuning takes Adam steps, not SGD steps, so LESS replaces the candidate's gradient with the direction Γ(z) of the
Adam step on it, given the moments at the end of the warm-up: I(z; V) = ⟨Γ(z), Ḡ(V)⟩. To first order, a step of
learning rate η on z alone lowers the validation loss by η·I(z; V).

Γ divides elementwise, so it cannot be contracted without being formed. It is formed layer by layer, for a few
candidates at a time: 2mn FLOPs per token, as for a contraction with a dense gradient, and about ten memory-bound passes
over mn numbers per candidate and layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from iprox.errors import InputError
from iprox.influence.estimators.base import GradientEstimator, Inputs
from iprox.influence.gradients import LayerGradient
from iprox.influence.scorer import BatchScorer, Normalize, TaskQuery
from iprox.influence.shared_basis import SharedQuery
from iprox.models.flops import contraction_flops
from iprox.models.layers import has_bias, signal_like, weight_shape
from iprox.models.loss import LossFn, causal_lm_losses
from iprox.models.optimizer_state import AdamState, Moments
from iprox.models.precision import accumulation_dtype


def adam_direction(gradient: Tensor, moments: Moments, state: AdamState) -> Tensor:
    """Return Γ of gradients [B, ...] of one parameter: the next Adam step on each alone, for a learning rate of 1.

    Γ = m̂ / (√v̂ + ε), with m̂ and v̂ the bias-corrected moments including the gradient. Weight decay is left out, as it
    is the same for all candidates. Overwrites `gradient`.
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
        bias: whether the layer has a bias.
        state: state of the warm-up's optimizer.
    """
    dtype = accumulation_dtype(h)
    at_once = max(1, h.numel() // (h.shape[2] * delta.shape[2]))  # no more memory than the inputs
    for x, d in zip(h.split(at_once), delta.split(at_once), strict=True):
        step = LayerGradient(adam_direction((d.mT @ x).to(dtype), state.weights[name], state), None)
        if bias:
            step.bias = adam_direction(d.sum(1, dtype=dtype), state.biases[name], state)
        yield step


def check_state(state: AdamState, layers: Mapping[str, nn.Module]) -> None:
    """Refuse the optimizer state of another model."""
    for name, layer in layers.items():
        known = state.weights.get(name)
        if known is None or tuple(known.mean.shape) != weight_shape(layer):
            raise InputError(f"the optimizer state has no moments for {name}: it belongs to another model")


class LessScorer(BatchScorer):
    """A `BatchScorer` that contracts Adam steps instead of gradients.

    Args:
        model: a model or a proxy of it.
        queries: validation gradients as for `BatchScorer`, not in shared bases.
        state: state of the warm-up's optimizer at this checkpoint.
        normalize: `none`, or `cosine` as in LESS to divide by ‖Γ(z)‖·‖Ḡ(V)‖.
        loss_fn: per-example losses, as for `BatchScorer`.

    Raises:
        InputError: the state belongs to another model (the message names the layer).
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
        """Return 0: the steps are formed, so their norms cost almost nothing."""
        return 0.0

    def _contract(
        self, columns: dict[str, Tensor], norms: list[Tensor], by_token: bool, name: str, h: Tensor, delta: Tensor
    ) -> None:
        """Add a layer's scores to `columns`, and ‖Γ(z)‖² [B] to `norms`.

        Raises:
            TypeError: `by_token` is set.
        """
        if by_token:
            raise TypeError("a candidate's Adam step is not a sum over its tokens")
        (query,) = self._queries[name]
        assert not isinstance(query, SharedQuery)  # shared bases are for gradients only
        scores, squares = [], []
        for step in adam_steps(h, delta, name, has_bias(self.layers[name]), self.state):
            scores.append(query.inner(step))
            own = step.weight.square().sum((1, 2))
            squares.append(own if step.bias is None else own + step.bias.square().sum(1))
        columns[name] = torch.cat(scores)
        norms.append(torch.cat(squares))

    def _query_dtype(self, layer: nn.Module) -> torch.dtype:
        return accumulation_dtype(signal_like(layer))  # Γ is in float32


class Less(GradientEstimator):
    """LESS. Its steps are formed anyway, so low-rank mean gradients would save nothing."""

    def scorer(self, inputs: Inputs) -> BatchScorer:
        """Return the scorer.

        Raises:
            InputError: there is no optimizer state, or it belongs to another model.
        """
        if inputs.optimizer is None:
            raise InputError("the estimator less needs the state of the warm-up's optimizer")
        return LessScorer(
            inputs.scored,
            self.validation_gradients(inputs),
            inputs.optimizer,
            normalize=inputs.settings.normalize,
            loss_fn=inputs.loss_fn,
        )
