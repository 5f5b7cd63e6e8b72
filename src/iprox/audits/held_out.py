"""Fidelity on held-out rows of proxies that are being made: many of them, or one again and again as it is tuned."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import cast

import numpy as np
import torch
from torch import nn

from iprox.audits.intervals import bootstrap_intervals
from iprox.audits.spearman import spearman
from iprox.data import Batch, Encoded, iter_batches, on_device
from iprox.errors import InputError
from iprox.influence.estimators import BatchScorer, ModelGradient, TaskQuery
from iprox.influence.ranking import equal_scores
from iprox.influence.scoring import ScoringSettings, scorer_of_batches, task_queries
from iprox.influence.truncation import QueryDirections
from iprox.settings import CURVED

# Fewest rows that a correlation is worth keeping factors by.
FEWEST = 16
# Share of the validation gradients' norm that the target's own scores keep: they rank as those of whole gradients do
# (Spearman 1.000, `benchmarks/queries.py`), for a twentieth of the contraction.
WANTED_NORM = 0.95


class HeldOutFidelity:
    """The mean over tasks of the Spearman correlation of proxy and target scores, the target's measured once.

    Scores are TracIn's, or an influence function's where that is the estimator: what Adam would have stepped, or a
    maximum over validation examples, moves with them. The target's are of validation gradients that keep 0.95 of their
    norm, or more if the settings ask for more; an influence function's of whole ones.

    Args:
        target: the target; what it says of the rows is measured now.
        rows: encoded held-out examples; those without a supervised token are left out.
        validation: encoded validation examples by task.
        pad_id: fills padding.
        settings: how candidates will be scored.
        query_on_target: whether validation gradients of proxies are taken on the target.
        sample: encoded examples of the pool, for an influence function.

    Raises:
        InputError: fewer than 16 rows have a supervised token, or the target's scores of a task rank nothing.
    """

    def __init__(
        self,
        target: nn.Module,
        rows: Sequence[Encoded],
        validation: Mapping[str, Sequence[Encoded]],
        pad_id: int,
        settings: ScoringSettings,
        *,
        query_on_target: bool = True,
        sample: Sequence[Encoded] = (),
    ) -> None:
        estimator = settings.estimator if settings.estimator in CURVED else "tracin"
        self.target, self.pad_id = target, pad_id
        self.settings = replace(settings, estimator=estimator, over_examples="mean", per_example=False)
        self.rows = [row for row in rows if row.supervised]
        if len(self.rows) < FEWEST:
            raise InputError(f"{len(self.rows)} held-out examples have a supervised token; give at least {FEWEST}")
        self.validation, self.sample, self.query_on_target = validation, sample, query_on_target
        whole = replace(self.settings, gradient="weight")
        queries = task_queries(target, self._validation(target), whole, sample=self._measured(target))
        means = cast(dict[str, ModelGradient], queries)
        # Gradients of whole layers do not hang on the factors, so they are the same for every proxy.
        self.fixed = query_on_target and self.settings.gradient == "weight"
        finer, self._queries = self._cut(means)
        on_target = self._weighing(target, finer)
        self._wanted = self._scores(on_target)
        self._refuse_unranked(self._wanted, "target", "lower warmup.learning_rate")
        # FLOPs of the rows' contraction with what they meet, and of their norms where those are wanted, on the target
        # and on the last proxy looked at.
        self.meeting_flops = {"target": self._meeting(on_target), "proxy": 0.0}

    def of(self, proxy: nn.Module) -> float:
        """The fidelity of a proxy.

        Raises:
            InputError: its scores of a task rank nothing.
        """
        return self._ranked(self._scores(self._scorer(proxy)))

    def with_bound(self, proxy: nn.Module) -> tuple[float, float]:
        """The fidelity of a proxy and its lower confidence bound, of a 95 % interval from resampling the rows.

        Both are NaN where its scores of a task are all equal.
        """
        scores = self._scores(self._scorer(proxy))

        def measure(rows: np.ndarray) -> dict[str, float]:
            return {"fidelity": self._fidelity(scores[rows], self._wanted[rows])}

        low, _ = bootstrap_intervals(measure, len(scores))["fidelity"]
        return self._fidelity(scores, self._wanted), low

    def watch(self, proxy: nn.Module) -> Callable[[], float]:
        """What measures the fidelity of one proxy that is tuned in place, at each call anew (as `of`)."""
        made: list[BatchScorer] = []

        def fidelity() -> float:
            # Made at the first call, when the proxy has the dtype that it is tuned in, and again where candidates meet
            # something that hangs on the factors.
            if not made or self._queries is None:
                made[:] = [self._scorer(proxy)]
            return self._ranked(self._scores(made[0]))

        return fidelity

    def _ranked(self, scores: np.ndarray) -> float:
        """The fidelity of a proxy's scores, if they rank the rows."""
        self._refuse_unranked(scores, "proxy", "lower proxy.align.learning_rate, or remove less (proxy.sparsity)")
        return self._fidelity(scores, self._wanted)

    def _refuse_unranked(self, scores: np.ndarray, of: str, remedy: str) -> None:
        """Refuse scores [rows, tasks] with which a fidelity is not a number."""
        for task, column in zip(self.validation, scores.T, strict=True):
            what = "all equal" if equal_scores(column) else "" if np.isfinite(column).all() else "not finite"
            if what:
                raise InputError(
                    f"the {of}'s scores of the {len(column)} held-out rows for {task} are {what}, so the fidelity is "
                    f"not a number: the {of} has probably collapsed; look at its training losses, and {remedy}"
                )

    def _cut(self, queries: dict[str, ModelGradient]) -> tuple[Mapping[str, TaskQuery], Mapping[str, TaskQuery] | None]:
        """What candidates meet on the target, and on every proxy; None where that hangs on the proxy."""
        keep = self.settings.kept_on_proxy
        if keep == 1:
            return queries, queries if self.fixed else None
        # Divided by the curvature, a gradient cut at 0.95 ranks a little differently (`benchmarks/queries.py`).
        whole = self.settings.estimator in CURVED
        if whole and not self.fixed:
            return queries, None
        finer = keep if whole else max(keep, WANTED_NORM)
        found = QueryDirections(queries, finer)
        return queries if whole else found.cut(finer), found.cut(keep) if self.fixed else None

    def _scorer(self, proxy: nn.Module) -> BatchScorer:
        scorer = self._made(proxy)
        self.meeting_flops["proxy"] = self._meeting(scorer)
        return scorer

    def _meeting(self, scorer: BatchScorer) -> float:
        lengths = [len(row.input_ids) for row in self.rows]
        return sum(lengths) * scorer.contraction_flops + scorer.norm_flops(lengths)

    def _made(self, proxy: nn.Module) -> BatchScorer:
        if self._queries is not None:
            return self._weighing(proxy, self._queries)
        target = self.target if self.query_on_target else None
        source = self.target if self.query_on_target else proxy
        return scorer_of_batches(
            proxy, self._validation(source), self.settings, target=target, sample=self._measured(source)
        )

    def _weighing(self, model: nn.Module, queries: Mapping[str, TaskQuery]) -> BatchScorer:
        """A scorer of gradients of whole layers."""
        sketch = self.settings.sketched(model)
        return BatchScorer(model, queries, gradient="weight", normalize=self.settings.normalize, norm_sketch=sketch)

    def _validation(self, model: nn.Module) -> dict[str, list[Batch]]:
        return {task: self._batches(rows, model) for task, rows in self.validation.items()}

    def _measured(self, model: nn.Module) -> list[Batch]:
        return self._batches(self.sample, model)

    def _batches(self, rows: Sequence[Encoded], model: nn.Module) -> list[Batch]:
        device = next(model.parameters()).device
        return list(on_device(iter_batches(rows, self.settings.batch_tokens, self.pad_id), device))

    def _scores(self, scorer: BatchScorer) -> np.ndarray:
        """Scores of the held-out rows [rows, tasks]."""
        out = torch.empty(len(self.rows), len(scorer.tasks), dtype=torch.float64)
        for batch in self._batches(self.rows, scorer.model):
            out[torch.as_tensor(batch.indices)] = scorer(batch)[0].double().cpu()
        return out.numpy()

    @staticmethod
    def _fidelity(scores: np.ndarray, wanted: np.ndarray) -> float:
        return float(np.mean([spearman(x, y) for x, y in zip(scores.T, wanted.T, strict=True)]))
