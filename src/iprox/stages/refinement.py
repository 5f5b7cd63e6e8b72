"""The stage in which the target scores the proxy's best rows again, to select among them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from iprox.aggregation import TaskSpread, over_tasks
from iprox.data import Pool
from iprox.errors import InputError
from iprox.records import StageRecord, write_json
from iprox.scores import (
    AGGREGATE,
    EXAMPLES_PREFIX,
    ROWS_AT_ONCE,
    TASK_PREFIX,
    ExampleScores,
    read_scores,
    score_matrix,
    task_names,
    write_parts,
)
from iprox.selection import best_rows
from iprox.settings import RefineSection, SelectSection, rows_in_share
from iprox.stages.selection import check_rows

# Function that scores a pool of candidates on the target and writes the scores to a file.
ScoreOnTarget = Callable[[Pool, Path], StageRecord]


def refine(
    *,
    scores: Path,
    pool: Pool,
    folder: Path,
    candidates: float,
    chosen: SelectSection,
    score_on_target: ScoreOnTarget,
) -> StageRecord:
    """Score a proxy's best rows again on the target; writes `scores.parquet` and `refine.json`.

    Only these candidates have scores afterwards, so nothing else can be selected. Tasks are standardized by the spread
    of the candidates' scores.

    Args:
        scores: the proxy's scores, a file or its folder.
        pool: the pool that was scored.
        folder: folder to write.
        candidates: fraction of the pool to score again: the rows that `chosen` ranks highest.
        chosen: settings of the selection.
        score_on_target: function that scores the candidates.

    Raises:
        InputError: no row has a score, or the scores are for another pool or for other tasks.
    """
    folder.mkdir(parents=True, exist_ok=True)
    table = read_scores(scores)
    check_rows(table, pool)
    tasks = task_names(table)
    rows = best_rows(table, candidates, chosen, examples=ExampleScores.in_file(scores))
    if not len(rows):
        raise InputError(f"{scores}: no row has a score, so there is nothing to score again")
    again, scored = _score_again(table, tasks, rows, pool, folder, score_on_target)
    found = score_matrix(again.select([TASK_PREFIX + task for task in tasks]))
    matrix = np.full((table.num_rows, len(tasks)), np.nan)
    matrix[rows] = found
    spread = TaskSpread()
    spread.add(found)
    refined = _with_scores(table, tasks, matrix, over_tasks(matrix, spread))
    write_parts(folder / "scores.parquet", _with_examples(refined, rows, again))
    record: StageRecord = {
        **{name: scored[name] for name in ("tokens", "flops")},
        "candidates": len(rows),
        "candidate_share": len(rows) / table.num_rows,
    }
    write_json(folder / "refine.json", record)
    return record


def check_candidates(settings: RefineSection, chosen: SelectSection, rows: int) -> None:
    """Refuse a selection of more rows than are scored again, before any work.

    Raises:
        InputError: too many rows are to be selected, or a number that depends on the scores.
    """
    asked = chosen.rows_of(rows)
    if asked is None:
        raise InputError(
            "refine scores a fixed fraction of the pool again, but select.tokens or select.threshold alone may select "
            "more rows; give select.fraction or select.count"
        )
    share = settings.share(asked, rows)
    again = rows_in_share(share, rows)
    if asked > again:
        raise InputError(
            f"{asked:,} rows are to be selected, but refine.candidates {share:g} scores only {again:,} again; "
            "raise it, or select fewer"
        )


def _score_again(
    table: pa.Table,
    tasks: Sequence[str],
    candidates: np.ndarray,
    pool: Pool,
    folder: Path,
    score_on_target: ScoreOnTarget,
) -> tuple[pa.Table, StageRecord]:
    """Return the target's scores of the candidates, and the record of scoring them."""
    file, scores = folder / "candidates.jsonl", folder / "candidates.parquet"
    ids = table["id"].take(pa.array(candidates)).to_pylist()
    pool.write_rows(candidates.tolist(), file, ids)
    scored = score_on_target(Pool([file], name="candidates", columns=pool.columns.named, pairs=pool.pairs), scores)
    again = read_scores(scores, examples=True)
    file.unlink()
    scores.unlink()
    if set(task_names(again)) != set(tasks):
        raise InputError(
            f"--validation: the scores are for {', '.join(tasks)}; give the validation sets of exactly these tasks"
        )
    return again, scored


def _with_scores(table: pa.Table, tasks: Sequence[str], matrix: np.ndarray, influence: np.ndarray) -> pa.Table:
    """Return the table with other scores; NaN becomes null."""
    columns = {**{TASK_PREFIX + task: matrix[:, number] for number, task in enumerate(tasks)}, AGGREGATE: influence}
    for name, values in columns.items():
        table = table.set_column(table.column_names.index(name), name, pa.array(values, pa.float64(), from_pandas=True))
    return table


def _with_examples(table: pa.Table, rows: np.ndarray, again: pa.Table) -> Iterator[pa.Table]:
    """Yield the table in parts, with the candidates' scores by validation example; other rows have null."""
    names = [name for name in again.column_names if name.startswith(EXAMPLES_PREFIX)]
    for start in range(0, table.num_rows, ROWS_AT_ONCE):
        part = table.slice(start, ROWS_AT_ONCE)
        numbers = np.arange(start, start + part.num_rows)
        places = np.minimum(np.searchsorted(rows, numbers), len(rows) - 1)
        there = rows[places] == numbers
        for name in names:
            part = part.append_column(name, again[name].take(pa.array(places, mask=~there)))
        yield part
