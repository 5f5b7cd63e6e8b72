"""The stage that selects rows by their scores."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from iprox.data import GENERATED_ID, Pool
from iprox.errors import InputError
from iprox.records import StageRecord, write_json
from iprox.scores import ExampleScores, read_scores, scores_metadata, task_names
from iprox.selection import select_rows
from iprox.selection.guard import Spelling, guard
from iprox.session import Session
from iprox.settings import SelectSection


def check_rows(table: pa.Table, pool: Pool) -> None:
    """Refuse a pool with a different number of rows than the scores."""
    there = pool.scan().rows
    if there != table.num_rows:
        raise InputError(
            f"--pool: the scores are for {table.num_rows:,} rows, but the pool has {there:,}; give the pool that was "
            "scored"
        )


def _refuse_other_rows(table: pa.Table, pool: Pool, ids: Sequence[str]) -> None:
    """Refuse a pool that has changed since it was scored, if rows can only be found by their position."""
    made_by: Any = scores_metadata(table)
    scored = made_by.get("pool") or (made_by.get("inputs") or {}).get("pool")
    files = [Path(file) for file in pool.scan().files]
    stems = {name for file in files for name in (file.stem, file.name)}
    placed = next((name for name in ids if GENERATED_ID.sub("", name) in stems), None)
    if scored is not None and placed is not None and scored != pool.scan().fingerprint:
        raise InputError(
            f"--pool: the files have changed since they were scored (their names or bytes differ), and rows such as "
            f"{placed!r} have no id to find them by; give the original files, or score the pool again"
        )


def _scored(table: pa.Table) -> dict[str, Any]:
    """Return what was scored and how, for those who get the selection without its scores."""
    made: Any = scores_metadata(table)
    how = {key: made.get(key, "unknown") for key in ("estimator", "normalize")}
    return {"rows": table.num_rows, "tasks": task_names(table), **how}


def select(
    session: Session,
    scores: Path,
    pool: Pool,
    output: Path,
    description: Path,
    settings: SelectSection,
    spelling: Spelling,
) -> StageRecord:
    """Select rows of a scores table; writes them, best first, and a description as JSON.

    Warns if the selection looks unlike the validation sets (`iprox.selection.guard`); `spelling` says how these
    warnings spell settings.
    """
    table = read_scores(scores)
    check_rows(table, pool)

    def texts(rows: Sequence[int]) -> list[str]:
        return [example.words for example in pool.take(rows)]

    selection = select_rows(table, settings, texts=texts, examples=ExampleScores.in_file(scores))
    if selection.count_asked is not None and len(selection.rows) < selection.count_asked:
        session.reporter.warn(
            f"{len(selection.rows)} rows selected instead of {selection.count_asked}: no others have a score of "
            f"{settings.threshold} or more"
            + "".join(f", and {number} were passed over ({why})" for why, number in selection.passed_over.items())
        )
    rows = selection.rows.tolist()
    ids = table["id"].take(pa.array(rows)).to_pylist()
    _refuse_other_rows(table, pool, ids)
    pool.write_rows(rows, output, ids)
    profile = guard(table, selection.rows, settings, spelling, texts)
    for warning in profile.warnings:
        session.reporter.warn(warning)
    chosen = {
        **selection.as_dict(),
        "profile": profile.as_dict(),
        "scored": _scored(table),
        "settings": settings.model_dump(exclude_defaults=True),
    }
    write_json(description, chosen)
    return {
        key: chosen[key]
        for key in ("strategy", "task", "weights", "count", "fraction", "threshold", "tokens", "passed_over", "profile")
    }
