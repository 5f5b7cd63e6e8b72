"""Estimators: what "influence of a candidate on a task" is, for one batch of candidates at one checkpoint.

TracIn (Pruthi et al., arXiv:2002.08484, eq. TracInCP): I(z; V) = Σ_c η_c Σ_ℓ ⟨G_ℓ,c(z), Ḡ_ℓ,c(V)⟩, c over checkpoints
with learning rates η_c, Ḡ the mean gradient over the validation set. Positive: an SGD step on z lowers the
validation loss, by I(z; V) to first order.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from iprox.influence.gradients import LayerGradient, contract, squared_norms, summed_gradient
from iprox.models.layers import GradientSpace, influence_layers
from iprox.models.loss import LossFn, causal_lm_losses
from iprox.models.observe import frozen, watched_backward

Normalise = Literal["none", "cosine"]

# A gradient of the whole model: layer name -> gradient of that layer.
ModelGradient = dict[str, LayerGradient]


def mean_gradient(
    model: nn.Module,
    batches: Iterable[Any],
    gradient: GradientSpace = "factors",
    loss_fn: LossFn = causal_lm_losses,
) -> tuple[ModelGradient, int]:
    """The mean per-example gradient over a set, in float32 or better: Ḡ(V).

    Forward, backward and one weight GEMM a layer: 6P FLOPs a token, P the parameters of the layers.

    Returns:
        The gradient, and the number of examples it is the mean of.

    Raises:
        FloatingPointError: a gradient is not finite (the layer is named).
        ValueError: no example.
    """
    layers = influence_layers(model, gradient)
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
            count += losses.shape[0]
    if count == 0:
        raise ValueError("no example with a supervised token")
    for name, part in total.items():
        part.weight /= count
        if part.bias is not None:
            part.bias /= count
        if not torch.isfinite(part.squared_norm()):
            raise FloatingPointError(f"the gradient of {name} is not finite; try --dtype float32")
    return total, count


class BatchScorer:
    """Scores batches of candidates against the mean gradients of several tasks, at one checkpoint.

    Forward 2P, backward to the activations 2P, one contraction per task 2P FLOPs a token. The memory is the
    batch's activations and one copy of each task's gradient.

    Args:
        model: a proxy or any model.
        queries: mean validation gradient by task, from `mean_gradient` with the same `gradient`.
        gradient: `factors` or `weight`, for proxies.
        normalise: `none`, or `cosine`: divide by ‖G(z)‖·‖Ḡ(V)‖, norms over all layers together.
        loss_fn: per-example losses of a model that is no language model.
    """

    def __init__(
        self,
        model: nn.Module,
        queries: Mapping[str, ModelGradient],
        *,
        gradient: GradientSpace = "factors",
        normalise: Normalise = "none",
        loss_fn: LossFn = causal_lm_losses,
    ) -> None:
        self.model = model
        self.tasks = list(queries)
        self.normalise = normalise
        self.loss_fn = loss_fn
        self.layers = influence_layers(model, gradient)
        # One copy in the compute dtype, so that the contraction is a plain GEMM of it.
        self._queries = {
            name: [queries[task][name].to(layer.weight.dtype) for task in self.tasks]  # pyright: ignore
            for name, layer in self.layers.items()
            if all(name in queries[task] for task in self.tasks)
        }
        norms = [sum(part.squared_norm() for part in queries[task].values()) for task in self.tasks]
        self._query_norms = torch.stack([torch.as_tensor(norm).sqrt() for norm in norms])

    def __call__(self, batch: Any) -> tuple[Tensor, Tensor]:
        """Score one batch.

        Returns:
            Scores [B, tasks] and losses [B], in float32 or better, on the model's device.
        """
        columns: dict[str, Tensor] = {}
        norms: list[Tensor] = []

        def sink(name: str, h: Tensor, delta: Tensor) -> None:
            if name in self._queries:
                columns[name] = torch.stack([contract(h, delta, query) for query in self._queries[name]], dim=1)
            if self.normalise == "cosine":
                norms.append(squared_norms(h, delta, has_bias(self.layers[name])))

        with frozen(self.model):
            losses = watched_backward(self.model, self.layers, lambda: self.loss_fn(self.model, batch), sink)
        for name, column in columns.items():
            if column.shape[0] != losses.shape[0]:
                raise TypeError(f"{name} does not see one row an example, so its gradients cannot be told apart")
        scores = torch.stack(list(columns.values())).sum(0)
        if self.normalise == "cosine":
            length = torch.stack(norms).sum(0).sqrt()[:, None] * self._query_norms.to(scores.dtype)
            # A zero gradient has no direction: its cosine is 0, not NaN.
            scores = torch.where(length > 0, scores / length, torch.zeros_like(scores))
        return scores, losses


def has_bias(layer: nn.Module) -> bool:
    """Whether a linear layer carries a bias."""
    return getattr(layer, "bias", None) is not None
