import contextlib
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from iprox.errors import InputError
from iprox.recipe import validated
from iprox.scores import scores_table
from iprox.selection import check_feasible, select_rows
from iprox.selection.duplicates import NearDuplicates, word_runs
from iprox.selection.limits import Limits, take
from iprox.selection.strategies import top
from iprox.settings import SelectSection


@given(st.data())
def test_caps_and_floors_hold_and_nothing_better_is_left_out(data):
    """Against brute force: the best-first feasible set, greedily, row by row."""
    rows = data.draw(st.integers(1, 30))
    sources = data.draw(st.lists(st.sampled_from("abc"), min_size=rows, max_size=rows))
    influence = np.array(data.draw(st.permutations(range(rows))), dtype=np.float64)
    count = data.draw(st.integers(1, rows))
    floors = {"a": data.draw(st.integers(0, min(count, sources.count("a"))))}
    caps = {"b": data.draw(st.integers(0, rows))}

    def feasible(chosen):
        left = [row for row in range(rows) if row not in chosen]
        if sum(sources[row] == "b" for row in chosen) > caps["b"]:
            return False
        need = max(0, floors["a"] - sum(sources[row] == "a" for row in chosen))
        return need <= count - len(chosen) and need <= sum(sources[row] == "a" for row in left)

    expected: list[int] = []
    for row in np.argsort(-influence).tolist():
        if len(expected) < count and feasible([*expected, row]):
            expected.append(row)
    limits = Limits(count, None, floors, caps)
    ranking = lambda limit: top(influence, limit)  # noqa: E731
    if len(expected) < count:
        # Short of the count, or of a floor, which is refused.
        with contextlib.suppress(InputError):
            assert len(take(ranking, rows, limits, sources, np.ones(rows)).rows) < count
    else:
        assert take(ranking, rows, limits, sources, np.ones(rows)).rows.tolist() == expected


@given(st.lists(st.integers(1, 9), min_size=1, max_size=30), st.integers(1, 60))
def test_a_token_budget_ends_before_the_first_row_that_would_not_fit(tokens, budget):
    influence = -np.arange(len(tokens), dtype=np.float64)
    taken = take(lambda limit: top(influence, limit), len(tokens), Limits(tokens=budget), [None] * 30, np.array(tokens))
    expected = int((np.cumsum(tokens) <= budget).sum())
    assert taken.rows.tolist() == list(range(expected))


def test_the_tail_is_ranked_only_if_it_is_needed():
    asked = []

    def ranking(limit):
        asked.append(limit)
        return np.arange(limit)

    sources = ["common"] * 5000 + ["rare"] * 10
    taken = take(ranking, 5010, Limits(20, None, {"rare": 5}), sources, np.ones(5010))
    assert taken.rows.tolist() == [*range(15), *range(5000, 5005)]
    assert asked == [1024, 2048, 4096, 5010]
    asked.clear()
    take(ranking, 5010, Limits(20, None, {}, {"rare": 1}), sources, np.ones(5010))
    assert asked == [1024]


def test_shares_of_sources_are_of_the_selection(scores_of):
    table = scores_of(np.arange(100.0)[::-1], ["big"] * 80 + ["small"] * 20)
    chosen = select_rows(table, SelectSection(count=20, source_floor={"small": 0.25}, source_cap=0.8))
    assert chosen.rows.tolist() == [*range(15), *range(80, 85)]
    assert chosen.threshold is None
    assert chosen.passed_over == {"place owed to another source": 65}
    capped = select_rows(table, SelectSection(count=20, source_cap={"big": 0.5}))
    assert capped.rows.tolist() == [*range(10), *range(80, 90)]


def test_a_floor_that_cannot_be_met_is_refused(scores_of):
    table = scores_of([3.0, 2.0, 1.0, 0.0, float("nan")], ["a", "a", "a", "b", "b"])
    with pytest.raises(InputError, match="only 1 rows of the source 'b' can be chosen, and its floor is 2"):
        select_rows(table, SelectSection(count=4, source_floor={"b": 0.5}))
    assert select_rows(table, SelectSection(count=4, source_cap=0.5, threshold=0.5)).rows.tolist() == [0]


SOURCES = {"flan": 6, "dolly": 3, None: 1}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"count": 11}, "11 rows are to be selected, but the pool has only 10"),
        ({"count": 2, "source_floor": {"fln": 0.5}}, "floor of the source 'fln': .*did you mean 'flan'"),
        ({"count": 2, "source_cap": {"code": 0.5}}, "cap of the source 'code': .*its sources are dolly, flan"),
        ({"count": 8, "source_floor": {"dolly": 0.5}}, r"floor of the source 'dolly', 0.5 of 8 rows, .*\(3\)"),
        ({"count": 9, "source_cap": 0.5}, "9 rows are to be selected, but the caps of sources leave 8"),
        ({"count": 9, "source_cap": {"flan": 0.1}}, "9 rows are to be selected, but the caps of sources leave 4"),
    ],
)
def test_what_the_pool_has_not_the_rows_for_is_refused(settings, message):
    with pytest.raises(InputError, match=message):
        check_feasible(SelectSection(**settings), 10, SOURCES)


@given(st.lists(st.sampled_from("abc"), min_size=1, max_size=12), st.data())
def test_rows_that_all_have_a_score_can_be_chosen_where_that_is_feasible(sources, data):
    """Caps and counts only: floors that compete with caps are told of when rows are taken."""
    settings = SelectSection(
        count=data.draw(st.integers(1, 14)), source_cap=data.draw(st.sampled_from([0.0, 0.25, 0.5, {"a": 0.5}, 1.0]))
    )
    table = scores_table(
        [str(row) for row in range(len(sources))], sources, [1] * len(sources), np.arange(len(sources))[:, None], ["t"]
    )
    try:
        check_feasible(settings, len(sources), Counter(sources))
    except InputError:
        with pytest.raises(InputError):
            select_rows(table, settings)
    else:
        assert len(select_rows(table, settings).rows) == settings.count


def test_a_threshold_leaves_fewer_and_says_so(scores_of):
    chosen = select_rows(scores_of([3.0, float("nan"), 1.0, 2.0]), SelectSection(count=3, threshold=1.5))
    assert chosen.rows.tolist() == [0, 3]
    assert chosen.count_asked == 3
    assert select_rows(scores_of([3.0, 1.0]), SelectSection(threshold=2.0)).rows.tolist() == [0]
    with pytest.raises(InputError, match="no row has a score of 9"):
        select_rows(scores_of([3.0, 1.0]), SelectSection(threshold=9.0))


def test_limits_that_leave_no_row_are_named(scores_of):
    scores = scores_of([0.0, 1.0, 2.0], ["x"] * 3)
    with pytest.raises(InputError, match=r"the limits leave no row .*cap"):
        select_rows(scores, SelectSection(count=2, threshold=1.0, source_cap=0.3))


def texts_of(texts):
    return lambda rows: [texts[row] for row in rows]


def test_of_near_duplicates_the_better_is_kept(scores_of):
    story = "the quick brown fox jumps over the lazy dog and runs far away into the deep dark forest at night " * 3
    texts = ["something else entirely, about numbers and sums and nothing more", story, story.upper() + "!", "", ""]
    table = scores_of([1.0, 2.0, 3.0, 0.5, 0.4])
    chosen = select_rows(table, SelectSection(count=3, deduplicate=0.8), texts=texts_of(texts))
    assert chosen.rows.tolist() == [2, 0, 3]
    assert chosen.passed_over == {"near-duplicate": 1}
    with pytest.raises(InputError, match="give the pool"):
        select_rows(table, SelectSection(count=3, deduplicate=0.8))


def test_the_estimate_follows_the_jaccard_similarity():
    """Pairs of known similarity around the threshold: far ones are kept, close ones are not."""
    rng = np.random.default_rng(0)
    words = [f"w{number}" for number in range(4000)]
    verdicts = {}
    for changed in (2, 60):
        text = rng.choice(words, 200).tolist()
        other = list(text)
        for position in rng.choice(200, changed, replace=False):
            other[position] = "changed"
        first, second = " ".join(text), " ".join(other)
        jaccard = len(word_runs(first) & word_runs(second)) / len(word_runs(first) | word_runs(second))
        kept = NearDuplicates(0.7, texts_of([first, second]))
        kept.read([0, 1])
        verdicts[changed] = (jaccard, kept.add(0) and kept.add(1))
    assert verdicts[2][0] > 0.85
    assert not verdicts[2][1]
    assert verdicts[60][0] < 0.5
    assert verdicts[60][1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"count": 2, "source_floor": {"a": 0.7, "b": 0.7}}, "more than 1"),
        ({"count": 2, "source_cap": 1.5}, "source_cap: .*less than or equal to 1"),
        ({"tokens": 9, "source_cap": 0.5}, "give fraction or count"),
        ({"count": 2, "weights": {"a": -1.0}}, "weights.a: .*greater than or equal to 0"),
        ({"count": 2, "weights": {"a": float("nan")}}, "finite"),
        ({"count": 2, "weights": {"a": 2.0}, "task": "a"}, "leave one out"),
        ({"count": 2, "deduplicate": 1.5}, "deduplicate: .*less than or equal to 1"),
        ({"tokens": 0}, "tokens: .*greater than or equal to 1"),
    ],
)
def test_what_cannot_be_meant_is_refused(settings, message):
    with pytest.raises(InputError, match=message):
        validated(SelectSection, settings, "")


def test_texts_without_words_are_told_apart_by_their_characters():
    assert word_runs("😀 😀") != word_runs("∀ → ∃")
    assert word_runs("∀ → ∃") == word_runs("∀→∃")


def test_a_budget_of_tokens_passes_over_a_capped_row_that_would_not_fit():
    """A long row of a source at its cap ends nothing: it would not have been taken."""
    tokens, sources = np.array([4, 90, 5]), ["a", "a", "b"]
    limits = Limits(tokens=10, caps={"a": 1})
    taken = take(lambda limit: np.arange(min(limit, 3)), 3, limits, sources, tokens)
    assert taken.rows.tolist() == [0, 2]


@pytest.mark.parametrize(
    ("weights", "message"),
    [({"tusk": 2.0}, "the task 'tusk', and the tasks are task"), ({"task": 0.0}, "are 0 for all tasks")],
)
def test_weights_of_other_tasks_or_of_none_are_refused(scores_of, weights, message):
    with pytest.raises(InputError, match=message):
        select_rows(scores_of([1, 2, 3]), SelectSection(count=2, weights=weights))
