"""The stage that has the target score a proxy's best rows again, so that the selection is among these."""

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
from iprox.settings import SelectSection, rows_in_share
from iprox.stages.selection import check_rows

# Pool of candidates, file to write -> what scoring them on the target took.
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
    """Have the target score a proxy's best rows again; writes `scores.parquet` and `refine.json`.

    Only the candidates have scores then, those of the target, so that nothing else can be selected. Tasks are
    standardized by the spread of the candidates' scores.

    Args:
        scores: the proxy's, a file or its folder.
        pool: what was scored.
        folder: where to write.
        candidates: share of the pool to score again, in (0, 1): the best by the scores that `chosen` ranks by, of every
            task where tasks take turns.
        chosen: what will be selected.
        score_on_target: scores the candidates.

    Raises:
        InputError: the pool is not what was scored, no row has a score, or the target was asked for other tasks.
    """
    folder.mkdir(parents=True, exist_ok=True)
    table = read_scores(scores)
    check_rows(table, pool)
    tasks = task_names(table)
    rows = best_rows(table, candidates, chosen, examples=ExampleScores.in_file(scores))
    if not len(rows):
        raise InputError(f"{scores}: no row has a score, so there is none to score again")
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


def check_candidates(candidates: float, chosen: SelectSection, rows: int) -> None:
    """Refuse to select more rows than will be scored again, before any work.

    Args:
        candidates: share of the pool that will be.
        chosen: what will be selected.
        rows: number of rows of the pool.

    Raises:
        InputError: the selection is of more rows, or of a number that is not known before the pool is scored.
    """
    asked, again = chosen.rows_of(rows), rows_in_share(candidates, rows)
    if asked is None:
        raise InputError(
            "refine scores a share of the pool again, and select.tokens or select.threshold alone may ask for more of "
            "it: give select.fraction or select.count"
        )
    if asked > again:
        raise InputError(
            f"{asked:,} rows are to be selected, and refine.candidates {candidates:g} scores {again:,} again: raise "
            "it, or select fewer"
        )


def _score_again(
    table: pa.Table,
    tasks: Sequence[str],
    candidates: np.ndarray,
    pool: Pool,
    folder: Path,
    score_on_target: ScoreOnTarget,
) -> tuple[pa.Table, StageRecord]:
    """The target's scores of the candidates, by validation example too, and what they took.

    Raises:
        InputError: they are of other tasks.
    """
    file, scores = folder / "candidates.jsonl", folder / "candidates.parquet"
    ids = table["id"].take(pa.array(candidates)).to_pylist()
    pool.write_rows(candidates.tolist(), file, ids)
    scored = score_on_target(Pool([file], name="candidates", columns=pool.columns.named), scores)
    again = read_scores(scores, examples=True)
    file.unlink()
    scores.unlink()
    if set(task_names(again)) != set(tasks):
        raise InputError(
            f"--validation: the scores are of {', '.join(tasks)}; give the validation sets of these tasks, no others"
        )
    return again, scored


def _with_scores(table: pa.Table, tasks: Sequence[str], matrix: np.ndarray, influence: np.ndarray) -> pa.Table:
    """The table with other scores; rows without one have null."""
    columns = {**{TASK_PREFIX + task: matrix[:, number] for number, task in enumerate(tasks)}, AGGREGATE: influence}
    for name, values in columns.items():
        table = table.set_column(table.column_names.index(name), name, pa.array(values, pa.float64(), from_pandas=True))
    return table


def _with_examples(table: pa.Table, rows: np.ndarray, again: pa.Table) -> Iterator[pa.Table]:
    """The table with the candidates' scores by validation example, some rows at a time; the other rows have null."""
    names = [name for name in again.column_names if name.startswith(EXAMPLES_PREFIX)]
    for start in range(0, table.num_rows, ROWS_AT_ONCE):
        part = table.slice(start, ROWS_AT_ONCE)
        numbers = np.arange(start, start + part.num_rows)
        places = np.minimum(np.searchsorted(rows, numbers), len(rows) - 1)
        there = rows[places] == numbers
        for name in names:
            part = part.append_column(name, again[name].take(pa.array(places, mask=~there)))
        yield part
