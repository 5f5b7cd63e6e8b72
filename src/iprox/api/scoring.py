"""Score examples, and attribute scores to tokens, in memory."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
from torch import nn
from transformers import PreTrainedTokenizerBase

from iprox.api.arguments import check_model, check_tasks, chosen, takes
from iprox.api.batches import Batches, of_batches, score_batches
from iprox.api.examples import Examples, Reader, as_pool, of_pairs
from iprox.data.batching import batch_tokens_for
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
from iprox.settings import ESTIMATORS, InfluenceSection

_OF_INFLUENCE = ("estimator", "curvature_examples", "damping", "query_norm", "normalize", "per_example")


@takes(InfluenceSection, *_OF_INFLUENCE)
def score(
    model: nn.Module | Sequence[nn.Module],
    pool: Examples,
    validation: Mapping[str, Examples],
    *,
    curvature_sample: Examples | None = None,
    optimizer_state: str | Path | Sequence[str | Path] = (),
    target: nn.Module | None = None,
    learning_rates: Sequence[float] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    max_length: int = 2048,
    batch_tokens: int | Literal["auto"] = "auto",
    loss_fn: LossFn = causal_lm_losses,
    seed: int = 0,
    progress: bool = True,
    **settings: Any,
) -> pa.Table:
    """Return the influence of every pool example on every task. Positive: training on it lowers the validation loss.

    Args:
        model: a proxy or any model; several are checkpoints, summed by TracIn with their learning rates.
        pool: candidates. With `loss_fn` a torch data set, which is read in batches of 32, or a DataLoader that does not
            shuffle.
        validation: validation examples by task.
        curvature_sample: examples to measure curvature on. None draws `curvature_examples` from the pool.
        optimizer_state: for `less`, folder of the warm-up checkpoint with the optimizer's state; one per checkpoint.
        target: the target of a proxy. Validation gradients are then taken on it, which is more faithful and costs
            little because they are few. None takes them on `model`.
        learning_rates: one per checkpoint; 1 for a single model if None.
        tokenizer: tokenizer; the model's own if None.
        max_length: longest example in tokens.
        batch_tokens: largest rows × longest row of a batch; `auto` as in a recipe.
        loss_fn: (model, batch) -> losses [B], for models other than language models; or `iprox.DpoLoss` or
            `iprox.RewardLoss`, for rows with `chosen` and `rejected`.
        seed: seed for the estimator `random`, the curvature sample, and the labels that K-FAC and EK-FAC sample.
        progress: whether to show progress on standard error.
        **settings: settings of `influence` in a recipe.

    Returns:
        The scores table (docs/files.md), one row per example in pool order.

    Raises:
        InputError: bad input; the message says what is wrong and how to fix it.
    """
    how = chosen(InfluenceSection, score, settings, _OF_INFLUENCE)
    if curvature_sample is not None and not how.traits.curvature:
        raise InputError(f"curvature_sample= is for influence functions, but {how.estimator} measures no curvature")
    models = [model] if isinstance(model, nn.Module | str) else list(model)
    for each in models:
        check_model("model", each)
    check_tasks(validation)
    checkpoints = _checkpoints(how, models, learning_rates, target, optimizer_state)
    if of_batches(pool, loss_fn):
        source: Any = Batches(pool, "pool", next(models[0].parameters()).device)
        rows, unit = source.count, "batches"
    else:
        source = as_pool(pool, "pool", loss_fn)
        rows, unit = source.scan().rows, "rows"
    size = batch_tokens_for(next(models[0].parameters()).device, batch_tokens)
    common = {"seed": seed, "batch_tokens": size, "loss_fn": loss_fn}
    with (
        experts_split(*models, *([] if target is None else [target])),
        Reporter(quiet=not progress).bar("score", rows and rows * len(models), unit) as advance,
    ):
        _check_target(models[0], target)
        made_by = {"estimator": how.estimator, "normalize": how.normalize}
        made_by |= {"loss": type(loss_fn).__name__} if of_pairs(loss_fn) else {}
        if isinstance(source, Batches):
            return score_batches(how, checkpoints, source, validation, curvature_sample, made_by, advance, common)
        reader = Reader(models[0], tokenizer, max_length, size, loss_fn)
        encoded = {task: reader.encode(examples, task) for task, examples in validation.items()}
        curved = None
        if how.traits.curvature and curvature_sample is not None:
            curved = reader.encode(curvature_sample, "curvature_sample")
        job = Job.of(how, checkpoints, encoded, reader.encoder, source, sample=curved, **common)
        metadata = {**made_by, **ValidationLengths.of(encoded).as_metadata()}
        return job.score(source, metadata=metadata, progress=advance)[0]


_OF_ATTRIBUTION = ("query_norm", "normalize")


@takes(InfluenceSection, *_OF_ATTRIBUTION)
def attribute(
    model: nn.Module,
    examples: Examples,
    validation: Mapping[str, Examples],
    *,
    target: nn.Module | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    max_length: int = 2048,
    batch_tokens: int | Literal["auto"] = "auto",
    **settings: Any,
) -> pa.Table:
    """Return which tokens the TracIn scores of some examples come from (`iprox.influence.attribution`).

    Args:
        model: the model that they were scored on.
        examples: a few examples.
        validation: validation examples by task.
        target: as for `score`.
        tokenizer: tokenizer; the model's own if None.
        max_length: longest example in tokens.
        batch_tokens: largest rows × longest row of a batch; `auto` as in a recipe.
        **settings: settings of `influence` in a recipe.

    Returns:
        One row per example: `id`, `tokens`, `supervised`, and per task a list `influence/<task>` with one term per
            token; the sum of the terms is the score. Positive terms help the task.

    Raises:
        InputError: bad input, or a model with experts, whose layers do not see every token.
    """
    how = chosen(InfluenceSection, attribute, settings, _OF_ATTRIBUTION)
    how = how.model_copy(update={"estimator": "tracin", "per_example": False})
    check_model("model", model)
    check_tasks(validation)
    with experts_split(model, *([] if target is None else [target])):
        why = why_not_attributed(how, model)
        if why is not None:
            raise InputError(f"attribution: {why}")
        _check_target(model, target)
        reader = Reader(model, tokenizer, max_length, batch_tokens)
        encoded = {task: reader.encode(rows, task) for task, rows in validation.items()}
        source = as_pool(examples, "examples")
        source.scan()
        checkpoint = Checkpoint(model, target=target)
        job = Job.of(how, [checkpoint], encoded, reader.encoder, source, batch_tokens=reader.batch_tokens)
        shown = list(source)
        return attribution_table(job, shown, attribute_tokens(job, shown)[0])


def _checkpoints(
    settings: InfluenceSection,
    models: Sequence[nn.Module],
    learning_rates: Sequence[float] | None,
    target: nn.Module | None,
    optimizer_state: str | Path | Sequence[str | Path],
) -> list[Checkpoint]:
    """Return the models as checkpoints, each with its learning rate, target and optimizer state."""
    if learning_rates is None:
        if len(models) != 1:
            raise InputError("several checkpoints need their learning_rates")
        learning_rates = [1.0]
    if len(learning_rates) != len(models):
        raise InputError(f"{len(models)} models but {len(learning_rates)} learning rates")
    if not all(0 < rate < math.inf for rate in learning_rates):
        raise InputError(f"learning_rates must be numbers above 0, not {list(learning_rates)}")
    if target is not None and len(models) > 1:
        raise InputError("target= works with one proxy; score the proxy of each checkpoint separately")
    if not settings.traits.gradients and len(models) > 1:
        raise InputError(f"{settings.estimator} takes one model; only gradient estimators sum checkpoints")
    states = [optimizer_state] if isinstance(optimizer_state, str | Path) else list(optimizer_state)
    if len(states) != (len(models) if settings.traits.optimizer else 0):
        needing = next(name for name, traits in ESTIMATORS.items() if traits.optimizer)
        raise InputError(f"optimizer_state= is for the estimator {needing}, one per model; {len(states)} given")
    states = states or [None] * len(models)
    return [
        Checkpoint(model, rate, target, state)
        for model, rate, state in zip(models, learning_rates, states, strict=True)
    ]


def _check_target(model: nn.Module, target: nn.Module | None) -> None:
    """Refuse a target that is not the proxy's."""
    if target is not None and proxy_config(model) is not None:
        check_belongs(model, "model", target, "target")  # pyright: ignore[reportArgumentType]  (proxies are)
