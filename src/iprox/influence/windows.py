"""Stream a pool through a scorer: window by window, so that memory does not grow with the pool."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Protocol

import numpy as np
import pyarrow as pa
from torch import nn
from torch._dynamo.exc import TorchDynamoException
from transformers import PreTrainedModel

from iprox.data import Batch, ChatEncoder, Encoded, Example
from iprox.influence.estimators import BatchScorer
from iprox.influence.gradient_free import Corpus, RowScorer
from iprox.influence.rows import RowRunner, fitting
from iprox.influence.scores import scores_table
from iprox.influence.scoring import ScoringSettings, ScoringStats, build_scorer
from iprox.models.compiled import compile_layers, uncompile_layers, why_not_compiled
from iprox.models.loss import LossFn, causal_lm_losses
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

    def make(batch_tokens: int) -> BatchScorer | RowScorer:
        smaller = replace(settings, batch_tokens=batch_tokens)
        return build_scorer(model, validation, pad_id, smaller, loss_fn, target, sample, corpus, adam)

    scorer, batch_tokens = fitting(make, settings.batch_tokens, least)
    return scorer, replace(settings, batch_tokens=batch_tokens)


class WindowWorker(Protocol):
    """What one worker holds: makes the rows of a table of a window of examples."""

    encoder: ChatEncoder

    def __call__(
        self, window: Window, progress: Callable[[int], None] | None = None, encoded: list[Encoded] | None = None
    ) -> ScoredWindow:
        """A table with one row an example, in order, and what was read.

        Args:
            window: examples.
            progress: called with the number of rows done.
            encoded: their tokens, where they are ready.
        """
        ...


class WindowScorer:
    """Scores windows of examples.

    Args:
        scorer: from `build_scorer`.
        encoder: makes tokens and labels.
        pad_id: token id of the padding.
        settings: how to score; batches are halved whenever one does not fit in memory.
        uncompiled: why the model does not run compiled although the settings ask for it.
    """

    def __init__(
        self,
        scorer: BatchScorer | RowScorer,
        encoder: ChatEncoder,
        pad_id: int,
        settings: ScoringSettings,
        uncompiled: str = "",
    ) -> None:
        self.scorer, self.encoder, self.settings, self.uncompiled = scorer, encoder, settings, uncompiled
        self._rows = RowRunner(
            lambda batch: scorer(batch)[0].double(), scorer.device, pad_id, settings.batch_tokens, "score"
        )

    def __call__(
        self, window: Window, progress: Callable[[int], None] | None = None, encoded: list[Encoded] | None = None
    ) -> ScoredWindow:
        """A scores table of a window (see `WindowWorker`).

        Raises:
            FloatingPointError: a score is not finite (the example is named).
        """
        encoded = self.encoder.encode(window) if encoded is None else encoded
        scores = np.full((len(window), sum(self.scorer.widths)), np.nan)
        self._rows(window, encoded, scores, progress)
        stats = ScoringStats.of(encoded)
        scored = [len(example.input_ids) for example in encoded if example.supervised]
        stats.contraction_flops = sum(scored) * self.scorer.contraction_flops + self.scorer.norm_flops(scored)
        stats.contraction_flops += len(scored) * self.scorer.example_flops
        stats.query_kept = min(self.scorer.kept.values())
        stats.uncompiled = self.uncompiled
        stats.batch_tokens = self._rows.batch_tokens
        columns = np.split(scores, np.cumsum(self.scorer.widths)[:-1], axis=1)
        parts = zip(columns, self.scorer.weights, strict=True)
        of_tasks = np.stack([(part * weights).sum(axis=1) for part, weights in parts], axis=1)
        by_example = columns if self.settings.aggregation.by_example else ()
        ids, sources = [example.id for example in window], [example.source for example in window]
        lengths = [len(example.input_ids) for example in encoded]
        supervised = [example.supervised for example in encoded]
        table = scores_table(
            ids, sources, lengths, of_tasks, self.scorer.tasks, examples=by_example, supervised=supervised
        )
        return table, stats


def compile_model(model: nn.Module | None, run: Callable[[Batch], object], trial: Batch) -> str:
    """Have a model run compiled from now on.

    Args:
        model: compiled in place.
        run: runs it.
        trial: a batch that is scored to see whether it works.

    Returns:
        Why it cannot be; empty where it can. The model is then as it was.
    """
    if model is None:
        return ""  # nothing runs that could be
    reason = why_not_compiled(model)
    if reason is not None:
        return reason
    assert isinstance(model, PreTrainedModel)
    compile_layers(model)
    try:
        run(trial)
    except TorchDynamoException as error:  # no compiler, or code it cannot follow
        uncompile_layers(model)
        return " ".join(str(error).split())[:300]
    return ""


def windows_of(pool: Iterable[Example], size: int, leave_out: Container[int] = ()) -> Iterator[Window]:
    """Cut a stream of examples into windows, and leave out those of some numbers, counted from 0."""
    rows = iter(pool)
    for number in itertools.count():
        window = list(itertools.islice(rows, size))
        if not window:
            return
        if number not in leave_out:
            yield window


# Works through windows, in order: (make a worker, windows, progress) -> tables.
Engine = Callable[[Callable[[], WindowWorker], Iterator[Window], Callable[[int], None] | None], Iterator[ScoredWindow]]


def local_engine(
    make: Callable[[], WindowWorker], windows: Iterator[Window], progress: Callable[[int], None] | None = None
) -> Iterator[ScoredWindow]:
    """Work in this process, one window after the other."""
    work = make()
    for window in windows:
        yield work(window, progress)


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
