"""The stage that attributes the scores of the rows in the report to their tokens, so that the report can shade them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from iprox.aggregation import TaskSpread, over_tasks
from iprox.data import Pool
from iprox.files import replacing
from iprox.influence.attribution import attribute as attribute_tokens
from iprox.influence.attribution import attribution_table, lists
from iprox.influence.job import Checkpoint
from iprox.records import StageRecord
from iprox.scores import AGGREGATE, TASK_PREFIX, score_matrix
from iprox.session import Session, encode_validation, tokens_of
from iprox.settings import InfluenceSection
from iprox.stages.scoring import job_of


def attribute(
    session: Session,
    models: Sequence[Checkpoint],
    pool: Pool,
    rows: Sequence[int],
    validation: Mapping[str, Pool],
    scores: Path,
    output: Path,
    settings: InfluenceSection,
) -> StageRecord:
    """Write which tokens the scores of some rows come from: a Parquet file with one row per example.

    Its columns are `row`, those of `attribution_table`, and `influence` (the terms of the aggregate). `scores` is the
    table whose spread weighs the tasks. The estimator's scores must be sums over tokens (see `why_not_attributed`).
    """
    encoder = session.encoder(*models[0].read_by)
    encoded = encode_validation(encoder, validation)
    job = job_of(session, settings, models, encoded, encoder, pool)
    examples = pool.take(rows)
    with session.reporter.bar("attribute", len(models) * len(examples), "rows") as progress:
        terms, spent = attribute_tokens(job, examples, progress)
    spread = _spread_of(scores)
    table = attribution_table(job, examples, terms)
    table = table.add_column(0, "row", pa.array(list(rows), pa.int64()))
    table = table.append_column(
        AGGREGATE, lists([None if each is None else over_tasks(each, spread) for each in terms])
    )
    with replacing(output) as partial:
        pq.write_table(table, partial)
    tokens, supervised = tokens_of(encoder.encode(examples))
    counted, source = (session.skeleton(path) for path in (models[0].read_by[0], models[0].read_by[-1]))
    spent += len(models) * job.estimator.candidate_flops(counted, tokens, supervised, 0.0)
    spent += len(models) * job.estimator.query_flops(source, job.read)
    return {"rows": len(rows), "tokens": tokens * len(models), "flops": spent}


def _spread_of(scores: Path) -> TaskSpread:
    """Return the spread of each task's scores over the pool, reading the scores in batches to limit memory."""
    spread, file = TaskSpread(), pq.ParquetFile(scores)
    columns = [name for name in file.schema_arrow.names if name.startswith(TASK_PREFIX)]
    for batch in file.iter_batches(columns=columns):
        spread.add(score_matrix(pa.Table.from_batches([batch])))
    return spread
