"""The stage that scores a pool, and helpers for all stages that score."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

from iprox.data import ChatEncoder, Encoded, Pool
from iprox.data.tokens import ValidationLengths
from iprox.engine.shards import score_to_file
from iprox.engine.stream import local_engine, prefetching_engine
from iprox.engine.windows import WINDOW, Engine, ScoringStats
from iprox.influence.job import Checkpoint, Job
from iprox.models import flops
from iprox.models.checkpoint import proxy_config
from iprox.records import StageRecord, key_of
from iprox.session import Session, encode_validation
from iprox.settings import InfluenceSection

# Smallest pool that a model is compiled for: compiling takes up to a minute once, then every batch is faster.
COMPILE_ROWS = 8192


def score(
    session: Session,
    models: Sequence[Checkpoint],
    pool: Pool,
    validation: Mapping[str, Pool],
    output: Path,
    settings: InfluenceSection,
    identity: Mapping[str, Any],
    engine: Engine | None = None,
    part_of: Pool | None = None,
) -> StageRecord:
    """Score a pool at one or more checkpoints; writes `scores.parquet`.

    Args:
        models: checkpoints to score at.
        pool: the candidates.
        validation: validation sets by task.
        output: file to write.
        settings: how influence is scored.
        identity: key of everything else the scores depend on; kept in the file.
        engine: where windows are scored; in this process if None.
        part_of: pool that `pool` was taken from. Curvature is measured on it, so that rows score as they would there.
    """
    summary = pool.scan()
    encoder = session.encoder(*models[0].read_by)
    encoded = encode_validation(encoder, validation)
    warn_about_empty_validation(session, encoded)
    job = job_of(session, settings, models, encoded, encoder, part_of or pool, rows=summary.rows)
    model, source = (session.skeleton(path) for path in (models[0].read_by[0], models[0].read_by[-1]))
    query = "target" if models[0].target else "own"
    made_by = {
        **identity,
        **session.loss_identity(),
        **estimator_identity(session, settings),
        "normalize": settings.normalize,
        "per_example": settings.by_example,
        "query": query,
        "query_norm": settings.kept_norm(on_proxy=proxy_config(model) is not None),
        "learning_rates": job.learning_rates,
        "dtype": str(session.dtype).removeprefix("torch."),
        "max_length": session.max_length,
        "chat_template": key_of(encoder.chat_template),
        "window": WINDOW,
        "batch_tokens": session.batch_tokens,
        "compile": job.compile,
        **({"columns": pool.columns.named} if pool.columns.named else {}),
        **ValidationLengths.of(encoded).as_metadata(),
    }
    with session.reporter.bar("score" if part_of is None else "refine", summary.rows * len(models), "rows") as progress:
        stats = score_to_file(
            *(job.workers, job.learning_rates, pool, output),
            identity=made_by,
            window=WINDOW,
            progress=progress,
            engine=engine or engine_of(session),
            ranks=part_of is None,  # rows chosen from a pool may have equal scores
        )
    warn_about_rows(session, stats, encoder)
    tokens, supervised = stats.tokens * len(models), stats.supervised * len(models)
    queries = len(models) * job.estimator.query_flops(source, job.read)
    spent = job.estimator.candidate_flops(model, tokens, supervised, stats.contraction_flops)
    return {
        "flops": spent + queries,
        "query_flops": queries,
        "query_tokens": asdict(job.read),
        "query": query,
        **asdict(stats),
        "tokens": tokens,
        "pool_tokens": stats.tokens,
        "checkpoints": len(models),
        "tasks": list(encoded),
        "labels": encoder.describe,
        "parameters": flops.parameters(model),
        "flops_per_token": flops.forward_flops(model),
    }


def job_of(
    session: Session,
    settings: InfluenceSection,
    models: Sequence[Checkpoint],
    validation: Mapping[str, Sequence[Encoded]],
    encoder: ChatEncoder,
    pool: Pool | None,
    *,
    rows: int = 0,
) -> Job:
    """Return a scoring job in a session.

    Args:
        settings: how influence is scored.
        models: checkpoints to score at.
        validation: encoded validation examples by task.
        encoder: encoder of the model.
        pool: pool that curvature is measured on and term counts are taken from; None for estimators without these.
        rows: number of rows to score, which decides `compile: auto`.
    """
    for path in (path for each in models for path in each.read_by):
        session.note_adapter(path)
    counting = nullcontext()
    if settings.traits.corpus and pool is not None:
        counting = session.reporter.bar("count terms", pool.scan().rows, "rows")
    with counting as counted:
        return Job.of(
            *(settings, models, validation, encoder, pool),
            seed=session.seed,
            counted=counted,
            batch_tokens=session.batch_tokens,
            compile=rows >= COMPILE_ROWS if session.compile == "auto" else session.compile,
            load=session.load,
            loss_fn=session.loss_fn(),
        )


def warn_about_empty_validation(session: Session, validation: Mapping[str, Sequence[Encoded]]) -> None:
    """Warn about validation examples without a supervised token."""
    for task, rows in validation.items():
        empty = sum(row.supervised == 0 for row in rows)
        if empty:
            refused = ", or the chat template refuses them" if session.skip_refused else ""
            session.reporter.warn(
                f"validation task {task!r}: {empty} of {len(rows)} examples have no supervised token{refused}, so they "
                "are ignored"
            )


def warn_about_smaller_batches(session: Session, stats: ScoringStats) -> None:
    """Warn if batches were made smaller to fit into memory."""
    if stats.batch_tokens < session.batch_tokens:
        session.reporter.warn(
            f"not enough memory for batches of {session.batch_tokens} tokens, so {stats.batch_tokens} were used; set "
            f"--set batch_tokens={stats.batch_tokens} to skip the retries"
        )


def warn_about_rows(session: Session, stats: ScoringStats, encoder: ChatEncoder) -> None:
    """Warn about what did not go as asked, and about examples that were cut."""
    warn_about_smaller_batches(session, stats)
    if stats.uncompiled:
        session.reporter.warn(f"the model could not be compiled, so it runs more slowly: {stats.uncompiled}")
    if stats.unscored:
        refused = ", or the chat template refuses them" if session.skip_refused else ""
        session.reporter.warn(
            f"{stats.unscored} examples have no supervised token{refused}: they have no score and are never selected"
        )
    if stats.truncated and encoder.lowered:
        session.reporter.warn(encoder.lowered)  # worker processes cannot warn
    if stats.truncated:
        share = f"{stats.truncated / stats.rows:.1%} of the rows"
        session.reporter.warn(
            f"{stats.truncated:,} examples ({share}) were longer than {encoder.max_length:,} tokens and were cut: "
            "their answers are kept, their prompts lose the beginning"
        )


def engine_of(session: Session) -> Engine:
    """Return the default engine: this process, with tokenization in others if asked for."""
    return prefetching_engine(session.num_proc) if session.num_proc else local_engine


def estimator_identity(session: Session, settings: InfluenceSection) -> dict[str, Any]:
    """Return the settings that the estimator's scores depend on."""
    names = {"estimator", *(("damping", "curvature_examples") if settings.traits.curvature else ())}
    return {**settings.model_dump(include=names), **({"seed": session.seed} if settings.traits.seeded else {})}
