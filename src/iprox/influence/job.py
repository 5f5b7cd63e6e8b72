"""A scoring job: settings, checkpoints and validation examples, from which it makes the scorer of each checkpoint.

Everything that scores goes through it: the score stage, `iprox.score`, audits, held-out fidelity and attribution.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import torch
from torch import nn

from iprox.aggregation import combine
from iprox.data import ChatEncoder, Encoded, Example, Pool, iter_batches, on_device
from iprox.data.sampling import draw_rows
from iprox.engine.stream import (
    WINDOW,
    Engine,
    ScoringStats,
    WindowWorker,
    compile_model,
    fitting,
    local_engine,
    windows_of,
)
from iprox.errors import InputError
from iprox.influence.baselines import Corpus
from iprox.influence.estimators.base import Estimator, Inputs, QueryTokens
from iprox.influence.estimators.registry import estimator_of
from iprox.influence.scorer import Scorer
from iprox.kronecker.kept import KeptCurvature, is_kept
from iprox.models.loading import load_model
from iprox.models.loss import LossFn, causal_lm_losses
from iprox.models.optimizer_state import load_adam_state
from iprox.settings import InfluenceSection

T = TypeVar("T")
Load = Callable[[str], nn.Module]


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A model to score on, loaded or in a folder.

    Attributes:
        model: what candidates are scored on.
        learning_rate: η, which weighs its scores.
        target: the target of a proxy that validation gradients are taken on; None takes them on `model`.
        optimizer: the folder of the warm-up's checkpoint that holds the optimizer's state, for the estimator `less`.
        curvature: the folder in which a run keeps the curvature of the model that validation gradients are taken on;
            if it is empty, the curvature is measured.
    """

    model: nn.Module | str
    learning_rate: float = 1.0
    target: nn.Module | str | None = None
    optimizer: str | Path | None = None
    curvature: Path | None = None

    @property
    def kept(self) -> Path | None:
        """The folder of the curvature, if it is there already."""
        return self.curvature if self.curvature is not None and is_kept(self.curvature) else None

    @property
    def read_by(self) -> list[str]:
        """The folders of all that read validation examples; the model is first."""
        return [each for each in (self.model, self.target) if isinstance(each, str)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What is scored, and how (see `of`).

    Attributes:
        settings: how influence is scored.
        checkpoints: where.
        validation: encoded validation examples by task; or batches, of models that are no language models.
        encoder: makes tokens and labels; None where data are batches.
        sample: encoded examples of the pool that curvature is measured on; or batches.
        corpus: term counts of the pool.
        seed: seed for drawn labels and numbers.
        batch_tokens: largest rows × longest row of a batch.
        compile: run the model compiled; pays for itself after some ten thousand rows.
        load: loads a model from its folder.
        loss_fn: per-example losses of a model that is no language model.
    """

    settings: InfluenceSection
    checkpoints: Sequence[Checkpoint]
    validation: Mapping[str, Any]
    encoder: ChatEncoder | None
    sample: Sequence[Any] = ()
    corpus: Corpus | None = None
    seed: int = 0
    batch_tokens: int = 4096
    compile: bool = False
    load: Load = load_model
    loss_fn: LossFn = causal_lm_losses

    @classmethod
    def of(
        cls,
        settings: InfluenceSection,
        checkpoints: Sequence[Checkpoint],
        validation: Mapping[str, Sequence[Encoded]],
        encoder: ChatEncoder,
        pool: Pool,
        *,
        seed: int = 0,
        sample: Sequence[Encoded] | None = None,
        counted: Callable[[int], None] | None = None,
        **how: Any,
    ) -> Job:
        """Make the job of scoring examples, with what the estimator needs of the pool.

        Args:
            settings: how influence is scored.
            checkpoints: where.
            validation: encoded validation examples by task.
            encoder: makes tokens and labels.
            pool: what curvature is measured on, and whose terms are counted.
            seed: seed for the curvature sample, drawn labels and numbers.
            sample: what curvature is measured on instead.
            counted: called with the number of rows whose terms are counted.
            **how: other attributes of the job.

        Raises:
            InputError: a task, or the curvature sample, has no example with a supervised token.
        """
        for task, rows in validation.items():
            if settings.traits.by_task and not any(row.supervised for row in rows):
                raise InputError(f"validation task {task!r} has no example with a supervised token")
        measured = settings.traits.curvature and not all(each.kept for each in checkpoints)
        if not measured:
            sample = ()
        elif sample is None:
            rows = draw_rows("curvature", seed, pool.scan().rows, settings.curvature_examples)
            sample = encoder.encode(pool.take(rows))
        if measured and not any(row.supervised for row in sample):
            raise InputError(
                f"{settings.estimator}: the sample for the curvature has no example with a supervised token"
            )
        corpus = Corpus.of_pool(pool, encoder, counted) if settings.traits.corpus else None
        return cls(
            settings=settings,
            checkpoints=tuple(checkpoints),
            validation=validation,
            encoder=encoder,
            sample=sample,
            corpus=corpus,
            seed=seed,
            **how,
        )

    @property
    def estimator(self) -> Estimator:
        """What makes the scorers."""
        return estimator_of(self.settings)

    @property
    def learning_rates(self) -> list[float]:
        """η of each checkpoint."""
        return [each.learning_rate for each in self.checkpoints]

    @property
    def read(self) -> QueryTokens:
        """What is read at each checkpoint before the first candidate is scored."""
        return QueryTokens.of(self.validation, self.sample)

    def made(self, make: Callable[[Inputs], T], number: int = 0) -> tuple[T, int]:
        """Make something from a checkpoint's inputs, in batches halved until its validation gradients fit in memory.

        Returns:
            What was made, and the `batch_tokens` that fitted.
        """
        checkpoint, traits = self.checkpoints[number], self.settings.traits
        target = None if checkpoint.target is None else self._loaded(checkpoint.target)
        model = self._loaded(checkpoint.model) if traits.model else None
        device = torch.device("cpu") if model is None else next((target or model).parameters()).device
        optimizer = load_adam_state(checkpoint.optimizer, device) if checkpoint.optimizer is not None else None
        kept = None if checkpoint.kept is None else KeptCurvature(checkpoint.kept, device)

        def from_batches(batch_tokens: int) -> T:
            def batches(rows: Any) -> Iterable[Any]:
                return rows if self.encoder is None else on_device(iter_batches(rows, batch_tokens, 0), device)

            inputs = Inputs(
                settings=self.settings,
                model=model,
                target=target,
                validation={task: batches(rows) for task, rows in self.validation.items()},
                sample=list(batches(self.sample)),
                curvature=kept,
                optimizer=optimizer,
                corpus=self.corpus,
                seed=self.seed,
                loss_fn=self.loss_fn,
            )
            return make(inputs)

        if self.encoder is None:
            return from_batches(self.batch_tokens), self.batch_tokens
        least = max((len(row.input_ids) for rows in self.validation.values() for row in rows), default=1)
        return fitting(from_batches, self.batch_tokens, least)

    def scorer(self, number: int = 0) -> tuple[Scorer, int]:
        """Make the scorer of a checkpoint. Returns it, and the `batch_tokens` that fitted."""
        return self.made(self.estimator.scorer, number)

    def worker(self, number: int = 0) -> WindowWorker:
        """Make what scores windows at a checkpoint; also in another process."""
        assert self.encoder is not None
        scorer, batch_tokens = self.scorer(number)
        uncompiled = ""
        if self.compile:
            few = next(iter(self.validation.values()))
            trial = next(iter_batches(few, batch_tokens, 0)).to(scorer.device)
            uncompiled = compile_model(scorer.model, scorer, trial)
        return WindowWorker(scorer, self.encoder, batch_tokens, uncompiled)

    @property
    def workers(self) -> list[Callable[[], WindowWorker]]:
        """By checkpoint, what makes its worker."""
        return [functools.partial(self.worker, number) for number in range(len(self.checkpoints))]

    def score(
        self,
        pool: Iterable[Example],
        *,
        metadata: Mapping[str, object] | None = None,
        progress: Callable[[int], None] | None = None,
        engine: Engine = local_engine,
    ) -> tuple[pa.Table, list[ScoringStats]]:
        """Score examples at every checkpoint, in memory.

        Args:
            pool: examples; iterated once per checkpoint.
            metadata: kept in the table.
            progress: called with the number of rows done at a checkpoint.
            engine: where windows are scored.

        Returns:
            The scores table, one row per example in order; and by checkpoint what was read and done.
        """
        tables, stats = [], []
        for make in self.workers:
            scored = list(engine(make, windows_of(pool, WINDOW), progress))
            tables.append(pa.concat_tables([table for table, _ in scored]))
            total = ScoringStats()
            for _, counted in scored:
                total.add(counted)
            stats.append(total)
        return combine(tables, self.learning_rates, metadata=metadata), stats

    def _loaded(self, model: nn.Module | str) -> nn.Module:
        return self.load(model) if isinstance(model, str) else model
