"""From a scores table to the rows to train on: who may be chosen, in which order, and how many."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
import pyarrow as pa

from iprox.aggregation import equal_scores, no_scores, nothing_ranked, weighted
from iprox.errors import InputError
from iprox.scores import (
    AGGREGATE,
    TASK_PREFIX,
    ExampleScores,
    score_matrix,
    scores_metadata,
    source_column,
    task_names,
)
from iprox.selection.constraints import Limits, take
from iprox.selection.duplicates import NearDuplicates, Texts
from iprox.selection.feasible import check_feasible
from iprox.selection.settings import SelectionSettings, rows_in, rows_in_share
from iprox.selection.strategies import Ranking, top
from iprox.selection.turns import Turns


@dataclass(frozen=True, slots=True)
class Selection:
    """The chosen rows of a scores table.

    Attributes:
        rows: int64 [K], row numbers, best first.
        strategy: how they were chosen.
        task: whose scores counted; None: those of all.
        weights: of the tasks that were given one.
        fraction: the share asked for, if a share was.
        threshold: the lowest score chosen, where that is what decided; else None.
        tokens: what they have in all.
        count_asked: the rows asked for, if a number was; a threshold may leave fewer.
        passed_over: rows that ranked high enough and were not chosen, by reason.
    """

    rows: np.ndarray
    strategy: str
    task: str | None
    weights: Mapping[str, float]
    fraction: float | None
    threshold: float | None
    tokens: int
    count_asked: int | None
    passed_over: dict[str, int]

    def as_dict(self) -> dict[str, object]:
        """Plain data for JSON."""
        return {
            "strategy": self.strategy,
            "task": self.task,
            "weights": dict(self.weights),
            "count": len(self.rows),
            "fraction": self.fraction,
            "threshold": self.threshold,
            "tokens": self.tokens,
            "passed_over": self.passed_over,
            "rows": self.rows.tolist(),
        }


def select_rows(
    scores: pa.Table,
    settings: SelectionSettings,
    *,
    texts: Texts | None = None,
    examples: ExampleScores | None = None,
) -> Selection:
    """Choose rows of a scores table, best first.

    Ties go to the earlier row. A row without a score is never chosen. Without near-duplicates 10 million rows
    take seconds (`benchmarks/selection_speed.py`).

    Args:
        scores: a scores table.
        settings: what to choose.
        texts: of rows, for `deduplicate`.
        examples: scores by validation example; None takes those of the table, if it has any.

    Raises:
        InputError: the settings ask for more than the table has, or for texts that are not given; or no row has a
            score, or all have the same.
    """
    if settings.deduplicate is not None and texts is None:
        raise InputError("near-duplicates are found by the rows' texts, which a scores table has not: give the pool")
    sources = source_column(scores).tolist() if settings.by_source else [None] * scores.num_rows
    check_feasible(settings, scores.num_rows, Counter(sources) if settings.by_source else {None: scores.num_rows})
    influence = _column(scores, settings)
    scored = int(np.isfinite(influence).sum())
    if not scored:
        raise no_scores(scores.num_rows)
    count = settings.rows_of(scores.num_rows)
    if count is not None and count > scored:
        raise InputError(f"{count} rows asked for, but only {scored} of {scores.num_rows} have a score")
    tokens = scores["tokens"].to_numpy(zero_copy_only=False)
    allowed = np.isfinite(influence)
    if settings.threshold is not None:
        allowed &= influence >= settings.threshold
    available = int(allowed.sum())
    if not available:
        raise InputError(f"no row has a score of {settings.threshold} or more")
    asked, count = count, None if count is None else min(count, available)
    _refuse_equal(scores, settings, influence, chosen=count)

    ranking = _ranking(settings, scores, influence, allowed, examples or ExampleScores.of(scores))
    whole = count or 0  # without a number of rows there are no shares
    limits = Limits(
        count,
        settings.tokens,
        floors={source: rows_in(share, whole) for source, share in settings.source_floor.items()},
        caps={source: rows_in(share, whole) for source, share in settings.caps().items()},
    )
    seen = None
    if settings.deduplicate is not None:
        assert texts is not None
        seen = NearDuplicates(settings.deduplicate, texts)
    taken = take(ranking, available, limits, sources, tokens, seen)
    why = ", ".join(f"{number:,} {reason}" for reason, number in taken.passed_over.items())
    if count is not None and len(taken.rows) < count and settings.threshold is None:
        raise InputError(
            f"{count} rows asked for, but only {len(taken.rows)} can be chosen ({why}); ask for fewer, or loosen the "
            "limits"
        )
    if not len(taken.rows):
        if settings.tokens is not None:
            raise InputError(f"the best row alone has more than {settings.tokens} tokens; raise the budget")
        raise InputError(f"no row can be chosen ({why}); loosen the limits")
    by_score = settings.strategy == "top" and not taken.passed_over
    return Selection(
        taken.rows,
        settings.strategy,
        settings.task,
        settings.weights,
        settings.fraction,
        float(influence[taken.rows[-1]]) if by_score else None,
        int(tokens[taken.rows].sum()),
        asked,
        dict(taken.passed_over),
    )


def best_rows(
    scores: pa.Table, share: float, settings: SelectionSettings, *, examples: ExampleScores | None = None
) -> np.ndarray:
    """Return the share of the rows that a selection ranks highest.

    Args:
        scores: a scores table.
        share: of its rows, in (0, 1).
        settings: what will be selected.
        examples: as for `select_rows`.

    Returns:
        int64 [K] row numbers, in order; none has no score.

    Raises:
        InputError: the settings name a task that the table does not have.
    """
    influence = _column(scores, settings)
    ranking = _ranking(settings, scores, influence, np.isfinite(influence), examples or ExampleScores.of(scores))
    return np.sort(ranking(rows_in_share(share, scores.num_rows)))


def _refuse_equal(scores: pa.Table, settings: SelectionSettings, influence: np.ndarray, chosen: int | None) -> None:
    """Refuse scores that are all equal, unless all rows that have one are chosen.

    Raises:
        InputError: they are, in each column that the strategy chooses by.
    """
    known = influence[np.isfinite(influence)]
    if chosen is not None and chosen >= len(known):
        return
    by_turns = settings.strategy == "round-robin" and settings.task is None
    columns = list(score_matrix(scores).T) if by_turns else [influence]
    if all(equal_scores(column) for column in columns):
        raise nothing_ranked(len(known), float(known[0]), scores_metadata(scores).get("estimator"))


def _ranking(
    settings: SelectionSettings,
    scores: pa.Table,
    influence: np.ndarray,
    allowed: np.ndarray,
    examples: ExampleScores,
) -> Ranking:
    """The ranking that a strategy gives of the rows that are allowed [N].

    Turns are the validation examples', a task's in proportion to its weight; or the tasks' where scores by example
    were not kept.
    """
    if settings.strategy == "top":
        return partial(top, np.where(allowed, influence, np.nan))
    tasks = task_names(scores)
    weights = settings.weights_of(tasks) if settings.task is None else [float(task == settings.task) for task in tasks]
    if not examples.widths:
        matrix = score_matrix(scores)
        return Turns(lambda: iter([matrix]), weights, allowed)
    wanted = {task: weight for task, weight in zip(tasks, weights, strict=True) if weight}
    turns = [weight / examples.widths[task] for task, weight in wanted.items() for _ in range(examples.widths[task])]
    return Turns(lambda: examples.chunks(list(wanted)), turns, allowed)


def _column(scores: pa.Table, settings: SelectionSettings) -> np.ndarray:
    """The score [N] that rows are chosen by, NaN where there is none.

    Raises:
        InputError: the table has no such task.
    """
    tasks, task = task_names(scores), settings.task
    if settings.weights:
        return weighted(score_matrix(scores), settings.weights_of(tasks))
    if task is not None and task not in tasks:
        raise InputError(f"the scores are of no task {task!r}; they are of {', '.join(tasks)}")
    return scores[AGGREGATE if task is None else TASK_PREFIX + task].to_numpy(zero_copy_only=False).astype(np.float64)
