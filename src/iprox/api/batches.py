"""Influence for models other than language models: batches of DataLoaders and any loss."""

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
    """Return the number of batches; None if the data set has no length."""
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
    """Score the batches of a DataLoader. Rows get numbers as ids and have no token counts.

    Args:
        settings: how influence is scored.
        checkpoints: loaded models.
        pool: candidates.
        validation: validation batches by task.
        sample: batches to measure curvature on, or None.
        metadata: metadata of the table.
        advance: function called with the number of batches done.
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
            assert losses is not None  # all gradient estimators return them
            # An example without a supervised token has no score, rather than a score of 0.
            part = part.double().masked_fill(~examples_with_loss(batch, losses)[:, None], torch.nan)
            parts.append(part.cpu())
            advance(1)
        scores = torch.cat(parts).numpy()
        ids = [f"row-{i:08d}" for i in range(len(scores))]
        tables.append(scores_table(ids, [None] * len(ids), [0] * len(ids), scorer.of_tasks(scores), scorer.tasks))
    return combine(tables, job.learning_rates, metadata=metadata)
