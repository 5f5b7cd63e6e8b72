"""Stream a pool through a scorer: window by window, so that memory does not grow with the pool."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn
from torch._dynamo.exc import TorchDynamoException
from transformers import PreTrainedModel

from iprox.data import Batch, ChatEncoder, Encoded, Example, iter_batches
from iprox.influence.estimators import BatchScorer
from iprox.influence.gradient_free import Corpus, RowScorer
from iprox.influence.scores import scores_table
from iprox.influence.scoring import ScoringSettings, ScoringStats, build_scorer
from iprox.models.compiled import compile_layers, uncompile_layers, why_not_compiled
from iprox.models.loss import LossFn, causal_lm_losses
from iprox.models.memory import RELEASE_EVERY, out_of_memory, release_memory
from iprox.models.optimizer_state import AdamState

Window = list[Example]
ScoredWindow = tuple[pa.Table, ScoringStats]


def fitting_scorer(
    model: nn.Module | None,
    validation: Mapping[str, Sequence[Encoded]],
    pad_id: int,
    settings: ScoringSettings,
    target: nn.Module | None = None,
    sample: Sequence[Encoded] = (),
    corpus: Corpus | None = None,
    loss_fn: LossFn = causal_lm_losses,
    adam: AdamState | None = None,
) -> tuple[BatchScorer | RowScorer, ScoringSettings]:
    """`build_scorer` with batches halved until validation gradients fit in memory.

    Returns:
        The scorer, and the settings with the `batch_tokens` that fitted.
    """
    least = max((len(example.input_ids) for rows in validation.values() for example in rows), default=1)
    while True:
        try:
            scorer = build_scorer(model, validation, pad_id, settings, loss_fn, target, sample, corpus, adam)
            return scorer, settings
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory(error) or settings.batch_tokens <= least:
                raise
        # Outside the handler: its traceback holds on to what did not fit.
        release_memory()
        settings = replace(settings, batch_tokens=settings.batch_tokens // 2)


@dataclass(slots=True)
class WindowScorer:
    """Scores windows of examples: what one worker holds.

    Attributes:
        scorer: from `build_scorer`.
        encoder: makes tokens and labels.
        pad_id: token id of the padding.
        settings: how to score; its `batch_tokens` are halved whenever a batch does not fit in memory.
        uncompiled: why the model does not run compiled although the settings ask for it.
    """

    scorer: BatchScorer | RowScorer
    encoder: ChatEncoder
    pad_id: int
    settings: ScoringSettings
    uncompiled: str = ""

    def __call__(self, window: Window, progress: Callable[[int], None] | None = None) -> ScoredWindow:
        """Score a window.

        Args:
            window: examples.
            progress: called with the number of rows done.

        Returns:
            A scores table with one row an example, in order, and what was read.

        Raises:
            FloatingPointError: a score is not finite (the example is named).
        """
        device = self.scorer.device
        encoded = self.encoder.encode(window)
        scores = np.full((len(window), sum(self.scorer.widths)), np.nan)
        for number, batch in enumerate(iter_batches(encoded, self.settings.batch_tokens, self.pad_id)):
            if number % RELEASE_EVERY == 0:
                release_memory()
            scores[batch.indices] = self._fitting(batch.to(device)).double().cpu().numpy()
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
        ids, sources = [example.id for example in window], [example.source for example in window]
        scored = sum(length for length, example in zip(lengths, encoded, strict=True) if example.supervised)
        stats = ScoringStats(
            rows=len(window),
            unscored=empty,
            tokens=sum(lengths),
            supervised=sum(example.supervised for example in encoded),
            truncated=sum(example.truncated for example in encoded),
            contraction_flops=scored * self.scorer.contraction_flops,
            query_kept=min(self.scorer.kept.values()),
            uncompiled=self.uncompiled,
            batch_tokens=self.settings.batch_tokens,
        )
        columns = np.split(scores, np.cumsum(self.scorer.widths)[:-1], axis=1)
        means = np.stack([part.mean(axis=1) for part in columns], axis=1)
        by_example = columns if self.settings.aggregation.by_example else ()
        return scores_table(ids, sources, lengths, means, self.scorer.tasks, examples=by_example), stats

    def _fitting(self, batch: Batch) -> Tensor:
        """Scores of a batch [B, tasks], in halves where it does not fit in memory; later batches are then smaller."""
        if len(batch.indices) == 1 or batch.input_ids.numel() <= self.settings.batch_tokens:
            try:
                return self.scorer(batch)[0]
            except (MemoryError, RuntimeError) as error:
                if not out_of_memory(error) or len(batch.indices) == 1:
                    raise
            release_memory()
            self.settings = replace(self.settings, batch_tokens=max(1, self.settings.batch_tokens // 2))
        return torch.cat([self._fitting(half) for half in batch.halves()])


def compile_scorer(scorer: BatchScorer | RowScorer, trial: Batch) -> str:
    """Have a scorer's model run compiled from now on.

    Args:
        scorer: whose model is compiled in place.
        trial: a batch that is scored to see whether it works.

    Returns:
        Why it cannot be; empty where it can. The model is then as it was.
    """
    if scorer.model is None:
        return ""  # nothing runs that could be
    reason = why_not_compiled(scorer.model)
    if reason is not None:
        return reason
    assert isinstance(scorer.model, PreTrainedModel)
    compile_layers(scorer.model)
    try:
        scorer(trial)
    except TorchDynamoException as error:  # no compiler, or code it cannot follow
        uncompile_layers(scorer.model)
        return " ".join(str(error).split())[:300]
    return ""


def windows_of(pool: Iterable[Example], size: int, skip: int = 0) -> Iterator[Window]:
    """Cut a stream of examples into windows, leaving out the first `skip` windows."""
    rows = itertools.islice(iter(pool), skip * size, None)
    while window := list(itertools.islice(rows, size)):
        yield window


# Scores windows, in order: (make a worker's scorer, windows, progress) -> scored windows.
Engine = Callable[[Callable[[], WindowScorer], Iterator[Window], Callable[[int], None] | None], Iterator[ScoredWindow]]


def local_engine(
    make: Callable[[], WindowScorer], windows: Iterator[Window], progress: Callable[[int], None] | None = None
) -> Iterator[ScoredWindow]:
    """Score in this process, one window after the other."""
    scorer = make()
    for window in windows:
        yield scorer(window, progress)


def score_windows(
    scorer: BatchScorer | RowScorer,
    pool: Iterable[Example],
    encoder: ChatEncoder,
    pad_id: int,
    settings: ScoringSettings,
    progress: Callable[[int], None] | None = None,
) -> Iterator[ScoredWindow]:
    """Scores of a pool in this process, one table a window with what was read for it, in pool order."""
    worker = WindowScorer(scorer, encoder, pad_id, settings)
    return local_engine(lambda: worker, windows_of(pool, settings.window), progress)
