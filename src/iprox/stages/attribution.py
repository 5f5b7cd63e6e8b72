"""The scores of the rows that a report shows, token by token, so that it can shade them."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from torch import nn

from iprox.data import Pool
from iprox.files import replacing
from iprox.influence.aggregate import TaskSpread, over_tasks
from iprox.influence.attribution import attribute_examples
from iprox.influence.estimators import BatchScorer
from iprox.influence.rows import fitting
from iprox.influence.scores import TASK_PREFIX, score_matrix
from iprox.influence.windows import fitting_scorer
from iprox.models import flops
from iprox.models.experts import SplitExperts
from iprox.models.loading import skeleton
from iprox.run.folder import StageRecord
from iprox.session import Session, encode_validation, pad_id_of, tokens_of
from iprox.settings import InfluenceSection
from iprox.stages.query_cost import QueryTokens, query_flops
from iprox.stages.scoring import ScoredModel, curvature_sample, scoring_settings


def why_not_attributed(settings: InfluenceSection, model: nn.Module) -> str | None:
    """Why scores of this kind, on this model, are no sums of terms of tokens; None where they are."""
    if settings.gradient_free:
        return f"{settings.estimator} takes no gradients"
    if settings.estimator == "adam":
        return "Adam's step is no sum over tokens"
    if settings.over_examples == "max":
        return "the maximum over validation examples is no sum over tokens"
    if any(isinstance(module, SplitExperts) for module in model.modules()):
        return "the layers of experts do not see every token"
    return None


def attribute(
    session: Session,
    models: Sequence[ScoredModel],
    pool: Pool,
    rows: Sequence[int],
    validation: Mapping[str, Pool],
    scores: Path,
    output: Path,
    settings: InfluenceSection,
) -> StageRecord:
    """Write which tokens the scores of some rows come from; a Parquet file with a row each.

    Its columns: `row`, `id`, `tokens` and `supervised` (lists), and lists of one term a token: `influence/<task>`,
    which sum to the task's score, and `influence`, which sum to the aggregate.

    Args:
        session: how to compute.
        models: what the pool was scored on, all checkpoints.
        pool: where the rows are.
        rows: their numbers.
        validation: validation sets by task.
        scores: `scores.parquet`, whose spread weighs tasks against each other.
        output: the file.
        settings: how influence was scored; one that `why_not_attributed` says nothing of.
    """
    first = models[0].path
    encoder = session.encoder(first, *models[0].others)
    tokenizer = encoder.tokenizer
    encoded = encode_validation(encoder, dict(validation))
    scoring = scoring_settings(session, settings)  # in the bases that the scores were taken in
    curved = curvature_sample(session, pool, encoder, settings)
    examples = pool.take(rows)
    read = encoder.encode(examples)
    longest = max((len(row.input_ids) for row in read), default=1)
    spent = 0.0
    terms: list[np.ndarray | None] = [None] * len(examples)
    table = None
    with session.reporter.bar("attribute", len(models) * len(examples), "rows") as progress:
        for each in models:
            model = session.model(each.path)
            target = session.model(each.target) if each.target else None
            scorer, fitted = fitting_scorer(model, encoded, pad_id_of(tokenizer), scoring, target, curved)
            assert isinstance(scorer, BatchScorer)
            attributed = functools.partial(attribute_examples, scorer, examples, encoder, pad_id_of(tokenizer))
            table, _ = fitting(attributed, fitted.batch_tokens, longest)
            for place, found in enumerate(_terms(table, list(encoded))):
                if found is not None:
                    before = terms[place]
                    terms[place] = each.learning_rate * found + (0.0 if before is None else before)
            lengths = [len(row.input_ids) for row in read if row.supervised]
            spent += sum(lengths) * scorer.contraction_flops + scorer.norm_flops(lengths)
            progress(len(examples))
    assert table is not None
    spread = _spread_of(scores)
    columns: dict[str, pa.Array] = {"row": pa.array(list(rows), pa.int64())}
    columns |= {name: table[name] for name in ("id", "tokens", "supervised")}
    for number, task in enumerate(encoded):
        columns[TASK_PREFIX + task] = _lists([None if term is None else term[:, number] for term in terms])
    whole = [None if term is None else over_tasks(term, spread) for term in terms]
    columns["influence"] = _lists(whole)
    with replacing(output) as partial:
        pq.write_table(pa.table(columns), partial)
    tokens, supervised = tokens_of(read)
    counted, source = (
        skeleton(path, trust_remote_code=session.trust_remote_code) for path in (first, models[0].target or first)
    )
    spent += len(models) * flops.scoring_flops(counted, tokens, supervised, 0.0)
    spent += len(models) * query_flops(source, settings, QueryTokens.of(encoded, curved))
    return {"rows": len(rows), "tokens": tokens * len(models), "flops": spent}


def _spread_of(scores: Path) -> TaskSpread:
    """Of the tasks' scores over the pool, read in pieces: memory does not grow with the pool."""
    spread, file = TaskSpread(), pq.ParquetFile(scores)
    columns = [name for name in file.schema_arrow.names if name.startswith(TASK_PREFIX)]
    for batch in file.iter_batches(columns=columns):
        spread.add(score_matrix(pa.Table.from_batches([batch])))
    return spread


def _terms(table: pa.Table, tasks: Sequence[str]) -> list[np.ndarray | None]:
    """The terms [tokens, tasks] of each row; None for a row without a score."""
    columns = [table[TASK_PREFIX + task].to_pylist() for task in tasks]
    return [None if row[0] is None else np.stack(row, axis=1) for row in zip(*columns, strict=True)]


def _lists(rows: Sequence[np.ndarray | None]) -> pa.Array:
    return pa.array([None if row is None else row.tolist() for row in rows], pa.list_(pa.float64()))
