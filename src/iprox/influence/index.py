"""An index: the projected gradients of a pool on disk, written once and queried many times.

A folder with `index.json` (what it is of) and one Arrow file a window, memory-mapped when read, with the columns

    id, source, tokens, supervised    as in a scores table
    norm                              float32, ‖f(z)‖; null where an example has no supervised token
    gradient                          float16 [D], f(z)/‖f(z)‖ (a raw gradient would underflow in half precision)

Stopped at any point and started again it goes on after the last window, and gives the same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from iprox.data import ChatEncoder, Encoded, Example
from iprox.errors import InputError
from iprox.files import replacing, write_text
from iprox.influence.estimators import ApartQuery, Normalize
from iprox.influence.projector import GradientProjector
from iprox.influence.rows import RowRunner
from iprox.influence.scores import SUPERVISED, scores_table, supervised_column
from iprox.influence.scoring import ScoringStats
from iprox.influence.shards import IDENTITY, claim
from iprox.influence.windows import Engine, ScoredWindow, Window, local_engine, windows_of
from iprox.progress import Advance

DESCRIPTION = "index.json"


class WindowProjector:
    """Projects windows of examples (a `WindowWorker`).

    Args:
        projector: what projects.
        encoder: makes tokens and labels.
        pad_id: token id of the padding.
        batch_tokens: largest rows × longest row of a batch; halved whenever one does not fit in memory.
        uncompiled: why the model does not run compiled although asked to.
    """

    def __init__(
        self, projector: GradientProjector, encoder: ChatEncoder, pad_id: int, batch_tokens: int, uncompiled: str = ""
    ) -> None:
        self.projector, self.encoder, self.uncompiled = projector, encoder, uncompiled
        self._rows = RowRunner(lambda b: projector(b).float(), projector.device, pad_id, batch_tokens, "gradient")

    def __call__(
        self, window: Window, progress: Callable[[int], None] | None = None, encoded: list[Encoded] | None = None
    ) -> ScoredWindow:
        """The rows of the index.

        Raises:
            FloatingPointError: a gradient is not finite (the example is named).
        """
        encoded = self.encoder.encode(window) if encoded is None else encoded
        features = np.zeros((len(window), self.projector.dimension), dtype=np.float32)
        self._rows(window, encoded, features, progress)
        norms = np.linalg.norm(features, axis=1)
        features /= np.where(norms > 0, norms, 1)[:, None]
        unscored = np.array([example.supervised == 0 for example in encoded])
        table = pa.table(
            {
                "id": pa.array([example.id for example in window], pa.string()),
                "source": pa.array([example.source for example in window], pa.string()),
                "tokens": pa.array([len(example.input_ids) for example in encoded], pa.int32()),
                SUPERVISED: pa.array([example.supervised for example in encoded], pa.int32()),
                "norm": pa.array(norms, pa.float32(), mask=unscored),
                "gradient": pa.FixedSizeListArray.from_arrays(
                    pa.array(features.astype(np.float16).ravel()), self.projector.dimension
                ),
            }
        )
        stats = ScoringStats.of(encoded)
        scored = sum(len(example.input_ids) for example in encoded if example.supervised)
        stats.contraction_flops = scored * self.projector.flops
        stats.uncompiled, stats.batch_tokens = self.uncompiled, self._rows.batch_tokens
        return table, stats


def write_index(
    make: Callable[[], WindowProjector],
    pool: Iterable[Example],
    folder: Path,
    description: Mapping[str, Any],
    *,
    window: int,
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
            mend = "is not whole; the same `iprox index` command goes on with it" if begun else "is no index"
            raise InputError(f"{folder}: {mend}")
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
        queries: Mapping[str, ApartQuery],
        projector: GradientProjector,
        normalize: Normalize = "none",
        *,
        by_example: bool = False,
        progress: Callable[[int], None] | None = None,
    ) -> Iterator[ScoredWindow]:
        """Scores of its examples, one scores table a window with what had been read for it.

        2D FLOPs and 2D bytes an example and query, so it runs at the speed of the disk or the memory.

        Args:
            queries: by task, from `iprox.influence.scoring.task_queries`.
            projector: of the model, dimension and seed that the index is of.
            normalize: `none`; `cosine` divides by the norms of the features.
            by_example: keep the scores by validation example too.
            progress: called with the number of rows done.
        """
        parts = [projector.project(query).float() for query in queries.values()]
        widths = [len(part) for part in parts]
        Q = torch.cat(parts)
        # A task's own score is of its mean gradient; see `BatchScorer.weights`.
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
    """‖f_v‖/V‖f̄‖ of features [V, D]: what their cosines sum to the cosine with their mean with."""
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
