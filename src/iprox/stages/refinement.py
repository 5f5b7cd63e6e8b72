"""The stage that refines scores with what the target says of some rows: a correction, and a cascade.

Both rest on the audit's sample, whose rows have scores of both models. The correction takes out what the proxy gets
wrong by source and by length; the cascade has the target score the proxy's best rows again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from iprox.audit.cascade import best_rows, candidate_share, rows_needed, too_few
from iprox.audit.correction import Covariates, fit_correction
from iprox.data import Pool
from iprox.errors import InputError
from iprox.influence.aggregate import Aggregation, TaskSpread
from iprox.influence.scores import (
    AGGREGATE,
    TASK_PREFIX,
    read_scores,
    score_matrix,
    source_column,
    task_names,
    write_parts,
)
from iprox.recipe import Recipe, RefineSection, SelectSection
from iprox.run_folder import StageRecord, write_json
from iprox.selection import BY_TASK
from iprox.stages.selection import check_rows

# Rounding in bfloat16 and other batches move a row's score by a hundredth or so; other settings by far more than this.
SAME_SCORES = 0.2

NO_SIZE = "a cascade looks for a given number of rows: select a fraction or a count"

# Pool of candidates, file to write -> what scoring them on the target took.
ScoreOnTarget = Callable[[Pool, Path], StageRecord]


def refine(
    *,
    scores: Path,
    audit: Path,
    pool: Pool,
    folder: Path,
    settings: RefineSection,
    chosen: SelectSection,
    how: Aggregation,
    score_on_target: ScoreOnTarget,
) -> StageRecord:
    """Refine a scores table; writes `scores.parquet` and `refine.json`.

    After a cascade only the candidates have scores, those of the target, so that nothing else can be selected.

    Args:
        scores: the proxy's, a file or its folder.
        audit: folder of the audit.
        pool: what was scored.
        folder: where to write.
        settings: what to do.
        chosen: what is to be selected, which says how deep a cascade has to look.
        how: how several tasks make one score.
        score_on_target: scores the candidates.

    Raises:
        InputError: the audit is of other tasks or other scores, or the pool is not what was scored.
    """
    folder.mkdir(parents=True, exist_ok=True)
    table = read_scores(scores)
    check_rows(table, pool)
    tasks = task_names(table)
    sample = _read_audit(audit, tasks)
    _refuse_other_scores(table, sample, tasks, audit)
    known = sample["known"]
    proxy, target = (np.stack([sample[f"{side}/{task}"] for task in tasks], 1)[known] for side in ("proxy", "target"))
    spread = TaskSpread()
    spread.add(target)
    record: StageRecord = {"tokens": 0, "flops": 0.0, "audited": len(target)}
    matrix = score_matrix(table)
    if settings.correct:
        seen = Covariates(sample["source"][known], sample["tokens"][known])
        every = Covariates(source_column(table), table["tokens"].to_numpy(zero_copy_only=False))
        corrections = [fit_correction(proxy[:, n], target[:, n], seen) for n in range(len(tasks))]
        record["correction"] = {
            task: {"used": each.helps, "spearman": {"before": each.before, "after": each.after}}
            for task, each in zip(tasks, corrections, strict=True)
        }
        for number, correction in enumerate(corrections):
            if correction.helps:
                proxy[:, number] = correction.held_out
                matrix[:, number] = correction.apply(matrix[:, number], every)
            elif how.tasks != "standardised" and any(each.helps for each in corrections):
                # Corrected scores have the target's unit, so where tasks are weighed as they are all have to, and the
                # sample that a cascade is calibrated on with them.
                unit = _scale(target[:, number]) / _scale(proxy[:, number])
                matrix[:, number] *= unit
                proxy[:, number] *= unit
    if settings.recall is None:
        influence = how.over_tasks(matrix, _spread_of(matrix))
    else:
        share = _share_selected(chosen, table)
        rankings, on_proxy, on_target = (_rankings(each, how, chosen, tasks) for each in (matrix, proxy, target))
        pairs = zip(on_proxy, on_target, strict=True)
        shares = [candidate_share(one, other, share, settings.recall) for one, other in pairs]
        candidates = np.unique(
            np.concatenate([best_rows(ranking, part) for ranking, part in zip(rankings, shares, strict=True)])
        )
        again, scored = _score_again(table, tasks, candidates, pool, folder, score_on_target)
        matrix = np.full_like(matrix, np.nan)
        matrix[candidates] = again
        influence = how.over_tasks(matrix, spread)
        record |= {
            **{name: scored[name] for name in ("tokens", "flops")},
            "recall": settings.recall,
            "candidates": len(candidates),
            "candidate_share": len(candidates) / table.num_rows,
        }
    write_parts(folder / "scores.parquet", [_with_scores(table, tasks, matrix, influence)])
    write_json(folder / "refine.json", record)
    return record


def check_sample(recipe: Recipe, rows: int) -> None:
    """Refuse an audit too small for a recipe's cascade, before any work.

    Raises:
        InputError: it is.
    """
    if not (recipe.refine and recipe.refine.recall and recipe.audit):
        return
    share = recipe.select.fraction or (recipe.select.count and recipe.select.count / rows)
    if share is None:
        raise InputError(NO_SIZE)
    sample = min(recipe.audit.sample, rows)
    if sample < rows_needed(share, recipe.refine.recall):
        raise too_few(sample, share, recipe.refine.recall)


def _read_audit(folder: Path, tasks: Sequence[str]) -> dict[str, np.ndarray]:
    """The columns of an audit, and which rows have all scores."""
    file = folder / "audit.parquet" if folder.is_dir() else folder
    if not file.is_file():
        raise InputError(f"{file}: no such file; `iprox audit` writes it")
    table = pq.read_table(file)
    names = [f"{side}/{task}" for task in tasks for side in ("proxy", "target")]
    missing = [name for name in (*names, "id", "tokens", "source") if name not in table.column_names]
    if missing:
        raise InputError(f"{file}: has no column {missing[0]!r}; audit the tasks that were scored: {', '.join(tasks)}")
    columns = {name: table[name].to_numpy(zero_copy_only=False).astype(np.float64) for name in names}
    found: dict[str, np.ndarray] = {
        **columns,
        "id": np.array(table["id"].to_pylist(), dtype=object),
        "source": np.array(table["source"].to_pylist(), dtype=object),
        "tokens": table["tokens"].to_numpy(zero_copy_only=False),
        "known": np.asarray(np.isfinite(np.stack(list(columns.values()))).all(0)),
    }
    return found


def _refuse_other_scores(table: pa.Table, sample: Mapping[str, np.ndarray], tasks: Sequence[str], audit: Path) -> None:
    """Refuse an audit whose scores of the proxy are not those of the table: nothing follows for these from it.

    Raises:
        InputError: they are of other rows, of another model, or were taken otherwise.
    """
    asked = pa.array(sample["id"].tolist(), pa.string())
    found = table.filter(pc.is_in(table["id"], value_set=asked))  # pyright: ignore[reportAttributeAccessIssue]
    place = {name: number for number, name in enumerate(found["id"].to_pylist())}
    unknown = next((name for name in sample["id"] if name not in place), None)
    if unknown is not None:
        raise InputError(f"{audit}: has the row {unknown!r}, which the scores have not: it is of another pool")
    scored = score_matrix(found.select([TASK_PREFIX + task for task in tasks]))[[place[name] for name in sample["id"]]]
    audited = np.stack([sample[f"proxy/{task}"] for task in tasks], 1)
    both = np.isfinite(scored).all(1) & np.isfinite(audited).all(1)
    away, size = (np.linalg.norm(part[both], axis=0) for part in (scored - audited, audited))
    for task, other in zip(tasks, away > SAME_SCORES * size, strict=True):
        if other:
            raise InputError(
                f"{audit}: its scores of the proxy for {task} are not those given: audit the model that was scored, "
                "with the same settings"
            )


def _share_selected(chosen: SelectSection, table: pa.Table) -> float:
    """The share of the pool that is to be selected."""
    if chosen.fraction is not None:
        return chosen.fraction
    if chosen.count is not None:
        return min(1.0, chosen.count / table.num_rows)
    raise InputError(NO_SIZE)


def _rankings(matrix: np.ndarray, how: Aggregation, chosen: SelectSection, tasks: Sequence[str]) -> list[np.ndarray]:
    """The scores that the strategy chooses by: the tasks' own, one task's, or their aggregate."""
    if chosen.task is not None:
        if chosen.task not in tasks:
            raise InputError(f"the scores are of no task {chosen.task!r}; they are of {', '.join(tasks)}")
        return [matrix[:, tasks.index(chosen.task)]]
    if chosen.strategy in BY_TASK:
        return list(matrix.T)
    return [how.over_tasks(matrix, _spread_of(matrix))]


def _score_again(
    table: pa.Table,
    tasks: Sequence[str],
    candidates: np.ndarray,
    pool: Pool,
    folder: Path,
    score_on_target: ScoreOnTarget,
) -> tuple[np.ndarray, StageRecord]:
    """The target's scores of the candidates [candidates, tasks], and what they took.

    Raises:
        InputError: they are of other tasks.
    """
    file, scores = folder / "candidates.jsonl", folder / "candidates.parquet"
    ids = table["id"].take(pa.array(candidates)).to_pylist()
    pool.write_rows(candidates.tolist(), file, ids)
    scored = score_on_target(Pool([file], name="candidates", columns=pool.columns.named), scores)
    again = read_scores(scores)
    file.unlink()
    scores.unlink()
    if set(task_names(again)) != set(tasks):
        raise InputError(
            f"--validation: the scores are of {', '.join(tasks)}; give the validation sets of these tasks, no others"
        )
    return score_matrix(again.select([TASK_PREFIX + task for task in tasks])), scored


def _scale(scores: np.ndarray) -> float:
    return float(scores.std()) or 1.0


def _spread_of(matrix: np.ndarray) -> TaskSpread:
    spread = TaskSpread()
    spread.add(matrix)
    return spread


def _with_scores(table: pa.Table, tasks: Sequence[str], matrix: np.ndarray, influence: np.ndarray) -> pa.Table:
    """The table with other scores; rows without one have null."""
    columns: Mapping[str, Any] = {
        **{TASK_PREFIX + task: matrix[:, number] for number, task in enumerate(tasks)},
        AGGREGATE: influence,
    }
    for name, values in columns.items():
        table = table.set_column(table.column_names.index(name), name, pa.array(values, pa.float64(), from_pandas=True))
    return table
