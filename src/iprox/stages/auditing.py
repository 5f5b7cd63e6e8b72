"""The stage that scores a sample on proxy and target, to see how well they agree."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from transformers import PreTrainedModel

from iprox.aggregation import combine
from iprox.audits import AuditReport, compare_scores
from iprox.data import Example, Pool
from iprox.errors import one_line
from iprox.files import replacing
from iprox.influence.job import Checkpoint
from iprox.models.card import CARD, note_fidelity
from iprox.models.layers import low_rank_layers
from iprox.models.loading import check_belongs
from iprox.records import StageRecord, write_json
from iprox.session import Session, encode_validation
from iprox.settings import InfluenceSection
from iprox.stages.retraining import measure_lds, measure_removal
from iprox.stages.scoring import job_of, say_what_fitted

# What is measured by retraining on parts of the audited rows, in this order. NAME has the settings `audit.NAME`, is a
# stage of its own in a run, and writes `NAME.json`.
MEASUREMENTS = {"lds": measure_lds, "removal": measure_removal}


def audit(
    session: Session,
    checkpoints: Sequence[Checkpoint],
    examples: Sequence[Example],
    pool: Pool,
    validation: Mapping[str, Pool],
    output: Path,
    settings: InfluenceSection,
) -> tuple[StageRecord, AuditReport]:
    """Score a sample on proxies and on their targets and compare; writes `audit.json` and `audit.parquet`.

    Args:
        session: how to compute.
        checkpoints: folders of proxies with their targets.
        examples: the sample.
        pool: what curvature is measured on, and whose terms are counted.
        validation: validation sets by task.
        output: folder.
        settings: how influence is scored.
    """
    encoder = session.encoder(*checkpoints[0].read_by)
    encoded = encode_validation(encoder, dict(validation))
    job = replace(job_of(session, settings, checkpoints, encoded, encoder, pool), compile=False)
    tables: dict[str, list[pa.Table]] = {"target": [], "proxy": []}
    total, tokens = 0.0, 0
    with session.reporter.bar("audit", 2 * len(checkpoints) * len(examples), "rows") as progress:
        for each in checkpoints:
            proxy, target = (session.model(path) for path in each.read_by)
            check_belongs(proxy, each.read_by[0], target, each.read_by[1])
            query = target if takes_target_query(proxy, settings) else None
            for kind, model, checkpoint, how in (
                # The target's own scores are exact, so that the two have no error in common.
                ("target", target, replace(each, model=target, target=None), settings.exact),
                ("proxy", proxy, replace(each, model=proxy, target=query), settings.of_tasks),
            ):
                one = replace(job, checkpoints=[checkpoint], settings=how)
                table, (stats,) = one.score(examples, progress=progress)
                say_what_fitted(session, stats)
                tables[kind].append(table)
                tokens += stats.tokens
                total += job.estimator.candidate_flops(model, stats.tokens, stats.supervised, stats.contraction_flops)
                total += job.estimator.query_flops(model if checkpoint.target is None else target, job.read)
    # Scores have their learning rates already.
    proxies, targets = (combine(tables[kind], [1.0] * len(checkpoints)) for kind in ("proxy", "target"))
    report = compare_scores(proxies, targets)
    output.mkdir(parents=True, exist_ok=True)
    with replacing(output / "audit.parquet") as partial:
        pq.write_table(report.scores, partial)
    write_json(output / "audit.json", report.as_dict())
    card = Path(checkpoints[0].read_by[0])
    if len(checkpoints) == 1 and (card / CARD).is_file():
        try:
            note_fidelity(card, report.sample, report.tasks)
        except OSError as error:
            session.reporter.warn(f"{card}: the fidelity is not noted in its card ({one_line(error)})")
    return {"tokens": tokens, "flops": total, "examples": len(examples), "fidelity": report.mean}, report


def takes_target_query(proxy: PreTrainedModel, settings: InfluenceSection) -> bool:
    """Return whether candidates on this model are contracted with validation gradients of its target.

    Only the layers of a factorized proxy stand for the target's layers one by one; those of a shorter or another
    model do not, and take their own.
    """
    return settings.query == "target" and settings.traits.gradients and bool(low_rank_layers(proxy))
