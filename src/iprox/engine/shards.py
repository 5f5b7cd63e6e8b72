"""Scores on disk, one shard per window and checkpoint, so that an interrupted run resumes and gives the same bytes."""

from __future__ import annotations

import functools
import json
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from iprox.aggregation import TaskSpread, combine, over_checkpoints, refuse_unranked
from iprox.data import Example
from iprox.engine.stream import WindowWorker, local_engine
from iprox.engine.windows import WINDOW, Engine, ScoringStats, Windows
from iprox.files import empty_folder, write_text
from iprox.progress import Advance
from iprox.records import RUN
from iprox.scores import SUPERVISED, scores_metadata, write_parts

IDENTITY = "identity.json"
# File with the number of windows of a checkpoint, written when all are scored.
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

    Every window of every checkpoint is a shard, written atomically next to the result. A run that is interrupted and
    started again with the same `identity` scores only the windows whose shards are missing or damaged, and writes the
    same bytes. One checkpoint is in memory at a time.

    Args:
        workers: functions that make the worker of each checkpoint.
        learning_rates: η of each checkpoint.
        pool: examples; iterated once per checkpoint.
        path: file to write.
        identity: fingerprints of everything that the scores depend on, also kept in the file; shards of another
            identity are removed.
        window: rows per shard.
        progress: called with the number of rows done at a checkpoint.
        engine: engine that scores the windows.
        ranks: whether the scores will rank the pool.

    Raises:
        InputError: no row has a score, or all scores are equal.
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
        if not any(folder.iterdir()) and (shards / _name(number + 1)).is_dir():
            warnings.warn(f"{folder}: its files are missing; its rows are scored again", stacklevel=2)
        keeping = functools.partial(_keeping, make, folder)
        made = 0
        for index, (table, counted) in engine(keeping, Windows(pool, window, leave_out=ready), progress):
            write_shard(shards, number, index, table, counted)
            made += 1
        write_text(folder / DONE, str(len(ready) + made))
    return merge_shards(shards, path, learning_rates, identity, ranks=ranks)


def _keeping(make: Callable[[], WindowWorker], folder: Path) -> WindowWorker:
    """Return a worker that keeps the numbers of windows in progress in a folder."""
    worker = make()
    worker.kept = folder
    return worker


def sound_shards(folder: Path, window: int) -> dict[int, int]:
    """Return the number of rows of each intact shard, by window number; delete damaged shards with a warning.

    A shard is intact if its page checksums and its stored row count are right and, unless it is the last, it has a
    full window of rows. Windows without an intact shard are scored again.

    Args:
        folder: folder with the shards of one checkpoint.
        window: rows per window.
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
            warnings.warn(f"{file}: is damaged; its rows are scored again", stacklevel=2)
        else:
            found[number] = table.num_rows
    # Before all are scored, windows may be missing between others: Ray's workers finish them in any order.
    gone = next((number for number in range(_done(folder)) if number not in files), None)
    if gone is not None:
        warnings.warn(f"{folder / f'{gone:06d}.parquet'}: is missing; its rows are scored again", stacklevel=2)
    return found


def _done(folder: Path) -> int:
    """Return the number of windows of a checkpoint if all of them are scored, else 0."""
    said = (folder / DONE).read_text() if (folder / DONE).is_file() else ""
    return int(said) if said.isdecimal() else 0


def write_shard(shards: Path, checkpoint: int, window: int, table: pa.Table, counted: ScoringStats) -> None:
    """Write the scores of one window at one checkpoint, atomically."""
    # The shard stores its counts, so that a resumed run reports the totals.
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
    """Merge the shards of all checkpoints into one scores file, and remove them.

    Args:
        shards: folder of the shards.
        path: file to write.
        rates: η of each checkpoint.
        identity: metadata of the file.
        ranks: whether the scores will rank the pool, so that they must differ.

    Returns:
        The rows and tokens read at one checkpoint, and the work done at all of them.

    Raises:
        InputError: no row has a score, or all scores are equal. The shards are kept, and no file is written.
    """
    stats, spread, lengths, rows = ScoringStats(), TaskSpread(), TaskSpread(), 0

    def windows_done() -> Iterator[list[pa.Table]]:
        for name in sorted(file.name for file in _checkpoint_folder(shards, 0).glob("*.parquet")):
            yield [pq.read_table(_checkpoint_folder(shards, c) / name) for c in range(len(rates))]

    for tables in windows_done():
        rows += tables[0].num_rows
        spread.add(over_checkpoints(tables, rates))
        lengths.add(
            np.stack([tables[0][name].to_numpy() for name in ("tokens", SUPERVISED)], axis=1).astype(np.float64)
        )
    if ranks or not spread.count:
        refuse_unranked(spread, rows, identity.get("estimator"), lengths)

    def parts() -> Iterator[pa.Table]:
        for tables in windows_done():
            counted = [ScoringStats(**scores_metadata(table)) for table in tables]  # pyright: ignore[reportArgumentType]
            stats.add(ScoringStats.over_checkpoints(counted))
            yield combine(tables, rates, spread, identity)

    write_parts(path, parts())
    # A half-removed folder without its identity is not resumed.
    (shards / IDENTITY).unlink()
    shutil.rmtree(shards)
    return stats


def _name(number: int) -> str:
    return f"checkpoint-{number:03d}"


def _checkpoint_folder(shards: Path, number: int) -> Path:
    folder = shards / _name(number)
    folder.mkdir(exist_ok=True)
    return folder


def claim(shards: Path, identity: Mapping[str, object]) -> None:
    """Prepare a folder for shards of an identity: keep those of the same identity, remove those of another."""
    written = json.dumps(identity, sort_keys=True)
    marker = shards / IDENTITY
    if marker.is_file() and marker.read_text(encoding="utf-8") == written:
        return
    if not marker.is_file() and (any(shards.glob("*.arrow")) or any(shards.glob("*/*.parquet"))):
        warnings.warn(
            f"{marker}: is missing, so it is not known what the files there are of; all are made again", stacklevel=2
        )
    # The marker goes first, so that a half-removed folder is never resumed.
    marker.unlink(missing_ok=True)
    if (shards / RUN).is_file():  # the folder of an index, which has the record of its command
        empty_folder(shards, keep=RUN)
    else:
        shutil.rmtree(shards, ignore_errors=True)
        shards.mkdir(parents=True)
    write_text(marker, written)
