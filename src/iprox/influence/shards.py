"""Scores on disk: a shard a window and checkpoint, so that a stopped run goes on and gives the same bytes."""

from __future__ import annotations

import functools
import itertools
import json
import shutil
import warnings
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from torch import nn

from iprox.data import ChatEncoder, Encoded, Example, iter_batches
from iprox.files import write_text
from iprox.influence.aggregate import Aggregation, TaskSpread, by_task, combine
from iprox.influence.gradient_free import Corpus
from iprox.influence.ranking import all_equal, no_scores, nothing_ranked
from iprox.influence.scores import scores_metadata, write_parts
from iprox.influence.scoring import ScoringSettings, ScoringStats
from iprox.influence.windows import (
    Engine,
    ScoredWindow,
    WindowScorer,
    compile_model,
    fitting_scorer,
    local_engine,
    windows_of,
)
from iprox.models.optimizer_state import AdamState
from iprox.progress import Advance
from iprox.settings import MODEL_FREE

IDENTITY = "identity.json"
# Says of a checkpoint that all its windows are scored, and how many there are.
DONE = "done"


@dataclass(frozen=True, slots=True)
class ScoringCheckpoint:
    """A model to score with, loaded when its turn comes, and the learning rate η that weights its scores.

    `load_target`, for a proxy, loads the model that validation gradients are taken on; it is dropped after that.
    `load_adam`, for the estimator `adam`, loads the state of the warm-up's optimizer at this checkpoint.
    """

    load: Callable[[], nn.Module]
    learning_rate: float = 1.0
    load_target: Callable[[], nn.Module] | None = None
    load_adam: Callable[[], AdamState] | None = None


def score_to_file(
    checkpoints: Sequence[ScoringCheckpoint],
    pool: Iterable[Example],
    validation: Mapping[str, Sequence[Encoded]],
    encoder: ChatEncoder,
    pad_id: int,
    path: Path,
    settings: ScoringSettings,
    *,
    identity: Mapping[str, object],
    progress: Advance | None = None,
    engine: Engine = local_engine,
    sample: Sequence[Encoded] = (),
    corpus: Corpus | None = None,
    ranks: bool = True,
) -> ScoringStats:
    """Score a pool at every checkpoint and write `scores.parquet`.

    Every window of every checkpoint is a shard, written atomically beside the result. Stopped at any point and
    started again with the same `identity`, it scores the windows whose shards are missing or damaged, and writes the
    same bytes. One checkpoint is in memory at a time.

    Args:
        checkpoints: where to score, with learning rates.
        pool: examples; iterated once a checkpoint.
        validation: encoded validation examples by task.
        encoder: makes tokens and labels.
        pad_id: token id of the padding.
        path: the file to write.
        settings: how to score.
        identity: fingerprints of everything the scores depend on; shards of another identity are thrown away.
            Also kept in the file.
        progress: called with the number of rows done at a checkpoint.
        engine: where windows are scored.
        sample: encoded examples of the pool, which an influence function measures curvature on.
        corpus: term counts of the pool, for BM25.
        ranks: whether the pool is to be ranked by the scores.

    Raises:
        InputError: no row has a score, or all have the same.
    """
    shards = path.with_name(path.name + ".shards")
    claim(shards, identity)
    for number, checkpoint in enumerate(checkpoints):
        folder = _checkpoint_folder(shards, number)
        ready = sound_shards(folder, settings.window)
        if progress is not None and ready:
            progress(sum(ready.values()), earlier=True)
        if ready and len(ready) == _done(folder):
            continue
        make = functools.partial(_window_scorer, checkpoint, validation, encoder, pad_id, settings, sample, corpus)
        windows = windows_of(pool, settings.window, leave_out=ready)
        made = write_shards(shards, number, engine(make, windows, progress), leave_out=ready)
        write_text(folder / DONE, str(len(ready) + made))

    rates = [each.learning_rate for each in checkpoints]
    return merge_shards(shards, path, rates, settings.aggregation, identity, ranks=ranks)


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


def write_shards(shards: Path, number: int, scored: Iterable[ScoredWindow], leave_out: Container[int] = ()) -> int:
    """Write the scores of windows at one checkpoint, each atomically.

    Args:
        shards: the folder of all shards.
        number: of the checkpoint.
        scored: from an engine, of the windows that are not left out.
        leave_out: numbers of the windows that there are.

    Returns:
        The number of shards written.
    """
    made = 0
    numbers = (index for index in itertools.count() if index not in leave_out)
    for (table, counted), index in zip(scored, numbers, strict=False):
        # The shard carries its own counts, so that a resumed run reports the whole.
        shard = table.replace_schema_metadata({"iprox": json.dumps(asdict(counted))})
        write_parts(_checkpoint_folder(shards, number) / f"{index:06d}.parquet", [shard])
        made += 1
    return made


def merge_shards(
    shards: Path,
    path: Path,
    rates: Sequence[float],
    how: Aggregation,
    identity: Mapping[str, object],
    *,
    ranks: bool = True,
) -> ScoringStats:
    """Make one scores file of the shards of every checkpoint, and drop them.

    Args:
        shards: their folder.
        path: the file to write.
        rates: learning rate of each checkpoint.
        how: many scores become one.
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
        spread.add(by_task(tables, rates, how))
    if not spread.count:
        raise no_scores(rows)
    if ranks and spread.count > 1 and all_equal(spread.lowest, spread.highest).all():
        raise nothing_ranked(spread.count, float(np.max(spread.highest)), identity.get("estimator"))

    def parts() -> Iterator[pa.Table]:
        for tables in windows_done():
            counted = [ScoringStats(**scores_metadata(table)) for table in tables]  # pyright: ignore[reportArgumentType]
            stats.add(ScoringStats.over_checkpoints(counted))
            yield combine(tables, rates, how, spread, identity)

    write_parts(path, parts())
    # Without its identity a half-removed folder is nobody's; the next start drops it.
    (shards / IDENTITY).unlink()
    shutil.rmtree(shards)
    return stats


def _window_scorer(
    checkpoint: ScoringCheckpoint,
    validation: Mapping[str, Sequence[Encoded]],
    encoder: ChatEncoder,
    pad_id: int,
    settings: ScoringSettings,
    sample: Sequence[Encoded],
    corpus: Corpus | None,
) -> WindowScorer:
    """What a worker makes for itself (at module level, so that it can be sent to another process)."""
    target = None if checkpoint.load_target is None else checkpoint.load_target()
    model = checkpoint.load() if settings.estimator not in MODEL_FREE else None
    adam = None if checkpoint.load_adam is None else checkpoint.load_adam()
    scorer, settings = fitting_scorer(model, validation, pad_id, settings, target, sample, corpus, adam=adam)
    uncompiled = ""
    if settings.compile:
        few = next(iter(validation.values()))
        trial = next(iter_batches(few, settings.batch_tokens, pad_id)).to(scorer.device)
        uncompiled = compile_model(scorer.model, scorer, trial)
    return WindowScorer(scorer, encoder, pad_id, settings, uncompiled)


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
    shutil.rmtree(shards, ignore_errors=True)
    shards.mkdir(parents=True)
    write_text(marker, written)
