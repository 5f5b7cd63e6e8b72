"""Estimators: what "influence of a candidate on a task" is, for one batch of candidates at one checkpoint.

TracIn (Pruthi et al., arXiv:2002.08484, eq. TracInCP): I(z; V) = Σ_c η_c Σ_ℓ ⟨G_ℓ,c(z), Ḡ_ℓ,c(V)⟩, c over checkpoints
with learning rates η_c, Ḡ the mean gradient over the validation set. Positive: an SGD step on z lowers the
validation loss, by I(z; V) to first order.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from iprox.influence.gradients import (
    LayerGradient,
    LowRankGradient,
    mean_squared_norm,
    norm_flops,
    sketch_pays,
    sketched_norms,
    squared_norms,
    summed_gradient,
)
from iprox.influence.projection import signs
from iprox.influence.queries import LayerQuery, layer_query
from iprox.influence.shared_basis import SharedQueries, TasksQuery
from iprox.models.experts import expert_layers
from iprox.models.flops import layer_shares
from iprox.models.layers import GradientSpace, dense_weight, influence_layers, layer_bias, low_rank_layers, weight_shape
from iprox.models.loss import LossFn, causal_lm_losses, examples_with_loss
from iprox.models.observe import frozen, watched_backward
from iprox.models.precision import accumulation_dtype

Normalize = Literal["none", "cosine"]

# A gradient of the whole model: layer name -> gradient of that layer.
ModelGradient = dict[str, LayerGradient]

# The same of one example, low-rank.
ExampleGradient = dict[str, LowRankGradient]

# A mean gradient that is low-rank in the layers where that is cheaper.
TruncatedGradient = dict[str, LayerGradient | LowRankGradient]

# What candidates are contracted with of a task: its mean gradient, whole or truncated, or the gradients of its
# examples, one by one or in shared bases.
ApartQuery = ModelGradient | TruncatedGradient | Sequence[ExampleGradient]
TaskQuery = ApartQuery | SharedQueries


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
            count += int(examples_with_loss(batch, losses).sum())
    if count == 0:
        raise ValueError("no example with a supervised token")
    silent = [name for name in layers if name not in total and name not in expert_layers(model)]
    if silent:
        warnings.warn(
            f"{silent[0]} ({len(silent)} layers in all) took no part as a layer of its own in any pass, so no score "
            "counts its gradient",
            stacklevel=2,
        )
    for name, layer in layers.items():
        if name not in total:  # not called, or an expert that no token was routed to
            weight, bias = dense_weight(layer), layer_bias(layer)
            dtype = accumulation_dtype(weight)
            total[name] = LayerGradient(
                torch.zeros_like(weight, dtype=dtype), None if bias is None else torch.zeros_like(bias, dtype=dtype)
            )
    for name, part in total.items():
        part.weight /= count
        if part.bias is not None:
            part.bias /= count
        if not torch.isfinite(part.squared_norm()):
            raise FloatingPointError(f"the gradient of {name} is not finite; try --set dtype=float32")
    return total, count


def seen_from(gradient: ModelGradient, proxy: nn.Module, space: GradientSpace) -> ModelGradient:
    """A target's gradient as its proxy's layers see it, so that candidates on the proxy meet the target's own query.

    `weight`: the layer's gradient as it is. `factors`: by the chain rule of W = up·down, ∇_up = ∇_W downᵀ and
    ∇_down = upᵀ ∇_W (the bias belongs to up). Layers that the proxy does not have are left out.

    Args:
        gradient: of the target, by layer name.
        proxy: whose layers have the target's names and shapes.
        space: which gradient of the proxy's low-rank layers is scored.
    """
    seen: ModelGradient = {}
    low_rank = low_rank_layers(proxy)
    for name in influence_layers(proxy, "weight"):
        part = gradient[name]
        if name in low_rank and space == "factors":
            factors = low_rank[name].up, low_rank[name].down
            up, down = (factor.weight.detach().to(part.weight.dtype) for factor in factors)
            seen[f"{name}.up"] = LayerGradient(part.weight @ down.mT, part.bias)
            seen[f"{name}.down"] = LayerGradient(up.mT @ part.weight, None)
        else:
            seen[name] = part
    return seen


class BatchScorer:
    """Scores batches of candidates against the validation gradients of several tasks, at one checkpoint.

    Forward 2P, backward to the activations 2P, and the contraction (see `queries`). The memory is the batch's
    activations and the tasks' gradients.

    Args:
        model: a proxy or any model.
        queries: by task its mean validation gradient, from `mean_gradient` with the same `gradient` or from
            `seen_from`, made low-rank by `iprox.influence.truncation` or not; or the gradients of its examples, from
            `example_gradients`, which are a column of scores each, one by one or (all tasks) in shared bases.
        gradient: `factors` or `weight`, for proxies.
        normalize: `none`, or `cosine`: divide by ‖G(z)‖·‖Ḡ(V)‖, norms over all layers together.
        norm_sketch: random signs a layer that ‖G(z)‖ is estimated from (`iprox.influence.gradients.sketched_norms`);
            0 is exact. Layers too small to gain are exact, and experts, which an example sends few tokens.
        loss_fn: per-example losses of a model that is no language model.

    Attributes:
        widths: columns of each task: 1, or its examples.
        weights: by task, what its columns sum to its own score with, float64 [width]: the influence on the mean loss,
            or the cosine with the mean gradient, which is not the mean of the examples' cosines.
        contraction_flops: FLOPs per token of contracting with all tasks, an expert's for the tokens that use it.
        example_flops: FLOPs per candidate of contracting with examples in shared bases.
        kept: share of each task's gradient norm that its low-rank form kept, over all layers (of the example that
            lost most).
    """

    def __init__(
        self,
        model: nn.Module,
        queries: Mapping[str, TaskQuery],
        *,
        gradient: GradientSpace = "factors",
        normalize: Normalize = "none",
        norm_sketch: int = 0,
        loss_fn: LossFn = causal_lm_losses,
    ) -> None:
        self.model = model
        self.normalize = normalize
        self.norm_sketch = norm_sketch
        self.loss_fn = loss_fn
        self.layers = influence_layers(model, gradient)
        sketched = norm_sketch > 0 and normalize == "cosine"
        exact = expert_layers(model) if sketched else ()
        self._signs = {
            # The same for a layer in every run, so that a score is too.
            name: signs(f"norm/{name}", max(weight_shape(layer)), norm_sketch).to(next(layer.parameters()))
            for name, layer in self.layers.items()
            if sketched and name not in exact and sketch_pays(weight_shape(layer), norm_sketch)
        }
        self.tasks = list(queries)
        self._queries: Mapping[str, LayerQuery | TasksQuery]
        self._shares = layer_shares(model, self.layers)
        self.example_flops = 0.0
        shared = {task: query for task, query in queries.items() if isinstance(query, SharedQueries)}
        if shared:
            self._take_shared(shared)
        else:
            self._take({task: query for task, query in queries.items() if not isinstance(query, SharedQueries)})
        self.contraction_flops = sum(query.flops * self._shares[name] for name, query in self._queries.items())

    def _take(self, queries: Mapping[str, ApartQuery]) -> None:
        """Make ready to contract with mean gradients, or with those of examples one by one."""
        self.widths = [1 if isinstance(query, dict) else len(query) for query in queries.values()]
        columns: list[Any] = []
        for query in queries.values():
            columns += [query] if isinstance(query, dict) else query
        norms = torch.stack([torch.stack([part.squared_norm() for part in each.values()]).sum() for each in columns])
        ready: dict[str, LayerQuery] = {}
        lost = torch.zeros_like(norms)
        for name, layer in self.layers.items():
            if all(name in each for each in columns):
                parts = [each[name] for each in columns]
                ready[name] = layer_query(parts, self._query_dtype(layer))
                lost += torch.stack([getattr(part, "lost", norms.new_zeros(())) for part in parts])
        self._queries = ready
        self._query_norms = norms.sqrt()
        self.weights = [
            self._weights(query, own)
            for query, own in zip(queries.values(), norms.sqrt().split(self.widths), strict=True)
        ]
        kept = torch.where(norms > 0, 1 - lost / norms, torch.ones_like(norms)).clamp(min=0).sqrt()
        self.kept = {task: part.min().item() for task, part in zip(self.tasks, kept.split(self.widths), strict=True)}

    def _take_shared(self, queries: Mapping[str, SharedQueries]) -> None:
        """Make ready to contract with the examples of each task in the bases that they share."""
        self.widths = [len(query.norms) for query in queries.values()]
        ready: dict[str, TasksQuery] = {}
        for name in self.layers:
            parts = tuple(query.layers.get(name) for query in queries.values())
            if any(part is not None for part in parts):
                ready[name] = TasksQuery(parts, tuple(self.widths))
        self._queries = ready
        self.example_flops = sum(query.example_flops for query in ready.values())
        self._query_norms = torch.cat([query.norms for query in queries.values()]).to(self.device)
        self.weights = [self._of_examples(query.norms.cpu(), query.mean_norm()) for query in queries.values()]
        self.kept = {task: query.kept.min().item() for task, query in queries.items()}

    def _weights(self, query: ApartQuery, norms: Tensor) -> np.ndarray:
        """ḡ·g/‖ḡ‖ = Σ_v (‖g_v‖/V‖ḡ‖) cos(g_v, g) for a candidate's g; without norms each column counts 1/V."""
        if isinstance(query, dict):
            return np.ones(1)
        mean = torch.stack([mean_squared_norm([each[name] for each in query]) for name in query[0]]).sum()
        return self._of_examples(norms, mean.sqrt().item())

    def _of_examples(self, norms: Tensor, mean: float) -> np.ndarray:
        weights = np.full(len(norms), 1 / len(norms))
        if self.normalize == "cosine" and mean > 0:
            weights = weights * (norms / mean).double().cpu().numpy()
        return weights

    @property
    def device(self) -> torch.device:
        """Where batches are to be."""
        return next(self.model.parameters()).device

    def norm_flops(self, lengths: Sequence[int]) -> float:
        """FLOPs of the norms of candidates of some lengths; 0 where they are not wanted."""
        if self.normalize == "none":
            return 0.0
        shapes: dict[tuple[int, float], list[tuple[int, int]]] = {}
        for name, layer in self.layers.items():
            sketch = self.norm_sketch if name in self._signs else 0
            shapes.setdefault((sketch, self._shares[name]), []).append(weight_shape(layer))
        return sum(
            norm_flops(each, [length * share for length in lengths], sketch) for (sketch, share), each in shapes.items()
        )

    def __call__(self, batch: Any) -> tuple[Tensor, Tensor]:
        """Score one batch.

        Returns:
            Scores [B, columns], those of a task side by side, and losses [B], in float32 or better, on the model's
            device.
        """
        return self._score(batch, by_token=False)

    def by_token(self, batch: Any) -> Tensor:
        """What passes through each token's position: δ_tᵀ Ḡ h_t over all layers, whose sum over t is the score.

        Returns:
            Contributions [B, L, columns], 0 on padding, in float32 or better.

        Raises:
            TypeError: a layer does not see every position (an expert).
        """
        return self._score(batch, by_token=True)[0]

    def _query_dtype(self, layer: nn.Module) -> torch.dtype:
        """The compute dtype, so that the contraction is plain GEMMs."""
        return next(layer.parameters()).dtype

    def _meet(self, name: str, h: Tensor, delta: Tensor, by_token: bool) -> tuple[Tensor | None, Tensor | None]:
        """One layer's part of the scores, and of the candidates' squared norms where those are wanted."""
        column = self._queries[name].contract(h, delta, by_token) if name in self._queries else None
        if self.normalize == "none":
            return column, None
        bias = has_bias(self.layers[name])
        if name in self._signs:
            return column, sketched_norms(h, delta, bias, self._signs[name])
        return column, squared_norms(h, delta, bias)

    def _score(self, batch: Any, by_token: bool) -> tuple[Tensor, Tensor]:
        columns: dict[str, Tensor] = {}
        norms: list[Tensor] = []

        def sink(name: str, h: Tensor, delta: Tensor) -> None:
            column, squares = self._meet(name, h, delta, by_token)
            if column is not None:
                columns[name] = column
            if squares is not None:
                norms.append(squares)

        with frozen(self.model):
            losses = watched_backward(self.model, self.layers, lambda: self.loss_fn(self.model, batch), sink)
        positions = batch.input_ids.shape if by_token else losses.shape
        for name, column in columns.items():
            if column.shape[:-1] != positions:
                seen = "every token" if by_token else "one row an example"
                raise TypeError(f"{name} does not see {seen}, so its gradients cannot be told apart")
        scores = torch.stack(list(columns.values())).sum(0)
        if self.normalize == "cosine":
            length = torch.stack(norms).sum(0).sqrt()[:, None] * self._query_norms.to(scores.dtype)
            length = length[:, None] if by_token else length
            # A zero gradient has no direction: its cosine is 0, not NaN.
            scores = torch.where(length > 0, scores / length, torch.zeros_like(scores))
        return scores, losses


def has_bias(layer: nn.Module) -> bool:
    """Whether a linear layer carries a bias."""
    return getattr(layer, "bias", None) is not None
