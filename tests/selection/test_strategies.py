import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from iprox.errors import InputError
from iprox.recipe import validated
from iprox.scores import scores_table
from iprox.selection import select_rows as choose_rows
from iprox.selection.strategies import Turns, blended, top
from iprox.settings import SelectSection

scores = st.lists(st.one_of(st.integers(-3, 3).map(float), st.just(float("nan"))), min_size=1, max_size=40)


def select_rows(scores, **settings):
    return choose_rows(scores, validated(SelectSection, settings, ""))


def table(values):
    matrix = np.array(values, dtype=np.float64)[:, None]
    return scores_table([str(i) for i in range(len(values))], [None] * len(values), [1] * len(values), matrix, ["t"])


@given(scores, st.data())
def test_top_is_a_stable_sort(values, data):
    """Few distinct values, so ties are everywhere: they go to the earlier row."""
    ranked = sorted((i for i, v in enumerate(values) if v == v), key=lambda i: (-values[i], i))
    if not ranked:
        return
    count = data.draw(st.integers(1, len(ranked)))
    if len({values[row] for row in ranked}) == 1 and count < len(ranked):
        with pytest.raises(InputError, match=f"all {len(ranked)} rows are equal"):
            select_rows(table(values), count=count)
        return
    selection = select_rows(table(values), count=count, strategy="top")
    assert selection.rows.tolist() == ranked[:count]
    assert selection.threshold == values[ranked[count - 1]]


@given(st.lists(st.lists(st.integers(-3, 3).map(float), min_size=3, max_size=3), min_size=1, max_size=30), st.data())
def test_round_robin_gives_each_task_its_best_in_turn(values, data):
    matrix = np.array(values)
    matrix[data.draw(st.lists(st.integers(0, len(values) - 1), max_size=3)), :] = np.nan
    scored = [row for row in range(len(values)) if np.isfinite(matrix[row, 0])]
    if not scored:
        return
    assume(np.ptp(matrix[scored], axis=0).any())  # equal scores are refused
    count = data.draw(st.integers(1, len(scored)))
    expected: list[int] = []
    for turn in range(count):
        left = [row for row in scored if row not in expected]
        expected.append(max(left, key=lambda row: (matrix[row, turn % 3], -row)))
    ids = [str(i) for i in range(len(values))]
    scores = scores_table(ids, [None] * len(ids), [1] * len(ids), matrix, ["a", "b", "c"])
    selection = select_rows(scores, count=count, strategy="round-robin")
    assert selection.rows.tolist() == expected
    assert selection.threshold is None


@pytest.mark.parametrize("settings", [{}, {"strategy": "top"}, {"task": "a"}, {"strategy": "top", "task": "a"}])
def test_equal_scores_are_refused_unless_all_rows_are_chosen(settings):
    ids = ["x", "y", "z", "none"]
    matrix = np.array([[0.5, -2.0]] * 3 + [[np.nan, np.nan]]) * (1 + 1e-8 * np.arange(4)[:, None])
    scores = scores_table(ids, [None] * 4, [1] * 4, matrix, ["a", "b"])
    with pytest.raises(InputError, match="the scores of all 3 rows are equal"):
        select_rows(scores, count=2, **settings)
    assert sorted(select_rows(scores, count=3, **settings).rows) == [0, 1, 2]


def test_equal_scores_of_one_task_are_no_matter_where_another_ranks():
    scores = scores_table(["x", "y"], [None] * 2, [1] * 2, np.array([[1.0, 1.0], [1.0, 2.0]]), ["a", "b"])
    assert select_rows(scores, count=1, strategy="top").rows.tolist() == [1]
    assert select_rows(scores, count=1).rows.tolist() == [0]
    with pytest.raises(InputError, match="are equal"):
        select_rows(scores, count=1, task="a")


def test_rows_without_any_score_are_refused():
    with pytest.raises(InputError, match="none of the 2 rows has a score"):
        select_rows(table([np.nan, np.nan]), fraction=0.5)


WEIGHTS = st.lists(st.sampled_from([0.0, 0.5, 1.0, 3.0]), min_size=3, max_size=3).filter(any)


@given(st.lists(st.tuples(*[st.integers(-5, 5)] * 3), min_size=1, max_size=30), WEIGHTS, st.data())
def test_weights_are_of_standardized_scores(values, weights, data):
    """Tenths, whose mean is rounded: a task of equal scores has no spread all the same."""
    matrix = np.array(values) / 10
    count = data.draw(st.integers(1, len(values)))
    deviation = np.where(np.ptp(matrix, axis=0) > 0, matrix.std(axis=0), 1.0)
    wanted = (matrix / deviation) @ weights / sum(weights)
    assume(np.ptp(wanted) > 1e-9 or count == len(values))  # equal scores are refused
    ids = [str(i) for i in range(len(values))]
    scores = scores_table(ids, [None] * len(ids), [1] * len(ids), matrix, ["a", "b", "c"])
    by_name = dict(zip("abc", weights, strict=True))
    chosen = select_rows(scores, count=count, strategy="top", weights=by_name)
    np.testing.assert_allclose(wanted[chosen.rows], np.sort(wanted)[::-1][:count], rtol=0, atol=1e-9)
    assert chosen.threshold == pytest.approx(wanted[chosen.rows[-1]], abs=1e-9)


@given(WEIGHTS, st.integers(1, 200))
def test_turns_are_in_proportion_to_weights(weights, count):
    """No task wants another's rows here, so that a row says whose turn it was."""
    matrix = np.zeros((600, 3))
    for task in range(3):
        matrix[200 * task : 200 * (task + 1), task] = np.arange(200, 0, -1)
    ids = [str(i) for i in range(600)]
    scores = scores_table(ids, [None] * 600, [1] * 600, matrix, ["a", "b", "c"])
    by_name = dict(zip("abc", weights, strict=True))
    rows = select_rows(scores, count=count, strategy="round-robin", weights=by_name).rows
    turns = np.bincount(rows // 200, minlength=3)
    # Stride scheduling is never further from the share than one turn a task.
    assert (np.abs(turns - count * np.array(weights) / sum(weights)) <= 2).all()
    assert not turns[np.array(weights) == 0].any()
    for task in range(3):
        assert (rows[rows // 200 == task] % 200).tolist() == list(range(turns[task]))


def test_a_task_without_a_weight_counts_once():
    matrix = np.array([[2.0, 0.0], [0.0, 3.0], [1.9, 1.0]])
    scores = scores_table(list("xyz"), [None] * 3, [1] * 3, matrix, ["a", "b"])
    spelled, short = ({"a": 4.0, "b": 1.0}, {"a": 4.0})
    chosen = [
        select_rows(scores, count=3, strategy="top", weights=weights).rows.tolist() for weights in (spelled, short)
    ]
    assert chosen[0] == chosen[1] == [2, 0, 1]
    assert select_rows(scores, count=1, weights={"a": 0}).rows.tolist() == [1]


def test_one_task_of_several_chooses_alone():
    matrix = np.array([[1.0, 9.0], [2.0, 8.0], [3.0, 0.0], [np.nan, np.nan]])
    scores = scores_table(list("wxyz"), [None] * 4, [1] * 4, matrix, ["a", "b"])
    by_a, by_both = (select_rows(scores, count=2, strategy="top", **given) for given in ({"task": "a"}, {}))
    assert by_a.rows.tolist() == [2, 1]
    assert (by_a.threshold, by_a.settings.task) == (2.0, "a")
    assert by_both.rows.tolist() == [0, 1]
    assert select_rows(scores, threshold=8.5, task="b").rows.tolist() == [0]
    with pytest.raises(InputError, match="no scores for the task 'c'; the tasks are a, b"):
        select_rows(scores, count=1, task="c")
    in_turns = select_rows(scores, count=2, task="a")  # with itself
    assert (in_turns.rows.tolist(), in_turns.threshold) == ([2, 1], None)


def test_validation_examples_take_turns_where_their_scores_are_known():
    """Two of task a, one of task b, whose turns count alike; also where one task chooses alone."""
    a, b = np.array([[5, 0], [4, 9], [3, 8], [2, 7], [1, 6.0]]), np.array([[0], [0], [1], [2], [3.0]])
    scores = scores_table(list("vwxyz"), [None] * 5, [1] * 5, np.hstack([a.mean(1)[:, None], b]), ["a", "b"])
    kept = scores_table(
        list("vwxyz"), [None] * 5, [1] * 5, np.hstack([a.mean(1)[:, None], b]), ["a", "b"], examples=[a, b]
    )
    # Turns of a's first example, its second, and twice of b's only one: by stride a0, a1, b0, then b0, a0, a1. Row v is
    # the best for a's first example alone, but the mean is low there.
    assert select_rows(kept, count=4).rows.tolist() == [1, 2, 4, 3]
    assert select_rows(kept, count=3, task="a").rows.tolist() == [1, 2, 0]
    assert select_rows(kept, count=2, weights={"a": 0}).rows.tolist() == [4, 3]
    assert select_rows(scores, count=2).rows.tolist() == [1, 4]  # the tasks' turns


@given(arrays(np.float64, (11, 5), elements=st.integers(-4, 4).map(float)), st.sets(st.integers(0, 10), max_size=3))
def test_an_example_chooses_by_its_own_score_and_its_tasks(values, unscored):
    """Two tasks of two and three examples: against whole columns, standardized over the rows that have scores."""
    widths, rest = [2, 3], [row for row in range(11) if row not in unscored]
    assume((values[rest].std(0) > 0).all())
    means = np.stack([values[:, :2].mean(1), values[:, 2:].mean(1)], axis=1)
    assume((means[rest].std(0) > 0).all())
    for each in (values, means):
        each[list(unscored)] = np.nan
    scaled, whole = values / values[rest].std(0), means / means[rest].std(0)
    expected = scaled + np.hstack([whole[:, :1].repeat(2, 1), whole[:, 1:].repeat(3, 1)])
    found = list(blended(lambda: iter([values[:4], values[4:]]), means, widths)())
    np.testing.assert_allclose(np.vstack(found), expected, rtol=1e-9, atol=1e-12)


def test_a_fraction_is_of_all_rows():
    values = [float(i) for i in range(40)]
    assert select_rows(table(values), fraction=0.05).rows.tolist() == [39, 38]
    assert select_rows(table(values)).settings.fraction == 0.05
    assert select_rows(table(values), fraction=1e-9).rows.tolist() == [39]
    assert select_rows(table(values), fraction=1.0).rows.tolist() == list(range(39, -1, -1))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"fraction": 0.5, "count": 1}, "exactly one"),
        ({"fraction": 0.0}, "fraction: .*greater than 0"),
        ({"fraction": 1.5}, "fraction: .*less than or equal to 1"),
        ({"count": 0}, "count: .*greater than or equal to 1"),
        ({"count": 3}, "only 2 of 3 have a score"),
        ({"count": 4}, "the pool has only 3"),
        ({"count": 1, "strategy": "tpo"}, "strategy: input should be 'top' or"),
    ],
)
def test_bad_requests_are_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        select_rows(table([1.0, float("nan"), 2.0]), **arguments)


def test_ten_million_scores_take_seconds():
    """O(n): a partition, not a sort of everything. The bound is loose; it catches quadratic slips."""
    import time

    rng = np.random.default_rng(0)
    values = rng.normal(size=10_000_000)
    started = time.process_time()
    rows = top(values, 500_000)
    assert time.process_time() - started < 30
    assert values[rows[-1]] >= np.partition(values, -500_000)[-500_000]


matrices = st.integers(1, 4).flatmap(
    lambda tasks: st.integers(1, 25).flatmap(
        lambda rows: arrays(np.float64, (tasks, rows), elements=st.integers(-3, 3).map(float))
    )
)


@given(matrices, st.data())
def test_a_longer_ranking_starts_with_the_shorter(scores, data):
    rows = scores.shape[1]
    short = data.draw(st.integers(1, rows))
    turns = Turns(lambda: iter([scores.T]), [1.0] * len(scores), np.ones(rows, bool))
    for ranking in (lambda limit: top(scores[0], limit), turns):
        whole = ranking(rows)
        assert sorted(whole.tolist()) == list(range(rows))
        assert ranking(short).tolist() == whole[:short].tolist()
