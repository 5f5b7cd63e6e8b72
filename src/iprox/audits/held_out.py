"""Fidelity on held-out rows for proxies in the making: many candidates, or one that is being tuned."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
from torch import nn

from iprox.aggregation import equal_scores
from iprox.audits.agreement import bootstrap_intervals, spearman
from iprox.data import Encoded, iter_batches, on_device
from iprox.engine.stream import fitting
from iprox.errors import InputError
from iprox.influence.estimators.base import Estimator, GradientEstimator, Inputs, QueryTokens
from iprox.influence.gradients import TaskGradient
from iprox.influence.job import Checkpoint, Job
from iprox.influence.low_rank import low_rank_queries
from iprox.influence.scorer import Scorer
from iprox.settings import InfluenceSection

# Fewest rows that a correlation is worth keeping factors by.
FEWEST = 16


def watched_by(settings: InfluenceSection) -> InfluenceSection:
    """Return how held-out rows are scored: by TracIn, or an influence function, as a stand-in for the others."""
    estimator = settings.estimator if settings.traits.curvature else "tracin"
    return settings.model_copy(update={"estimator": estimator, "per_example": False})


class Watching(NamedTuple):
    """What the cost of watching fidelity depends on.

    Attributes:
        estimator: scores the held-out rows.
        read: what is read before the first row.
        tokens: tokens of the rows.
        supervised: supervised ones among them.
        contraction: FLOPs of contracting the rows with validation gradients, and of their norms where those are wanted:
            on the `target`, and on a `proxy`.
        query_on_target: whether validation gradients of proxies are taken on the target.
    """

    estimator: Estimator
    read: QueryTokens
    tokens: int
    supervised: int
    contraction: Mapping[str, float]
    query_on_target: bool

    def flops(self, target: nn.Module, proxies: Sequence[nn.Module]) -> float:
        """Return the FLOPs of validation gradients and curvature, of the target's scores of the rows, and proxies'."""
        sources = [target, *(() if self.query_on_target else proxies)]
        spent = sum(self.estimator.query_flops(source, self.read) for source in sources)
        for model, on in [(target, "target"), *((proxy, "proxy") for proxy in proxies)]:
            spent += self.estimator.candidate_flops(model, self.tokens, self.supervised, self.contraction[on])
        return spent


class HeldOutFidelity:
    """The mean over tasks of the Spearman correlation of proxy and target scores; the target is scored once.

    Scores are those of `watched_by`. The target's use whole validation gradients.

    Args:
        job: how candidates will be scored; its one checkpoint is the loaded target.
        rows: encoded held-out examples; those without a supervised token are left out.
        query_on_target: whether validation gradients of proxies are taken on the target.

    Raises:
        InputError: fewer than 16 rows have a supervised token, or all scores of the target for a task are equal.
    """

    def __init__(self, job: Job, rows: Sequence[Encoded], *, query_on_target: bool = True) -> None:
        self.job = replace(job, settings=watched_by(job.settings))
        self.query_on_target = query_on_target
        self.rows = [row for row in rows if row.supervised]
        if len(self.rows) < FEWEST:
            raise InputError(f"{len(self.rows)} held-out examples have a supervised token; give at least {FEWEST}")
        self._contraction = {"target": 0.0, "proxy": 0.0}
        scorer, self._gradients = self.job.made(self._on_target)[0]
        self._wanted = self._scores(scorer, "target")
        self._refuse_unranked(self._wanted, "target", "lower warmup.learning_rate")

    def with_bound(self, proxy: nn.Module) -> tuple[float, float]:
        """Return the fidelity of a proxy and the lower bound of its 95 % interval.

        Both are NaN if all of its scores for a task are equal.
        """
        scores = self._scores(self._scorer(proxy), "proxy")

        def measure(rows: np.ndarray) -> dict[str, float]:
            return {"fidelity": self._fidelity(scores[rows], self._wanted[rows])}

        low, _ = bootstrap_intervals(measure, len(scores))["fidelity"]
        return self._fidelity(scores, self._wanted), low

    def watch(self, proxy: nn.Module) -> Callable[[], float]:
        """Return a function that measures the fidelity of one proxy while it is tuned in place.

        The function raises InputError if all of the proxy's scores for a task are equal.
        """
        made: list[Scorer] = []

        def fidelity() -> float:
            # The scorer is made at the first call, when the proxy has its dtype for tuning, and at every call if
            # validation gradients depend on the factors.
            if not made or not self.query_on_target:
                made[:] = [self._scorer(proxy)]
            scores = self._scores(made[0], "proxy")
            self._refuse_unranked(scores, "proxy", "lower proxy.align.learning_rate, or remove less (proxy.sparsity)")
            return self._fidelity(scores, self._wanted)

        return fidelity

    def _refuse_unranked(self, scores: np.ndarray, of: str, remedy: str) -> None:
        """Refuse scores [rows, tasks] for which fidelity is not defined."""
        for task, column in zip(self.job.validation, scores.T, strict=True):
            what = "all equal" if equal_scores(column) else "" if np.isfinite(column).all() else "not finite"
            if what:
                raise InputError(
                    f"the {of}'s scores of the {len(column)} held-out rows for {task} are {what}, so the fidelity is "
                    f"not a number: the {of} has probably collapsed; look at its training losses, and {remedy}"
                )

    @property
    def _estimator(self) -> GradientEstimator:
        assert isinstance(self.job.estimator, GradientEstimator)
        return self.job.estimator

    def _on_target(self, inputs: Inputs) -> tuple[Scorer, dict[str, TaskGradient]]:
        """Return the target's scorer and the validation gradients it uses."""
        gradients = self._estimator.validation_gradients(inputs)
        return self._estimator.contracting(gradients, inputs), gradients

    def _scorer(self, proxy: nn.Module) -> Scorer:
        if not self.query_on_target:
            return replace(self.job, checkpoints=[Checkpoint(proxy)]).scorer()[0]
        inputs = Inputs(settings=self.job.settings, model=proxy, validation={}, loss_fn=self.job.loss_fn)
        return self._estimator.contracting(self._queries, inputs)

    @cached_property
    def _queries(self) -> Mapping[str, TaskGradient]:
        """The target's validation gradients in the form that the candidates of proxies are contracted with."""
        keep = self.job.settings.kept_norm(on_proxy=True)
        return self._gradients if keep == 1 else low_rank_queries(self._gradients, keep)  # pyright: ignore

    def _scores(self, scorer: Scorer, on: str) -> np.ndarray:
        """Return the scores of the held-out rows [rows, tasks]."""
        self._contraction[on] = scorer.spent_flops([row.tokens for row in self.rows])

        def scores(batch_tokens: int) -> np.ndarray:
            found = np.empty((len(self.rows), scorer.columns))
            for batch in on_device(iter_batches(self.rows, batch_tokens), scorer.device):
                found[batch.indices] = scorer(batch)[0].cpu().numpy()
            return found

        return fitting(scores, self.job.batch_tokens, max(row.longest for row in self.rows))[0]

    @property
    def cost(self) -> Watching:
        """What watching costs, as the last proxy looked at was scored."""
        lengths, supervised = zip(*((row.tokens, row.supervised) for row in self.rows), strict=True)
        read = (self.job.estimator, self.job.read, sum(lengths), sum(supervised))
        return Watching(*read, self._contraction, self.query_on_target)

    @staticmethod
    def _fidelity(scores: np.ndarray, wanted: np.ndarray) -> float:
        return float(np.mean([spearman(x, y) for x, y in zip(scores.T, wanted.T, strict=True)]))
