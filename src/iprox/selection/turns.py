"""Turns: the validation examples choose one after the other, each the row that is best for it.

A selection by the mean over a task's examples follows their most common kind. Where each example chooses in its turn,
the selection is as varied as they are. The scores by example [N, V] are read as a stream, and only the best rows of
each example are held.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Sequence

import numpy as np

# Scores of successive rows, [rows, V], from the first row to the last.
Chunks = Callable[[], Iterator[np.ndarray]]

# Best rows held per example to begin with, as a multiple of an equal share of the selection.
DEPTH = 3


class Turns:
    """A ranking by turns (see `iprox.selection.strategies.Ranking`).

    Args:
        chunks: scores by validation example; each call starts again at the first row.
        weights: turns of each example, in proportion [V], 0 or more, not all 0.
        allowed: whether each row may be taken, bool [N].
    """

    def __init__(self, chunks: Chunks, weights: Sequence[float], allowed: np.ndarray) -> None:
        self.chunks, self.weights, self.allowed = chunks, list(weights), allowed
        self._queues: list[np.ndarray] = []
        self._depth = 0

    def __call__(self, limit: int) -> np.ndarray:
        """Rank rows, best first: int64 [<= limit] row numbers. More are asked for, further on, with the same beginning.

        Time O(N·V) for each reading of the scores; memory O(limit), or O(limit·V) where the examples agree so much
        that each has to look past what the others took.
        """
        available = int(self.allowed.sum())
        limit = min(limit, available)
        active = sum(weight > 0 for weight in self.weights)
        while True:
            wanted = min(available, max(self._depth, -(-DEPTH * limit // active)))
            if wanted > self._depth:
                self._queues, self._depth = leading(self.chunks, self.allowed, wanted), wanted
            taken = take_turns(self._queues, limit, self.weights)
            if taken is not None:
                return taken
            self._depth = min(available, 2 * self._depth)
            self._queues = leading(self.chunks, self.allowed, self._depth)


def leading(chunks: Chunks, allowed: np.ndarray, depth: int) -> list[np.ndarray]:
    """Return the `depth` best rows of each column, best first; equal scores go to the earlier row.

    Args:
        chunks: scores, [rows, V] at a time.
        allowed: rows that may be taken, bool [N].
        depth: how many, if as many are allowed.
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
            if len(values[column]) == depth:  # a later row has to be better than the worst that is held
                better = scores > values[column][-1]
                scores, numbers = scores[better], numbers[better]
            if len(scores) > 2 * depth:  # no need to sort those that are not among the best
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
    """Take rows in turns until there are enough; None where a queue ends before that.

    The next turn is of the column that has had the fewest for its weight, the earlier of two (stride scheduling:
    Waldspurger and Weihl, 1995); equal weights are turns in order.

    Args:
        queues: row numbers of each column, best first.
        limit: number of rows to take, which the columns have between them.
        weights: of each column.
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
