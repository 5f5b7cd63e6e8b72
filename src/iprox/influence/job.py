"""The scoring job, which makes the scorer of each checkpoint from settings, checkpoints and validation examples.

The score stage, `iprox.score`, audits, held-out fidelity and attribution all use it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import torch
from torch import nn

from iprox.aggregation import combine
from iprox.data import ChatEncoder, Encoded, Example, Pool, iter_batches, on_device
from iprox.data.sampling import draw_rows
from iprox.engine.stream import WindowWorker, compile_model, fitting, local_engine
from iprox.engine.windows import Engine, ScoringStats, Windows
from iprox.errors import InputError
from iprox.influence.baselines import Corpus
from iprox.influence.estimators.base import Estimator, Inputs, QueryTokens
from iprox.influence.estimators.registry import estimator_of
from iprox.influence.scorer import Scorer
from iprox.kronecker.kept import is_kept
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
        model: model that candidates are scored on.
        learning_rate: η, the weight of its scores.
        target: target of a proxy, to take validation gradients on; None takes them on `model`.
        optimizer: folder of the warm-up's checkpoint with the optimizer state, for the estimator `less`.
        curvature: folder for the curvature of the model that validation gradients are taken on. If it is not there, it
            is measured and kept there.
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
        """Folders of the models that read validation examples; `model` is first."""
        return [each for each in (self.model, self.target) if isinstance(each, str)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """The inputs of scoring (see `of`).

    Attributes:
        settings: influence settings.
        checkpoints: checkpoints to score on.
        validation: encoded validation examples by task, or batches for a model that is not a language model.
        encoder: encoder that makes tokens and labels; None if the data are batches.
        sample: encoded examples of the pool to measure curvature on, or batches.
        corpus: term statistics of the pool.
        seed: seed for sampled labels and random scores.
        batch_tokens: largest batch size, rows × longest row.
        compile: whether to compile the model, which pays off after some ten thousand rows.
        load: function that loads a model from its folder.
        loss_fn: per-example losses, for a model that is not a language model.
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
        pool: Pool | None,
        *,
        seed: int = 0,
        sample: Sequence[Encoded] | None = None,
        counted: Callable[[int], None] | None = None,
        **how: Any,
    ) -> Job:
        """Make a job, with the curvature sample or term statistics if the estimator needs them.

        Args:
            settings: influence settings.
            checkpoints: checkpoints to score on.
            validation: encoded validation examples by task.
            encoder: encoder that makes tokens and labels.
            pool: pool for the curvature sample and the term statistics; None for estimators without these.
            seed: seed for the curvature sample, sampled labels and random scores.
            sample: curvature sample to use instead of one from the pool.
            counted: called with the number of rows whose terms are counted.
            **how: other attributes of the job.

        Raises:
            InputError: a task, or the curvature sample, has no example with a supervised token.
        """
        for task, rows in validation.items():
            if settings.traits.by_task and not any(row.supervised for row in rows):
                raise InputError(f"validation task {task!r} has no example with a supervised token")
        kept = bool(checkpoints) and all(each.kept for each in checkpoints)
        measured = settings.traits.curvature and not kept
        if not measured:
            sample = ()
        elif sample is None:
            assert pool is not None
            rows = draw_rows("curvature", seed, pool.scan().rows, settings.curvature_examples)
            sample = encoder.encode(pool.take(rows))
        if measured and not any(row.supervised for row in sample):
            raise InputError(f"{settings.estimator}: the curvature sample has no example with a supervised token")
        corpus = Corpus.of_pool(pool, encoder, counted) if settings.traits.corpus and pool is not None else None
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
        """Estimator that makes the scorers."""
        return estimator_of(self.settings)

    @property
    def learning_rates(self) -> list[float]:
        """η of each checkpoint."""
        return [each.learning_rate for each in self.checkpoints]

    @property
    def read(self) -> QueryTokens:
        """Token counts of what each checkpoint reads before it scores candidates."""
        return QueryTokens.of(self.validation, self.sample)

    def made(self, make: Callable[[Inputs], T], number: int = 0) -> tuple[T, int]:
        """Call a function with a checkpoint's inputs, halving the batches until it does not run out of memory.

        Returns:
            Its result, and the `batch_tokens` that fit.
        """
        checkpoint, traits = self.checkpoints[number], self.settings.traits
        target = None if checkpoint.target is None else self._loaded(checkpoint.target)
        model = self._loaded(checkpoint.model) if traits.model else None
        device = torch.device("cpu") if model is None else next((target or model).parameters()).device
        optimizer = load_adam_state(checkpoint.optimizer, device) if checkpoint.optimizer is not None else None
        if traits.curvature and not len(self.sample) and checkpoint.kept is None:
            raise InputError(f"{checkpoint.curvature}: has no curvature; all machines of a run need its folder")

        def from_batches(batch_tokens: int) -> T:
            def batches(rows: Any) -> Iterable[Any]:
                return rows if self.encoder is None else on_device(iter_batches(rows, batch_tokens), device)

            inputs = Inputs(
                settings=self.settings,
                model=model,
                target=target,
                validation={task: batches(rows) for task, rows in self.validation.items()},
                sample=list(batches(self.sample)),
                curvature=checkpoint.curvature,
                optimizer=optimizer,
                corpus=self.corpus,
                seed=self.seed,
                loss_fn=self.loss_fn,
            )
            return make(inputs)

        if self.encoder is None:
            return from_batches(self.batch_tokens), self.batch_tokens
        least = max((row.longest for rows in self.validation.values() for row in rows), default=1)
        return fitting(from_batches, self.batch_tokens, least)

    def scorer(self, number: int = 0) -> tuple[Scorer, int]:
        """Return the scorer of a checkpoint, and the `batch_tokens` that fit in memory."""
        return self.made(self.estimator.scorer, number)

    def worker(self, number: int = 0) -> WindowWorker:
        """Return the worker that scores windows at a checkpoint."""
        assert self.encoder is not None
        scorer, batch_tokens = self.scorer(number)
        uncompiled = ""
        if self.compile:
            few = next(iter(self.validation.values()))
            trial = next(iter_batches(few, batch_tokens)).to(scorer.device)
            uncompiled = compile_model(scorer.model, scorer, trial)
        return WindowWorker(scorer, self.encoder, batch_tokens, uncompiled)

    @property
    def workers(self) -> list[Callable[[], WindowWorker]]:
        """Functions that make the worker of each checkpoint; they can be pickled."""
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
            metadata: metadata of the table.
            progress: called with the number of rows done at a checkpoint.
            engine: engine that scores the windows.

        Returns:
            The scores table, one row per example in order, and the statistics of each checkpoint.
        """
        tables, stats = [], []
        for make in self.workers:
            scored = [each for _, each in sorted(engine(make, Windows(pool), progress), key=itemgetter(0))]
            tables.append(pa.concat_tables([table for table, _ in scored]))
            total = ScoringStats()
            for _, counted in scored:
                total.add(counted)
            stats.append(total)
        return combine(tables, self.learning_rates, metadata=metadata), stats

    def _loaded(self, model: nn.Module | str) -> nn.Module:
        return self.load(model) if isinstance(model, str) else model
