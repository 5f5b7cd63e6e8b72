"""What the stages of a plan have in common: the pool, the model's sizes, and what scoring a token costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from transformers import PreTrainedModel

from iprox.data import Encoded
from iprox.influence.estimators.base import Estimator, QueryTokens
from iprox.influence.estimators.registry import estimator_of
from iprox.influence.gradients import norm_flops
from iprox.influence.scorer import NORM_SKETCH
from iprox.models import flops
from iprox.models.loading import skeleton
from iprox.proxy.size import Size
from iprox.settings import InfluenceSection, Recipe

# Share of the linear parameters that a proxy sized by its fidelity keeps: a guess, as the search is yet to come.
KEPT_BY_FIDELITY = 0.5
# What low-rank validation gradients that keep 0.9 of the norm cost next to whole ones, and an influence function's that
# keep 0.98: estimates, as their ranks are known only once they are made.
LOW_RANK_QUERY, CURVED_QUERY = 0.02, 0.3


@dataclass(frozen=True, slots=True)
class Rows:
    """A pool as a plan knows it: how many rows, and the mean tokens and supervised tokens of a sample of them."""

    total: int
    tokens: float
    supervised: float

    def read(self, rows: float) -> tuple[int, int]:
        """Tokens of that many rows, and supervised ones among them."""
        return round(rows * self.tokens), round(rows * self.supervised)


@dataclass(frozen=True)
class Costs:
    """FLOPs and bytes that the stages of a recipe are reckoned from.

    Attributes:
        recipe: what is planned.
        model: the target, without weights.
        rows: of the pool.
        queried: what is read of the validation sets, and of the pool for curvature, at each checkpoint.
        bytes_per_number: of the dtype that products are in.
    """

    recipe: Recipe
    model: PreTrainedModel
    rows: Rows
    queried: QueryTokens
    bytes_per_number: int

    @classmethod
    def of(
        cls,
        recipe: Recipe,
        model: PreTrainedModel,
        rows: Rows,
        validation: Mapping[str, Sequence[Encoded]],
        dtype: torch.dtype,
    ) -> Costs:
        """Of a recipe for a model and encoded validation sets."""
        read, influence = QueryTokens.of(validation), recipe.influence
        curved = min(influence.curvature_examples, rows.total) if influence.traits.curvature else 0
        queried = QueryTokens(read.tasks, read.tokens, read.supervised, *rows.read(curved))
        return cls(recipe, model, rows, queried, 2 if dtype == torch.bfloat16 else 4)

    @property
    def influence(self) -> InfluenceSection:
        """How influence is scored."""
        return self.recipe.influence

    @property
    def estimator(self) -> Estimator:
        """What makes the scorers."""
        return estimator_of(self.influence)

    @property
    def checkpoints(self) -> int:
        """At how many the pool is scored."""
        return self.recipe.warmup.epochs if self.recipe.warmup and self.influence.checkpoints == "all" else 1

    @cached_property
    def parameters(self) -> int:
        """Of the target."""
        return sum(p.numel() for p in self.model.parameters())

    @cached_property
    def forward(self) -> float:
        """FLOPs of a token's pass through the target's linear layers."""
        return flops.forward_flops(self.model)

    @cached_property
    def head(self) -> float:
        """FLOPs of a supervised token's pass through the head."""
        return flops.head_flops(self.model)

    @property
    def linear(self) -> float:
        """Parameters of the target's linear layers that a token meets."""
        return self.forward / 2

    @cached_property
    def kept(self) -> float:
        """Share of the target's linear parameters that the proxy keeps; 1 without one."""
        settings = self.recipe.proxy
        if not settings:
            return 1.0
        if settings.method == "off-the-shelf":
            other = skeleton(str(settings.model), trust_remote_code=self.recipe.trust_remote_code)
            return flops.forward_flops(other) / self.forward
        if settings.fidelity is not None:
            return KEPT_BY_FIDELITY
        dense = flops.linear_parameters(self.model)
        return Size(settings.sparsity, settings.flops).budget(self.model, dense) / dense

    @property
    def activations(self) -> int:
        """Bytes that a batch keeps for its backward pass: about 16 numbers of the hidden size a layer and token."""
        config = self.model.config.get_text_config()
        tokens = 16 * self.bytes_per_number * self.recipe.batch_tokens
        return tokens * config.hidden_size * config.num_hidden_layers

    def training_memory(self, lora_rank: int | None = None) -> float:
        """Bytes of a training: weights, gradients, Adam's two, in float32; of adapters, and the frozen weights."""
        held = 16 * self.parameters
        if lora_rank is not None:
            held = self.bytes_per_number * self.parameters + 16 * flops.lora_parameters(self.model, lora_rank)
        return held + 2 * self.activations

    @cached_property
    def queries(self) -> float:
        """FLOPs of the validation gradients at one checkpoint, taken on the target."""
        return self.estimator.query_flops(self.model, self.queried)

    @cached_property
    def whole_contraction(self) -> float:
        """FLOPs a token of meeting every task's whole gradient on the target."""
        return self.queried.tasks * flops.contraction_flops(self.model)

    @cached_property
    def norms(self) -> tuple[float, float]:
        """FLOPs a token of norms: exact ones on the target, and those of what candidates are scored on.

        Of rows of one length; exact ones of longer rows cost more. Experts', which see a part of a row, are exact.
        """
        if self.influence.normalize != "cosine":
            return 0.0, 0.0
        mean = self.rows.tokens
        shapes: dict[float, list[tuple[int, int]]] = {}
        for m, n, part in flops.layers_of(self.model):
            shapes.setdefault(part, []).append((m, n))

        def of(sketch: int) -> float:
            parts = (norm_flops(each, [mean * part], sketch if part == 1 else 0) for part, each in shapes.items())
            return sum(parts) / mean

        return of(0), of(NORM_SKETCH if self.recipe.proxy else 0)

    @property
    def query_cost(self) -> float:
        """The cost of a contraction with validation gradients, as a fraction of one with whole gradients."""
        kept = self.influence.of_tasks.kept_norm(on_proxy=bool(self.recipe.proxy))
        return 1.0 if kept == 1 else self._cut_cost

    @property
    def _cut_cost(self) -> float:
        return CURVED_QUERY if self.queried.curvature_tokens else LOW_RANK_QUERY

    @property
    def formed(self) -> bool:
        """Whether candidates' gradients are formed whole, so that their norms cost nothing more."""
        return self.influence.traits.optimizer

    @cached_property
    def contraction(self) -> float:
        """FLOPs a token of meeting the validation gradients, norms included, on a model of the target's shapes."""
        return self.whole_contraction * self.query_cost + (0.0 if self.formed else self.norms[1])

    @cached_property
    def on_target(self) -> float:
        """FLOPs of scoring the pool on the target with gradients made low-rank, and norms, as a proxy's are."""
        tokens, supervised = self.rows.read(self.rows.total * self.checkpoints)
        passes = self.estimator.candidate_flops(self.model, tokens, supervised, tokens * self.contraction)
        return passes + self.checkpoints * self.queries

    @cached_property
    def target_pool(self) -> float:
        """FLOPs of the target's own scores of the pool, of whole gradients and exact norms."""
        own = self.whole_contraction + (0.0 if self.formed else self.norms[0])
        tokens, supervised = self.rows.read(self.rows.total * self.checkpoints)
        return self.estimator.candidate_flops(self.model, tokens, supervised, tokens * own)

    @cached_property
    def per_row(self) -> float:
        """FLOPs of scoring a row of mean length on the proxy, or on the target where there is none."""
        rows, influence = self.rows, self.influence
        if not influence.traits.gradients:
            tokens, supervised = self.rows.read(self.rows.total)
            on_target = self.estimator.candidate_flops(self.model, tokens, supervised, 0.0)
            removed = (1 - self.kept) * self.forward * tokens if influence.traits.model else 0.0
            return (on_target - removed) / self.rows.total
        contraction = self.contraction
        if self.formed:
            # A gradient a candidate, whatever the number of tasks; on a proxy of the target's shapes.
            contraction = flops.contraction_flops(self.model)
        return rows.tokens * (2 * self.kept * self.forward + contraction) + rows.supervised * 2 * self.head

    def watching(self, rows: int, proxies: int) -> float:
        """FLOPs of scoring held-out rows on the target and some proxies at one checkpoint, gradients included."""
        tokens, supervised = self.rows.read(min(rows, self.rows.total))
        cut = self.influence.query_norm != 1
        exact_norms, norms = self.norms
        cost = flops.scoring_flops(self.model, tokens, supervised, tokens * (self.whole_contraction + exact_norms))
        per_token = 2 * self.kept * self.forward + self.whole_contraction * (self._cut_cost if cut else 1) + norms
        cost += proxies * (tokens * per_token + supervised * 2 * self.head)
        fixed = self.influence.query == "target"  # else for each proxy again
        return cost + (1 if fixed else 1 + proxies) * self.queries
