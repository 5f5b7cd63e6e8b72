"""The strategies: rankings of the rows by one score (`top`) or by validation examples that take turns (`Turns`).

A ranking orders rows best first; equal scores go to the earlier row. A longer ranking begins with the shorter one, so a
caller can ask for as many rows as it turns out to need.

A selection by the mean over a task's examples follows their most common kind. Where each example chooses in its turn,
the selection is as varied as they are; what it chooses by is half its own score, half the mean's (`blended`). The
scores by example [N, V] are read as a stream, and only the best rows of each example are held.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from iprox.aggregation import TaskSpread

# The number of rows to rank -> their row numbers, best first (fewer where fewer have a score).
Ranking = Callable[[int], np.ndarray]
# Scores of successive rows, [rows, V], from the first row to the last.
Chunks = Callable[[], Iterator[np.ndarray]]

# Best rows held per example at first, as a multiple of an equal share of the selection.
DEPTH = 3


def top(influence: np.ndarray, limit: int) -> np.ndarray:
    """Return the row numbers of the `limit` highest scores [N], best first, skipping NaN. O(n + k log k)."""
    loss = np.where(np.isnan(influence), np.inf, -influence)
    limit = min(limit, int(np.isfinite(influence).sum()))
    if limit == 0:
        return np.empty(0, np.int64)
    if limit < len(loss):
        cut = np.partition(loss, limit - 1)[limit - 1]
        better = np.flatnonzero(loss < cut)
        equal = np.flatnonzero(loss == cut)[: limit - len(better)]
        candidates = np.sort(np.concatenate([better, equal]))
    else:
        candidates = np.arange(len(loss))
    return candidates[np.argsort(loss[candidates], kind="stable")]


class Turns:
    """The ranking in which validation examples take turns, each choosing the row that is best for it.

    Args:
        chunks: scores by validation example; each call starts again at the first row.
        weights: relative numbers of turns per example [V], 0 or more, not all 0.
        allowed: whether each row may be chosen, bool [N].
    """

    def __init__(self, chunks: Chunks, weights: Sequence[float], allowed: np.ndarray) -> None:
        self.chunks, self.weights, self.allowed = chunks, list(weights), allowed
        self._queues: list[np.ndarray] = []
        self._depth = 0

    def __call__(self, limit: int) -> np.ndarray:
        """Return the best rows, best first: int64 [<= limit] row numbers.

        Time O(N·V) per reading of the scores; memory O(limit), or O(limit·V) where the examples agree so much that
        each has to look past the rows that the others took.
        """
        available = int(self.allowed.sum())
        limit = min(limit, available)
        active = sum(weight > 0 for weight in self.weights)
        wanted = min(available, -(-DEPTH * limit // active))
        while True:
            if wanted > self._depth:
                self._queues, self._depth = leading(self.chunks, self.allowed, wanted), wanted
            taken = take_turns(self._queues, limit, self.weights)
            if taken is not None:
                return taken
            wanted = min(available, 2 * self._depth)


def blended(chunks: Chunks, of_tasks: np.ndarray, widths: Sequence[int]) -> Chunks:
    """Return each example's scores plus its task's, both divided by their standard deviation over the rows.

    The gradient of one example is noisy, and the mean of all follows their most common kind. The sum trains better than
    either alone (docs/results/defaults.md). It takes one more reading of the scores.

    Args:
        chunks: scores by validation example.
        of_tasks: scores by task [N, T], NaN for rows without a score.
        widths: number of examples of each task.
    """
    spread, whole = TaskSpread(), TaskSpread()
    whole.add(of_tasks)
    for chunk in chunks():
        spread.add(chunk)
    deviations, means = spread.deviation(), of_tasks / whole.deviation()

    def blend() -> Iterator[np.ndarray]:
        start = 0
        for chunk in chunks():
            yield chunk / deviations + np.repeat(means[start : start + len(chunk)], widths, axis=1)
            start += len(chunk)

    return blend


def leading(chunks: Chunks, allowed: np.ndarray, depth: int) -> list[np.ndarray]:
    """Return the `depth` best allowed rows of each column, best first; ties go to the earlier row.

    `chunks` yields the scores, [rows, V] at a time.
    """
    values: list[np.ndarray] = []
    rows: list[np.ndarray] = []
    start = 0
    for chunk in chunks():
        places = np.flatnonzero(allowed[start : start + len(chunk)])
        for column in range(chunk.shape[1]):
            if len(values) == column:
                values.append(np.empty(0))
                rows.append(np.empty(0, np.int64))
            scores, numbers = chunk[places, column].astype(np.float64), places + start
            if len(values[column]) == depth:  # a later row has to be better than the worst row held
                better = scores > values[column][-1]
                scores, numbers = scores[better], numbers[better]
            if len(scores) > 2 * depth:  # rows that are not among the best need no sorting
                good = scores >= -np.partition(-scores, depth - 1)[depth - 1]
                scores, numbers = scores[good], numbers[good]
            if len(scores):
                scores = np.concatenate([values[column], scores])
                order = np.argsort(-scores, kind="stable")[:depth]
                values[column] = scores[order]
                rows[column] = np.concatenate([rows[column], numbers])[order]
        start += len(chunk)
    return rows


def take_turns(queues: Sequence[np.ndarray], limit: int, weights: Sequence[float]) -> np.ndarray | None:
    """Return rows taken in turns, or None if a queue ends before there are enough.

    The next turn goes to the column that has had the fewest turns relative to its weight, the earlier of two (stride
    scheduling: Waldspurger and Weihl, 1995). With equal weights the columns take turns in order.

    Args:
        queues: row numbers per column, best first.
        limit: number of rows to take.
        weights: relative numbers of turns per column.
    """
    waiting = [(0.0, column) for column, weight in enumerate(weights) if weight > 0]
    had = [0] * len(queues)
    places = [0] * len(queues)
    taken: dict[int, None] = {}  # keeps its order
    while len(taken) < limit:
        column = waiting[0][1]
        queue, place = queues[column], places[column]
        while place < len(queue) and int(queue[place]) in taken:
            place += 1
        if place == len(queue):
            return None
        taken[int(queue[place])] = None
        places[column] = place + 1
        had[column] += 1
        heapq.heapreplace(waiting, (had[column] / weights[column], column))
    return np.fromiter(taken, dtype=np.int64, count=limit)
