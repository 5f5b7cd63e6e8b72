"""Retraining on random subsets: linear datamodeling scores of the proxy's and the target's scores (`audit.lds`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from iprox.audits.datamodels import datamodeling_score, draw_subsets
from iprox.data import Example, Pool
from iprox.records import StageRecord, write_json
from iprox.session import Session
from iprox.settings import SUBSET_FRACTION, AuditSection
from iprox.stages.retraining import Retraining, Training

RESULT = "lds.json"


def measure_lds(
    session: Session,
    model: str,
    examples: Sequence[Example],
    validation: Mapping[str, Pool],
    folder: Path,
    settings: AuditSection,
) -> StageRecord:
    """Retrain a target on random subsets of the audited rows; writes `lds.json` next to `audit.parquet`.

    Args:
        session: how to compute.
        model: the target, or the warm-up's checkpoint that the scores were taken at.
        examples: the audited rows, in the order of `audit.parquet`.
        validation: validation sets by task.
        folder: folder of the audit.
        settings: how many subsets, how large, how trained.

    Raises:
        InputError: fewer than two audited rows have scores.
    """
    retraining = Retraining(session, model, examples, validation, folder, settings, "lds")
    scores, rows = retraining.scores, len(retraining.encoded)
    members = draw_subsets(rows, settings.lds, SUBSET_FRACTION, session.seed)
    losses, record = retraining.losses([Training(subset, session.seed) for subset in members])
    found = {
        task: {side: datamodeling_score(scores[side][:, column], members, losses[:, column]) for side in scores}
        for column, task in enumerate(retraining.tasks)
    }
    result = {
        **retraining.described,
        "subsets": settings.lds,
        "fraction": SUBSET_FRACTION,
        "rows": rows,
        "tasks": found,
    }
    result["mean"] = {side: float(np.mean([entry[side]["lds"] for entry in found.values()])) for side in scores}
    write_json(folder / RESULT, result)
    return {**record, "lds": result["mean"]}
