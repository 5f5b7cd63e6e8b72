"""The stages of a gradient index: build one for a pool, and score a pool with it."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

from iprox.data import ChatEncoder, Encoded, Pool, iter_batches
from iprox.data.tokens import ValidationLengths
from iprox.engine.shards import claim, merge_shards, write_shard
from iprox.engine.stream import WindowWorker, compile_model
from iprox.engine.windows import WINDOW, windows_of
from iprox.errors import InputError
from iprox.influence.estimators.base import GradientEstimator, Inputs
from iprox.influence.estimators.registry import estimator_of
from iprox.influence.gradients import TaskGradient
from iprox.influence.index import GradientIndex, GradientProjector, write_index
from iprox.influence.job import Checkpoint, Job
from iprox.influence.projection import sides
from iprox.models import flops
from iprox.records import StageRecord
from iprox.session import Session, encode_validation
from iprox.settings import InfluenceSection
from iprox.stages.scoring import engine_of, job_of, warn_about_empty_validation, warn_about_rows


def build_index(
    session: Session,
    checkpoint: Checkpoint,
    pool: Pool,
    output: Path,
    settings: InfluenceSection,
    dimension: int,
    fingerprint: str,
) -> StageRecord:
    """Write the index of a pool.

    Args:
        checkpoint: model whose gradients are projected, as a folder.
        pool: the candidates.
        output: folder to write.
        settings: only the estimator matters, `tracin` or `less`.
        dimension: numbers stored per example.
        fingerprint: fingerprint of the model's files.
    """
    sides(dimension)
    summary = pool.scan()
    path = checkpoint.read_by[0]
    encoder = session.encoder(path)
    job = job_of(session, settings, [checkpoint], {}, encoder, pool, rows=summary.rows)
    description = {
        "format": 2,
        "model": str(Path(path).resolve()) if Path(path).exists() else path,
        "model_fingerprint": fingerprint,
        "estimator": settings.estimator,
        "dimension": dimension,
        "seed": session.seed,
        "pool": summary.fingerprint,
        "labels": encoder.describe,
        # The text, because a file may change; the tokenizer's own template is part of the model's fingerprint.
        "chat_template": session.chat_template and encoder.chat_template,
        "max_length": session.max_length,
        "dtype": str(session.dtype).removeprefix("torch."),
        "batch_tokens": session.batch_tokens,
        "compile": job.compile,
        "window": WINDOW,
    }
    make = functools.partial(_worker, job, dimension, _first_with_loss(pool, encoder) if job.compile else ())
    with session.reporter.bar("index", summary.rows, "rows") as progress:
        stats = write_index(
            make, pool, output, description, window=WINDOW, progress=progress, engine=engine_of(session)
        )
    warn_about_rows(session, stats, encoder)
    return {
        "flops": flops.scoring_flops(session.skeleton(path), stats.tokens, stats.supervised, stats.contraction_flops),
        "dimension": dimension,
        "bytes": sum(file.stat().st_size for file in output.glob("*.arrow")),
        **{k: v for k, v in asdict(stats).items() if k != "query_kept"},
        "labels": encoder.describe,
    }


def _first_with_loss(pool: Pool, encoder: ChatEncoder) -> list[Encoded]:
    """Return one example with a supervised token, to try a compiled model on; [] if there is none."""
    for examples in windows_of(pool, 64):
        if found := [row for row in encoder.encode(examples) if row.supervised]:
            return found[:1]
    return []


def _worker(job: Job, dimension: int, trial: Sequence[Encoded]) -> WindowWorker:
    """Return a worker that projects the gradients of windows; also called in other processes."""
    assert job.encoder is not None

    def projector_of(inputs: Inputs) -> GradientProjector:
        return GradientProjector(inputs.scored, dimension, seed=job.seed, optimizer=inputs.optimizer)

    projector, batch_tokens = job.made(projector_of)
    uncompiled = ""
    for batch in iter_batches(trial, batch_tokens):
        uncompiled = compile_model(projector.model, projector, batch.to(projector.device))
    return WindowWorker(projector, job.encoder, batch_tokens, uncompiled)


def query_indexes(
    session: Session,
    indexes: Sequence[GradientIndex],
    checkpoints: Sequence[Checkpoint],
    validation: Mapping[str, Pool],
    output: Path,
    settings: InfluenceSection,
    identity: Mapping[str, Any],
) -> StageRecord:
    """Score a pool with its index, or with the indexes of several checkpoints; writes `scores.parquet`.

    Args:
        session: the session, with the index's `max_length` and chat template.
        indexes: indexes of the same pool.
        checkpoints: model of each index, as a folder.
        validation: validation sets by task.
        output: file to write.
        settings: how influence is scored.
        identity: fingerprints of everything the scores depend on; kept in the file.

    Raises:
        InputError: the indexes are for different pools.
    """
    first = indexes[0]
    for other in indexes[1:]:
        if other.description["pool"] != first.description["pool"]:
            raise InputError(f"{other.folder}: is of another pool than {first.folder}")
    encoder = session.encoder(checkpoints[0].read_by[0])
    encoded = encode_validation(encoder, validation)
    warn_about_empty_validation(session, encoded)
    # Low-rank validation gradients would save nothing here: they are projected once.
    whole = settings.model_copy(update={"query_norm": 1.0})
    job = job_of(session, whole, checkpoints, encoded, encoder, None)
    shards = output.with_name(output.name + ".shards")
    identity = {**identity, **ValidationLengths.of(encoded).as_metadata()}
    claim(shards, identity)
    columns = 0
    with session.reporter.bar("query", first.rows * len(indexes), "rows") as progress:
        for number, index in enumerate(indexes):
            (model, gradients), _ = job.made(_gradients, number)
            columns = sum(1 if isinstance(each, dict) else len(each) for each in gradients.values())
            projector = GradientProjector(model, index.dimension, seed=index.description["seed"])
            scored = index.scores(
                gradients, projector, settings.normalize, by_example=settings.by_example, progress=progress
            )
            for window, (table, counted) in enumerate(scored):
                write_shard(shards, number, window, table, counted)
    stats = merge_shards(shards, output, job.learning_rates, identity)
    return {
        "flops": 2.0 * first.dimension * columns * stats.rows * len(indexes),
        "rows": stats.rows,
        "unscored": stats.unscored,
        "pool_tokens": stats.tokens,
        "checkpoints": len(indexes),
        "dimension": first.dimension,
        "tasks": list(encoded),
        "query": "target" if checkpoints[0].target else "own",
        "labels": encoder.describe,
    }


def _gradients(inputs: Inputs) -> tuple[nn.Module, dict[str, TaskGradient]]:
    """Return the model of a checkpoint and the validation gradients of each task."""
    estimator = estimator_of(inputs.settings)
    assert isinstance(estimator, GradientEstimator)
    return inputs.scored, estimator.validation_gradients(inputs)
