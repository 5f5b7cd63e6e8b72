"""Influence for models other than language models: batches of torch data sets and any loss."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Sized
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from accelerate.utils import send_to_device
from torch import nn
from torch.utils.data import DataLoader, RandomSampler, SequentialSampler, Subset

from iprox.aggregation import combine
from iprox.data.sampling import draw_rows
from iprox.errors import InputError
from iprox.influence.job import Checkpoint, Job
from iprox.models.layers import influence_layers
from iprox.models.loss import LossFn, causal_lm_losses, examples_with_loss
from iprox.models.observe import check_examples_apart
from iprox.models.preference import PreferenceLoss
from iprox.progress import Advance
from iprox.scores import scores_table
from iprox.settings import InfluenceSection

# Examples per batch of a data set that is given without a DataLoader.
BATCH_SIZE = 32


class Batches:
    """The batches of a data set or DataLoader in order, on a device.

    Args:
        examples: DataLoader that does not shuffle, torch data set, or list of examples.
        name: what they are, for messages.
        device: device that tensors are moved to.

    Raises:
        InputError: the DataLoader shuffles, or it is no data set.
    """

    def __init__(self, examples: Any, name: str, device: torch.device) -> None:
        readable = hasattr(examples, "__getitem__") or hasattr(examples, "__iter__")
        if isinstance(examples, str | Mapping) or not readable:
            raise InputError(f"{name}: expected a torch data set or a DataLoader, not a {type(examples).__name__}")
        self.loader = examples if isinstance(examples, DataLoader) else DataLoader(examples, batch_size=BATCH_SIZE)
        self.device = device
        samplers = (self.loader.sampler, getattr(self.loader.batch_sampler, "sampler", None))
        if any(isinstance(each, RandomSampler) for each in samplers):
            raise InputError(f"{name}: the DataLoader shuffles, so its rows cannot be identified; use shuffle=False")

    def __iter__(self) -> Iterator[Any]:
        for batch in self.loader:
            yield send_to_device(batch, self.device)

    @property
    def count(self) -> int | None:
        """Number of batches; None if the data set has no length."""
        try:
            return len(self.loader)
        except TypeError:
            return None

    def sample(self, count: int, seed: int) -> Batches | None:
        """Return batches of examples drawn at random; None where examples cannot be read by number."""
        loader, data = self.loader, self.loader.dataset
        if not isinstance(data, Sized) or not isinstance(loader.sampler, SequentialSampler) or not loader.batch_size:
            return None
        rows = Subset(data, draw_rows("curvature", seed, len(data), count))
        drawn = DataLoader(rows, loader.batch_size, collate_fn=loader.collate_fn)
        return Batches(drawn, "pool", self.device)


def of_batches(examples: Any, loss_fn: LossFn) -> bool:
    """Return whether examples are read as batches, not as text: with a loss of one's own, or from a DataLoader."""
    text = loss_fn is causal_lm_losses or isinstance(loss_fn, PreferenceLoss)
    return not text or isinstance(examples, DataLoader)


def score_batches(
    settings: InfluenceSection,
    checkpoints: Sequence[Checkpoint],
    pool: Batches,
    validation: Mapping[str, Any],
    sample: Any,
    metadata: Mapping[str, object],
    advance: Advance,
    how: Mapping[str, Any],
) -> pa.Table:
    """Score the examples of a data set. Rows get numbers as ids and have no token counts.

    Args:
        settings: how influence is scored.
        checkpoints: loaded models.
        pool: candidates.
        validation: validation examples by task.
        sample: examples to measure curvature on; None draws some from the pool.
        metadata: metadata of the table.
        advance: function called with the number of batches done.
        how: other attributes of the job.

    Raises:
        InputError: the settings need text, or a curvature sample that is not given.
    """
    if not settings.traits.gradients:
        raise InputError(f"{settings.estimator} reads tokens: give examples, not a DataLoader")
    if settings.traits.curvature:
        count, seed = settings.curvature_examples, how["seed"]
        sample = pool.sample(count, seed) if sample is None else Batches(sample, "curvature_sample", pool.device)
        if sample is None:
            raise InputError(
                f"{settings.estimator}: examples to measure curvature on cannot be drawn from this pool (a stream, or "
                "a DataLoader with its own sampler); give curvature_sample=, or estimator='tracin'"
            )
    sets = {task: Batches(examples, task, pool.device) for task, examples in validation.items()}
    sample = list(sample or ())
    job = Job(settings=settings, checkpoints=checkpoints, validation=sets, encoder=None, sample=sample, **how)
    tables = []
    first, model, loss_fn = next(iter(pool), None), checkpoints[0].model, how["loss_fn"]
    if first is None:
        raise InputError("pool: no examples in it")
    if loss_fn is not causal_lm_losses:
        assert isinstance(model, nn.Module)
        check_examples_apart(model, influence_layers(model), lambda: loss_fn(model, first))
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
        examples = np.split(scores, np.cumsum(scorer.widths)[:-1], axis=1) if scorer.by_example else ()
        of_tasks = scorer.of_tasks(scores)
        tables.append(scores_table(ids, [None] * len(ids), [0] * len(ids), of_tasks, scorer.tasks, examples=examples))
    return combine(tables, job.learning_rates, metadata=metadata)
