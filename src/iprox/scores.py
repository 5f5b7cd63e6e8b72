"""The scores table: its columns and its file."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from iprox.errors import InputError, one_line
from iprox.files import replacing

TASK_PREFIX = "influence/"
EXAMPLES_PREFIX = "examples/"
AGGREGATE = "influence"
# The number of tokens with a loss. Tables from a DataLoader do not have this column.
SUPERVISED = "supervised"

# Number of rows of scores by validation example that are read at a time.
ROWS_AT_ONCE = 4096


def scores_table(
    ids: Sequence[str],
    sources: Sequence[str | None],
    tokens: Sequence[int],
    scores: np.ndarray,
    tasks: Sequence[str],
    metadata: Mapping[str, object] | None = None,
    *,
    influence: np.ndarray | None = None,
    examples: Sequence[np.ndarray] = (),
    supervised: Sequence[int] | np.ndarray | None = None,
) -> pa.Table:
    """Return a scores table with one row per example, in pool order.

    Args:
        ids: ids of the examples.
        sources: sources of the examples; None if unknown.
        tokens: lengths in tokens.
        scores: float64 [N, tasks]; NaN (no supervised token) becomes null.
        tasks: names of the columns of `scores`.
        metadata: what made the scores, kept as JSON under the key `iprox`.
        influence: aggregate [N]; None takes the mean over tasks.
        examples: per task, scores by validation example [N, V].
        supervised: numbers of supervised tokens; None if unknown.

    Returns:
        Columns `id`, `source`, `tokens`, `supervised` if given, `influence/<task>` per task, `influence`, and with
        `examples` also `examples/<task>`, lists of fixed length.
    """
    columns: dict[str, pa.Array] = {
        "id": pa.array(ids, pa.string()),
        "source": pa.array(sources, pa.string()),
        "tokens": pa.array(tokens, pa.int32()),
    }
    if supervised is not None:
        columns[SUPERVISED] = pa.array(supervised, pa.int32())
    for position, task in enumerate(tasks):
        columns[TASK_PREFIX + task] = pa.array(scores[:, position], pa.float64(), from_pandas=True)
    columns[AGGREGATE] = pa.array(
        scores.mean(axis=1) if influence is None else influence, pa.float64(), from_pandas=True
    )
    for task, matrix in zip(tasks, examples, strict=False):
        values = pa.array(np.ascontiguousarray(matrix).ravel(), pa.float64(), from_pandas=True)
        columns[EXAMPLES_PREFIX + task] = pa.FixedSizeListArray.from_arrays(values, matrix.shape[1])
    table = pa.table(columns)
    return table.replace_schema_metadata({"iprox": json.dumps(metadata, sort_keys=True)} if metadata else None)


def task_names(table: pa.Table) -> list[str]:
    """Return the tasks of a scores table, in order."""
    return [name.removeprefix(TASK_PREFIX) for name in table.column_names if name.startswith(TASK_PREFIX)]


def score_matrix(table: pa.Table) -> np.ndarray:
    """Return the task columns as float64 [N, tasks], NaN for null."""
    columns = [table[TASK_PREFIX + task].to_numpy(zero_copy_only=False) for task in task_names(table)]
    return np.stack(columns, axis=1).astype(np.float64)


def source_column(table: pa.Table) -> np.ndarray:
    """Return the source of each row, object [N], None if it has none; each name is stored once."""
    encoded = table["source"].combine_chunks()
    if not pa.types.is_dictionary(encoded.type):
        encoded = encoded.dictionary_encode()
    names = np.array([*encoded.dictionary.to_pylist(), None], dtype=object)
    return names[encoded.indices.fill_null(len(names) - 1).to_numpy(zero_copy_only=False)]


def supervised_column(table: pa.Table | pa.RecordBatch) -> np.ndarray | None:
    """Return the number of supervised tokens of each row, int32 [N]; None if the table does not have it."""
    return table[SUPERVISED].to_numpy(zero_copy_only=False) if SUPERVISED in table.schema.names else None


def example_matrix(table: pa.Table, task: str) -> np.ndarray:
    """Return a task's scores by validation example, float64 [N, V], NaN for null.

    Raises:
        KeyError: the table does not have them.
    """
    return _matrix(table[EXAMPLES_PREFIX + task].combine_chunks())


def example_widths(table: pa.Table | pa.Schema) -> dict[str, int]:
    """Return the number of validation examples of each task with scores by example; {} if these were not kept."""
    schema = table.schema if isinstance(table, pa.Table) else table
    columns = [field for field in schema if field.name.startswith(EXAMPLES_PREFIX)]
    return {field.name.removeprefix(EXAMPLES_PREFIX): field.type.list_size for field in columns}


@dataclass(frozen=True, slots=True)
class ExampleScores:
    """Scores by validation example, read as a stream.

    Attributes:
        widths: number of examples of each task; {} if these scores were not kept.
        read: function from columns to record batches, from the first row to the last.
    """

    widths: dict[str, int]
    read: Callable[[list[str]], Iterator[pa.RecordBatch]]

    @classmethod
    def of(cls, table: pa.Table) -> ExampleScores:
        """Return those of a table in memory."""
        return cls(
            example_widths(table), lambda names: iter(table.select(names).to_batches(max_chunksize=ROWS_AT_ONCE))
        )

    @classmethod
    def in_file(cls, path: str | Path) -> ExampleScores:
        """Return those of a scores file or of a folder that holds it."""
        widths = example_widths(read_scores_schema(path))

        def read(names: list[str]) -> Iterator[pa.RecordBatch]:
            with _readable(path) as file:
                yield from pq.ParquetFile(file).iter_batches(ROWS_AT_ONCE, columns=names)

        return cls(widths, read)

    def chunks(self, tasks: Sequence[str]) -> Iterator[np.ndarray]:
        """Yield the scores of several tasks' examples side by side, float64 [rows, ΣV], NaN for null."""
        for batch in self.read([EXAMPLES_PREFIX + task for task in tasks]):
            yield np.hstack([_matrix(batch[EXAMPLES_PREFIX + task]) for task in tasks])


def _matrix(column: pa.FixedSizeListArray) -> np.ndarray:
    """Return lists of fixed length as float64 [rows, V]."""
    size = column.type.list_size
    start = column.offset * size
    values = column.values.slice(start, len(column) * size).to_numpy(zero_copy_only=False)
    return values.astype(np.float64).reshape(len(column), size)


def scores_metadata(scores: pa.Table | pa.Schema) -> dict[str, object]:
    """Return what made the scores, as written by `scores_table`."""
    return json.loads(((scores.schema if isinstance(scores, pa.Table) else scores).metadata or {}).get(b"iprox", b"{}"))


def write_parts(path: Path, parts: Iterable[pa.Table]) -> int:
    """Write tables of one schema as row groups of one Parquet file, atomically; return the number of rows."""
    rows = 0
    writer: pq.ParquetWriter | None = None
    with replacing(path) as partial:
        try:
            for part in parts:
                if writer is None:
                    writer = pq.ParquetWriter(partial, part.schema, compression="zstd", write_page_checksum=True)
                writer.write_table(part)
                rows += part.num_rows
        finally:
            if writer is not None:
                writer.close()
        if writer is None:
            raise ValueError("no scores to write")
    return rows


def read_scores(path: str | Path, *, examples: bool = False) -> pa.Table:
    """Read a scores table from `scores.parquet` or a folder that holds it.

    Args:
        path: file or folder.
        examples: whether to read the scores by validation example too, which are most of the file.

    Raises:
        InputError: the file is missing or not a scores table.
    """
    names = read_scores_schema(path).names
    with _readable(path) as file:
        return pq.read_table(file, columns=[name for name in names if examples or not name.startswith(EXAMPLES_PREFIX)])


def read_scores_schema(path: str | Path) -> pa.Schema:
    """Read the columns and metadata of a scores table, without its rows."""
    with _readable(path) as file:
        schema = pq.read_schema(file)
        missing = [name for name in ("id", "source", "tokens", AGGREGATE) if name not in schema.names]
        if missing or not any(name.startswith(TASK_PREFIX) for name in schema.names):
            lacking = repr(missing[0]) if missing else f"{TASK_PREFIX}TASK"
            raise InputError(f"{file}: has no column {lacking}, so it is not a scores table")
        for name, kind in zip(schema.names, schema.types, strict=True):
            if schema.names.count(name) > 1:
                raise InputError(f"{file}: two columns have the name {name!r}; score again")
            sound = not name.startswith(EXAMPLES_PREFIX) or pa.types.is_fixed_size_list(kind)
            if name == AGGREGATE or name.startswith(TASK_PREFIX):
                sound = pa.types.is_floating(kind) or pa.types.is_integer(kind)
            if not sound:
                raise InputError(f"{file}: the column {name!r} holds {kind}, which no score is; score again")
        try:
            sound = isinstance(scores_metadata(schema), dict)
        except (ValueError, RecursionError):
            sound = False
        if not sound:
            raise InputError(f"{file}: its metadata, which says how it was scored, is damaged; score again")
        return schema


@contextmanager
def _readable(path: str | Path) -> Iterator[Path]:
    """Yield the scores file at a path, and refuse one that is missing or unreadable."""
    file = Path(path)
    if file.is_dir():
        file = file / "scores.parquet"
    if not file.is_file():
        raise InputError(f"{file}: no such scores file; `iprox score` or `iprox run` writes it")
    try:
        yield file
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{file}: not a readable Parquet file: {one_line(error)}") from error
