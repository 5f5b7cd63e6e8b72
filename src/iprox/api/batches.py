"""Influence of what is no text: the batches of DataLoaders, for any model and loss."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyarrow as pa
import torch
from torch import nn
from torch.utils.data import DataLoader

from iprox.api.examples import in_order
from iprox.errors import InputError
from iprox.influence.estimators import BatchScorer
from iprox.influence.scores import scores_table
from iprox.influence.scoring import ScoringSettings, scorer_of_batches
from iprox.models.loss import LossFn, examples_with_loss
from iprox.models.optimizer_state import AdamState
from iprox.progress import Advance
from iprox.settings import CURVED, GRADIENT_FREE


def count_batches(pool: DataLoader) -> int | None:
    """How many batches there are; None where the data set cannot say."""
    try:
        return len(in_order(pool, "pool"))
    except TypeError:
        return None


def scorer_for_batches(
    model: nn.Module,
    validation: Mapping[str, DataLoader],
    settings: ScoringSettings,
    loss_fn: LossFn,
    target: nn.Module | None,
    sample: list[Any] | None,
    adam: AdamState | None,
) -> BatchScorer:
    """What scores a DataLoader's batches, if the settings are of any."""
    if settings.estimator in GRADIENT_FREE:
        raise InputError(f"{settings.estimator} reads tokens: give examples, not a DataLoader")
    if settings.aggregation.by_example:
        raise InputError("scores by validation example are of examples, not of a DataLoader's batches")
    if settings.estimator in CURVED and not sample:
        raise InputError(f"{settings.estimator} on a DataLoader needs curvature_sample=, a list of batches")
    return scorer_of_batches(model, validation, settings, loss_fn, target, sample or (), adam)


def score_batches(scorer: BatchScorer, pool: DataLoader, advance: Advance) -> pa.Table:
    """Scores of a DataLoader's batches: no text, so rows are numbered and have no token count."""
    parts = []
    for batch in pool:
        part, losses = scorer(batch)
        # Without a supervised token an example has no score, not one of 0.
        part = part.double().masked_fill(~examples_with_loss(batch, losses)[:, None], torch.nan)
        parts.append(part.cpu())
        advance(1)
    scores = torch.cat(parts).numpy()
    count = len(scores)
    return scores_table([f"row-{i:08d}" for i in range(count)], [None] * count, [0] * count, scores, scorer.tasks)
