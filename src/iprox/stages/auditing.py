"""The stage that scores a sample on both proxy and target and compares the two."""

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
from iprox.models.checkpoint import proxy_config
from iprox.models.layers import low_rank_layers
from iprox.models.loading import check_belongs
from iprox.records import StageRecord, write_json
from iprox.session import Session, encode_validation
from iprox.settings import InfluenceSection
from iprox.stages.retraining import measure_lds, measure_removal
from iprox.stages.scoring import job_of, warn_about_smaller_batches

# Measurements by retraining, in order. NAME is switched on by `audit.NAME`, is its own stage, and writes `NAME.json`.
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
    """Score a sample on proxies and their targets and compare the scores; writes `audit.json` and `audit.parquet`.

    Args:
        checkpoints: folders of the proxies, each with its target.
        examples: the sample.
        pool: pool that curvature is measured on and term counts are taken from.
        validation: validation sets by task.
        output: folder to write.
        settings: how influence is scored.
    """
    encoder = session.encoder(*checkpoints[0].read_by)
    encoded = encode_validation(encoder, validation)
    job = replace(job_of(session, settings, checkpoints, encoded, encoder, pool), compile=False)
    tables: dict[str, list[pa.Table]] = {"target": [], "proxy": []}
    total, tokens = 0.0, 0
    for each in checkpoints:
        proxy, target = (session.model(path) for path in each.read_by)
        check_belongs(proxy, each.read_by[0], target, each.read_by[1])
        query = target if takes_target_query(proxy, settings) else None
        for kind, model, checkpoint, how in (
            # The target's scores are exact, so that proxy and target share no approximation error.
            ("target", target, replace(each, model=target, target=None), settings.exact),
            ("proxy", proxy, replace(each, model=proxy, target=query), settings.of_tasks),
        ):
            one = replace(job, checkpoints=[checkpoint], settings=how)
            with session.reporter.bar(f"audit, {kind}", len(examples), "rows") as progress:  # each has its own rate
                table, (stats,) = one.score(examples, progress=progress)
            warn_about_smaller_batches(session, stats)
            tables[kind].append(table)
            tokens += stats.tokens
            total += job.estimator.candidate_flops(model, stats.tokens, stats.supervised, stats.contraction_flops)
            total += job.estimator.query_flops(model if checkpoint.target is None else target, job.read)
    # The scores are already multiplied by their learning rates.
    proxies, targets = (combine(tables[kind], [1.0] * len(checkpoints)) for kind in ("proxy", "target"))
    report = compare_scores(proxies, targets)
    output.mkdir(parents=True, exist_ok=True)
    with replacing(output / "audit.parquet") as partial:
        pq.write_table(report.scores, partial)
    write_json(output / "audit.json", report.as_dict())
    card = Path(checkpoints[0].read_by[0])
    if len(checkpoints) == 1 and (card / CARD).is_file():
        try:
            note_fidelity(card, report.sample, report.tasks, settings.score)
        except OSError as error:
            session.reporter.warn(f"{card}: the fidelity could not be added to the model card ({one_line(error)})")
    return {
        "tokens": tokens,
        "flops": total,
        "examples": len(examples),
        "score": settings.score,
        "fidelity": report.mean,
    }, report


def takes_target_query(proxy: PreTrainedModel, settings: InfluenceSection) -> bool:
    """Return whether a model's candidates are contracted with validation gradients of its target.

    This requires a proxy whose layers correspond to the target's one by one: a factorized one, or one of its weights.
    """
    described = proxy_config(proxy)
    same = bool(low_rank_layers(proxy)) or (described is not None and described.method == "target")
    return settings.query == "target" and settings.traits.gradients and same
