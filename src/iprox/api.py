"""The Python API (design 7): the stages on models and data in memory."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pyarrow as pa
import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from iprox.audit.fidelity import AuditReport, compare_scores
from iprox.audit.held_out import HeldOutFidelity
from iprox.data import Encoded, example_batches, on_device
from iprox.errors import InputError
from iprox.examples import Examples, Reader, as_pool
from iprox.influence.aggregate import Aggregate, OverExamples, TaskSpread, by_task, combine
from iprox.influence.attribution import attribute_examples
from iprox.influence.estimators import BatchScorer, Normalise
from iprox.influence.gradient_free import Corpus
from iprox.influence.index import GradientIndex
from iprox.influence.preconditioning import InfluenceEstimator, KroneckerCurvature
from iprox.influence.scores import scores_table
from iprox.influence.scoring import Estimator, Query, ScoringSettings, scorer_of_batches
from iprox.influence.windows import fitting_scorer, score_windows, windows_of
from iprox.models import checkpoint as _checkpoint  # noqa: F401  registers proxies with transformers
from iprox.models.experts import SplitExperts, experts_split
from iprox.models.layers import GradientSpace, low_rank_layers
from iprox.models.loading import load_model
from iprox.models.loss import LossFn, causal_lm_losses
from iprox.models.optimizer_state import AdamState, load_adam_state
from iprox.proxy.align import AlignmentHistory, AlignSettings
from iprox.proxy.align import align as align_factors
from iprox.proxy.align_loss import Distance, Objective
from iprox.proxy.compress import Method, adopt, derive_proxy, extract_layers
from iprox.proxy.factorise import FactorSettings, RankRule
from iprox.proxy.methods import PROBED, Ridge
from iprox.proxy.moments import Labels, MomentSettings, Tokens
from iprox.proxy.size import Size
from iprox.recipe import CURVATURE_EXAMPLES, CURVED, GRADIENT_FREE
from iprox.selection import SelectionSettings, Strategy, select_rows
from iprox.session import draw_rows


def compress(
    model: PreTrainedModel,
    probe: Examples = (),
    *,
    sparsity: float | None = None,
    parameters: int | None = None,
    flops: float | None = None,
    method: Method = "ipsvd",
    ranks: RankRule = "global",
    ridge: Ridge = "auto",
    other: PreTrainedModel | None = None,
    labels: Labels = "data",
    tokens: Tokens = "all",
    seed: int = 0,
    tokenizer: PreTrainedTokenizerBase | None = None,
    max_length: int = 2048,
    batch_tokens: int = 4096,
    loss_fn: LossFn = causal_lm_losses,
) -> PreTrainedModel:
    """Derive a proxy from a model (stage 1). The model is left as it was.

    Give exactly one of `sparsity`, `parameters` and `flops` (none with `off-the-shelf`).

    Args:
        model: the target.
        probe: examples that second moments are measured on; `svd`, `random`, `layers` and `off-the-shelf` need none.
        sparsity: share of the linear parameters to remove, in (0, 1).
        parameters: of the whole proxy, embeddings and head included.
        flops: of a token's forward pass, as a share of the target's, in (0, 1).
        method: `ipsvd`, or a baseline: `svd`, `svd-llm`, `asvd`, `fwsvd`, `random`, `layers` (the first few decoder
            layers), `off-the-shelf` (`other` as it is).
        ranks: `global` or `uniform`.
        ridge: share of the mean eigenvalue added to the moments, or `auto` (Ledoit and Wolf).
        other: the proxy itself, for `off-the-shelf`.
        labels: `data`, or `sampled` from the model (true Fisher).
        tokens: probe tokens that count, `all` or `supervised`.
        seed: of sampled labels and random factors.
        tokenizer: the model's own if None.
        max_length: longest example in tokens.
        batch_tokens: largest rows × longest row of a batch.
        loss_fn: (model, batch) -> losses [B], for models that are no language models; `probe` is then a DataLoader.

    Returns:
        The proxy; `proxy.save_pretrained(path)` saves it.

    Raises:
        InputError: bad input; the message says which and how to mend it.
    """
    _refuse_adapter(model)
    if (method == "off-the-shelf") != (other is not None):
        raise InputError("method='off-the-shelf' takes other=, the model to use as the proxy; no other method does")
    if other is not None:
        with experts_split(model, other):
            return adopt(model, other)[0]
    size = Size(sparsity, parameters, flops)
    if method == "layers":
        with experts_split(model):
            return extract_layers(model, size)[0]
    settings = FactorSettings(method, ranks, ridge, MomentSettings(labels, tokens, seed=seed), seed=seed)  # pyright: ignore
    batches = Reader(model, tokenizer, max_length, batch_tokens).batches(probe, "probe") if method in PROBED else []
    with experts_split(model):
        return derive_proxy(model, batches, size, settings, loss_fn=loss_fn)[0]


def align(
    proxy: PreTrainedModel,
    model: PreTrainedModel,
    data: Examples,
    *,
    epochs: int = 5,
    learning_rate: float = 1e-4,
    gradient_weight: float = 1.0,
    kl_weight: float = 0.1,
    hidden_weight: float = 0.0,
    temperature: float = 2.0,
    distance: Distance = "cosine",
    layer_weights: Mapping[str, float] | None = None,
    accumulate: int = 1,
    held_out: Examples | None = None,
    validation: Mapping[str, Examples] | None = None,
    normalise: Normalise = "none",
    evaluations: int = 4,
    patience: int = 2,
    seed: int = 0,
    tokenizer: PreTrainedTokenizerBase | None = None,
    max_length: int = 2048,
    batch_size: int = 8,
) -> AlignmentHistory:
    """Tune a proxy in place until its gradients match the target's (stage 2).

    Args:
        proxy: from `compress`.
        model: its target.
        data: examples to align on.
        epochs: passes over them.
        learning_rate: peak.
        gradient_weight: weight of the gradients' distance; 0 matches the logits only.
        kl_weight: weight of the KL anchor.
        hidden_weight: weight of the distance of hidden states.
        temperature: of the KL anchor.
        distance: of gradients: `cosine` or `frobenius`.
        layer_weights: by pattern of layer names, the weight of a layer's distance.
        accumulate: batches an optimiser step; with a `batch_size` of 1 every example's own gradient is matched.
        held_out: examples that are not aligned on: the factors most faithful on them are kept, for which
            `validation` is needed.
        validation: validation examples by task.
        normalise: of the scores whose fidelity is measured.
        evaluations: how often that is done, evenly over the steps.
        patience: evaluations in a row that may be no better before it stops.
        seed: of the order.
        tokenizer: the model's own if None.
        max_length: longest example in tokens.
        batch_size: examples a batch.

    Returns:
        Losses by step, and the fidelity where it was measured.

    Raises:
        InputError: bad input; the message says which and how to mend it.
    """
    if (held_out is None) != (validation is None):
        raise InputError("held_out= goes with validation=: fidelity is of scores for some task")
    reader = Reader(model, tokenizer, max_length, batch_tokens=0)
    if isinstance(data, DataLoader):
        batches = list(data)
    else:
        batches = list(on_device(example_batches(reader.encode(data, "data"), batch_size, 0), reader.device))
    with experts_split(model):
        watched = None
        if held_out is not None and validation is not None:
            tasks = {task: reader.encode(examples, task) for task, examples in validation.items()}
            scoring = ScoringSettings("weight", normalise)
            watched = HeldOutFidelity(model, reader.encode(held_out, "held_out"), tasks, 0, scoring).watch(proxy)
        steps = epochs * math.ceil(len(batches) / accumulate)
        return align_factors(
            proxy,
            model,
            batches,
            AlignSettings(steps, learning_rate, accumulate, evaluations, patience, seed),
            Objective(gradient_weight, kl_weight, hidden_weight, temperature, distance, layer_weights or {}),
            held_out=watched,
        )


def score(
    model: nn.Module | Sequence[nn.Module],
    pool: Examples,
    validation: Mapping[str, Examples],
    *,
    estimator: Estimator = "tracin",
    curvature: KroneckerCurvature = "ek-fac",
    curvature_sample: Examples | None = None,
    optimizer_state: str | Path | Sequence[str | Path] = (),
    damping: float = 0.1,
    target: nn.Module | None = None,
    gradient: GradientSpace = "weight",
    query_norm: float | None = None,
    normalise: Normalise = "none",
    aggregate: Aggregate = "standardised",
    over_examples: OverExamples = "mean",
    per_example: bool = False,
    learning_rates: Sequence[float] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    max_length: int = 2048,
    batch_tokens: int = 4096,
    loss_fn: LossFn = causal_lm_losses,
    seed: int = 0,
) -> pa.Table:
    """Influence of every pool example on every task. Positive: training on it lowers the validation loss.

    Args:
        model: a proxy or any model; several are checkpoints, summed by TracIn with their learning rates.
        pool: candidates.
        validation: validation examples by task.
        estimator: `tracin`; `adam`, of the steps that the warm-up's Adam would take (LESS, `iprox.influence.adam`); an
            influence function, `influence-function` or `datainf` (`iprox.influence.curvature`); or without gradients,
            to compare with (`iprox.influence.gradient_free`): `random`, `length`, `perplexity`, `rds` (hidden states)
            or `bm25` (words).
        curvature: of `influence-function`: `ek-fac` or `k-fac`.
        curvature_sample: what an influence function measures curvature on. None draws 512 examples of the pool, unless
            the data are DataLoaders.
        optimizer_state: for `adam`, the folder of the warm-up's checkpoint that holds the optimizer's state; of several
            checkpoints, one each.
        damping: of an influence function: λ as a share of the mean eigenvalue of each layer's curvature.
        target: the target of a proxy: validation gradients are then taken on it, which is more faithful and costs next
            to nothing, as they are few. None takes them on `model`.
        gradient: of a proxy: `factors` or `weight`.
        query_norm: share of the validation gradients' norm that is kept when they are made low-rank; 1 is exact.
            None: 0.9 on a proxy, 1 on a model itself.
        normalise: `none` or `cosine`.
        aggregate: how `influence` is made of several tasks: `standardised`, `mean` or `max`
            (`iprox.influence.aggregate.Aggregation`).
        over_examples: how a task's score is made of its validation examples: their `mean`, or the `max`.
        per_example: keep the scores by validation example, as columns `examples/<task>`.
        learning_rates: one a checkpoint; 1 for a single model if None.
        tokenizer: the model's own if None.
        max_length: longest example in tokens.
        batch_tokens: largest rows × longest row of a batch.
        loss_fn: (model, batch) -> losses [B], for models that are no language models; data are then DataLoaders.
        seed: of the estimator `random`.

    Returns:
        The scores table (design 6), one row an example in pool order.

    Raises:
        InputError: bad input; the message says which and how to mend it.
    """
    known = (*get_args(InfluenceEstimator), *GRADIENT_FREE)
    for name, given, names in (("estimator", estimator, known), ("curvature", curvature, get_args(KroneckerCurvature))):
        if given not in names:
            raise InputError(f"unknown {name} {given!r}; known: {', '.join(names)}")
    if damping <= 0:
        raise InputError(f"damping must be above 0, not {damping}")
    models = [model] if isinstance(model, nn.Module) else list(model)
    for each in models:
        _refuse_adapter(each)
    if learning_rates is None:
        if len(models) != 1:
            raise InputError("several checkpoints need their learning_rates")
        learning_rates = [1.0]
    if len(learning_rates) != len(models):
        raise InputError(f"{len(models)} models but {len(learning_rates)} learning rates")
    if target is not None and len(models) > 1:
        raise InputError("target= goes with one proxy; score each checkpoint's proxy by itself")
    settings = ScoringSettings(
        gradient,
        normalise,
        aggregate,
        query_norm,
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
    tables = []
    with experts_split(*models, *([] if target is None else [target])):
        for number, checkpoint in enumerate(models):
            adam = load_adam_state(states[number], next(checkpoint.parameters()).device) if states else None
            if isinstance(pool, DataLoader):
                sample = None if curvature_sample is None else list(curvature_sample)
                tables.append(_score_batches(checkpoint, pool, validation, settings, loss_fn, target, sample, adam))
                continue
            reader = Reader(checkpoint, tokenizer, max_length, batch_tokens)
            encoded = {task: reader.encode(examples, task) for task, examples in validation.items()}
            source = as_pool(pool, "pool")
            rows = source.scan().rows
            curved: list[Encoded] = []
            if estimator in CURVED:
                curved = (
                    reader.encoder.encode(source.take(draw_rows("curvature", 0, rows, CURVATURE_EXAMPLES)))
                    if curvature_sample is None
                    else reader.encode(curvature_sample, "curvature_sample")
                )
            corpus = None
            if estimator == "bm25":
                corpus = Corpus.of(
                    row for some in windows_of(source, settings.window) for row in reader.encoder.encode(some)
                )
            scorer, fitted = fitting_scorer(checkpoint, encoded, 0, settings, target, curved, corpus, loss_fn, adam)
            parts = score_windows(scorer, source, reader.encoder, 0, fitted)
            tables.append(pa.concat_tables([table for table, _ in parts]))
    spread = TaskSpread()
    spread.add(by_task(tables, learning_rates, settings.aggregation))
    return combine(tables, learning_rates, settings.aggregation, spread)


def attribute(
    model: nn.Module,
    examples: Examples,
    validation: Mapping[str, Examples],
    *,
    target: nn.Module | None = None,
    gradient: GradientSpace = "weight",
    query_norm: float | None = None,
    normalise: Normalise = "none",
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
        normalise: as for `score`.
        tokenizer: the model's own if None.
        max_length: longest example in tokens.
        batch_tokens: largest rows × longest row of a batch.

    Returns:
        One row an example: `id`, `tokens`, `supervised`, and for each task a list `influence/<task>` of one term a
        token, whose sum is the score. Positive terms help the task.

    Raises:
        InputError: bad input, or a model with experts, whose layers do not see every token.
    """
    _refuse_adapter(model)
    with experts_split(model):
        if any(isinstance(module, SplitExperts) for module in model.modules()):
            raise InputError("attribution: the model has experts, whose layers do not see every token")
    settings = ScoringSettings(gradient, normalise, query_norm=query_norm, batch_tokens=batch_tokens)
    reader = Reader(model, tokenizer, max_length, batch_tokens)
    encoded = {task: reader.encode(rows, task) for task, rows in validation.items()}
    source = as_pool(examples, "examples")
    source.scan()
    with experts_split(model, *([] if target is None else [target])):
        scorer, settings = fitting_scorer(model, encoded, 0, settings, target)
        assert isinstance(scorer, BatchScorer)
        return attribute_examples(scorer, list(source), reader.encoder, 0, settings.batch_tokens)


def _refuse_adapter(model: nn.Module) -> None:
    if hasattr(model, "peft_config") and hasattr(model, "merge_and_unload"):
        raise InputError("the model carries a PEFT adapter; merge it first: model = model.merge_and_unload()")


def select(
    scores: pa.Table,
    *,
    fraction: float | None = None,
    count: int | None = None,
    tokens: int | None = None,
    strategy: Strategy = "top",
    threshold: float | None = None,
    temperature: float = 1.0,
    source_floor: Mapping[str, float] | None = None,
    source_cap: float | Mapping[str, float] | None = None,
    deduplicate: float | None = None,
    control_length: bool = False,
    pool: Examples | None = None,
    features: str | Path | None = None,
    seed: int = 0,
) -> np.ndarray:
    """The chosen rows of a scores table: int64 row numbers, best first.

    Args:
        scores: from `score`.
        fraction: share of the rows; exactly one of this, `count` and `tokens` (or a `threshold` alone).
        count: number of rows.
        tokens: number of tokens that they may have in all.
        strategy: `top`, `round-robin`, `balanced`, `diverse` or `sample` (`iprox.selection.SelectionSettings`).
        threshold: lowest influence to choose; there may then be fewer rows.
        temperature: of `sample`, in standard deviations of the score.
        source_floor: by source, the least share of the selection.
        source_cap: the largest share of the selection, of any source or by source.
        deduplicate: similarity of words from which two rows are near-duplicates, of which the better is kept; it
            needs `pool`.
        control_length: compare rows with those of about their length only.
        pool: what was scored.
        features: for `diverse`, the folder of the pool's `iprox index`.
        seed: of `sample`.

    Raises:
        InputError: bad input; the message says which and how to mend it.
    """
    settings = SelectionSettings(
        fraction,
        count,
        tokens,
        strategy,
        threshold,
        temperature,
        source_floor or {},
        source_cap,
        deduplicate,
        control_length,
        seed,
    )
    index = None if features is None else GradientIndex.open(features)
    source = None if pool is None else as_pool(pool, "pool")
    return select_rows(
        scores,
        settings,
        texts=None if source is None else lambda rows: [example.words for example in source.take(rows)],
        features=None if index is None else lambda rows: index.features_of(scores, rows),
    ).rows


def audit(
    model: nn.Module,
    proxy: nn.Module,
    sample: Examples,
    validation: Mapping[str, Examples],
    *,
    query: Query = "target",
    **settings: Any,
) -> AuditReport:
    """How faithfully a proxy ranks a sample: its scores against the target's.

    Args:
        model: the target.
        proxy: its proxy.
        sample: examples to compare on.
        validation: validation examples by task.
        query: where the proxy's validation gradients are taken, on its `target` or on the `proxy` too. Proxies that
            are not factorised take their own.
        **settings: as for `score`.
    """
    target = model if query == "target" and low_rank_layers(proxy) else None
    on_proxy = score(proxy, sample, validation, target=target, **settings)
    return compare_scores(on_proxy, score(model, sample, validation, **settings))


def load(path: str | Path, *, dtype: torch.dtype = torch.float32, device: str = "cpu") -> PreTrainedModel:
    """Load a proxy or model folder.

    Raises:
        InputError: it holds none.
    """
    return load_model(path, dtype=dtype, device=device)


def _score_batches(
    model: nn.Module,
    pool: DataLoader,
    validation: Mapping[str, DataLoader],
    settings: ScoringSettings,
    loss_fn: LossFn,
    target: nn.Module | None,
    sample: list[Any] | None,
    adam: AdamState | None,
) -> pa.Table:
    """Score a DataLoader's batches: no text, so rows are numbered and have no token count."""
    if settings.estimator in GRADIENT_FREE:
        raise InputError(f"{settings.estimator} reads tokens: give examples, not a DataLoader")
    if settings.aggregation.by_example:
        raise InputError("scores by validation example are of examples, not of a DataLoader's batches")
    if settings.estimator in CURVED and not sample:
        raise InputError(f"{settings.estimator} on a DataLoader needs curvature_sample=, a list of batches")
    scorer = scorer_of_batches(model, validation, settings, loss_fn, target, sample or (), adam)
    scores = torch.cat([scorer(batch)[0].double().cpu() for batch in pool]).numpy()
    count = len(scores)
    return scores_table([f"row-{i:08d}" for i in range(count)], [None] * count, [0] * count, scores, scorer.tasks)
