"""From a scores table to the rows to train on: which may be chosen, in which order, and how many."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
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
from iprox.selection.duplicates import NearDuplicates, Texts
from iprox.selection.limits import Limits, check_feasible, rows_in, take
from iprox.selection.strategies import Ranking, Turns, blended, top
from iprox.settings import SelectSection, rows_in_share


@dataclass(frozen=True, slots=True)
class Selection:
    """The selected rows of a scores table.

    Attributes:
        rows: row numbers, best first, int64 [K].
        settings: settings of the selection.
        threshold: lowest selected score, if the score alone decided; else None.
        tokens: number of tokens of all rows together.
        count_asked: number of rows asked for, or None; a threshold may leave fewer.
        passed_over: number of rows that ranked high enough but were not selected, by reason.
    """

    rows: np.ndarray
    settings: SelectSection
    threshold: float | None
    tokens: int
    count_asked: int | None
    passed_over: dict[str, int]

    def as_dict(self) -> dict[str, object]:
        """Return plain data for JSON."""
        return {
            **self.settings.model_dump(include={"strategy", "task", "weights", "fraction"}),
            "count": len(self.rows),
            "threshold": self.threshold,
            "tokens": self.tokens,
            "passed_over": self.passed_over,
            "rows": self.rows.tolist(),
        }


def select_rows(
    scores: pa.Table,
    settings: SelectSection,
    *,
    texts: Texts | None = None,
    examples: ExampleScores | None = None,
) -> Selection:
    """Choose rows of a scores table, best first.

    Ties go to the earlier row. A row without a score is never chosen. Without `deduplicate`, 10 million rows take
    seconds (`benchmarks/selection_speed.py`).

    Args:
        scores: scores table.
        settings: settings of the selection.
        texts: function that returns the texts of rows, for `deduplicate`.
        examples: scores by validation example; None uses those of the table, if it has any.

    Raises:
        InputError: the settings ask for more than the table has, or for texts that are not given; no row has a score,
            or all have the same.
    """
    if settings.deduplicate is not None and texts is None:
        raise InputError("deduplicate compares the texts of rows, and a scores table has none: give the pool")
    sources = source_column(scores).tolist() if settings.by_source else [None] * scores.num_rows
    check_feasible(settings, scores.num_rows, Counter(sources) if settings.by_source else {None: scores.num_rows})
    influence = _column(scores, settings)
    scored = int(np.isfinite(influence).sum())
    if not scored:
        raise no_scores(scores.num_rows)
    count = settings.rows_of(scores.num_rows)
    if count is not None and count > scored:
        raise InputError(
            f"{count} rows are to be selected, but only {scored} of {scores.num_rows} have a score; ask for fewer"
        )
    tokens = scores["tokens"].to_numpy(zero_copy_only=False)
    allowed = np.isfinite(influence)
    if settings.threshold is not None:
        allowed &= influence >= settings.threshold
    available = int(allowed.sum())
    if not available:
        raise InputError(f"no row has a score of {settings.threshold} or more; lower the threshold")
    asked, count = count, None if count is None else min(count, available)
    _refuse_equal(scores, settings, influence, chosen=count)

    ranking = _ranking(settings, scores, influence, allowed, examples or ExampleScores.of(scores))
    whole = count or 0  # SelectSection allows shares of sources with a number of rows only
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
            f"{count} rows are to be selected, but the limits leave only {len(taken.rows)} (passed over: {why}); ask "
            "for fewer rows or relax source_floor, source_cap or deduplicate"
        )
    if not len(taken.rows):
        if settings.tokens is not None:
            raise InputError(f"the best row alone has more than {settings.tokens} tokens; raise tokens")
        raise InputError(f"the limits leave no row (passed over: {why}); relax source_floor, source_cap or deduplicate")
    by_score = settings.strategy == "top" and not taken.passed_over
    return Selection(
        taken.rows,
        settings,
        float(influence[taken.rows[-1]]) if by_score else None,
        int(tokens[taken.rows].sum()),
        asked,
        dict(taken.passed_over),
    )


def best_rows(
    scores: pa.Table, share: float, settings: SelectSection, *, examples: ExampleScores | None = None
) -> np.ndarray:
    """Return the rows that a selection ranks highest, a `share` of all: row numbers in rising order, int64 [K].

    Every row returned has a score. `examples` are as for `select_rows`.
    """
    influence = _column(scores, settings)
    ranking = _ranking(settings, scores, influence, np.isfinite(influence), examples or ExampleScores.of(scores))
    return np.sort(ranking(rows_in_share(share, scores.num_rows)))


def _refuse_equal(scores: pa.Table, settings: SelectSection, influence: np.ndarray, chosen: int | None) -> None:
    """Refuse scores that rank nothing, unless all rows that have a score are chosen.

    Raises:
        InputError: the scores are all equal in each column that the strategy chooses by.
    """
    known = influence[np.isfinite(influence)]
    if chosen is not None and chosen >= len(known):
        return
    by_turns = settings.strategy == "round-robin" and settings.task is None
    columns = list(score_matrix(scores).T) if by_turns else [influence]
    if all(equal_scores(column) for column in columns):
        raise nothing_ranked(len(known), float(known[0]), scores_metadata(scores).get("estimator"))


def _ranking(
    settings: SelectSection,
    scores: pa.Table,
    influence: np.ndarray,
    allowed: np.ndarray,
    examples: ExampleScores,
) -> Ranking:
    """Return the ranking of the allowed rows [N].

    Validation examples take turns by blended scores, a task's in proportion to its weight; the tasks do where scores by
    example were not kept.
    """
    if settings.strategy == "top":
        return partial(top, np.where(allowed, influence, np.nan))
    tasks = task_names(scores)
    weights = _weights(settings, tasks) if settings.task is None else [float(task == settings.task) for task in tasks]
    matrix = score_matrix(scores)
    if not examples.widths:
        return Turns(lambda: iter([matrix]), weights, allowed)
    wanted = {task: weight for task, weight in zip(tasks, weights, strict=True) if weight}
    widths = [examples.widths[task] for task in wanted]
    turns = [weight / width for weight, width in zip(wanted.values(), widths, strict=True) for _ in range(width)]
    of_tasks = matrix[:, [task in wanted for task in tasks]]
    return Turns(blended(lambda: examples.chunks(list(wanted)), of_tasks, widths), turns, allowed)


def _column(scores: pa.Table, settings: SelectSection) -> np.ndarray:
    """Return the scores [N] that rows are chosen by, NaN where a row has none.

    Raises:
        InputError: the table has no such task.
    """
    tasks, task = task_names(scores), settings.task
    if settings.weights:
        return weighted(score_matrix(scores), _weights(settings, tasks))
    if task is not None and task not in tasks:
        raise InputError(f"there are no scores for the task {task!r}; the tasks are {', '.join(tasks)}")
    return scores[AGGREGATE if task is None else TASK_PREFIX + task].to_numpy(zero_copy_only=False).astype(np.float64)


def _weights(settings: SelectSection, tasks: Sequence[str]) -> list[float]:
    """Return the weight of each task.

    Raises:
        InputError: a weight names another task, or all weights are 0.
    """
    unknown = next((name for name in settings.weights if name not in tasks), None)
    if unknown is not None:
        raise InputError(f"weights names the task {unknown!r}, and the tasks are {', '.join(tasks)}")
    weights = [settings.weights.get(task, 1.0) for task in tasks]
    if not any(weights):
        raise InputError(
            "weights are 0 for all tasks, so there is nothing to choose by; give one task a weight above 0"
        )
    return weights
