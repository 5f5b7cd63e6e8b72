"""The content of a finished run's folder, read column by column into plain arrays."""

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from iprox.aggregation import weighted
from iprox.errors import InputError, one_line
from iprox.files import digest_of
from iprox.report.examples import ShadedToken, read_shading
from iprox.scores import AGGREGATE, SUPERVISED, TASK_PREFIX, read_scores, score_matrix, task_names

# What is read of a run, besides run.json.
_READ = ("scores.parquet", "selection.json", "attribution.parquet", "audit.json", "audit.parquet", "refine.json")
_READ += ("compression.json", "checkpoints.json", "history.json", "alignment.json")


@dataclass(frozen=True)
class Scores:
    """The columns of scores.parquet; N rows, row i is the i-th good row of the pool.

    Attributes:
        influence: scores that rows are selected by, float64 [N]; NaN where a row has no score.
        tasks: scores by task, float64 [N] each.
        tokens: tokens of each row, int [N].
        supervised: tokens of each row that its loss is taken over, int [N].
        source_codes: source of each row, an index into `source_names`, int [N].
        source_names: distinct sources; None for rows without a source.
        ids: id of each row.
        task: the one task that rows are selected by; None where all tasks count.
        weights: weights of the tasks that were given one for the selection.
    """

    influence: np.ndarray
    tasks: dict[str, np.ndarray]
    tokens: np.ndarray
    supervised: np.ndarray
    source_codes: np.ndarray
    source_names: list[str | None]
    ids: pa.ChunkedArray
    task: str | None = None
    weights: Mapping[str, float] = field(default_factory=dict)

    @property
    def rows(self) -> int:
        """Number of rows N."""
        return len(self.influence)

    @cached_property
    def ranks(self) -> np.ndarray:
        """Place of each row by influence, the best 1, int64 [N]; rows without a score come last."""
        ranks = np.empty(self.rows, np.int64)
        ranks[np.argsort(-self.influence, kind="stable")] = np.arange(1, self.rows + 1)
        return ranks

    def id(self, row: int) -> str:
        """Return the id of a row."""
        return str(self.ids[row].as_py())

    def source(self, row: int) -> str | None:
        """Return the source of a row, or None."""
        return self.source_names[self.source_codes[row]]


@dataclass(frozen=True)
class SelectedRows:
    """The content of selection.json: the selected rows, best first, how they were selected, and their profile."""

    rows: np.ndarray
    strategy: str
    threshold: float | None
    profile: dict[str, Any]


@dataclass(frozen=True)
class Audit:
    """audit.json and audit.parquet: agreement of proxy and target on S sampled rows.

    Attributes:
        summary: audit.json as read.
        ids: id of each sampled row.
        sources: source of each sampled row.
        proxy: the proxy's scores by task, float64 [S] each.
        target: the target's scores by task, float64 [S] each.
        lds: lds.json as read, or None if it was not measured.
        removal: removal.json as read, or None if it was not measured.
    """

    summary: dict[str, Any]
    ids: list[str]
    sources: list[str | None]
    proxy: dict[str, np.ndarray]
    target: dict[str, np.ndarray]
    lds: dict[str, Any] | None = None
    removal: dict[str, Any] | None = None


@dataclass(frozen=True)
class FinishedRun:
    """The files of a run. What a stage that was switched off, or has not run, would have written is None."""

    path: Path
    record: dict[str, Any]
    recipe: str
    scores: Scores
    refined: dict[str, Any] | None
    selection: SelectedRows | None
    audit: Audit | None
    compression: dict[str, Any] | None
    checkpoints: list[dict[str, Any]] | None
    warmup_history: list[dict[str, Any]] | None
    alignment: dict[str, Any] | None
    shading: dict[int, list[ShadedToken]]

    @cached_property
    def selected(self) -> frozenset[int]:
        """The selected rows."""
        return frozenset(() if self.selection is None else self.selection.rows.tolist())


def read_run(path: Path) -> FinishedRun:
    """Return the content of the folder that `iprox run` wrote, without the pool.

    Raises:
        InputError: the folder, run.json or scores.parquet is missing, or a file cannot be read.
    """
    if not path.is_dir():
        raise InputError(f"{path}: no such folder; give the output folder of `iprox run`")
    record = _read_json(path / "run.json", dict)
    if record is None:
        raise InputError(f"{path / 'run.json'}: missing; run `iprox run RECIPE.yaml` with this output folder first")
    done = record.get("stages")
    if not isinstance(done, dict) or not all(isinstance(stage, dict) for stage in done.values()):
        raise InputError(f"{path / 'run.json'}: is damaged: not the record of a run; run it again")
    _require_as_written(path, done)
    refined = _read_json(path / "refined" / "refine.json", dict) if "refine" in done else None
    scores_path = path / "scores.parquet"  # also of a refined run: refined scores are of few rows
    if not scores_path.is_file():
        raise InputError(
            f"{scores_path}: missing, because the score stage has not finished; "
            f"run `iprox run {path / 'recipe.yaml'}` to finish it"
        )
    if done and "score" not in done:
        raise InputError(
            f"{path}: its scores belong to an earlier recipe, and the present one has not been scored yet; "
            f"run `iprox run {path / 'recipe.yaml'}` to the end"
        )
    chosen = _read_json(path / "selection.json", dict) if "select" in done else None
    scores = _read_scores(scores_path, chosen or {})
    recipe = path / "recipe.yaml"
    # A stage that has been switched off since leaves its files behind, so only the stages in run.json count.
    return FinishedRun(
        path=path,
        record=record,
        recipe=recipe.read_text(encoding="utf-8", errors="replace") if recipe.is_file() else "",
        scores=scores,
        refined=refined,
        selection=_selected_rows(path / "selection.json", chosen, scores.rows) if chosen is not None else None,
        audit=_read_audit(path / "audit", done) if "audit" in done else None,
        compression=_read_json(path / "proxy" / "compression.json", dict) if "compress" in done else None,
        checkpoints=_read_json(path / "warmup" / "checkpoints.json", list) if "warmup" in done else None,
        warmup_history=_read_json(path / "warmup" / "history.json", list) if "warmup" in done else None,
        alignment=_read_json(path / "aligned" / "alignment.json", dict) if "align" in done else None,
        shading=read_shading(path / "attribution.parquet") if "attribute" in done else {},
    )


def _require_as_written(folder: Path, stages: Mapping[str, Any]) -> None:
    """Refuse files that are not as their stages wrote them, by the checksums in run.json."""
    written = {name: digest for stage in stages.values() for name, digest in stage.get("files", {}).items()}
    for name, digest in written.items():
        file = folder / name
        if file.name in _READ and not (file.is_file() and digest_of(file) == digest):
            raise InputError(
                f"{file}: is not as its stage wrote it; the same `iprox` command in this folder makes it again"
            )


def _read_json(path: Path, kind: type) -> Any:
    if not path.is_file():
        return None
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path}: not valid JSON ({error}); run its stage again") from None
    if not isinstance(value, kind) or not all(isinstance(each, dict) for each in (value if kind is list else ())):
        shape = "an object" if kind is dict else "a list of objects"
        raise InputError(f"{path}: {shape} is expected at the top level; run its stage again")
    return value


def _read_scores(path: Path, chosen: Mapping[str, Any]) -> Scores:
    """Return the scores by which a selection, the content of selection.json, was made."""
    task, weights = chosen.get("task"), chosen.get("weights", {})
    table = read_scores(path)
    if not table.num_rows:
        raise InputError(f"{path}: has no rows; run the score stage again on a pool that is not empty")
    used = AGGREGATE if task is None else TASK_PREFIX + task
    absent = next((name for name in (SUPERVISED, used) if name not in table.column_names), None)
    if absent is not None:
        raise InputError(f"{path}: no column {absent!r}; run the score stage again")
    matrix, names = score_matrix(table), task_names(table)
    influence = weighted(matrix, [weights.get(name, 1.0) for name in names]) if weights else _floats(table, used)
    source = table["source"].combine_chunks().dictionary_encode(null_encoding="encode")
    return Scores(
        influence=influence,
        tasks=dict(zip(names, matrix.T, strict=True)),
        tokens=table["tokens"].to_numpy(),
        supervised=table[SUPERVISED].to_numpy(),
        source_codes=source.indices.to_numpy(zero_copy_only=False),
        source_names=source.dictionary.to_pylist(),
        ids=table["id"],
        task=task,
        weights=weights,
    )


def _floats(table: pa.Table, name: str) -> np.ndarray:
    """Return a column as float64, NaN for nulls."""
    return table[name].to_numpy(zero_copy_only=False).astype(np.float64)


def _selected_rows(path: Path, content: Mapping[str, Any], pool_rows: int) -> SelectedRows:
    absent = [name for name in ("rows", "strategy", "threshold", "profile") if name not in content]
    if absent:
        raise InputError(f"{path}: no {absent[0]!r}; run the select stage again")
    rows = np.asarray(content["rows"], dtype=np.int64)
    if len(rows) and (rows.min() < 0 or rows.max() >= pool_rows):
        raise InputError(
            f"{path}: names a row outside the {pool_rows:,} rows of scores.parquet; run the select stage again"
        )
    return SelectedRows(rows, content["strategy"], content["threshold"], content["profile"])


def _read_audit(folder: Path, done: Collection[str]) -> Audit | None:
    summary = _read_json(folder / "audit.json", dict)
    if summary is None:
        return None
    file = folder / "audit.parquet"
    tasks = list(summary.get("tasks", {}))
    try:
        table = pq.read_table(file)
        proxy, target = ({task: _floats(table, f"{side}/{task}") for task in tasks} for side in ("proxy", "target"))
    except FileNotFoundError:
        raise InputError(f"{file}: missing; run the audit stage again") from None
    except (pa.ArrowException, OSError, KeyError) as error:
        raise InputError(f"{file}: cannot be read ({one_line(error)}); run the audit stage again") from None
    return Audit(
        summary=summary,
        ids=table["id"].to_pylist(),
        sources=table["source"].to_pylist(),
        proxy=proxy,
        target=target,
        **{name: _read_json(folder / f"{name}.json", dict) for name in ("lds", "removal") if name in done},
    )
