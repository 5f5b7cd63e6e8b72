"""Base classes of estimators, which make a scorer of candidates from validation examples."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from torch import nn

from iprox.data import Encoded
from iprox.influence.gradients import ModelGradient, TaskGradient
from iprox.influence.low_rank import low_rank_queries
from iprox.influence.scorer import NORM_SKETCH, BatchScorer, Scorer, TaskQuery
from iprox.influence.shared_basis import SharedQueries, shared_in_turn
from iprox.influence.validation_gradients import example_gradients, gradients_in_turn, mean_gradient
from iprox.models import flops
from iprox.models.checkpoint import proxy_config
from iprox.models.layers import influence_layers
from iprox.models.loss import LossFn, causal_lm_losses
from iprox.models.optimizer_state import AdamState
from iprox.settings import InfluenceSection

if TYPE_CHECKING:
    from iprox.influence.baselines import Corpus
    from iprox.kronecker.eigen import EigenBasis

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """The inputs from which an estimator makes the scorer of one checkpoint.

    Attributes:
        settings: influence settings.
        model: model that candidates are scored on; None if the estimator runs no model.
        target: target of a proxy `model`, to take validation gradients on. They are few, so this costs little, and
            only the candidates' side of the dot product is approximate.
        validation: batches of each task's validation examples.
        sample: batches of the pool's examples to measure curvature on.
        curvature: folder that the curvature is kept in; it is measured if it is not there yet.
        optimizer: state of the warm-up's optimizer at this checkpoint.
        corpus: term statistics of the pool.
        seed: seed for sampled labels and random scores.
        loss_fn: per-example losses, for a model that is not a language model.
    """

    settings: InfluenceSection
    model: nn.Module | None = None
    target: nn.Module | None = None
    validation: Mapping[str, Iterable[Any]]
    sample: Sequence[Any] = ()
    curvature: Path | None = None
    optimizer: AdamState | None = None
    corpus: Corpus | None = None
    seed: int = 0
    loss_fn: LossFn = causal_lm_losses

    @property
    def scored(self) -> nn.Module:
        """Model that candidates are scored on, for estimators that run one."""
        assert self.model is not None
        return self.model

    @property
    def source(self) -> nn.Module:
        """Model that validation gradients are taken on."""
        return self.scored if self.target is None else self.target

    @property
    def layers(self) -> dict[str, nn.Module]:
        """Layers of `source` that `scored` has too, by name."""
        layers = influence_layers(self.source)
        return {name: layers[name] for name in influence_layers(self.scored) if name in layers}

    @property
    def kept_norm(self) -> float:
        """Share of the validation gradients' norm to keep."""
        return self.settings.kept_norm(on_proxy=proxy_config(self.scored) is not None)


@dataclass(frozen=True, slots=True)
class QueryTokens:
    """Token counts of what each checkpoint reads before it scores candidates; kept in `run.json`.

    Attributes:
        tasks: number of validation tasks.
        tokens: number of tokens in their examples.
        supervised: number of supervised tokens among them.
        curvature_tokens: number of tokens in the curvature sample; 0 for estimators without curvature.
        curvature_supervised: number of supervised tokens among them.
    """

    tasks: int
    tokens: int
    supervised: int
    curvature_tokens: int = 0
    curvature_supervised: int = 0

    @classmethod
    def of(cls, validation: Mapping[str, Sequence[Encoded]], sample: Sequence[Encoded] = ()) -> QueryTokens:
        """Count encoded examples."""

        def count(rows: Sequence[Encoded]) -> tuple[int, int]:
            return sum(row.tokens for row in rows), sum(row.supervised for row in rows)

        return cls(len(validation), *count([row for rows in validation.values() for row in rows]), *count(sample))


class Estimator(ABC):
    """A kind of score. `iprox.settings.ESTIMATORS` declares its needs and properties."""

    @abstractmethod
    def scorer(self, inputs: Inputs) -> Scorer:
        """Return the scorer of batches of candidates at one checkpoint."""

    def query_flops(self, model: nn.Module, read: QueryTokens) -> float:
        """Return the FLOPs of the validation side (gradients and curvature) at one checkpoint, on this model."""
        return 0.0

    def candidate_flops(self, model: nn.Module, tokens: int, supervised: int, contraction: float) -> float:
        """Return the FLOPs of scoring candidates.

        Args:
            model: model that they are scored on.
            tokens: number of tokens.
            supervised: number of supervised tokens.
            contraction: FLOPs of contracting with validation gradients, including norms.
        """
        return 0.0


class GradientEstimator(Estimator):
    """An estimator that contracts candidates with validation gradients, which subclasses may precondition."""

    def precondition(self, means: dict[str, ModelGradient], inputs: Inputs) -> dict[str, ModelGradient]:
        """Return the preconditioned mean validation gradient of each task."""
        return means

    def bases(self, inputs: Inputs) -> Mapping[str, EigenBasis] | None:
        """Return the curvature by layer that gradients of single validation examples are divided by, if any."""
        return None

    def validation_gradients(self, inputs: Inputs) -> dict[str, TaskGradient]:
        """Return the preconditioned mean gradient of each task, or the unpreconditioned gradients of its examples."""
        source, layers, loss_fn = inputs.source, inputs.layers, inputs.loss_fn
        if inputs.settings.by_example:
            # Adam steps are contracted with the examples one by one; an index projects them whole.
            keep = inputs.kept_norm if inputs.settings.traits.optimizer else 1.0
            return {
                task: example_gradients(source, batches, keep, loss_fn, layers)
                for task, batches in inputs.validation.items()
            }
        means = {task: mean_gradient(source, batches, loss_fn, layers) for task, batches in inputs.validation.items()}
        return dict(self.precondition(means, inputs))

    def scorer(self, inputs: Inputs) -> BatchScorer:
        """Return the scorer, with low-rank validation gradients unless the settings keep all of their norm."""
        if inputs.settings.by_example:
            return self.contracting(self.shared(inputs), inputs)
        gradients = self.validation_gradients(inputs)
        queries: Mapping[str, TaskQuery] = gradients
        if (keep := inputs.kept_norm) < 1:
            queries = low_rank_queries(gradients, keep)  # pyright: ignore[reportArgumentType]
        return self.contracting(queries, inputs)

    def shared(self, inputs: Inputs) -> dict[str, SharedQueries]:
        """Return the gradients of each task's examples in shared bases, one task after the other."""
        bases, made = self.bases(inputs), {}
        how = (inputs.kept_norm, bases, inputs.settings.damping, next(inputs.scored.parameters()).dtype)
        for task, batches in inputs.validation.items():
            norms, parts = gradients_in_turn(inputs.source, list(batches), inputs.loss_fn, inputs.layers)
            made[task] = shared_in_turn(parts, norms, *how)
        return made

    def contracting(self, queries: Mapping[str, TaskQuery], inputs: Inputs) -> BatchScorer:
        """Return the scorer that contracts candidates with given validation gradients."""
        sketch = NORM_SKETCH if proxy_config(inputs.scored) is not None else 0
        normalize = inputs.settings.normalize
        return BatchScorer(inputs.scored, queries, normalize=normalize, norm_sketch=sketch, loss_fn=inputs.loss_fn)

    def query_flops(self, model: nn.Module, read: QueryTokens) -> float:
        """Return the FLOPs of validation gradients: 6P per token, as in training."""
        return flops.training_flops(model, read.tokens, read.supervised)

    def candidate_flops(self, model: nn.Module, tokens: int, supervised: int, contraction: float) -> float:
        """Return the FLOPs of a forward pass, a backward pass to the activations, and the contraction."""
        return flops.scoring_flops(model, tokens, supervised, contraction)
