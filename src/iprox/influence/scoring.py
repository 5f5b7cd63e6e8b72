"""Stream a pool through a scorer: window by window, so that memory does not grow with the pool."""

from __future__ import annotations

import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from torch import nn

from iprox.data import ChatEncoder, Encoded, Example, iter_batches, on_device
from iprox.errors import InputError
from iprox.influence.estimators import BatchScorer, Normalise, mean_gradient
from iprox.influence.scores import score_matrix, scores_metadata, scores_table, task_names, write_parts
from iprox.models.layers import GradientSpace
from iprox.models.loss import LossFn, causal_lm_losses

Aggregate = Literal["standardised", "mean"]

# Rows tokenised and sorted by length together. Enough that length-sorted batches hold little padding, few enough
# that a window's tokens are nothing beside a model; also the unit of resuming.
WINDOW = 4096


@dataclass(frozen=True, slots=True)
class ScoringSettings:
    """How to score.

    Attributes:
        gradient: which gradient of a proxy's low-rank layers, `factors` or `weight`.
        normalise: `none` or `cosine`.
        aggregate: how `influence` is made of several tasks: `standardised` (the mean of scores divided by their
            standard deviation over the pool, so that every task counts alike, whatever the size of its gradients)
            or `mean` (of the scores as they are).
        batch_tokens: largest rows × longest row of a batch.
        window: rows read, sorted and written together.
    """

    gradient: GradientSpace = "factors"
    normalise: Normalise = "none"
    aggregate: Aggregate = "standardised"
    batch_tokens: int = 4096
    window: int = WINDOW


@dataclass(slots=True)
class ScoringStats:
    """What was read: rows, rows without a score, tokens, supervised tokens, over-long examples that were cut."""

    rows: int = 0
    unscored: int = 0
    tokens: int = 0
    supervised: int = 0
    truncated: int = 0

    def add(self, other: ScoringStats) -> None:
        """Count another's rows and tokens into this one."""
        for name in self.__slots__:
            setattr(self, name, getattr(self, name) + getattr(other, name))


@dataclass(frozen=True, slots=True)
class ScoringCheckpoint:
    """A model to score with, loaded when its turn comes, and the learning rate η that weights its scores."""

    load: Callable[[], nn.Module]
    learning_rate: float = 1.0


def build_scorer(
    model: nn.Module,
    validation: Mapping[str, Sequence[Encoded]],
    pad_id: int,
    settings: ScoringSettings,
    loss_fn: LossFn = causal_lm_losses,
) -> BatchScorer:
    """A scorer of candidates against each task's mean validation gradient at one checkpoint.

    Raises:
        InputError: a task has no example with a supervised token.
    """
    device = next(model.parameters()).device
    queries = {}
    for task, encoded in validation.items():
        if not any(example.supervised for example in encoded):
            raise InputError(f"validation task {task!r} has no example with a supervised token")
        batches = on_device(iter_batches(encoded, settings.batch_tokens, pad_id), device)
        queries[task], _ = mean_gradient(model, batches, settings.gradient, loss_fn)
    return BatchScorer(model, queries, gradient=settings.gradient, normalise=settings.normalise, loss_fn=loss_fn)


def score_windows(
    scorer: BatchScorer,
    pool: Iterable[Example],
    encoder: ChatEncoder,
    pad_id: int,
    settings: ScoringSettings,
    *,
    skip_windows: int = 0,
    progress: Callable[[int], None] | None = None,
) -> Iterator[tuple[pa.Table, ScoringStats]]:
    """Scores of a pool, one table a window with what was read for it, in pool order.

    Args:
        scorer: from `build_scorer`.
        pool: examples, read once.
        encoder: makes tokens and labels.
        pad_id: token id of the padding.
        settings: how to score.
        skip_windows: leave out this many windows at the start (already done).
        progress: called with the number of rows done.

    Raises:
        FloatingPointError: a score is not finite (the example is named).
    """
    device = next(scorer.model.parameters()).device
    rows = itertools.islice(iter(pool), skip_windows * settings.window, None)
    while window := list(itertools.islice(rows, settings.window)):
        encoded = encoder.encode(window)
        scores = np.full((len(window), len(scorer.tasks)), np.nan)
        for batch in iter_batches(encoded, settings.batch_tokens, pad_id):
            values, _ = scorer(batch.to(device))
            scores[batch.indices] = values.double().cpu().numpy()
            bad = ~np.isfinite(scores[batch.indices]).all(axis=1)
            if bad.any():
                culprit = window[batch.indices[int(bad.argmax())]]
                raise FloatingPointError(f"{culprit.origin}: the score is not finite; try --dtype float32")
            if progress is not None:
                progress(len(batch.indices))
        empty = sum(example.supervised == 0 for example in encoded)
        if progress is not None and empty:
            progress(empty)
        lengths = [len(example.input_ids) for example in encoded]
        table = scores_table(
            [example.id for example in window], [example.source for example in window], lengths, scores, scorer.tasks
        )
        yield (
            table,
            ScoringStats(
                rows=len(window),
                unscored=empty,
                tokens=sum(lengths),
                supervised=sum(example.supervised for example in encoded),
                truncated=sum(example.truncated for example in encoded),
            ),
        )


def over_checkpoints(tables: Sequence[pa.Table], learning_rates: Sequence[float]) -> np.ndarray:
    """TracIn over checkpoints: Σ_c η_c · scores_c of the same rows, float64 [N, tasks]."""
    return sum(rate * score_matrix(table) for table, rate in zip(tables, learning_rates, strict=True))  # pyright: ignore


class TaskSpread:
    """Running mean and variance of each task's scores (Chan's update), to weigh tasks against each other."""

    def __init__(self) -> None:
        self.count, self.mean, self.squares = 0, 0.0, 0.0

    def add(self, scores: np.ndarray) -> None:
        """Count scores [N, tasks] in; rows without a score are left out."""
        scores = scores[np.isfinite(scores).all(axis=1)]
        if not len(scores):
            return
        count, mean = len(scores), scores.mean(axis=0)
        shift, total = mean - self.mean, self.count + count
        self.squares = self.squares + ((scores - mean) ** 2).sum(axis=0) + shift**2 * self.count * count / total
        self.mean = self.mean + shift * count / total
        self.count = total

    def weights(self, aggregate: Aggregate) -> np.ndarray | None:
        """Weights of the tasks in the aggregate: 1 over the standard deviation, or none (`mean`, or one task)."""
        deviation = np.sqrt(np.atleast_1d(self.squares) / max(self.count, 1))
        if aggregate == "mean" or len(deviation) == 1:
            return None
        return 1 / np.where(deviation > 0, deviation, 1.0)


def combine(
    tables: Sequence[pa.Table],
    learning_rates: Sequence[float],
    metadata: Mapping | None = None,
    weights: np.ndarray | None = None,
) -> pa.Table:
    """One scores table of the scores of the same rows at several checkpoints."""
    first = tables[0]
    total = over_checkpoints(tables, learning_rates)
    ids, sources, tokens = (first[name].to_pylist() for name in ("id", "source", "tokens"))
    return scores_table(ids, sources, tokens, total, task_names(first), metadata, weights)


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
    progress: Callable[[int], None] | None = None,
) -> ScoringStats:
    """Score a pool at every checkpoint and write `scores.parquet`.

    Every window of every checkpoint is a shard, written atomically beside the result. Stopped at any point and
    started again with the same `identity`, it goes on after the last shard and writes the same bytes. One
    checkpoint is in memory at a time.

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
    """
    shards = path.with_name(path.name + ".shards")
    _claim(shards, identity)
    for number, checkpoint in enumerate(checkpoints):
        folder = shards / f"checkpoint-{number:03d}"
        folder.mkdir(exist_ok=True)
        if (folder / "done").exists():
            continue
        done = len(list(folder.glob("*.parquet")))
        if progress is not None and done:
            progress(done * settings.window)
        scorer = build_scorer(checkpoint.load(), validation, pad_id, settings)
        windows = score_windows(scorer, pool, encoder, pad_id, settings, skip_windows=done, progress=progress)
        for index, (table, counted) in enumerate(windows, start=done):
            # The shard carries its own counts, so that a resumed run reports the whole.
            shard = table.replace_schema_metadata({"iprox": json.dumps(asdict(counted))})
            write_parts(folder / f"{index:06d}.parquet", [shard])
        (folder / "done").touch()

    stats, spread = ScoringStats(), TaskSpread()
    rates = [checkpoint.learning_rate for checkpoint in checkpoints]

    def windows_done() -> Iterator[list[pa.Table]]:
        for name in sorted(file.name for file in (shards / "checkpoint-000").glob("*.parquet")):
            yield [pq.read_table(shards / f"checkpoint-{c:03d}" / name) for c in range(len(checkpoints))]

    for tables in windows_done():
        spread.add(over_checkpoints(tables, rates))
    weights = spread.weights(settings.aggregate)

    def parts() -> Iterator[pa.Table]:
        for tables in windows_done():
            stats.add(ScoringStats(**scores_metadata(tables[0])))  # pyright: ignore[reportArgumentType]
            yield combine(tables, rates, identity, weights)

    write_parts(path, parts())
    shutil.rmtree(shards)
    return stats


def _claim(shards: Path, identity: Mapping[str, object]) -> None:
    """Make the shard folder ours: keep shards of the same identity, drop those of another."""
    written = json.dumps(identity, sort_keys=True)
    marker = shards / "identity.json"
    if marker.is_file() and marker.read_text(encoding="utf-8") == written:
        return
    shutil.rmtree(shards, ignore_errors=True)
    shards.mkdir(parents=True)
    partial = marker.with_suffix(".partial")
    partial.write_text(written, encoding="utf-8")
    os.replace(partial, marker)
