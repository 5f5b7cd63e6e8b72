"""Scores on disk: one shard per window and checkpoint, so that a stopped run resumes and gives the same bytes."""

from __future__ import annotations

import itertools
import json
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from iprox.aggregation import TaskSpread, combine, over_checkpoints, refuse_unranked
from iprox.data import Example
from iprox.engine.stream import WINDOW, Engine, ScoringStats, WindowWorker, local_engine, windows_of
from iprox.files import empty_folder, write_text
from iprox.progress import Advance
from iprox.records import RUN
from iprox.scores import scores_metadata, write_parts

IDENTITY = "identity.json"
# Says of a checkpoint that all its windows are scored, and how many there are.
DONE = "done"


def score_to_file(
    workers: Sequence[Callable[[], WindowWorker]],
    learning_rates: Sequence[float],
    pool: Iterable[Example],
    path: Path,
    *,
    identity: Mapping[str, object],
    window: int = WINDOW,
    progress: Advance | None = None,
    engine: Engine = local_engine,
    ranks: bool = True,
) -> ScoringStats:
    """Score a pool at every checkpoint and write `scores.parquet`.

    Every window of every checkpoint is a shard, written atomically next to the result. Stopped at any point and
    started again with the same `identity`, it scores the windows whose shards are missing or damaged, and writes the
    same bytes. One checkpoint is in memory at a time.

    Args:
        workers: by checkpoint, what makes a worker.
        learning_rates: η of each checkpoint.
        pool: examples; iterated once per checkpoint.
        path: the file to write.
        identity: fingerprints of everything the scores depend on; shards of another identity are thrown away.
            Also kept in the file.
        window: rows per shard.
        progress: called with the number of rows done at a checkpoint.
        engine: where windows are scored.
        ranks: whether the pool is to be ranked by the scores.

    Raises:
        InputError: no row has a score, or all have the same.
    """
    shards = path.with_name(path.name + ".shards")
    claim(shards, identity)
    for number, make in enumerate(workers):
        folder = _checkpoint_folder(shards, number)
        ready = sound_shards(folder, window)
        if progress is not None and ready:
            progress(sum(ready.values()), earlier=True)
        if ready and len(ready) == _done(folder):
            continue
        missing = (index for index in itertools.count() if index not in ready)
        made = 0
        for (table, counted), index in zip(
            engine(make, windows_of(pool, window, leave_out=ready), progress), missing, strict=False
        ):
            write_shard(shards, number, index, table, counted)
            made += 1
        write_text(folder / DONE, str(len(ready) + made))
    return merge_shards(shards, path, learning_rates, identity, ranks=ranks)


def sound_shards(folder: Path, window: int) -> dict[int, int]:
    """Return the rows of each shard that is whole, by the number of its window; a damaged one is deleted and warned of.

    A shard is whole if its pages have the checksums they were written with, its own count of rows is right, and it
    has as many as a window, unless it is the last. One that is missing is left out as well, so both are made again.

    Args:
        folder: shards of one checkpoint.
        window: rows of a window.
    """
    files = {int(file.stem): file for file in sorted(folder.glob("*.parquet")) if file.stem.isdecimal()}
    found: dict[int, int] = {}
    for number, file in files.items():
        try:
            table = pq.read_table(file, page_checksum_verification=True)
            counted = scores_metadata(table).get("rows")
        except (pa.ArrowException, OSError, ValueError):
            counted, table = None, None
        if table is None or counted != table.num_rows or (number < max(files) and table.num_rows != window):
            file.unlink()
            warnings.warn(f"{file}: is damaged, so its rows are scored again", stacklevel=2)
        else:
            found[number] = table.num_rows
    expected = max(_done(folder), max(files, default=-1) + 1)
    gone = next((number for number in range(expected) if number not in files), None)
    if gone is not None:
        warnings.warn(f"{folder / f'{gone:06d}.parquet'}: is not there, so its rows are scored again", stacklevel=2)
    return found


def _done(folder: Path) -> int:
    """The number of windows of a checkpoint whose windows are all scored; 0 where they are not."""
    said = (folder / DONE).read_text() if (folder / DONE).is_file() else ""
    return int(said) if said.isdecimal() else 0


def write_shard(shards: Path, checkpoint: int, window: int, table: pa.Table, counted: ScoringStats) -> None:
    """Write the scores of one window at one checkpoint, atomically."""
    # The shard carries its own counts, so that a resumed run reports the whole.
    shard = table.replace_schema_metadata({"iprox": json.dumps(asdict(counted))})
    write_parts(_checkpoint_folder(shards, checkpoint) / f"{window:06d}.parquet", [shard])


def merge_shards(
    shards: Path,
    path: Path,
    rates: Sequence[float],
    identity: Mapping[str, object],
    *,
    ranks: bool = True,
) -> ScoringStats:
    """Make one scores file of the shards of every checkpoint, and drop them.

    Args:
        shards: their folder.
        path: the file to write.
        rates: η of each checkpoint.
        identity: kept in the file.
        ranks: whether the pool is to be ranked by the scores, which equal ones cannot do.

    Returns:
        What was read, once, and what was done at all checkpoints.

    Raises:
        InputError: no row has a score, or all have the same. The shards stay, and no file is written.
    """
    stats, spread, rows = ScoringStats(), TaskSpread(), 0

    def windows_done() -> Iterator[list[pa.Table]]:
        for name in sorted(file.name for file in _checkpoint_folder(shards, 0).glob("*.parquet")):
            yield [pq.read_table(_checkpoint_folder(shards, c) / name) for c in range(len(rates))]

    for tables in windows_done():
        rows += tables[0].num_rows
        spread.add(over_checkpoints(tables, rates))
    if ranks or not spread.count:
        refuse_unranked(spread, rows, identity.get("estimator"))

    def parts() -> Iterator[pa.Table]:
        for tables in windows_done():
            counted = [ScoringStats(**scores_metadata(table)) for table in tables]  # pyright: ignore[reportArgumentType]
            stats.add(ScoringStats.over_checkpoints(counted))
            yield combine(tables, rates, spread, identity)

    write_parts(path, parts())
    # Without its identity a half-removed folder is nobody's; the next start drops it.
    (shards / IDENTITY).unlink()
    shutil.rmtree(shards)
    return stats


def _checkpoint_folder(shards: Path, number: int) -> Path:
    folder = shards / f"checkpoint-{number:03d}"
    folder.mkdir(exist_ok=True)
    return folder


def claim(shards: Path, identity: Mapping[str, object]) -> None:
    """Make a folder of shards ours: keep shards of the same identity, drop those of another."""
    written = json.dumps(identity, sort_keys=True)
    marker = shards / IDENTITY
    if marker.is_file() and marker.read_text(encoding="utf-8") == written:
        return
    # First the marker: a half-removed folder must not be taken for whole by a later start of the other identity.
    marker.unlink(missing_ok=True)
    if (shards / RUN).is_file():  # an index is a folder of shards itself, with the record of its command
        empty_folder(shards, keep=RUN)
    else:
        shutil.rmtree(shards, ignore_errors=True)
        shards.mkdir(parents=True)
    write_text(marker, written)
