"""An index: the projected gradients of a pool on disk, written once and queried many times.

A folder with `index.json` (what it is of) and one Arrow file per window, memory-mapped when read, with the columns

    id, source, tokens, supervised    as in a scores table
    norm                              float32, ‖f(z)‖; null where an example has no supervised token
    gradient                          float16 [D], f(z)/‖f(z)‖ (a raw gradient would underflow in half precision)

Stopped at any point and started again it resumes after the last window, and gives the same bytes.
"""

from __future__ import annotations

import json
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
from iprox.engine.stream import WINDOW, Engine, ScoredWindow, ScoringStats, WindowWorker, local_engine, windows_of
from iprox.errors import InputError
from iprox.files import replacing, write_text
from iprox.influence.estimators.less import adam_steps, check_state
from iprox.influence.gradients import LayerGradient, TaskGradient
from iprox.influence.projection import LayerProjection
from iprox.influence.scorer import Normalize
from iprox.models.answers import answer_losses
from iprox.models.checkpoint import candidate_losses
from iprox.models.layers import has_bias, influence_layers, weight_shape
from iprox.models.loss import LossFn, causal_lm_losses
from iprox.models.observe import frozen, watched_backward
from iprox.models.optimizer_state import AdamState
from iprox.progress import Advance
from iprox.scores import SUPERVISED, scores_table, supervised_column

DESCRIPTION = "index.json"


class GradientProjector:
    """Projects gradients, or Adam's steps, of a model to D numbers (see `iprox.influence.projection`).

    Args:
        model: a proxy or any model.
        dimension: D.
        seed: seed of the signs. They follow from it and the layers' names, so that a proxy has its target's.
        optimizer: state of the warm-up's optimizer: Adam's steps are projected then, as in LESS.
        loss_fn: per-example losses of a model that is no language model.

    Raises:
        InputError: the state is of another model, or a dimension that has no near divisors.

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
        loss_fn: LossFn = causal_lm_losses,
    ) -> None:
        self.model, self.dimension, self.optimizer = model, dimension, optimizer
        self.loss_fn = candidate_losses(model, loss_fn)
        self.by_answer = self.loss_fn is answer_losses
        self.layers = influence_layers(model)
        if optimizer is not None:
            check_state(optimizer, self.layers)
        self._projections: dict[str, LayerProjection] = {}
        self.flops = 0.0
        for name, layer in self.layers.items():
            m, n = weight_shape(layer)
            weight = next(layer.parameters())
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
        """Where batches are to be."""
        return next(self.model.parameters()).device

    def __call__(self, batch: Any) -> tuple[Tensor, Tensor]:
        """Return features of a batch of candidates [B, D], in float32 or better, and losses [B]."""
        parts: list[Tensor] = []

        def sink(name: str, h: Tensor, delta: Tensor) -> None:
            projection, bias = self._projections[name], has_bias(self.layers[name])
            if self.optimizer is None:
                part = projection.of_tokens(h, delta, bias)
            else:
                part = torch.cat([projection.of_gradient(s) for s in adam_steps(h, delta, name, bias, self.optimizer)])
            parts[:] = [parts[0].add_(part)] if parts else [part]  # one layer's features at a time

        with frozen(self.model):
            losses = watched_backward(self.model, self.layers, lambda: self.loss_fn(self.model, batch), sink)
        return parts[0].flatten(1), losses

    def count(self, stats: ScoringStats, lengths: Sequence[int]) -> None:
        """Note what was done for examples of some lengths."""
        stats.contraction_flops = sum(lengths) * self.flops

    def table(self, window: Sequence[Example], encoded: Sequence[Encoded], numbers: np.ndarray) -> pa.Table:
        """Return the rows of the index of some examples, from their features [N, D], NaN where there are none."""
        features = np.nan_to_num(numbers)
        norms = np.linalg.norm(features, axis=1)
        features /= np.where(norms > 0, norms, 1)[:, None]
        unscored = np.array([example.supervised == 0 for example in encoded])
        return pa.table(
            {
                "id": pa.array([example.id for example in window], pa.string()),
                "source": pa.array([example.source for example in window], pa.string()),
                "tokens": pa.array([len(example.input_ids) for example in encoded], pa.int32()),
                SUPERVISED: pa.array([example.supervised for example in encoded], pa.int32()),
                "norm": pa.array(norms, pa.float32(), mask=unscored),
                "gradient": pa.FixedSizeListArray.from_arrays(
                    pa.array(features.astype(np.float16).ravel()), self.dimension
                ),
            }
        )

    def project(self, query: TaskGradient) -> Tensor:
        """Return features of a task's validation gradients: [1, D] of their mean, [V, D] of its examples one by one.

        Args:
            query: from `GradientEstimator.validation_gradients`.
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
        make: makes a worker's projector.
        pool: examples; iterated once.
        folder: where to; windows of an interrupted writing with the same description are kept.
        description: everything the rows depend on; kept in `index.json`, with the counts of what was read.
        window: rows read and written together.
        progress: called with the number of rows done.
        engine: where windows are projected.
    """
    claim(folder, description)
    ready = sorted(folder.glob("*.arrow"))
    stats = ScoringStats()
    for file in ready:
        counted = _counts(file)
        stats.add(counted)
        if progress is not None:
            progress(counted.rows, earlier=True)
    windows = windows_of(pool, window, leave_out=range(len(ready)))
    for number, (table, counted) in enumerate(engine(make, windows, progress), start=len(ready)):
        # A window carries its own counts, so that a resumed run reports the whole.
        table = table.replace_schema_metadata({"iprox": json.dumps(asdict(counted))})
        with (
            replacing(folder / f"{number:06d}.arrow") as partial,
            pa.OSFile(str(partial), "wb") as sink,
            pa.ipc.new_file(sink, table.schema) as writer,
        ):
            writer.write_table(table, max_chunksize=len(table))
        stats.add(counted)
    write_text(folder / DESCRIPTION, json.dumps({**description, "rows": stats.rows}, indent=2) + "\n")
    (folder / IDENTITY).unlink()
    return stats


@dataclass(frozen=True, slots=True)
class GradientIndex:
    """An index on disk.

    Attributes:
        folder: where it is.
        description: what it is of (`index.json`).
    """

    folder: Path
    description: Mapping[str, Any]

    @classmethod
    def open(cls, folder: str | Path) -> GradientIndex:
        """Open an index.

        Raises:
            InputError: there is none, or it is not whole.
        """
        folder = Path(folder)
        file = folder / DESCRIPTION
        if not file.is_file():
            begun = (folder / IDENTITY).is_file()
            what = "is not whole; the same `iprox index` command resumes it" if begun else "is no index"
            raise InputError(f"{folder}: {what}")
        return cls(folder, json.loads(file.read_text(encoding="utf-8")))

    @property
    def dimension(self) -> int:
        """D, numbers an example."""
        return self.description["dimension"]

    @property
    def rows(self) -> int:
        """Examples in it."""
        return self.description["rows"]

    def windows(self) -> Iterator[pa.Table]:
        """Its tables in pool order, memory-mapped."""
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
        """Yield the scores of its examples, one scores table per window with what had been read for it.

        2D FLOPs and 2D bytes per example and query, so it runs at the speed of the disk or the memory.

        Args:
            queries: by task, from `GradientEstimator.validation_gradients`.
            projector: of the model, dimension and seed that the index is of.
            normalize: `none`; `cosine` divides by the norms of the features.
            by_example: keep the scores by validation example too.
            progress: called with the number of rows done.
        """
        parts = [projector.project(query).float() for query in queries.values()]
        widths = [len(part) for part in parts]
        Q = torch.cat(parts)
        # A task's own score is of its mean gradient; see `Scorer.weights`.
        weights = [np.full(width, 1 / width) for width in widths]
        if normalize == "cosine":
            weights = [_of_mean(part) for part in parts]
            Q = torch.nn.functional.normalize(Q, dim=1)
        for table in self.windows():
            X = unit_gradients(table).to(Q.device, Q.dtype)
            scores = (X @ Q.mT).double().cpu().numpy()
            norms = table["norm"].to_numpy().astype(np.float64)  # NaN where there is no score
            scores *= (norms if normalize == "none" else np.where(np.isnan(norms), norms, 1.0))[:, None]
            columns = np.split(scores, np.cumsum(widths)[:-1], axis=1)
            of_tasks = np.stack([(c * w).sum(axis=1) for c, w in zip(columns, weights, strict=True)], axis=1)
            ids, sources, tokens = (table[name].to_pylist() for name in ("id", "source", "tokens"))
            stats = replace(ScoringStats(**json.loads(table.schema.metadata[b"iprox"])), contraction_flops=0.0)
            kept = columns if by_example else ()
            supervised = supervised_column(table)
            yield (
                scores_table(ids, sources, tokens, of_tasks, list(queries), examples=kept, supervised=supervised),
                stats,
            )
            if progress is not None:
                progress(len(table))


def _of_mean(features: Tensor) -> np.ndarray:
    """Return the weights ‖f_v‖/V‖f̄‖ that combine cosines with features [V, D] into the cosine with their mean."""
    mean = features.mean(0).norm()
    norms = features.norm(dim=1) / mean if mean > 0 else torch.ones(len(features))
    return norms.double().cpu().numpy() / len(features)


def unit_gradients(table: pa.Table) -> Tensor:
    """The normalized features of a window, float16 [N, D]; a copy, as torch has no read-only tensors."""
    column = table["gradient"].chunk(0)
    return torch.from_numpy(column.flatten().to_numpy().reshape(len(column), -1).copy())


def _mapped(file: Path) -> pa.Table:
    return pa.ipc.open_file(pa.memory_map(str(file))).read_all()


def _counts(file: Path) -> ScoringStats:
    return ScoringStats(**json.loads(_mapped(file).schema.metadata[b"iprox"]))
