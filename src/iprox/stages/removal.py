"""Retraining without the top rows: what the proxy's and the target's rankings are worth (`audit.removal`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from iprox.audits.removal import length_strata, random_rows, removal_effect, removed_count, top_rows
from iprox.data import Example, Pool
from iprox.records import StageRecord, write_json
from iprox.session import Session
from iprox.settings import REMOVED_FRACTION, AuditSection
from iprox.stages.retraining import Retraining, Training

RESULT = "removal.json"


def measure_removal(
    session: Session,
    model: str,
    examples: Sequence[Example],
    validation: Mapping[str, Pool],
    folder: Path,
    settings: AuditSection,
) -> StageRecord:
    """Retrain a target without the top rows of each ranking; writes `removal.json` next to `audit.parquet`.

    Each repeat trains, in an order of its own, on all rows, and for each task and side (proxy, target) without its top
    rows and without random rows of like length: 1 + 4T trainings of T tasks, fewer where the same rows are left out.

    Args:
        session: how to compute.
        model: the target, or the warm-up's checkpoint that the scores were taken at.
        examples: the audited rows, in the order of `audit.parquet`.
        validation: validation sets by task.
        folder: folder of the audit.
        settings: how many rows are left out, how often, how trained.

    Raises:
        InputError: fewer than two audited rows have scores.
    """
    retraining = Retraining(session, model, examples, validation, folder, settings, "removal")
    scores, rows, tasks = retraining.scores, len(retraining.encoded), retraining.tasks
    count = removed_count(rows, REMOVED_FRACTION)
    supervised = np.array([row.supervised for row in retraining.encoded])
    strata = length_strata(supervised)
    orders = [np.random.default_rng([session.seed, repeat]).permutation(rows) for repeat in range(settings.removal)]
    rankings = [(side, column) for column in range(len(tasks)) for side in scores]
    tops = {ranking: top_rows(scores[ranking[0]][:, ranking[1]], count) for ranking in rankings}
    controls = {ranking: [random_rows(tops[ranking], strata, order) for order in orders] for ranking in rankings}
    trainings = []
    for repeat in range(settings.removal):
        removed = [np.zeros(rows, bool)]
        for ranking in rankings:
            removed += [tops[ranking], controls[ranking][repeat]]
        trainings += [Training(~left_out, session.seed + repeat) for left_out in removed]
    losses, record = retraining.losses(trainings)
    by_repeat = losses.reshape(settings.removal, 1 + 2 * len(rankings), len(tasks))
    everything = by_repeat[:, 0]
    found: dict[str, dict[str, Any]] = {task: {"loss": float(everything[:, i].mean())} for i, task in enumerate(tasks)}
    measured = {side: np.zeros((3, settings.removal)) for side in scores}  # means over tasks
    for place, (side, column) in enumerate(rankings):
        compared = np.stack(
            [everything[:, column], by_repeat[:, 1 + 2 * place, column], by_repeat[:, 2 + 2 * place, column]]
        )
        measured[side] += compared / len(tasks)
        found[tasks[column]][side] = {
            **removal_effect(*compared),
            "supervised": {
                "top": int(supervised[tops[side, column]].sum()),
                "random": float(np.mean([supervised[control].sum() for control in controls[side, column]])),
            },
        }
    mean = {side: removal_effect(*values) for side, values in measured.items()}
    described = {**retraining.described, "repeats": settings.removal, "fraction": REMOVED_FRACTION}
    write_json(folder / RESULT, {**described, "rows": rows, "removed": count, "tasks": found, "mean": mean})
    return {**record, "removal": mean}
