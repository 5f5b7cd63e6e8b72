"""Influence of what is no text: the batches of DataLoaders, for any model and loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import torch
from torch.utils.data import DataLoader

from iprox.aggregation import combine
from iprox.api.examples import in_order
from iprox.errors import InputError
from iprox.influence.job import Checkpoint, Job
from iprox.models.loss import examples_with_loss
from iprox.progress import Advance
from iprox.scores import scores_table
from iprox.settings import InfluenceSection


def count_batches(pool: DataLoader) -> int | None:
    """Return the number of batches; None where the data set does not have one."""
    try:
        return len(in_order(pool, "pool"))
    except TypeError:
        return None


def score_batches(
    settings: InfluenceSection,
    checkpoints: Sequence[Checkpoint],
    pool: DataLoader,
    validation: Mapping[str, DataLoader],
    sample: Any,
    metadata: Mapping[str, object],
    advance: Advance,
    how: Mapping[str, Any],
) -> pa.Table:
    """Score a DataLoader's batches: no text, so rows are numbered and have no token count.

    Args:
        settings: how influence is scored.
        checkpoints: loaded models.
        pool: candidates.
        validation: validation batches by task.
        sample: batches that curvature is measured on, or None.
        metadata: kept in the table.
        advance: called with the number of batches done.
        how: other attributes of the job.

    Raises:
        InputError: the settings need examples.
    """
    if not settings.traits.gradients:
        raise InputError(f"{settings.estimator} reads tokens: give examples, not a DataLoader")
    if settings.by_example:
        raise InputError("scores by validation example need examples, not a DataLoader's batches")
    sample = list(sample or ())
    if settings.traits.curvature and not sample:
        raise InputError(f"{settings.estimator} on a DataLoader needs curvature_sample=, a list of batches")
    job = Job(settings=settings, checkpoints=checkpoints, validation=validation, encoder=None, sample=sample, **how)
    tables = []
    for number in range(len(checkpoints)):
        scorer, _ = job.scorer(number)
        parts = []
        for batch in pool:
            part, losses = scorer(batch)
            assert losses is not None  # gradients, and baselines that run the model, have them
            # Without a supervised token an example has no score, not one of 0.
            part = part.double().masked_fill(~examples_with_loss(batch, losses)[:, None], torch.nan)
            parts.append(part.cpu())
            advance(1)
        scores = torch.cat(parts).numpy()
        ids = [f"row-{i:08d}" for i in range(len(scores))]
        tables.append(scores_table(ids, [None] * len(ids), [0] * len(ids), scorer.of_tasks(scores), scorer.tasks))
    return combine(tables, job.learning_rates, metadata=metadata)
