"""Turns of validation examples: against the same by brute force, whatever is held of the scores."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from iprox.selection.strategies import Turns, leading


def brute_force(scores, allowed, limit, weights):
    taken, had = [], np.zeros(len(weights))
    while len(taken) < min(limit, allowed.sum()):
        waiting = np.where(np.array(weights) > 0, had / np.maximum(weights, 1e-300), np.inf)
        column = int(waiting.argmin())
        left = [row for row in np.flatnonzero(allowed) if row not in taken]
        best = max(left, key=lambda row: (scores[row, column], -row))
        taken.append(int(best))
        had[column] += 1
    return taken


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 40),
    st.integers(1, 6),
    st.integers(1, 45),
    st.integers(1, 9),
    st.booleans(),
    st.booleans(),
    st.integers(0, 999),
)
def test_turns_equal_brute_force(rows, columns, limit, chunk, alike, ties, seed):
    """Also where all examples want the same rows, where scores are equal, and where more is asked for later."""
    rng = np.random.default_rng(seed)
    scores = rng.normal(size=(rows, 1 if alike else columns)).repeat(columns if alike else 1, axis=1)
    if ties:
        scores = scores.round()
    allowed = rng.random(rows) < 0.8
    if not allowed.any():
        allowed[0] = True
    weights = rng.choice([0.0, 0.5, 1.0, 2.0], size=columns)
    weights[0] = 1.0
    turns = Turns(lambda: (scores[i : i + chunk] for i in range(0, rows, chunk)), weights, allowed)
    few = turns(max(1, limit // 3)).tolist()
    assert turns(limit).tolist() == brute_force(scores, allowed, limit, weights)
    assert few == turns(limit).tolist()[: len(few)]


def test_only_the_best_rows_are_held():
    scores = np.random.default_rng(0).normal(size=(5000, 3))
    held = leading(lambda: iter(np.array_split(scores, 7)), np.ones(5000, bool), 10)
    assert [len(column) for column in held] == [10, 10, 10]
    assert held[1].tolist() == np.argsort(-scores[:, 1])[:10].tolist()


def test_the_rows_of_an_example_alone_are_its_best():
    scores = np.random.default_rng(1).normal(size=(200, 4))
    turns = Turns(lambda: iter([scores]), [0, 1, 0, 0], np.ones(200, bool))
    assert turns(20).tolist() == np.argsort(-scores[:, 1])[:20].tolist()
