import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from iprox.errors import InputError
from iprox.selection import SelectionSettings, select_rows
from iprox.selection.diverse import AMONG, PICKS, diverse, greedy_determinant
from iprox.selection.strategies import balanced, round_robin, sampled, standardised, top

matrices = st.integers(1, 4).flatmap(
    lambda tasks: st.integers(1, 25).flatmap(
        lambda rows: arrays(np.float64, (tasks, rows), elements=st.integers(-3, 3).map(float))
    )
)


@given(matrices, st.data())
def test_balanced_serves_the_task_served_least(scores, data):
    """Against the rule written out: the least served task, its best row left, every task credited."""
    count = data.draw(st.integers(1, scores.shape[1]))
    z = np.stack([standardised(row) for row in scores])
    served, expected = np.zeros(len(z)), []
    for _ in range(count):
        task = int(np.argmin(served))
        row = max((r for r in range(scores.shape[1]) if r not in expected), key=lambda r: (scores[task, r], -r))
        expected.append(row)
        served += z[:, row]
    assert balanced(list(scores), count).tolist() == expected


@given(matrices, st.data())
def test_a_longer_ranking_starts_with_the_shorter(scores, data):
    rows = scores.shape[1]
    short = data.draw(st.integers(1, rows))
    rankings = (
        lambda limit: top(scores[0], limit),
        lambda limit: round_robin(list(scores), limit),
        lambda limit: balanced(list(scores), limit),
        lambda limit: sampled(scores[0], limit, 1.0, seed=3),
    )
    for ranking in rankings:
        whole = ranking(rows)
        assert sorted(whole.tolist()) == list(range(rows))
        assert ranking(short).tolist() == whole[:short].tolist()


def test_balanced_helps_the_task_that_top_forgets():
    """One task's scores are large and common, the other's good rows are few: BIDS serves both."""
    rng = np.random.default_rng(0)
    tasks = np.abs(rng.normal(size=(2, 200))) * np.array([[10.0], [1.0]])
    tasks[1, :150] = 0
    chosen = balanced(list(tasks), 40)
    best = top(tasks.mean(axis=0), 40)
    assert standardised(tasks[1])[chosen].sum() > 1.5 * standardised(tasks[1])[best].sum()


def test_sampling_follows_the_chances():
    """First draws over many seeds, against exp(z / temperature) normalised."""
    scores = np.array([0.0, 1.0, 2.0, np.nan, 3.0])
    draws = [int(sampled(scores, 1, 0.8, seed)[0]) for seed in range(4000)]
    frequency = np.bincount(draws, minlength=5) / len(draws)
    weights = np.exp(np.where(np.isnan(scores), -np.inf, standardised(scores) / 0.8))
    np.testing.assert_allclose(frequency, weights / weights.sum(), atol=0.03)
    assert frequency[3] == 0
    assert sampled(scores, 4, 0.8, 1).tolist() == sampled(scores, 4, 0.8, 1).tolist()


def test_a_low_temperature_is_top_and_a_high_one_is_not():
    scores = np.random.default_rng(1).normal(size=500)
    assert sampled(scores, 20, 1e-4, 0).tolist() == top(scores, 20).tolist()
    assert len(np.intersect1d(sampled(scores, 20, 1e4, 0), top(scores, 20))) < 8


def determinant(features, log_quality, rows):
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    q = np.exp(log_quality / 2)
    return np.linalg.det((q[:, None] * (unit @ unit.T) * q)[np.ix_(rows, rows)])


def test_every_step_of_the_greedy_choice_is_the_best_by_dense_determinants():
    rng = np.random.default_rng(0)
    features, log_quality = rng.normal(size=(12, 6)), rng.normal(size=12)
    taken = greedy_determinant(features, log_quality, 5).tolist()
    for step in range(5):
        others = [row for row in range(12) if row not in taken[:step]]
        best = max(others, key=lambda row: determinant(features, log_quality, [*taken[:step], row]))
        assert taken[step] == best


def test_what_the_taken_span_comes_last_and_by_quality():
    features = np.array([[1.0, 0], [1, 0], [0, 1], [2, 0]])
    assert greedy_determinant(features, np.array([0.0, 3, -5, 2]), 4).tolist() == [1, 2, 3, 0]


def test_diverse_takes_unlike_rows_where_top_takes_copies():
    """Forty rows in forty directions, each with four copies that score a little more than the next direction."""
    directions = np.eye(40).repeat(5, axis=0)
    influence = np.linspace(10, 9, 200)
    rows = diverse(influence, 40, lambda some: directions[some])
    assert len(np.unique(rows // 5)) >= 32  # of the best 160 rows, which hold 32 directions
    assert len(np.unique(top(influence, 40) // 5)) == 8
    assert influence[rows].tolist() == sorted(influence[rows], reverse=True)
    assert rows.max() < AMONG * 40


def test_blocks_give_as_many_rows_as_asked(monkeypatch):
    monkeypatch.setattr("iprox.selection.diverse.PICKS", 7)
    rng = np.random.default_rng(0)
    influence, features = rng.normal(size=300), rng.normal(size=(300, 16))
    rows = diverse(influence, 40, lambda some: features[some])
    assert len(np.unique(rows)) == 40
    assert len(diverse(influence[:30], 40, lambda some: features[some])) == 30
    assert PICKS > 7


def test_diverse_needs_features(scores_of):
    with pytest.raises(InputError, match="index made by iprox index"):
        select_rows(scores_of([1.0, 2.0]), SelectionSettings(count=1, strategy="diverse"))
    with pytest.raises(InputError, match="diverse chooses a number of rows as a whole"):
        SelectionSettings(tokens=100, strategy="diverse")
