"""The stage that scores a sample on proxy and target, to see how well they agree."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from transformers import PreTrainedModel

from iprox.audits import AuditReport, compare_scores
from iprox.data import ChatEncoder, Encoded, Example, Pool
from iprox.files import replacing
from iprox.influence.aggregate import TaskSpread, combine
from iprox.influence.scoring import ScoringStats
from iprox.influence.windows import fitting_scorer, score_windows
from iprox.models.card import CARD, note_fidelity
from iprox.models.layers import low_rank_layers
from iprox.models.loading import check_belongs
from iprox.models.optimizer_state import AdamState, load_adam_state
from iprox.run.folder import StageRecord, write_json
from iprox.session import Session, encode_validation
from iprox.settings import InfluenceSection
from iprox.stages.lds import measure_lds
from iprox.stages.query_cost import QueryTokens, candidate_flops, query_flops
from iprox.stages.removal import measure_removal
from iprox.stages.scoring import curvature_sample, say_what_fitted, scoring_settings

# What is measured by retraining on parts of the audited rows, in this order. NAME has the settings `audit.NAME`, is a
# stage of its own in a run, and writes `NAME.json`.
MEASUREMENTS = {"lds": measure_lds, "removal": measure_removal}


def audit(
    session: Session,
    pairs: Sequence[tuple[str, str, float]],
    examples: Sequence[Example],
    pool: Pool,
    validation: Mapping[str, Pool],
    output: Path,
    settings: InfluenceSection,
) -> tuple[StageRecord, AuditReport]:
    """Score a sample on proxies and on their targets and compare; writes `audit.json` and `audit.parquet`.

    Args:
        session: how to compute.
        pairs: (target, proxy, learning rate) of each checkpoint.
        examples: the sample.
        pool: where an influence function takes the examples that it measures curvature on.
        validation: validation sets by task.
        output: folder.
        settings: how influence is scored.
    """
    encoder = session.encoder(*pairs[0][:2])
    encoded = encode_validation(encoder, dict(validation))
    curved = curvature_sample(session, pool, encoder, settings)
    read = QueryTokens.of(encoded, curved)
    rates = [rate for _, _, rate in pairs]
    tables: dict[str, list[pa.Table]] = {"target": [], "proxy": []}
    total = 0.0
    tokens = 0
    with session.reporter.bar("audit", 2 * len(pairs) * len(examples), "rows") as progress:
        for target_path, proxy_path, _ in pairs:
            target, proxy = session.model(target_path), session.model(proxy_path)
            check_belongs(proxy, proxy_path, target, target_path)
            adam = load_adam_state(target_path, session.device) if settings.estimator == "adam" else None
            for kind, model in (("target", target), ("proxy", proxy)):
                query = target if kind == "proxy" and takes_target_query(proxy, settings) else None
                asked = settings.of_tasks if kind == "proxy" else settings.exact  # no error in common
                table, stats = score_examples(
                    session, model, examples, encoded, encoder, asked, query, curved, progress, adam
                )
                say_what_fitted(session, stats)
                tables[kind].append(table)
                tokens += stats.tokens
                total += candidate_flops(model, settings, stats.tokens, stats.supervised, stats.contraction_flops)
                total += query_flops(query or model, settings, read)
    # Tasks are compared one by one, so how they are weighed against each other does not matter here.
    how = replace(scoring_settings(session, settings), per_example=False).aggregation
    proxies, targets = (combine(tables[kind], rates, how, TaskSpread()) for kind in ("proxy", "target"))
    report = compare_scores(proxies, targets)
    output.mkdir(parents=True, exist_ok=True)
    with replacing(output / "audit.parquet") as partial:
        pq.write_table(report.scores, partial)
    write_json(output / "audit.json", report.as_dict())
    if len(pairs) == 1 and (Path(pairs[0][1]) / CARD).is_file():
        note_fidelity(Path(pairs[0][1]), report.sample, report.tasks)
    return {"tokens": tokens, "flops": total, "examples": len(examples), "fidelity": report.mean}, report


def takes_target_query(proxy: PreTrainedModel, settings: InfluenceSection) -> bool:
    """Whether candidates on this model are to meet validation gradients of its target.

    Only the layers of a factorized proxy stand for the target's layers one by one; those of a shorter or another
    model do not, and take their own.
    """
    return settings.query == "target" and not settings.gradient_free and bool(low_rank_layers(proxy))


def score_examples(
    session: Session,
    model: PreTrainedModel,
    examples: Sequence[Example],
    validation: Mapping[str, Sequence[Encoded]],
    encoder: ChatEncoder,
    settings: InfluenceSection,
    target: PreTrainedModel | None = None,
    curved: Sequence[Encoded] = (),
    progress: Any = None,
    adam: AdamState | None = None,
) -> tuple[pa.Table, ScoringStats]:
    """Score a list of examples on one model, in memory.

    Args:
        session: how to compute.
        model: what candidates are scored on.
        examples: the candidates.
        validation: encoded validation examples by task.
        encoder: makes tokens and labels.
        settings: how influence is scored.
        target: where validation gradients are taken, if not on `model`.
        curved: from `curvature_sample`.
        progress: called with the number of rows done.
        adam: the optimizer's state, for the estimator `adam`.

    Returns:
        The scores table, and what was read.
    """
    scoring = scoring_settings(session, settings)
    scorer, scoring = fitting_scorer(model, validation, 0, scoring, target, curved, adam=adam)
    total = ScoringStats()
    tables = []
    for table, stats in score_windows(scorer, examples, encoder, 0, scoring, progress=progress):
        tables.append(table)
        total.add(stats)
    return pa.concat_tables(tables), total
