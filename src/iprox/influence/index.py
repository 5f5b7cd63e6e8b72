"""The gradient index: the projected gradients of a pool on disk, written once and queried many times.

An index is a folder with `index.json` (a description) and one Arrow file per window, memory-mapped when read, with

    id, source, tokens, supervised    as in a scores table
    norm                              float32, ‖f(z)‖; null if an example has no supervised token
    gradient                          float16 [D], f(z)/‖f(z)‖ (a raw gradient would underflow in half precision)

An interrupted index resumes after its last window and ends with the same bytes.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn

from iprox.data import Encoded, Example
from iprox.engine.shards import IDENTITY, claim
from iprox.engine.stream import WindowWorker, local_engine
from iprox.engine.windows import WINDOW, Engine, ScoredWindow, ScoringStats, Windows
from iprox.errors import InputError, one_line
from iprox.files import digest_of, replacing, write_text
from iprox.influence.estimators.less import adam_steps, check_state
from iprox.influence.gradients import LayerGradient, TaskGradient
from iprox.influence.projection import LayerProjection
from iprox.influence.scorer import Normalize
from iprox.models.layers import has_bias, influence_layers, signal_like, weight_shape
from iprox.models.loss import LossFn, causal_lm_losses
from iprox.models.observe import frozen, watched_backward
from iprox.models.optimizer_state import AdamState
from iprox.progress import Advance
from iprox.scores import SUPERVISED, scores_table, supervised_column

DESCRIPTION = "index.json"
# Ending of the files with the checksums of an index that is not complete.
SUM = ".sum"


class GradientProjector:
    """Projects the per-example gradients (or Adam steps) of a model to D numbers (see `iprox.influence.projection`).

    Args:
        model: a proxy or any other model.
        dimension: D.
        seed: seed for the signs. They depend on it and the layer names only, so a proxy has the signs of its target.
        optimizer: state of the warm-up's optimizer, to project Adam steps instead of gradients, as in LESS.

    Raises:
        InputError: the state belongs to another model, or D is not a product of two similar numbers.

    Attributes:
        flops: FLOPs of projecting one token.
    """

    def __init__(
        self,
        model: nn.Module,
        dimension: int,
        *,
        seed: int = 0,
        optimizer: AdamState | None = None,
    ) -> None:
        self.model, self.dimension, self.optimizer = model, dimension, optimizer
        self.loss_fn: LossFn = causal_lm_losses
        self.layers = influence_layers(model)
        if optimizer is not None:
            check_state(optimizer, self.layers)
        self._projections: dict[str, LayerProjection] = {}
        self.flops = 0.0
        for name, layer in self.layers.items():
            m, n = weight_shape(layer)
            weight = signal_like(layer)
            projection = LayerProjection.of(f"{seed}/{name}", (m, n), dimension, weight)
            self._projections[name] = projection
            a, b = len(projection.left), len(projection.right)
            self.flops += 2.0 * (a * m + b * n + a * b) if optimizer is None else 2.0 * m * n

    noun = "gradient"
    dtype = np.float32

    @property
    def columns(self) -> int:
        """Numbers per example."""
        return self.dimension

    @property
    def device(self) -> torch.device:
        """Device that batches must be on."""
        return next(self.model.parameters()).device

    def __call__(self, batch: Any) -> tuple[Tensor, Tensor]:
        """Return the features of a batch of candidates [B, D], in float32 or better, and losses [B]."""
        parts: list[Tensor] = []

        def sink(name: str, h: Tensor, delta: Tensor) -> None:
            projection, bias = self._projections[name], has_bias(self.layers[name])
            if self.optimizer is None:
                part = projection.of_tokens(h, delta, bias)
            else:
                part = torch.cat([projection.of_gradient(s) for s in adam_steps(h, delta, name, bias, self.optimizer)])
            parts[:] = [parts[0].add_(part)] if parts else [part]  # sum as layers arrive, to save memory

        with frozen(self.model):
            losses = watched_backward(self.model, self.layers, lambda: self.loss_fn(self.model, batch), sink)
        return parts[0].flatten(1), losses

    def count(self, stats: ScoringStats, lengths: Sequence[int]) -> None:
        """Record the work done for examples of some lengths."""
        stats.contraction_flops = sum(lengths) * self.flops

    def table(self, window: Sequence[Example], encoded: Sequence[Encoded], numbers: np.ndarray) -> pa.Table:
        """Return the index rows of some examples from their features [N, D], NaN if an example has none."""
        features = np.nan_to_num(numbers)
        norms = np.linalg.norm(features, axis=1)
        features /= np.where(norms > 0, norms, 1)[:, None]
        unscored = np.array([example.supervised == 0 for example in encoded])
        return pa.table(
            {
                "id": pa.array([example.id for example in window], pa.string()),
                "source": pa.array([example.source for example in window], pa.string()),
                "tokens": pa.array([example.tokens for example in encoded], pa.int32()),
                SUPERVISED: pa.array([example.supervised for example in encoded], pa.int32()),
                "norm": pa.array(norms, pa.float32(), mask=unscored),
                "gradient": pa.FixedSizeListArray.from_arrays(
                    pa.array(features.astype(np.float16).ravel()), self.dimension
                ),
            }
        )

    def project(self, query: TaskGradient) -> Tensor:
        """Return the features of a task's validation gradients: [1, D] for their mean, [V, D] for single examples.

        Args:
            query: gradients from `GradientEstimator.validation_gradients`.
        """
        rows = [query] if isinstance(query, dict) else query
        return torch.stack([self._features(row).flatten() for row in rows])

    def _features(self, gradient: Any) -> Tensor:
        total: Tensor | None = None
        for name, projection in self._projections.items():
            if name not in gradient:
                continue
            part = gradient[name]
            dense = isinstance(part, LayerGradient)
            features = projection.of_gradient(part) if dense else projection.of_low_rank(part)
            total = features if total is None else total + features
        assert total is not None
        return total


def write_index(
    make: Callable[[], WindowWorker],
    pool: Iterable[Example],
    folder: Path,
    description: Mapping[str, Any],
    *,
    window: int = WINDOW,
    progress: Advance | None = None,
    engine: Engine = local_engine,
) -> ScoringStats:
    """Write the index of a pool.

    Args:
        make: function that makes a worker's projector.
        pool: examples; iterated once.
        folder: folder of the index; windows of an interrupted run with the same description are kept.
        description: everything that the rows depend on; written to `index.json`, with the number of rows.
        window: rows per file.
        progress: called with the number of rows done.
        engine: engine that projects the windows.
    """
    claim(folder, description)
    ready = _sound(folder)
    stats = ScoringStats()
    for file in ready.values():
        counted = _counts(_mapped(file))
        stats.add(counted)
        if progress is not None:
            progress(counted.rows, earlier=True)
    for number, (table, counted) in engine(make, Windows(pool, window, leave_out=ready), progress):
        # A window stores its counts, so that a resumed run reports the totals.
        table = table.replace_schema_metadata({"iprox": json.dumps(asdict(counted))})
        with (
            replacing(folder / f"{number:06d}.arrow") as partial,
            pa.OSFile(str(partial), "wb") as sink,
            pa.ipc.new_file(sink, table.schema) as writer,
        ):
            writer.write_table(table, max_chunksize=len(table))
        write_text(folder / f"{number:06d}.arrow{SUM}", digest_of(folder / f"{number:06d}.arrow"))
        stats.add(counted)
    write_text(folder / DESCRIPTION, json.dumps({**description, "rows": stats.rows}, indent=2) + "\n")
    for left in (*folder.glob(f"*{SUM}"), folder / IDENTITY):
        left.unlink()
    return stats


def _sound(folder: Path) -> dict[int, Path]:
    """Return the files of an interrupted index by window; delete those that are not as they were written, and warn."""
    sound: dict[int, Path] = {}
    for written in sorted(folder.glob(f"*{SUM}")):
        file = written.with_suffix("")
        if file.is_file() and digest_of(file) == written.read_text(encoding="utf-8"):
            sound[int(file.stem)] = file
        else:
            warnings.warn(f"{file}: is missing or damaged; its rows are read again", stacklevel=2)
    for file in (*folder.glob("*.arrow"), *folder.glob(f"*{SUM}")):
        if int(file.name.partition(".")[0]) not in sound:
            file.unlink()
    return sound


@dataclass(frozen=True, slots=True)
class GradientIndex:
    """An index on disk.

    Attributes:
        folder: folder of the index.
        description: content of `index.json`.
    """

    folder: Path
    description: Mapping[str, Any]

    @classmethod
    def open(cls, folder: str | Path) -> GradientIndex:
        """Open an index.

        Raises:
            InputError: there is no index, or it is incomplete.
        """
        folder = Path(folder)
        file = folder / DESCRIPTION
        if not file.is_file():
            begun = (folder / IDENTITY).is_file()
            what = "is incomplete; the same `iprox index` command resumes it" if begun else "is not an index"
            raise InputError(f"{folder}: {what}")
        try:
            described = json.loads(file.read_text(encoding="utf-8"))
            sound = {"rows", "dimension"} <= described.keys()
        except (ValueError, RecursionError, AttributeError):
            sound = False
        if not sound:
            raise InputError(f"{file}: is damaged; remove {folder} and index the pool again")
        index = cls(folder, described)
        if (rows := sum(map(len, index.windows()))) != index.rows:
            raise InputError(f"{folder}: holds {rows} rows of {index.rows}; remove it and index the pool again")
        return index

    @property
    def dimension(self) -> int:
        """D, the number of features per example."""
        return self.description["dimension"]

    @property
    def rows(self) -> int:
        """Number of examples."""
        return self.description["rows"]

    def windows(self) -> Iterator[pa.Table]:
        """Yield the windows in pool order, memory-mapped."""
        for file in sorted(self.folder.glob("*.arrow")):
            yield _mapped(file)

    def scores(
        self,
        queries: Mapping[str, TaskGradient],
        projector: GradientProjector,
        normalize: Normalize = "none",
        *,
        by_example: bool = False,
        progress: Callable[[int], None] | None = None,
    ) -> Iterator[ScoredWindow]:
        """Yield one scores table per window, with the statistics of indexing it.

        2D FLOPs and 2D bytes per example and query, so the speed of the disk or memory is the limit.

        Args:
            queries: validation gradients by task, from `GradientEstimator.validation_gradients`.
            projector: projector with the index's model, dimension and seed.
            normalize: `none`, or `cosine` to divide by the norms of the features.
            by_example: whether to keep one score per validation example too.
            progress: called with the number of rows done.
        """
        parts = [projector.project(query).float() for query in queries.values()]
        widths = [len(part) for part in parts]
        Q = torch.cat(parts)
        # A task's score uses its mean gradient; see `Scorer.weights`.
        weights = [np.full(width, 1 / width) for width in widths]
        if normalize == "cosine":
            weights = [_of_mean(part) for part in parts]
            Q = torch.nn.functional.normalize(Q, dim=1)
        for table in self.windows():
            X = unit_gradients(table).to(Q.device, Q.dtype)
            scores = (X @ Q.mT).double().cpu().numpy()
            norms = table["norm"].to_numpy().astype(np.float64)  # NaN if there is no score
            scores *= (norms if normalize == "none" else np.where(np.isnan(norms), norms, 1.0))[:, None]
            columns = np.split(scores, np.cumsum(widths)[:-1], axis=1)
            of_tasks = np.stack([(c * w).sum(axis=1) for c, w in zip(columns, weights, strict=True)], axis=1)
            ids, sources, tokens = (table[name].to_pylist() for name in ("id", "source", "tokens"))
            stats = replace(_counts(table), contraction_flops=0.0)
            kept = columns if by_example else ()
            supervised = supervised_column(table)
            yield (
                scores_table(ids, sources, tokens, of_tasks, list(queries), examples=kept, supervised=supervised),
                stats,
            )
            if progress is not None:
                progress(len(table))


def _of_mean(features: Tensor) -> np.ndarray:
    """Return the weights ‖f_v‖/(V‖f̄‖) that combine the cosines with features [V, D] into the cosine with their mean."""
    mean = features.mean(0).norm()
    norms = features.norm(dim=1) / mean if mean > 0 else torch.ones(len(features))
    return norms.double().cpu().numpy() / len(features)


def unit_gradients(table: pa.Table) -> Tensor:
    """Return the normalized features of a window, float16 [N, D]; a copy, as torch has no read-only tensors."""
    column = table["gradient"].chunk(0)
    return torch.from_numpy(column.flatten().to_numpy().reshape(len(column), -1).copy())


def _mapped(file: Path) -> pa.Table:
    try:
        return pa.ipc.open_file(pa.memory_map(str(file))).read_all()
    except (pa.ArrowException, OSError) as error:
        again = "remove its folder and index the pool again"
        raise InputError(f"{file}: is damaged ({one_line(error)}); {again}") from error


def _counts(window: pa.Table) -> ScoringStats:
    return ScoringStats(**json.loads(window.schema.metadata[b"iprox"]))
