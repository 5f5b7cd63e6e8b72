"""Influence in memory: of examples, and of their tokens."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
from torch import nn
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from iprox.api.arguments import check_model, check_tasks
from iprox.api.batches import count_batches, score_batches
from iprox.api.examples import Examples, Reader, as_pool
from iprox.data.tokens import ValidationLengths
from iprox.errors import InputError
from iprox.influence.attribution import attribute as attribute_tokens
from iprox.influence.attribution import attribution_table, why_not_attributed
from iprox.influence.job import Checkpoint, Job
from iprox.models.checkpoint import proxy_config
from iprox.models.experts import experts_split
from iprox.models.loading import check_belongs
from iprox.models.loss import LossFn, causal_lm_losses
from iprox.progress import Reporter
from iprox.recipe import validated
from iprox.settings import ESTIMATORS, EstimatorName, InfluenceSection


def score(
    model: nn.Module | Sequence[nn.Module],
    pool: Examples,
    validation: Mapping[str, Examples],
    *,
    estimator: EstimatorName | None = None,
    curvature_sample: Examples | None = None,
    optimizer_state: str | Path | Sequence[str | Path] = (),
    damping: float = 0.1,
    target: nn.Module | None = None,
    query_norm: float | None = None,
    normalize: Literal["none", "cosine"] | None = None,
    per_example: bool | None = None,
    learning_rates: Sequence[float] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    max_length: int = 2048,
    batch_tokens: int = 4096,
    loss_fn: LossFn = causal_lm_losses,
    seed: int = 0,
    progress: bool = True,
) -> pa.Table:
    """Return the influence of every pool example on every task. Positive: training on it lowers the validation loss.

    Args:
        model: a proxy or any model; several are checkpoints, summed by TracIn with their learning rates.
        pool: candidates.
        validation: validation examples by task.
        estimator: `ekfac` (default), `kfac` or `datainf`, influence functions; `tracin` (default for DataLoaders
            without a `curvature_sample`); `less`, which scores the steps that the warm-up's Adam would take; or a
            baseline without gradients (`iprox.influence.baselines`): `random`, `length`, `perplexity`, `rds` (hidden
            states) or `bm25` (words).
        curvature_sample: what an influence function measures curvature on. None draws 256 examples of the pool by the
            seed, unless the data are DataLoaders.
        optimizer_state: for `less`, the folder of the warm-up's checkpoint that holds the optimizer's state; with
            several checkpoints, one each.
        damping: λ of an influence function, as a share of the mean eigenvalue of each layer's curvature.
        target: the target of a proxy: validation gradients are then taken on it, which is more faithful and costs next
            to nothing, as they are few. None takes them on `model`.
        query_norm: share of the validation gradients' norm that is kept when they are made low-rank; 1 is exact.
            None: 0.9 by validation example; otherwise 0.9 on a proxy, 0.98 with influence functions, and 1 on a model
            itself.
        normalize: `none` or `cosine`; None is `cosine` for estimators that take gradients.
        per_example: keep the scores by validation example, as columns `examples/<task>`, by which examples take turns
            in `iprox.select`. None keeps them where there are any: not with DataLoaders, `datainf`, `random`, `length`
            and `perplexity`.
        learning_rates: one per checkpoint; 1 for a single model if None.
        tokenizer: the model's own if None.
        max_length: longest example in tokens.
        batch_tokens: largest rows × longest row of a batch.
        loss_fn: (model, batch) -> losses [B], for models that are no language models; data are then DataLoaders.
        seed: seed for the estimator `random`, the curvature sample, and the labels that K-FAC and EK-FAC sample.
        progress: show it, with rate and time left, on standard error.

    Returns:
        The scores table (docs/files.md), one row per example in pool order.

    Raises:
        InputError: bad input; the message says which and how to fix it.
    """
    loader = isinstance(pool, DataLoader)
    if loader:
        estimator = estimator or ("tracin" if curvature_sample is None else "ekfac")
        per_example = bool(per_example)
    settings = influence_settings(
        estimator=estimator, damping=damping, query_norm=query_norm, normalize=normalize, per_example=per_example
    )
    models = [model] if isinstance(model, nn.Module | str) else list(model)
    for each in models:
        check_model("model", each)
    check_tasks(validation)
    checkpoints = _checkpoints(settings, models, learning_rates, target, optimizer_state)
    source: Any = pool if loader else as_pool(pool, "pool")
    rows, unit = (count_batches(source), "batches") if loader else (source.scan().rows, "rows")
    how = {"seed": seed, "batch_tokens": batch_tokens, "loss_fn": loss_fn}
    with (
        experts_split(*models, *([] if target is None else [target])),
        Reporter(quiet=not progress).bar("score", rows and rows * len(models), unit) as advance,
    ):
        _check_target(models[0], target)
        made_by = {"estimator": settings.estimator, "normalize": settings.normalize}
        if loader:
            return score_batches(settings, checkpoints, source, validation, curvature_sample, made_by, advance, how)
        reader = Reader(models[0], tokenizer, max_length, batch_tokens)
        encoded = {task: reader.encode(examples, task) for task, examples in validation.items()}
        curved = None
        if settings.traits.curvature and curvature_sample is not None:
            curved = reader.encode(curvature_sample, "curvature_sample")
        job = Job.of(settings, checkpoints, encoded, reader.encoder, source, sample=curved, **how)
        metadata = {**made_by, **ValidationLengths.of(encoded).as_metadata()}
        return job.score(source, metadata=metadata, progress=advance)[0]


def attribute(
    model: nn.Module,
    examples: Examples,
    validation: Mapping[str, Examples],
    *,
    target: nn.Module | None = None,
    query_norm: float | None = None,
    normalize: Literal["none", "cosine"] = "cosine",
    tokenizer: PreTrainedTokenizerBase | None = None,
    max_length: int = 2048,
    batch_tokens: int = 4096,
) -> pa.Table:
    """Return which tokens the TracIn score of some examples comes from (`iprox.influence.attribution`).

    Args:
        model: what they were scored on.
        examples: the few to look at.
        validation: validation examples by task.
        target: as for `score`.
        query_norm: as for `score`; None: 0.9 on a proxy, and 1 on a model itself.
        normalize: `cosine` (default) or `none`.
        tokenizer: the model's own if None.
        max_length: longest example in tokens.
        batch_tokens: largest rows × longest row of a batch.

    Returns:
        One row per example: `id`, `tokens`, `supervised`, and for each task a list `influence/<task>` of one term per
        token, whose sum is the score. Positive terms help the task.

    Raises:
        InputError: bad input, or a model with experts, whose layers do not see every token.
    """
    settings = influence_settings(estimator="tracin", query_norm=query_norm, normalize=normalize, per_example=False)
    check_model("model", model)
    check_tasks(validation)
    with experts_split(model, *([] if target is None else [target])):
        why = why_not_attributed(settings, model)
        if why is not None:
            raise InputError(f"attribution: {why}")
        _check_target(model, target)
        reader = Reader(model, tokenizer, max_length, batch_tokens)
        encoded = {task: reader.encode(rows, task) for task, rows in validation.items()}
        source = as_pool(examples, "examples")
        source.scan()
        checkpoint = Checkpoint(model, target=target)
        job = Job.of(settings, [checkpoint], encoded, reader.encoder, source, batch_tokens=batch_tokens)
        shown = list(source)
        return attribution_table(job, shown, attribute_tokens(job, shown)[0])


def influence_settings(**given: Any) -> InfluenceSection:
    """Return the settings that some arguments give; None leaves one at its default.

    Raises:
        InputError: a bad value, or values that exclude each other.
    """
    named = {name: value for name, value in given.items() if value is not None}
    return validated(InfluenceSection, named, "")


def _checkpoints(
    settings: InfluenceSection,
    models: Sequence[nn.Module],
    learning_rates: Sequence[float] | None,
    target: nn.Module | None,
    optimizer_state: str | Path | Sequence[str | Path],
) -> list[Checkpoint]:
    """Return the models with what belongs to each.

    Raises:
        InputError: numbers of things that do not agree.
    """
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
    if not settings.traits.gradients and len(models) > 1:
        raise InputError(f"checkpoints are summed by TracIn; {settings.estimator} takes one model")
    states = [optimizer_state] if isinstance(optimizer_state, str | Path) else list(optimizer_state)
    if len(states) != (len(models) if settings.traits.optimizer else 0):
        needing = next(name for name, traits in ESTIMATORS.items() if traits.optimizer)
        raise InputError(f"optimizer_state= goes with the estimator {needing}, one per model: {len(states)} given")
    states = states or [None] * len(models)
    return [
        Checkpoint(model, rate, target, state)
        for model, rate, state in zip(models, learning_rates, states, strict=True)
    ]


def _check_target(model: nn.Module, target: nn.Module | None) -> None:
    """Refuse a target that is not the proxy's, as the command line does."""
    if target is not None and proxy_config(model) is not None:
        check_belongs(model, "model", target, "target")  # pyright: ignore[reportArgumentType]  (proxies are)
