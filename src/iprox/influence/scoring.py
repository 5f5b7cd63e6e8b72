"""What to score and how: from the settings and the validation sets to a scorer of batches."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

from torch import nn

from iprox.data import Batch, Encoded, iter_batches, on_device
from iprox.errors import InputError
from iprox.influence import gradient_free
from iprox.influence.adam import AdamScorer
from iprox.influence.aggregate import Aggregation, OverExamples
from iprox.influence.estimators import BatchScorer, ModelGradient, Normalize, TaskQuery, mean_gradient, seen_from
from iprox.influence.example_gradients import example_gradients, example_seen_from
from iprox.influence.gradient_free import Corpus, RowScorer
from iprox.influence.preconditioning import (
    InfluenceEstimator,
    KroneckerCurvature,
    curvature_of,
    precondition,
    warn_of_unmoved,
)
from iprox.influence.shared_basis import shared_queries
from iprox.influence.truncation import low_rank_queries
from iprox.models.checkpoint import proxy_config
from iprox.models.layers import GradientSpace
from iprox.models.loss import LossFn, causal_lm_losses
from iprox.models.optimizer_state import AdamState
from iprox.settings import ALIKE, CURVED, GRADIENT_FREE, GradientFree

# Rows tokenized and sorted by length together. Enough that length-sorted batches hold little padding, few enough
# that a window's tokens are nothing beside a model; also the unit of resuming and of spreading over workers.
WINDOW = 1024

# Share of the validation gradients' norm that scores on a proxy keep unless asked otherwise: what is lost is small
# beside what the proxy loses. On a model itself they are kept whole, so that its scores are exact. Divided by a
# curvature they are less low-rank, and candidates meet their small directions too (`benchmarks/queries.py`).
QUERY_NORM, CURVED_QUERY_NORM = 0.9, 0.98
# The same for scores by validation example, on any model (`iprox.influence.shared_basis`).
EXAMPLES_NORM = 0.9
# Random signs a layer that candidates' norms are estimated from on a proxy unless asked otherwise, for their cosine.
# Exact norms would cost a proxy as much as they do its target, up to half of its scoring.
NORM_SKETCH = 32

# Where the validation gradients of a proxy are taken.
Query = Literal["target", "proxy"]

# What a score is: an influence, or something to compare it with.
Estimator = InfluenceEstimator | GradientFree


@dataclass(frozen=True, slots=True)
class ScoringSettings:
    """How to score.

    Attributes:
        estimator: `tracin`; `adam`, TracIn of the steps that the warm-up's Adam would take (`iprox.influence.adam`);
            the influence functions `influence-function` and `datainf`, which need a sample of the
            pool to measure curvature on; or a scorer without gradients (`iprox.influence.gradient_free`).
        curvature: of `influence-function`: `ek-fac` or `k-fac`.
        damping: of an influence function: λ as a share of the mean eigenvalue of each layer's curvature.
        gradient: which gradient of a proxy's low-rank layers, `factors` or `weight`.
        normalize: `none` or `cosine`.
        over_examples: how a task's score is made of its validation examples (`Aggregation.examples`).
        per_example: keep the scores by validation example.
        query_norm: share of the norm of a validation gradient that is kept when it is made low-rank
            (`iprox.influence.truncation`), so that many tasks cost little more than one; 1 scores with the whole
            gradient. None: 0.9 on a proxy, by influence functions 0.98, and 1 on a model itself. `adam`, which forms
            candidates' gradients anyway, meets whole mean gradients, and is refused another.
        norm_sketch: for the cosine on a proxy, random signs a layer that a candidate's norm is estimated from
            (`iprox.influence.gradients.sketched_norms`); 0 is exact, None is 32. A model's own norms are always exact,
            so that what a proxy is judged by has no error in common with it; `adam` has them for nothing.
        batch_tokens: largest rows × longest row of a batch.
        window: rows read, sorted and written together.
        compile: run the model's decoder layers compiled; pays for itself after some ten thousand rows.
        seed: of the estimator `random`, and of the labels that K-FAC and EK-FAC sample.
    """

    gradient: GradientSpace = "factors"
    normalize: Normalize = "none"
    query_norm: float | None = None
    norm_sketch: int | None = None
    batch_tokens: int = 4096
    window: int = WINDOW
    compile: bool = False
    estimator: Estimator = "tracin"
    curvature: KroneckerCurvature = "ek-fac"
    damping: float = 0.1
    seed: int = 0
    over_examples: OverExamples = "mean"
    per_example: bool = False

    @property
    def aggregation(self) -> Aggregation:
        """How many scores of a candidate become one."""
        return Aggregation(self.over_examples, self.per_example)

    @property
    def kept_on_proxy(self) -> float:
        """The share of the validation gradients' norm to keep when candidates are scored on a proxy."""
        if self.query_norm is not None:
            return self.query_norm
        return CURVED_QUERY_NORM if self.estimator in CURVED else QUERY_NORM

    @property
    def kept_by_example(self) -> float:
        """The share of the examples' gradients that their shared bases keep.

        Whole bases would take the memory of a gradient of the model per example, so they are for those who ask.
        """
        return EXAMPLES_NORM if self.query_norm is None else self.query_norm

    def kept_norm(self, model: nn.Module) -> float:
        """The share of the validation gradients' norm to keep when candidates are scored on this model."""
        own = self.query_norm is None and proxy_config(model) is None
        return 1.0 if own else self.kept_on_proxy

    def sketched(self, model: nn.Module) -> int:
        """The random signs a layer that norms of candidates are estimated from on this model; 0: none are."""
        if self.normalize == "none" or self.estimator == "adam" or proxy_config(model) is None:
            return 0
        return NORM_SKETCH if self.norm_sketch is None else self.norm_sketch


@dataclass(slots=True)
class ScoringStats:
    """What was read and done.

    Attributes:
        rows: rows read.
        unscored: rows without a score.
        tokens: tokens read.
        supervised: supervised tokens among them.
        truncated: over-long examples that were cut.
        contraction_flops: spent on contracting with the validation gradients, and on norms where they are wanted, at
            all checkpoints.
        query_kept: share of the validation gradients' norm that was kept: of the task that lost most.
        uncompiled: why the model did not run compiled although asked to; empty where it did or need not.
        batch_tokens: largest batch that memory held, in tokens.
    """

    rows: int = 0
    unscored: int = 0
    tokens: int = 0
    supervised: int = 0
    truncated: int = 0
    contraction_flops: float = 0.0
    query_kept: float = 1.0
    uncompiled: str = ""
    batch_tokens: int = sys.maxsize

    @classmethod
    def of(cls, encoded: Sequence[Encoded]) -> ScoringStats:
        """What reading some examples counts for."""
        return cls(
            rows=len(encoded),
            unscored=sum(example.supervised == 0 for example in encoded),
            tokens=sum(len(example.input_ids) for example in encoded),
            supervised=sum(example.supervised for example in encoded),
            truncated=sum(example.truncated for example in encoded),
        )

    @classmethod
    def over_checkpoints(cls, each: Sequence[ScoringStats]) -> ScoringStats:
        """Of the same rows at several checkpoints: they were read once, what was done adds up."""
        total = replace(each[0])
        for other in each[1:]:
            total._add_work(other)
        return total

    def add(self, other: ScoringStats) -> None:
        """Count other rows, and what was done with them, into this one."""
        for name in ("rows", "unscored", "tokens", "supervised", "truncated"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self._add_work(other)

    def _add_work(self, other: ScoringStats) -> None:
        self.contraction_flops += other.contraction_flops
        self.query_kept = min(self.query_kept, other.query_kept)
        self.uncompiled = self.uncompiled or other.uncompiled
        self.batch_tokens = min(self.batch_tokens, other.batch_tokens)


def scorer_of_batches(
    model: nn.Module,
    validation: Mapping[str, Iterable[Any]],
    settings: ScoringSettings,
    loss_fn: LossFn = causal_lm_losses,
    target: nn.Module | None = None,
    sample: Sequence[Any] = (),
    adam: AdamState | None = None,
) -> BatchScorer:
    """A scorer of candidates against each task's validation gradients at one checkpoint (see `task_queries`).

    Args:
        model: what candidates are scored on.
        validation: batches of each task's validation examples.
        settings: how to score.
        loss_fn: per-example losses of a model that is no language model.
        target: the target of a proxy `model`, for the validation gradients.
        sample: batches of the pool's examples, which an influence function measures curvature on.
        adam: the state of the warm-up's optimizer.

    Raises:
        InputError: from `task_queries`; the estimator `adam` without the state of the optimizer, of factors, which no
            optimizer has moments of, or with a `query_norm`.
    """
    if settings.estimator == "adam":
        if adam is None:
            raise InputError("the estimator adam needs the state of the warm-up's optimizer")
        if settings.gradient == "factors":
            raise InputError("adam: the optimizer's moments are of the target's weights; set gradient to weight")
        if (settings.query_norm or 1) < 1 and not settings.aggregation.by_example:
            raise InputError("adam forms whole gradients, so a query_norm saves it nothing: leave it out")
    queries = task_queries(model, validation, settings, loss_fn, target, sample)
    if settings.estimator == "adam":
        assert adam is not None
        return AdamScorer(model, queries, adam, normalize=settings.normalize, loss_fn=loss_fn)
    keep = settings.kept_norm(model)
    if keep < 1 and not settings.aggregation.by_example:
        queries = low_rank_queries(cast(Mapping[str, ModelGradient], queries), keep)
    return BatchScorer(
        model,
        queries,
        gradient=settings.gradient,
        normalize=settings.normalize,
        norm_sketch=settings.sketched(model),
        loss_fn=loss_fn,
    )


def task_queries(
    model: nn.Module,
    validation: Mapping[str, Iterable[Any]],
    settings: ScoringSettings,
    loss_fn: LossFn = causal_lm_losses,
    target: nn.Module | None = None,
    sample: Sequence[Any] = (),
    *,
    shared: bool = True,
) -> dict[str, TaskQuery]:
    """What candidates on a model are to meet of each task: its mean validation gradient, or those of its examples.

    Args:
        model: what candidates are scored on.
        validation: batches of each task's validation examples.
        settings: how to score.
        loss_fn: per-example losses of a model that is no language model.
        target: the target of a proxy `model`: validation gradients are then taken on it. They are few, so that costs
            next to nothing, and only the candidates' side of the dot product is approximate.
        sample: batches of the pool's examples, which an influence function measures curvature on.
        shared: bring the gradients of a task's examples into shared bases, which contracting needs and projecting
            does not.

    Raises:
        InputError: an influence function of a proxy's factors with validation gradients of its target: an inverse does
            not go through the chain rule; or scores by example of one, which there are none of.
    """
    if settings.estimator in CURVED and target is not None and settings.gradient == "factors":
        raise InputError(
            f"{settings.estimator} with gradients of the factors takes validation gradients on the proxy: "
            "set query to proxy, or gradient to weight"
        )
    source, space = (model, settings.gradient) if target is None else (target, "weight")
    if settings.aggregation.by_example:
        return _queries_by_example(model, validation, settings, loss_fn, target, sample, shared)
    queries = {task: mean_gradient(source, batches, space, loss_fn)[0] for task, batches in validation.items()}
    if settings.estimator in CURVED:
        queries = precondition(
            source,
            queries,
            sample,
            "datainf" if settings.estimator == "datainf" else settings.curvature,
            damping=settings.damping,
            gradient=space,
            loss_fn=loss_fn,
            seed=settings.seed,
        )
    if target is not None:
        queries = {task: seen_from(query, model, settings.gradient) for task, query in queries.items()}
    return dict(queries)


def _queries_by_example(
    model: nn.Module,
    validation: Mapping[str, Iterable[Any]],
    settings: ScoringSettings,
    loss_fn: LossFn,
    target: nn.Module | None,
    sample: Sequence[Any],
    shared: bool,
) -> dict[str, TaskQuery]:
    """The gradients of single validation examples: in shared bases, but for Adam's steps.

    Raises:
        InputError: DataInf, whose inverse is of a task's mean gradient.
    """
    if settings.estimator == "datainf":
        raise InputError(
            "datainf divides the mean gradient of a task by the curvature; by validation example there are tracin, "
            "influence-function, adam, rds and bm25"
        )
    source, space = (model, settings.gradient) if target is None else (target, "weight")
    adam = settings.estimator == "adam"  # whose candidates are whole gradients, which need no bases
    assert shared or settings.estimator not in CURVED  # the inverse is applied on the way into the bases
    found = {
        task: example_gradients(source, batches, space, settings.kept_norm(model) if adam else 1.0, loss_fn)
        for task, batches in validation.items()
    }
    bases = None
    if settings.estimator in CURVED:
        bases = curvature_of(source, sample, settings.curvature, gradient=space, loss_fn=loss_fn, seed=settings.seed)
        first = next(iter(found.values()))[0]
        warn_of_unmoved(sorted(name for name in first if name not in bases or not bases[name].eigenvalues.any()))
    if target is not None:  # layers that the proxy lacks are met by no candidate
        found = {t: [example_seen_from(each, model, settings.gradient) for each in of] for t, of in found.items()}
    if adam or not shared:
        return dict(found)
    dtype = next(model.parameters()).dtype
    keep = settings.kept_by_example
    return {task: shared_queries(each, keep, bases, settings.damping, dtype) for task, each in found.items()}


def build_scorer(
    model: nn.Module | None,
    validation: Mapping[str, Sequence[Encoded]],
    pad_id: int,
    settings: ScoringSettings,
    loss_fn: LossFn = causal_lm_losses,
    target: nn.Module | None = None,
    sample: Sequence[Encoded] = (),
    corpus: Corpus | None = None,
    adam: AdamState | None = None,
) -> BatchScorer | RowScorer:
    """`scorer_of_batches` for encoded validation examples by task, and an encoded sample of the pool.

    Scorers without gradients too; some need no model. BM25 needs the `corpus`, `adam` the optimizer's state.

    Raises:
        InputError: cosine of a scorer without gradients; a task, or the sample that an influence function needs, has no
            example with a supervised token.
    """
    if settings.estimator in GRADIENT_FREE and settings.normalize != "none":
        raise InputError(f"normalize {settings.normalize} is of gradients, which {settings.estimator} has none of")
    if settings.aggregation.by_example and settings.estimator in ALIKE:
        raise InputError(f"{settings.estimator} looks at no validation example, so it has no scores by example")
    if settings.estimator == "bm25":
        assert corpus is not None
        return gradient_free.bm25_scorer(corpus, validation, by_example=settings.aggregation.by_example)
    if settings.estimator == "random":
        return RowScorer(list(validation), lambda batch: gradient_free.random_scores(batch, settings.seed))
    if settings.estimator == "length":
        return RowScorer(list(validation), gradient_free.length_scores)
    assert model is not None
    if settings.estimator == "perplexity":
        return RowScorer(list(validation), lambda batch: gradient_free.perplexity_scores(model, batch, loss_fn), model)
    device = next((model if target is None else target).parameters()).device
    batches = {}
    for task, encoded in validation.items():
        if not any(example.supervised for example in encoded):
            raise InputError(f"validation task {task!r} has no example with a supervised token")
        batches[task] = on_device(iter_batches(encoded, settings.batch_tokens, pad_id), device)
    if settings.estimator == "rds":
        return gradient_free.rds_scorer(model, batches, by_example=settings.aggregation.by_example)  # pyright: ignore[reportArgumentType]
    measured: list[Batch] = []
    if settings.estimator in CURVED:
        measured = list(on_device(iter_batches(sample, settings.batch_tokens, pad_id), device))
        if not measured:
            raise InputError(
                f"{settings.estimator}: the sample for the curvature has no example with a supervised token"
            )
    return scorer_of_batches(model, batches, settings, loss_fn, target, measured, adam)
