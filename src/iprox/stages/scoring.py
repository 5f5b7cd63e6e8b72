"""The stage that scores a pool at its checkpoints, and what every stage that scores has in common."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from iprox.data import ChatEncoder, Encoded, Pool
from iprox.data.tokens import ValidationLengths
from iprox.influence.gradient_free import Corpus
from iprox.influence.prefetch import prefetching_engine
from iprox.influence.scoring import WINDOW, ScoringSettings, ScoringStats
from iprox.influence.shards import ScoringCheckpoint, score_to_file
from iprox.influence.windows import Engine, local_engine, windows_of
from iprox.models import flops
from iprox.models.loading import skeleton
from iprox.models.optimizer_state import load_adam_state
from iprox.run.folder import StageRecord, key_of
from iprox.session import Session, draw_rows, encode_validation, pad_id_of
from iprox.settings import CURVED, InfluenceSection
from iprox.stages.query_cost import QueryTokens, candidate_flops, query_flops

# Rows from which compiling pays: it takes up to a minute, once, and every batch is faster after it.
COMPILE_ROWS = 8192


@dataclass(frozen=True, slots=True)
class ScoredModel:
    """A checkpoint to score on: its folder, its learning rate η, and the target its validation gradients come from.

    `target` is None for a model that is scored with its own; `warmed` is the folder of the warm-up's checkpoint that
    holds the optimizer's state, for the estimator `adam`.
    """

    path: str
    learning_rate: float = 1.0
    target: str | None = None
    warmed: str | None = None

    @property
    def others(self) -> list[str]:
        """What has to read the validation examples beside it."""
        return [self.target] if self.target else []


def score(
    session: Session,
    models: Sequence[ScoredModel],
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
    first = models[0].path
    encoder = session.encoder(first, *models[0].others)
    tokenizer = encoder.tokenizer
    encoded = encode_validation(encoder, dict(validation))
    say_what_counts_for_nothing(session, encoded)
    compile_model = summary.rows >= COMPILE_ROWS if session.compile == "auto" else session.compile
    scoring = replace(scoring_settings(session, settings), compile=compile_model)
    model = skeleton(first, trust_remote_code=session.trust_remote_code)
    sample = curvature_sample(session, part_of or pool, encoder, settings)
    corpus = _count_terms(session, part_of or pool, encoder) if settings.estimator == "bm25" else None
    checkpoints = [
        ScoringCheckpoint(
            session.loader(model.path),
            model.learning_rate,
            session.loader(model.target) if model.target else None,
            functools.partial(load_adam_state, model.warmed, session.device) if model.warmed else None,
        )
        for model in models
    ]
    with session.reporter.bar("score", summary.rows * len(models), "rows") as progress:
        stats = score_to_file(
            checkpoints,
            pool,
            encoded,
            encoder,
            pad_id_of(tokenizer),
            output,
            scoring,
            identity={
                **identity,
                **_estimator_identity(session, settings),
                "gradient": settings.gradient,
                "normalize": settings.normalize,
                "over_examples": settings.over_examples,
                "per_example": settings.by_example,
                "query": "target" if models[0].target else "own",
                "query_norm": scoring.kept_by_example if settings.by_example else scoring.kept_norm(model),
                "norm_sketch": scoring.sketched(model),
                "learning_rates": [model.learning_rate for model in models],
                "dtype": str(session.dtype).removeprefix("torch."),
                "max_length": session.max_length,
                "chat_template": key_of(encoder.chat_template),
                "window": scoring.window,
                "batch_tokens": session.batch_tokens,
                "compile": compile_model,
                **({"columns": pool.columns.named} if pool.columns.named else {}),
                **ValidationLengths.of(encoded).as_metadata(),
            },
            progress=progress,
            engine=engine or engine_of(session),
            sample=sample,
            corpus=corpus,
            ranks=part_of is None,  # what is chosen already may be rows that are all alike
        )
    say_what_was_read(session, stats, encoder)
    tokens, supervised = stats.tokens * len(models), stats.supervised * len(models)
    source = skeleton(models[0].target or first, trust_remote_code=session.trust_remote_code)
    read = QueryTokens.of(encoded, sample)
    queries = len(models) * query_flops(source, settings, read)
    spent = candidate_flops(model, settings, tokens, supervised, stats.contraction_flops)
    return {
        "tokens": tokens,
        "flops": spent + queries,
        "query_flops": queries,
        "query_tokens": asdict(read),
        "query": "target" if models[0].target else "own",
        "norm_sketch": scoring.sketched(model),
        **{k: v for k, v in asdict(stats).items() if k != "tokens"},
        "pool_tokens": stats.tokens,
        "checkpoints": len(models),
        "tasks": list(encoded),
        "labels": encoder.describe,
        "parameters": sum(p.numel() for p in model.parameters()),
        "flops_per_token": flops.forward_flops(model),
    }


def scoring_settings(session: Session, settings: InfluenceSection) -> ScoringSettings:
    """The scoring settings that a recipe and a session give."""
    return ScoringSettings(
        settings.gradient,
        settings.normalize,
        settings.query_norm,
        settings.norm_sketch,
        session.batch_tokens,
        estimator=settings.estimator,
        curvature=settings.curvature,
        damping=settings.damping,
        seed=session.seed,
        over_examples=settings.over_examples,
        per_example=settings.by_example,
    )


def _count_terms(session: Session, pool: Pool, encoder: ChatEncoder) -> Corpus:
    """Term counts of the whole pool, read as a stream."""
    with session.reporter.bar("count terms", pool.scan().rows, "rows") as progress:

        def encoded() -> Iterator[Encoded]:
            for window in windows_of(pool, WINDOW):
                yield from encoder.encode(window)
                progress(len(window))

        return Corpus.of(encoded())


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
    """Where windows are worked through unless a recipe names an engine: in this process, tokenized ahead if asked."""
    return prefetching_engine(session.num_proc) if session.num_proc else local_engine


def curvature_sample(
    session: Session, pool: Pool, encoder: ChatEncoder, settings: InfluenceSection
) -> Sequence[Encoded]:
    """The examples of a pool that an influence function measures curvature on; none for the others."""
    if settings.estimator not in CURVED:
        return ()
    total = pool.scan().rows
    return encoder.encode(pool.take(draw_rows("curvature", session.seed, total, settings.curvature_examples)))


def _estimator_identity(session: Session, settings: InfluenceSection) -> dict[str, Any]:
    """The settings of the estimator that scores hang on."""
    if settings.estimator == "random":
        return {"estimator": settings.estimator, "seed": session.seed}
    if settings.estimator not in CURVED:
        return {"estimator": settings.estimator}
    names = ("estimator", "damping", "curvature_examples")
    if settings.estimator == "influence-function":
        names = (*names, "curvature")
    return {**settings.model_dump(include=set(names)), "seed": session.seed}
