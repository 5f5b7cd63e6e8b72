"""The stage that measures the curvature of each checkpoint of the target, for all stages that score."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

from iprox.data import Pool
from iprox.errors import InputError
from iprox.influence.estimators.base import Inputs
from iprox.influence.estimators.ekfac import KroneckerInfluence
from iprox.influence.job import Checkpoint
from iprox.kronecker.eigen import curvature_groups
from iprox.kronecker.kept import discard_curvature, keep_curvature
from iprox.models import flops
from iprox.models.layers import influence_layers
from iprox.records import StageRecord
from iprox.session import Session
from iprox.settings import InfluenceSection
from iprox.stages.scoring import job_of


def measure_curvature(
    session: Session, models: Sequence[str], pool: Pool, folders: Sequence[Path], settings: InfluenceSection
) -> StageRecord:
    """Measure the curvature of each model on the same rows of the pool, and keep it in the model's folder.

    Args:
        models: folders of the target's checkpoints.
        pool: the pool that the rows are drawn from.
        folders: folder for each model's curvature.
        settings: how influence is scored; the estimator is `kfac` or `ekfac`.
    """
    job = job_of(session, settings, [Checkpoint(model) for model in models], {}, session.encoder(*models), pool)
    estimator = job.estimator
    assert isinstance(estimator, KroneckerInfluence)
    readings = 2 if estimator.corrected else 1
    target = session.skeleton(models[0])
    readings *= len(models) * len(curvature_groups(influence_layers(target)))
    check_room(
        folders[0].parent.parent, 4 * len(models) * sum(m**2 + n**2 + m * n for m, n, _ in flops.layers_of(target))
    )
    for folder in folders:
        discard_curvature(folder)
    shutil.rmtree(folders[0].parent, ignore_errors=True)  # what a killed start left
    with session.reporter.bar("curvature", readings * len(job.sample), "rows") as progress:

        def keep(inputs: Inputs, folder: Path) -> None:
            counted = replace(inputs, sample=_Counted(inputs.sample, progress))
            keep_curvature(estimator.measured(counted, influence_layers(inputs.source)), folder)

        for number, folder in enumerate(folders):
            job.made(partial(keep, folder=folder), number)
    spent = len(models) * estimator.curvature_flops(target, job.read)
    tokens = readings * job.read.curvature_tokens
    return {"tokens": tokens, "flops": spent, "rows": len(job.sample), "read": asdict(job.read)}


def check_room(folder: Path, needed: int) -> None:
    """Refuse a curvature that the disk has no room for.

    Raises:
        InputError: there are fewer bytes left than are needed.
    """
    left = shutil.disk_usage(folder).free
    if needed > left:
        raise InputError(
            f"{folder}: the curvature takes {needed / 1e9:,.0f} GB while the run lasts, and the disk has "
            f"{left / 1e9:,.0f} GB left; choose an output on another disk, or set influence.estimator to tracin"
        )


class _Counted(Sequence[Any]):
    """Batches that report their rows as they are read.

    A batch counts by its tokens, as the longest rows come first, so that the rate stays the same.
    """

    def __init__(self, batches: Sequence[Any], progress: Callable[[int], None]) -> None:
        self._batches, self._progress = batches, progress

    def __getitem__(self, index: Any) -> Any:
        return self._batches[index]

    def __iter__(self) -> Iterator[Any]:
        tokens = [int(batch.lengths.sum()) for batch in self._batches]
        rows = sum(len(batch.indices) for batch in self._batches)
        total = sum(tokens)
        done = [rows * count // total for count in accumulate(tokens)]
        for batch, before, after in zip(self._batches, [0, *done], done, strict=False):
            yield batch
            self._progress(after - before)

    def __len__(self) -> int:
        return len(self._batches)
