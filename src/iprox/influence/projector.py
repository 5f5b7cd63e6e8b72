"""Features of candidates and of validation gradients on one model: the two sides of an index's inner products."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from iprox.influence.adam import adam_steps, check_state
from iprox.influence.estimators import ApartQuery, has_bias
from iprox.influence.gradients import LayerGradient
from iprox.influence.projection import LayerProjection
from iprox.models.layers import GradientSpace, influence_layers, weight_shape
from iprox.models.loss import LossFn, causal_lm_losses
from iprox.models.observe import frozen, watched_backward
from iprox.models.optimizer_state import AdamState


class GradientProjector:
    """Projects gradients, or Adam's steps, of a model to D numbers (see `iprox.influence.projection`).

    Args:
        model: a proxy or any model.
        dimension: D.
        gradient: `factors` or `weight`, for proxies.
        seed: of the signs. With the layers' names it gives them, so that a proxy's layers get those of the target's.
        adam: the state of the warm-up's optimizer: Adam's steps are projected then, as in LESS.
        loss_fn: per-example losses of a model that is no language model.

    Raises:
        InputError: the state is of another model; a dimension that has no near divisors.

    Attributes:
        flops: of projecting one token.
    """

    def __init__(
        self,
        model: nn.Module,
        dimension: int,
        gradient: GradientSpace = "weight",
        *,
        seed: int = 0,
        adam: AdamState | None = None,
        loss_fn: LossFn = causal_lm_losses,
    ) -> None:
        self.model, self.dimension, self.adam, self.loss_fn = model, dimension, adam, loss_fn
        self.layers = influence_layers(model, gradient)
        if adam is not None:
            check_state(adam, self.layers)
        self._projections: dict[str, LayerProjection] = {}
        self.flops = 0.0
        for name, layer in self.layers.items():
            m, n = weight_shape(layer)
            weight = next(layer.parameters())
            projection = LayerProjection.of(f"{seed}/{name}", (m, n), dimension, weight)
            self._projections[name] = projection
            a, b = len(projection.left), len(projection.right)
            self.flops += 2.0 * (a * m + b * n + a * b) if adam is None else 2.0 * m * n

    @property
    def device(self) -> torch.device:
        """Where batches are to be."""
        return next(self.model.parameters()).device

    def __call__(self, batch: Any) -> Tensor:
        """Features of a batch of candidates [B, D], in float32 or better."""
        parts: list[Tensor] = []

        def sink(name: str, h: Tensor, delta: Tensor) -> None:
            projection, bias = self._projections[name], has_bias(self.layers[name])
            if self.adam is None:
                part = projection.of_tokens(h, delta, bias)
            else:
                part = torch.cat([projection.of_gradient(s) for s in adam_steps(h, delta, name, bias, self.adam)])
            parts[:] = [parts[0].add_(part)] if parts else [part]  # one layer's features at a time

        with frozen(self.model):
            watched_backward(self.model, self.layers, lambda: self.loss_fn(self.model, batch), sink)
        return parts[0].flatten(1)

    def project(self, query: ApartQuery) -> Tensor:
        """Features of what candidates meet of a task: [1, D] of its mean gradient, [V, D] of its examples' gradients.

        Args:
            query: from `iprox.influence.scoring.task_queries` with the same `gradient`.
        """
        rows = [query] if isinstance(query, dict) else query
        return torch.stack([self._features(row).flatten() for row in rows])

    def _features(self, gradient: Any) -> Tensor:
        total: Tensor | None = None
        for name, projection in self._projections.items():
            if name not in gradient:
                continue
            part = gradient[name]
            dense = isinstance(part, LayerGradient)
            features = projection.of_gradient(part) if dense else projection.of_low_rank(part)
            total = features if total is None else total + features
        assert total is not None
        return total
