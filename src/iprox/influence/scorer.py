"""Scorers of batches of candidates at one checkpoint, which contract their gradients with the validation gradients.

TracIn (Pruthi et al., arXiv:2002.08484, eq. TracInCP): I(z; V) = Σ_c η_c Σ_ℓ ⟨G_ℓ,c(z), Ḡ_ℓ,c(V)⟩, c over checkpoints
with learning rates η_c, Ḡ the mean gradient over the validation set. To first order, an SGD step on z lowers the
validation loss by I(z; V).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn

from iprox.data import Encoded, Example
from iprox.engine.windows import ScoringStats
from iprox.influence.gradients import (
    NormShape,
    TaskGradient,
    mean_squared_norm,
    norm_flops,
    sketch_pays,
    sketched_norms,
    squared_norms,
)
from iprox.influence.projection import signs
from iprox.influence.query import DenseQuery, LowRankQuery, layer_query
from iprox.influence.shared_basis import SharedQueries, SharedQuery
from iprox.models.experts import expert_layers
from iprox.models.flops import layer_shares
from iprox.models.layers import has_bias, influence_layers, signal_like, weight_shape
from iprox.models.loss import LossFn, causal_lm_losses
from iprox.models.observe import frozen, watched_backward
from iprox.scores import scores_table

Normalize = Literal["none", "cosine"]

# Random signs per layer that estimate the norms of candidates on a proxy, for the cosine. Exact norms would cost a
# proxy as much as its target, up to half of the scoring. The target's norms are exact, so that comparing a proxy with
# it shows the error of the estimate.
NORM_SKETCH = 32

# What candidates are contracted with for a task: its mean gradient, dense or truncated, or the gradients of its
# examples, one by one or in shared bases.
TaskQuery = TaskGradient | SharedQueries


class Scorer(ABC):
    """A scorer gives every candidate of a batch one or more columns of scores per task.

    Attributes:
        tasks: names of the tasks.
        widths: number of columns of each task: 1, or one per validation example.
        weights: weights of each task's columns in its score, float64 [width].
        by_example: whether the columns are kept as scores by validation example.
        model: model that is run, if any.
        contraction_flops: FLOPs per token of contracting with all tasks; experts count for the tokens that use them.
        example_flops: FLOPs per candidate of contracting with examples in shared bases.
        kept: share of each task's gradient norm that its low-rank form kept, over all layers (the minimum over its
            examples).
    """

    noun = "score"
    dtype = np.float64

    def __init__(
        self,
        tasks: Collection[str],
        widths: Sequence[int],
        *,
        by_example: bool = False,
        model: nn.Module | None = None,
    ) -> None:
        self.tasks, self.widths, self.by_example, self.model = list(tasks), list(widths), by_example, model
        self.weights = [np.full(width, 1 / width) for width in widths]
        self.contraction_flops = self.example_flops = 0.0
        self.kept = dict.fromkeys(self.tasks, 1.0)

    @abstractmethod
    def __call__(self, batch: Any) -> tuple[Tensor, Tensor | None]:
        """Return scores [B, columns], with a task's columns next to each other, and losses [B] if there are any."""

    @property
    def columns(self) -> int:
        """Number of columns of all tasks."""
        return sum(self.widths)

    @property
    def device(self) -> torch.device:
        """Device that batches must be on."""
        return torch.device("cpu") if self.model is None else next(self.model.parameters()).device

    def norm_flops(self, lengths: Sequence[int]) -> float:
        """Return the FLOPs of norms for candidates of some lengths; 0 if the scorer needs no norms."""
        return 0.0

    def spent_flops(self, lengths: Sequence[int]) -> float:
        """Return the FLOPs of contracting candidates of some lengths, including norms."""
        whole = sum(lengths) * self.contraction_flops + len(lengths) * self.example_flops
        return whole + self.norm_flops(lengths)

    def of_tasks(self, numbers: np.ndarray) -> np.ndarray:
        """Return the scores by task [..., tasks] from columns [..., columns]."""
        parts = np.split(numbers, np.cumsum(self.widths)[:-1], axis=-1)
        return np.stack([part @ weights for part, weights in zip(parts, self.weights, strict=True)], axis=-1)

    def count(self, stats: ScoringStats, lengths: Sequence[int]) -> None:
        """Record the work done for candidates of some lengths."""
        stats.contraction_flops, stats.query_kept = self.spent_flops(lengths), min(self.kept.values())

    def table(self, window: Sequence[Example], encoded: Sequence[Encoded], numbers: np.ndarray) -> pa.Table:
        """Return the scores table of some examples from their columns [N, columns], NaN if there is no score."""
        return scores_table(
            [example.id for example in window],
            [example.source for example in window],
            [example.tokens for example in encoded],
            self.of_tasks(numbers),
            self.tasks,
            examples=np.split(numbers, np.cumsum(self.widths)[:-1], axis=1) if self.by_example else (),
            supervised=[example.supervised for example in encoded],
        )


class BatchScorer(Scorer):
    """A scorer that contracts candidates with the validation gradients of several tasks at one checkpoint.

    Forward 2P, backward to the activations 2P, and the contraction (see `iprox.influence.query`). Memory: the batch's
    activations and the tasks' gradients.

    Args:
        model: a proxy or any other model.
        queries: validation gradients by task: the mean from `mean_gradient`, low-rank or not, or those of single
            examples from `example_gradients`, one column each, one by one or (for all tasks) in shared bases. Layers
            that the model does not have are left out.
        normalize: `none`, or `cosine` to divide by ‖G(z)‖·‖Ḡ(V)‖, norms over all layers. The weights then combine the
            columns of validation examples into the cosine with their mean, which is not the mean of their cosines.
        norm_sketch: number of random signs per layer that estimate ‖G(z)‖ (`iprox.influence.gradients.sketched_norms`);
            0 is exact. Norms of small layers and of experts, which see few tokens per example, are always exact.
        loss_fn: per-example losses, for a model that is not a language model.
    """

    def __init__(
        self,
        model: nn.Module,
        queries: Mapping[str, TaskQuery],
        *,
        normalize: Normalize = "none",
        norm_sketch: int = 0,
        loss_fn: LossFn = causal_lm_losses,
    ) -> None:
        self.normalize, self.norm_sketch, self.loss_fn = normalize, norm_sketch, loss_fn
        self.layers = influence_layers(model)
        widths = [_width(query) for query in queries.values()]
        by_example = not all(isinstance(query, dict) for query in queries.values())
        super().__init__(queries, widths, by_example=by_example, model=model)
        sketched = norm_sketch > 0 and normalize == "cosine"
        exact = expert_layers(model) if sketched else ()
        self._signs = {
            # The same in every run, so that scores are reproducible.
            name: signs(f"norm/{name}", max(weight_shape(layer)), norm_sketch).to(signal_like(layer))
            for name, layer in self.layers.items()
            if sketched and name not in exact and sketch_pays(weight_shape(layer), norm_sketch)
        }
        self._shares = layer_shares(model, self.layers)
        self._norm_shapes = norm_shapes(model, norm_sketch)
        self._queries: dict[str, tuple[DenseQuery | LowRankQuery | SharedQuery, ...]] = {}
        shared = {task: query for task, query in queries.items() if isinstance(query, SharedQueries)}
        if shared:
            self._take_shared(shared)
        else:
            self._take(queries)
        self.contraction_flops = sum(
            query.flops * self._shares[name] for name, parts in self._queries.items() for query in parts
        )

    def _take(self, queries: Mapping[str, Any]) -> None:
        """Prepare mean gradients, or gradients of single examples."""
        columns: list[Any] = []
        for query in queries.values():
            columns += [query] if isinstance(query, dict) else query
        columns = [{name: part for name, part in each.items() if name in self.layers} for each in columns]
        norms = torch.stack([torch.stack([part.squared_norm() for part in each.values()]).sum() for each in columns])
        lost = torch.zeros_like(norms)
        for name, layer in self.layers.items():
            if all(name in each for each in columns):
                parts = [each[name] for each in columns]
                self._queries[name] = (layer_query(parts, self._query_dtype(layer)),)
                lost += torch.stack([getattr(part, "lost", norms.new_zeros(())) for part in parts])
        self._query_norms = norms.sqrt()
        kept = torch.where(norms > 0, 1 - lost / norms, torch.ones_like(norms)).clamp(min=0).sqrt()
        ends = np.cumsum(self.widths)
        for place, task in enumerate(self.tasks):
            own = slice(int(ends[place]) - self.widths[place], int(ends[place]))
            self.kept[task] = kept[own].min().item()
            if self.by_example:
                mean = torch.stack([mean_squared_norm([each[name] for each in columns[own]]) for name in columns[0]])
                self._weigh(place, self._query_norms[own], mean.sum().sqrt().item())

    def _take_shared(self, queries: Mapping[str, SharedQueries]) -> None:
        """Prepare the gradients of each task's examples in shared bases."""
        for name in self.layers:
            parts = [query.of_layer(name, self.layers[name]) for query in queries.values()]
            if any(part.cores.numel() for part in parts):
                self._queries[name] = tuple(parts)
                self.example_flops += sum(part.example_flops for part in parts)
        self._query_norms = torch.cat([query.norms for query in queries.values()]).to(self.device)
        for place, (task, query) in enumerate(queries.items()):
            self.kept[task] = query.kept.min().item()
            self._weigh(place, query.norms.cpu(), query.mean)

    def _weigh(self, place: int, norms: Tensor, mean: float) -> None:
        """Set a task's weights for the cosine: ḡ·g/(‖ḡ‖‖g‖) = Σ_v (‖g_v‖/(V‖ḡ‖)) cos(g_v, g)."""
        if self.normalize == "cosine" and mean > 0:
            self.weights[place] = self.weights[place] * (norms / mean).double().cpu().numpy()

    def norm_flops(self, lengths: Sequence[int]) -> float:
        """Return the FLOPs of norms for candidates of some lengths; 0 without `cosine`."""
        return norm_flops(self._norm_shapes, lengths) if self.normalize == "cosine" else 0.0

    def __call__(self, batch: Any, *, by_token: bool = False) -> tuple[Tensor, Tensor]:
        """Score one batch.

        Args:
            batch: batch on the model's device.
            by_token: return the terms of the sum over tokens, Σ_ℓ δ_tᵀ Ḡ_ℓ h_t.

        Returns:
            Scores [B, columns], or [B, L, columns] by token with 0 on padding, and losses [B], in float32 or better.

        Raises:
            TypeError: a layer does not see one row per example, or, with `by_token`, every token (an expert).
        """
        columns: dict[str, Tensor] = {}
        norms: list[Tensor] = []
        sink = partial(self._contract, columns, norms, by_token)
        model = self.model
        assert model is not None
        with frozen(model):
            losses = watched_backward(model, self.layers, lambda: self.loss_fn(model, batch), sink)
        positions = losses.shape
        if by_token:
            positions = batch.input_ids.shape
        return self._normalized(columns, norms, positions), losses

    def _contract(
        self, columns: dict[str, Tensor], norms: list[Tensor], by_token: bool, name: str, h: Tensor, delta: Tensor
    ) -> None:
        """Add a layer's scores by its queries [..., columns] to `columns`, and with `cosine` ‖G(z)‖² [B] to `norms`."""
        scores = []
        for query in self._queries.get(name, ()):
            scores.append(query.contract(h, delta, by_token))
        if scores:
            columns[name] = torch.cat(scores, dim=-1)
        if self.normalize == "cosine":
            bias, signs = has_bias(self.layers[name]), self._signs.get(name)
            norms.append(squared_norms(h, delta, bias) if signs is None else sketched_norms(h, delta, bias, signs))

    def _normalized(self, columns: Mapping[str, Tensor], norms: list[Tensor], positions: torch.Size) -> Tensor:
        """Sum the layers' scores, each [*positions, columns], and divide the sum by the norms."""
        for name, part in columns.items():
            if part.shape[:-1] != positions:
                seen = "every token" if len(positions) > 1 else "one row per example"
                raise TypeError(f"{name} does not see {seen}, so its gradients cannot be separated")
        if not columns:  # all validation gradients are zero
            return torch.zeros(*positions, self.columns, device=self.device)
        scores = torch.stack(list(columns.values())).sum(0)
        if self.normalize == "none":
            return scores
        length = torch.stack(norms).sum(0).sqrt()[:, None] * self._query_norms.to(scores.dtype)
        length = length[:, None] if len(positions) > 1 else length
        # The cosine with a zero gradient is 0, not NaN.
        return torch.where(length > 0, scores / length, torch.zeros_like(scores))

    def _query_dtype(self, layer: nn.Module) -> torch.dtype:
        """Return the compute dtype, so that the contraction is a plain GEMM."""
        return signal_like(layer).dtype


def norm_shapes(model: nn.Module, sketch: int) -> list[NormShape]:
    """Return the layer shapes that `BatchScorer` computes norms for with `norm_sketch=sketch`."""
    layers, exact = influence_layers(model), expert_layers(model)
    shares = layer_shares(model, layers)
    return [
        NormShape(*weight_shape(layer), 0 if name in exact else sketch, shares[name]) for name, layer in layers.items()
    ]


def _width(query: TaskQuery) -> int:
    if isinstance(query, SharedQueries):
        return len(query.norms)
    return 1 if isinstance(query, dict) else len(query)
