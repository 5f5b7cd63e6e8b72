"""The stage that scores a pool at its checkpoints, and what every stage that scores has in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

from iprox.data import ChatEncoder, Encoded, Pool
from iprox.data.tokens import ValidationLengths
from iprox.engine.shards import score_to_file
from iprox.engine.stream import WINDOW, Engine, ScoringStats, local_engine, prefetching_engine
from iprox.influence.job import Checkpoint, Job
from iprox.models import flops
from iprox.models.checkpoint import proxy_config
from iprox.models.loading import skeleton
from iprox.records import StageRecord, key_of
from iprox.session import Session, encode_validation
from iprox.settings import InfluenceSection

# Rows from which compiling pays: it takes up to a minute, once, and every batch is faster after it.
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
    """Score a pool at one or more checkpoints; writes `scores.parquet`. Without an engine, in this process.

    `part_of` is the pool that this one is chosen from, if it is: curvature is measured on it, so that a row has the
    score that it would have there.
    """
    summary = pool.scan()
    encoder = session.encoder(*models[0].read_by)
    encoded = encode_validation(encoder, dict(validation))
    say_what_counts_for_nothing(session, encoded)
    job = job_of(session, settings, models, encoded, encoder, part_of or pool, rows=summary.rows)
    model, source = (
        skeleton(path, trust_remote_code=session.trust_remote_code)
        for path in (models[0].read_by[0], models[0].read_by[-1])
    )
    query = "target" if models[0].target else "own"
    made_by = {
        **identity,
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
    with session.reporter.bar("score", summary.rows * len(models), "rows") as progress:
        stats = score_to_file(
            *(job.workers, job.learning_rates, pool, output),
            identity=made_by,
            window=WINDOW,
            progress=progress,
            engine=engine or engine_of(session),
            ranks=part_of is None,  # what is chosen already may be rows that are all alike
        )
    say_what_was_read(session, stats, encoder)
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
    pool: Pool,
    *,
    rows: int = 0,
) -> Job:
    """Make the job of scoring in a session.

    Args:
        session: how to compute.
        settings: how influence is scored.
        models: where.
        validation: encoded validation examples by task.
        encoder: makes tokens and labels.
        pool: what curvature is measured on, and whose terms are counted.
        rows: number of rows to score, by which `compile: auto` is decided.
    """
    for path in (path for each in models for path in each.read_by):
        session.note_adapter(path)
    counting = (
        session.reporter.bar("count terms", pool.scan().rows, "rows") if settings.traits.corpus else nullcontext()
    )
    with counting as counted:
        return Job.of(
            *(settings, models, validation, encoder, pool),
            seed=session.seed,
            counted=counted,
            batch_tokens=session.batch_tokens,
            compile=rows >= COMPILE_ROWS if session.compile == "auto" else session.compile,
            load=session.load,
        )


def say_what_counts_for_nothing(session: Session, validation: Mapping[str, Sequence[Encoded]]) -> None:
    """Warn of validation examples that have no loss."""
    for task, rows in validation.items():
        empty = sum(row.supervised == 0 for row in rows)
        if empty:
            refused = ", or the chat template refuses them" if session.skip_refused else ""
            session.reporter.warn(
                f"validation task {task!r}: {empty} of {len(rows)} examples have no supervised token{refused}: they "
                "count for nothing"
            )


def say_what_fitted(session: Session, stats: ScoringStats) -> None:
    """Warn of batches that memory did not hold, and so were made smaller."""
    if stats.batch_tokens < session.batch_tokens:
        session.reporter.warn(
            f"memory did not hold {session.batch_tokens} tokens at once: batches of {stats.batch_tokens} were scored; "
            f"--set batch_tokens={stats.batch_tokens} saves the tries"
        )


def say_what_was_read(session: Session, stats: ScoringStats, encoder: ChatEncoder) -> None:
    """Warn of what did not go as asked, and say which examples were cut."""
    say_what_fitted(session, stats)
    if stats.uncompiled:
        session.reporter.warn(f"the model runs without being compiled, more slowly: {stats.uncompiled}")
    if stats.unscored:
        refused = ", or the chat template refuses them" if session.skip_refused else ""
        session.reporter.warn(f"{stats.unscored} examples have no supervised token{refused}: no score, never selected")
    if stats.truncated and encoder.lowered:
        session.reporter.warn(encoder.lowered)  # which processes that tokenize ahead cannot
    if stats.truncated:
        share = f"{stats.truncated / stats.rows:.1%} of the rows"
        session.reporter.warn(
            f"{stats.truncated:,} examples ({share}) were longer than {encoder.max_length:,} tokens and were cut: the "
            "answer is kept, the prompt loses its start"
        )


def engine_of(session: Session) -> Engine:
    """Return where windows are worked through by default: in this process, tokenized ahead if asked."""
    return prefetching_engine(session.num_proc) if session.num_proc else local_engine


def estimator_identity(session: Session, settings: InfluenceSection) -> dict[str, Any]:
    """Return the settings of the estimator that scores depend on."""
    names = {"estimator", *(("damping", "curvature_examples") if settings.traits.curvature else ())}
    return {**settings.model_dump(include=names), **({"seed": session.seed} if settings.traits.seeded else {})}
