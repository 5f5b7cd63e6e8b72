"""The stages of a gradient index: write one of a pool, score a pool with one, hand one to FAISS."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

from torch import nn

from iprox.data import ChatEncoder, Encoded, Pool, iter_batches, on_device
from iprox.data.tokens import ValidationLengths
from iprox.errors import InputError
from iprox.files import replacing
from iprox.influence.estimators import ApartQuery
from iprox.influence.index import GradientIndex, WindowProjector, unit_gradients, write_index
from iprox.influence.projection import sides
from iprox.influence.projector import GradientProjector
from iprox.influence.rows import fitting
from iprox.influence.scoring import WINDOW, ScoringSettings, task_queries
from iprox.influence.shards import claim, merge_shards, write_shards
from iprox.influence.windows import compile_model, windows_of
from iprox.models import flops
from iprox.models.loading import skeleton
from iprox.models.optimizer_state import AdamState, load_adam_state
from iprox.run.folder import StageRecord
from iprox.session import Session, encode_validation, pad_id_of
from iprox.settings import InfluenceSection
from iprox.stages.scoring import (
    COMPILE_ROWS,
    engine_of,
    say_what_counts_for_nothing,
    say_what_was_read,
    scoring_settings,
)


@dataclass(frozen=True, slots=True)
class IndexedModel:
    """What an index is of: the model's folder, and the folder of the optimizer's state for the estimator `adam`."""

    path: str
    warmed: str | None = None


def build_index(
    session: Session,
    model: IndexedModel,
    pool: Pool,
    output: Path,
    settings: InfluenceSection,
    dimension: int,
    fingerprint: str,
) -> StageRecord:
    """Write the index of a pool.

    Args:
        session: how to compute.
        model: whose gradients.
        pool: the candidates.
        output: folder.
        settings: `estimator` (`tracin` or `adam`), `gradient` and `compile` count.
        dimension: numbers an example.
        fingerprint: of the model's files.
    """
    sides(dimension)
    summary = pool.scan()
    encoder = session.encoder(model.path)
    tokenizer = encoder.tokenizer
    compiled = summary.rows >= COMPILE_ROWS if session.compile == "auto" else session.compile
    description = {
        "format": 2,
        "model": str(Path(model.path).resolve()) if Path(model.path).exists() else model.path,
        "model_fingerprint": fingerprint,
        "estimator": settings.estimator,
        "gradient": settings.gradient,
        "dimension": dimension,
        "seed": session.seed,
        "pool": summary.fingerprint,
        "labels": encoder.describe,
        # As text, since a file may change or be out of reach; the tokenizer's own is in the model's fingerprint.
        "chat_template": session.chat_template and encoder.chat_template,
        "max_length": session.max_length,
        "dtype": str(session.dtype).removeprefix("torch."),
        "batch_tokens": session.batch_tokens,
        "compile": compiled,
        "window": WINDOW,
    }
    load_adam = functools.partial(load_adam_state, model.warmed, session.device) if model.warmed else None
    make = functools.partial(
        _window_projector,
        session.loader(model.path),
        load_adam,
        settings,
        dimension,
        session.seed,
        encoder,
        pad_id_of(tokenizer),
        session.batch_tokens,
        _first_with_loss(pool, encoder) if compiled else (),
    )
    with session.reporter.bar("index", summary.rows, "rows") as progress:
        stats = write_index(
            make, pool, output, description, window=WINDOW, progress=progress, engine=engine_of(session)
        )
    say_what_was_read(session, stats, encoder)
    counted = skeleton(model.path, trust_remote_code=session.trust_remote_code)
    return {
        "flops": flops.scoring_flops(counted, stats.tokens, stats.supervised, stats.contraction_flops),
        "dimension": dimension,
        "bytes": sum(file.stat().st_size for file in output.glob("*.arrow")),
        **{k: v for k, v in asdict(stats).items() if k != "query_kept"},
        "labels": encoder.describe,
    }


def _first_with_loss(pool: Pool, encoder: ChatEncoder) -> list[Encoded]:
    """An example to try a compiled model on; none where no example has a supervised token."""
    for examples in windows_of(pool, 64):
        if found := [row for row in encoder.encode(examples) if row.supervised]:
            return found[:1]
    return []


def _window_projector(
    load: Callable[[], nn.Module],
    load_adam: Callable[[], AdamState] | None,
    settings: InfluenceSection,
    dimension: int,
    seed: int,
    encoder: ChatEncoder,
    pad_id: int,
    batch_tokens: int,
    trial: Sequence[Encoded],
) -> WindowProjector:
    """What a worker makes for itself (at module level, so that it can be sent to another process)."""
    adam = None if load_adam is None else load_adam()
    projector = GradientProjector(load(), dimension, settings.gradient, seed=seed, adam=adam)
    uncompiled = ""
    for batch in iter_batches(trial, batch_tokens, pad_id):
        uncompiled = compile_model(projector.model, projector, batch.to(projector.device))
    return WindowProjector(projector, encoder, pad_id, batch_tokens, uncompiled)


@dataclass(frozen=True, slots=True)
class IndexQuery:
    """An index to query, the model that it is of, its learning rate η, and the target of a proxy."""

    index: GradientIndex
    model: str
    learning_rate: float = 1.0
    target: str | None = None


def query_indexes(
    session: Session,
    asked: Sequence[IndexQuery],
    validation: Mapping[str, Pool],
    output: Path,
    settings: InfluenceSection,
    identity: Mapping[str, Any],
) -> StageRecord:
    """Score a pool by its index, or by those of several checkpoints of one model; writes `scores.parquet`.

    Args:
        session: how to compute; `max_length` and the chat template are of the index.
        asked: indexes of the same pool.
        validation: validation sets by task.
        output: the file to write.
        settings: how influence is scored.
        identity: fingerprints of everything the scores depend on, kept in the file.

    Raises:
        InputError: the indexes are of different pools.
    """
    first = asked[0].index
    for other in asked[1:]:
        if other.index.description["pool"] != first.description["pool"]:
            raise InputError(f"{other.index.folder}: is of another pool than {first.folder}")
    encoder = session.encoder(asked[0].model)
    encoded = encode_validation(encoder, dict(validation))
    say_what_counts_for_nothing(session, encoded)
    # An index holds what it holds: the queries are projected whole.
    scoring = replace(scoring_settings(session, settings), query_norm=1.0)
    shards = output.with_name(output.name + ".shards")
    identity = {**identity, **ValidationLengths.of(encoded).as_metadata()}
    claim(shards, identity)
    columns = 0
    with session.reporter.bar("query", first.rows * len(asked), "rows") as progress:
        for number, query in enumerate(asked):
            model = session.model(query.model)
            target = session.model(query.target) if query.target else None
            queries = _queries(session, model, target, encoded, scoring)
            columns = sum(1 if isinstance(each, dict) else len(each) for each in queries.values())
            about = query.index.description
            projector = GradientProjector(model, about["dimension"], about["gradient"], seed=about["seed"])
            scored = query.index.scores(
                queries, projector, settings.normalize, by_example=scoring.aggregation.by_example, progress=progress
            )
            write_shards(shards, number, scored)
    rates = [query.learning_rate for query in asked]
    stats = merge_shards(shards, output, rates, scoring.aggregation, identity)
    return {
        "flops": 2.0 * first.dimension * columns * stats.rows * len(asked),
        "rows": stats.rows,
        "unscored": stats.unscored,
        "pool_tokens": stats.tokens,
        "checkpoints": len(asked),
        "dimension": first.dimension,
        "tasks": list(encoded),
        "query": "target" if asked[0].target else "own",
        "labels": encoder.describe,
    }


def _queries(
    session: Session,
    model: nn.Module,
    target: nn.Module | None,
    encoded: Mapping[str, Sequence[Encoded]],
    scoring: ScoringSettings,
) -> Mapping[str, ApartQuery]:
    """Every task's validation gradients, in batches that fit in memory."""

    def make(batch_tokens: int) -> Mapping[str, ApartQuery]:
        batches = {
            task: on_device(iter_batches(rows, batch_tokens, 0), session.device) for task, rows in encoded.items()
        }
        return cast(Mapping[str, ApartQuery], task_queries(model, batches, scoring, target=target, shared=False))

    least = max(len(row.input_ids) for rows in encoded.values() for row in rows)
    return fitting(make, session.batch_tokens, least)[0]


def export_faiss(index: GradientIndex, output: Path) -> int:
    """Write a FAISS index of an index's normalized gradients in half precision, its metric the inner product.

    FAISS's ids are row numbers of the pool; an example without a score is the zero vector. Like any flat FAISS index it
    is in memory as a whole: 2D bytes an example.

    Returns:
        The number of rows.

    Raises:
        InputError: FAISS is not installed.
    """
    try:
        import faiss  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise InputError("FAISS is not installed; pip install 'iprox[faiss]'") from error
    vectors: Any = faiss.IndexScalarQuantizer(
        index.dimension, faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT
    )
    for table in index.windows():
        vectors.add(unit_gradients(table).float().numpy())
    output.parent.mkdir(parents=True, exist_ok=True)
    with replacing(output) as partial:
        faiss.write_index(vectors, str(partial))
    return vectors.ntotal
