"""Influence in memory: of examples, and of their tokens."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import pyarrow as pa
from torch import nn
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from iprox.api.arguments import check_choices, check_model, check_tasks
from iprox.api.batches import count_batches, score_batches, scorer_for_batches
from iprox.api.examples import Examples, Reader, as_pool
from iprox.data import Encoded
from iprox.data.tokens import ValidationLengths
from iprox.errors import InputError
from iprox.influence.aggregate import OverExamples, TaskSpread, by_task, combine
from iprox.influence.attribution import attribute_examples
from iprox.influence.estimators import BatchScorer, Normalize
from iprox.influence.gradient_free import Corpus
from iprox.influence.preconditioning import InfluenceEstimator, KroneckerCurvature
from iprox.influence.scoring import Estimator, ScoringSettings
from iprox.influence.windows import fitting_scorer, score_windows, windows_of
from iprox.models.checkpoint import proxy_config
from iprox.models.experts import SplitExperts, experts_split
from iprox.models.layers import GradientSpace
from iprox.models.loading import check_belongs
from iprox.models.loss import LossFn, causal_lm_losses
from iprox.models.optimizer_state import load_adam_state
from iprox.progress import Reporter
from iprox.session import draw_rows
from iprox.settings import CURVATURE_EXAMPLES, CURVED, GRADIENT_FREE, WITHOUT_EXAMPLES


def score(
    model: nn.Module | Sequence[nn.Module],
    pool: Examples,
    validation: Mapping[str, Examples],
    *,
    estimator: Estimator | None = None,
    curvature: KroneckerCurvature = "ek-fac",
    curvature_sample: Examples | None = None,
    optimizer_state: str | Path | Sequence[str | Path] = (),
    damping: float = 0.1,
    target: nn.Module | None = None,
    gradient: GradientSpace = "weight",
    query_norm: float | None = None,
    normalize: Normalize | None = None,
    norm_sketch: int | None = None,
    over_examples: OverExamples = "mean",
    per_example: bool | None = None,
    learning_rates: Sequence[float] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    max_length: int = 2048,
    batch_tokens: int = 4096,
    loss_fn: LossFn = causal_lm_losses,
    seed: int = 0,
    progress: bool = True,
) -> pa.Table:
    """Influence of every pool example on every task. Positive: training on it lowers the validation loss.

    Args:
        model: a proxy or any model; several are checkpoints, summed by TracIn with their learning rates.
        pool: candidates.
        validation: validation examples by task.
        estimator: None is `influence-function`, but `tracin` for DataLoaders without a `curvature_sample`. `tracin`;
            `adam`, of the steps that the warm-up's Adam would take (LESS, `iprox.influence.adam`); an
            influence function, `influence-function` or `datainf` (`iprox.kronecker.eigen`); or without gradients,
            to compare with (`iprox.influence.gradient_free`): `random`, `length`, `perplexity`, `rds` (hidden states)
            or `bm25` (words).
        curvature: of `influence-function`: `ek-fac` or `k-fac`.
        curvature_sample: what an influence function measures curvature on. None draws 256 examples of the pool, unless
            the data are DataLoaders.
        optimizer_state: for `adam`, the folder of the warm-up's checkpoint that holds the optimizer's state; of several
            checkpoints, one each.
        damping: of an influence function: λ as a share of the mean eigenvalue of each layer's curvature.
        target: the target of a proxy: validation gradients are then taken on it, which is more faithful and costs next
            to nothing, as they are few. None takes them on `model`.
        gradient: of a proxy: `factors` or `weight`.
        query_norm: share of the validation gradients' norm that is kept when they are made low-rank; 1 is exact.
            None: 0.9 on a proxy, by influence functions 0.98, and 1 on a model itself.
        normalize: `none` or `cosine`; None is `cosine` for estimators that take gradients.
        norm_sketch: of a cosine on a proxy: random signs a layer that norms of candidates are estimated from, which
            saves time on rows of more tokens than that; 0 is exact. None: 32.
        over_examples: how a task's score is made of its validation examples: their `mean`, or the `max`.
        per_example: keep the scores by validation example, as columns `examples/<task>`, by which examples take turns
            in `iprox.select`. None keeps them where there are any: not of DataLoaders, `datainf`, `random`, `length`
            and `perplexity`.
        learning_rates: one a checkpoint; 1 for a single model if None.
        tokenizer: the model's own if None.
        max_length: longest example in tokens.
        batch_tokens: largest rows × longest row of a batch.
        loss_fn: (model, batch) -> losses [B], for models that are no language models; data are then DataLoaders.
        seed: of the estimator `random`, of the curvature sample, and of the labels that K-FAC and EK-FAC sample.
        progress: show it, with rate and time left, on standard error.

    Returns:
        The scores table (docs/files.md), one row an example in pool order.

    Raises:
        InputError: bad input; the message says which and how to mend it.
    """
    loader = isinstance(pool, DataLoader)
    if estimator is None:
        estimator = "tracin" if loader and curvature_sample is None else "influence-function"
    if normalize is None:
        normalize = "none" if estimator in GRADIENT_FREE else "cosine"
    if per_example is None:
        per_example = not loader and estimator not in WITHOUT_EXAMPLES
    check_choices(
        estimator=(estimator, (*get_args(InfluenceEstimator), *GRADIENT_FREE)),
        curvature=(curvature, get_args(KroneckerCurvature)),
        gradient=(gradient, get_args(GradientSpace)),
        normalize=(normalize, get_args(Normalize)),
        over_examples=(over_examples, get_args(OverExamples)),
    )
    if damping <= 0:
        raise InputError(f"damping must be above 0, not {damping}")
    if query_norm is not None and not 0 < query_norm <= 1:
        raise InputError(f"query_norm must lie between 0 and 1, not {query_norm}")
    models = [model] if isinstance(model, nn.Module | str) else list(model)
    for each in models:
        check_model("model", each)
    _check_norm_sketch(norm_sketch, normalize, models, estimator)
    if learning_rates is None:
        if len(models) != 1:
            raise InputError("several checkpoints need their learning_rates")
        learning_rates = [1.0]
    if len(learning_rates) != len(models):
        raise InputError(f"{len(models)} models but {len(learning_rates)} learning rates")
    if not all(0 < rate < math.inf for rate in learning_rates):
        raise InputError(f"learning_rates must be numbers above 0, not {list(learning_rates)}")
    if target is not None and len(models) > 1:
        raise InputError("target= goes with one proxy; score each checkpoint's proxy by itself")
    check_tasks(validation)
    settings = ScoringSettings(
        gradient,
        normalize,
        query_norm,
        norm_sketch,
        batch_tokens,
        estimator=estimator,
        curvature=curvature,
        damping=damping,
        seed=seed,
        over_examples=over_examples,
        per_example=per_example,
    )
    if settings.estimator in GRADIENT_FREE and len(models) > 1:
        raise InputError(f"checkpoints are summed by TracIn; {estimator} takes one model")
    states = [optimizer_state] if isinstance(optimizer_state, str | Path) else list(optimizer_state)
    if len(states) != (len(models) if estimator == "adam" else 0):
        raise InputError(f"optimizer_state= goes with the estimator adam, one a model: {len(states)} given")
    tables: list[pa.Table] = []
    lengths: dict[str, Any] = {}
    source = pool if isinstance(pool, DataLoader) else as_pool(pool, "pool")
    rows, unit = (count_batches(source), "batches") if isinstance(source, DataLoader) else (source.scan().rows, "rows")
    with (
        experts_split(*models, *([] if target is None else [target])),
        Reporter(quiet=not progress).bar("score", rows and rows * len(models), unit) as advance,
    ):
        _check_target(models[0], target)
        for number, checkpoint in enumerate(models):
            adam = load_adam_state(states[number], next(checkpoint.parameters()).device) if states else None
            if isinstance(source, DataLoader):
                sample = None if curvature_sample is None else list(curvature_sample)
                scorer = scorer_for_batches(checkpoint, validation, settings, loss_fn, target, sample, adam)
                tables.append(score_batches(scorer, source, advance))
                continue
            reader = Reader(checkpoint, tokenizer, max_length, batch_tokens)
            encoded = {task: reader.encode(examples, task) for task, examples in validation.items()}
            lengths = ValidationLengths.of(encoded).as_metadata()
            curved: list[Encoded] = []
            if estimator in CURVED:
                curved = (
                    reader.encoder.encode(
                        source.take(draw_rows("curvature", seed, source.scan().rows, CURVATURE_EXAMPLES))
                    )
                    if curvature_sample is None
                    else reader.encode(curvature_sample, "curvature_sample")
                )
            corpus = None
            if estimator == "bm25":
                corpus = Corpus.of(
                    row for some in windows_of(source, settings.window) for row in reader.encoder.encode(some)
                )
            scorer, fitted = fitting_scorer(checkpoint, encoded, 0, settings, target, curved, corpus, loss_fn, adam)
            parts = score_windows(scorer, source, reader.encoder, 0, fitted, advance)
            tables.append(pa.concat_tables([table for table, _ in parts]))
    spread = TaskSpread()
    spread.add(by_task(tables, learning_rates, settings.aggregation))
    made_by = {"estimator": estimator, "normalize": normalize, **lengths}
    return combine(tables, learning_rates, settings.aggregation, spread, made_by)


def attribute(
    model: nn.Module,
    examples: Examples,
    validation: Mapping[str, Examples],
    *,
    target: nn.Module | None = None,
    gradient: GradientSpace = "weight",
    query_norm: float | None = None,
    normalize: Normalize = "cosine",
    norm_sketch: int | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    max_length: int = 2048,
    batch_tokens: int = 4096,
) -> pa.Table:
    """Which tokens the TracIn score of some examples comes from (`iprox.influence.attribution`).

    Args:
        model: what they were scored on.
        examples: the few to look at.
        validation: validation examples by task.
        target: as for `score`.
        gradient: as for `score`.
        query_norm: as for `score`.
        normalize: `cosine` (default) or `none`.
        norm_sketch: as for `score`.
        tokenizer: the model's own if None.
        max_length: longest example in tokens.
        batch_tokens: largest rows × longest row of a batch.

    Returns:
        One row an example: `id`, `tokens`, `supervised`, and for each task a list `influence/<task>` of one term a
        token, whose sum is the score. Positive terms help the task.

    Raises:
        InputError: bad input, or a model with experts, whose layers do not see every token.
    """
    check_model("model", model)
    check_choices(gradient=(gradient, get_args(GradientSpace)), normalize=(normalize, get_args(Normalize)))
    with experts_split(model):
        if any(isinstance(module, SplitExperts) for module in model.modules()):
            raise InputError("attribution: the model has experts, whose layers do not see every token")
    _check_norm_sketch(norm_sketch, normalize, [model])
    check_tasks(validation)
    settings = ScoringSettings(
        gradient, normalize, query_norm=query_norm, norm_sketch=norm_sketch, batch_tokens=batch_tokens
    )
    reader = Reader(model, tokenizer, max_length, batch_tokens)
    encoded = {task: reader.encode(rows, task) for task, rows in validation.items()}
    source = as_pool(examples, "examples")
    source.scan()
    with experts_split(model, *([] if target is None else [target])):
        _check_target(model, target)
        scorer, settings = fitting_scorer(model, encoded, 0, settings, target)
        assert isinstance(scorer, BatchScorer)
        return attribute_examples(scorer, list(source), reader.encoder, 0, settings.batch_tokens)


def _check_norm_sketch(
    sketch: int | None, normalize: Normalize, models: Sequence[nn.Module], estimator: Estimator = "tracin"
) -> None:
    """Refuse a sketch of norms that are not wanted, are had for nothing, or not of a proxy."""
    if not sketch:
        return
    if sketch < 0:
        raise InputError(f"norm_sketch must be 0 or more, not {sketch}")
    if normalize == "none":
        raise InputError("norm_sketch is of the norms of a cosine: set normalize to cosine, or leave it out")
    if estimator == "adam":
        raise InputError("adam forms whole gradients, so a norm_sketch saves it nothing: leave it out")
    if any(proxy_config(model) is None for model in models):
        raise InputError("norm_sketch is for a proxy: a model's own norms are exact")


def _check_target(model: nn.Module, target: nn.Module | None) -> None:
    """Refuse a target that is not the proxy's, as the command line does."""
    if target is not None and proxy_config(model) is not None:
        check_belongs(model, "model", target, "target")  # pyright: ignore[reportArgumentType]  (proxies are)
