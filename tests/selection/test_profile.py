"""The guard against brute force: medians by sorting, shares by counting, near-duplicates two and two."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from iprox.data import Encoded
from iprox.data.tokens import Lengths, ValidationLengths
from iprox.scores import scores_table
from iprox.selection.duplicates import word_runs
from iprox.selection.guard import COMPARED, Setting, duplicate_share, guard
from iprox.settings import SelectSection

counts = st.lists(st.integers(0, 50), min_size=1, max_size=30)


def encoded(supervised):
    """An example of that many supervised tokens."""
    labels = np.r_[np.full(3, -100), np.ones(supervised)].astype(np.int32)
    return Encoded(np.ones_like(labels), labels, False)


def scored(supervised, validation, sources=None, **made_by):
    """A scores table of rows of some lengths; row 0 is the best."""
    rows, tasks = len(supervised), list(validation)
    known = ValidationLengths.of({task: [encoded(each) for each in given] for task, given in validation.items()})
    matrix = np.tile(-np.arange(rows, dtype=float)[:, None], len(tasks))
    metadata = {"estimator": "tracin", "normalize": "none", **known.as_metadata(), **made_by}
    return scores_table(
        [str(row) for row in range(rows)], sources or [None] * rows, [99] * rows, matrix, tasks, metadata,
        supervised=supervised,
    )  # fmt: skip


def warned(table, best, spelling="recipe", texts=None, **settings):
    rows = np.arange(best)
    return list(guard(table, rows, SelectSection(count=best, **settings), spelling, texts).warnings)


def by_hand(values, share):
    """The quantile between the two nearest of the sorted positive values."""
    ordered = sorted(value for value in values if value > 0)
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


@given(counts)
def test_lengths_are_quantiles_of_what_has_a_supervised_token(values):
    found = Lengths.of(values)
    if not any(values):
        assert found is None
        return
    assert (found.low, found.median, found.high) == pytest.approx([by_hand(values, each) for each in (0.1, 0.5, 0.9)])


def test_validation_lengths_are_what_the_metadata_gives_back():
    validation = {"a": [encoded(3), encoded(0), encoded(5)], "b": [encoded(40)], "none": [encoded(0)]}
    found = ValidationLengths.of(validation)
    assert {task: each.median for task, each in found.tasks.items()} == {"a": 4, "b": 40}
    assert found.together.median == 5
    assert ValidationLengths.from_metadata(found.as_metadata()) == found
    assert ValidationLengths.from_metadata({}) is None


@given(st.lists(st.sampled_from(["a", "b", "c", "d", "e", "f", "g", None]), min_size=2, max_size=40), st.data())
def test_shares_of_sources_are_counted(sources, data):
    rows = data.draw(st.lists(st.integers(0, len(sources) - 1), min_size=1, unique=True))
    found = guard(scored([1] * len(sources), {"t": [1]}, sources), np.array(rows), SelectSection(count=1), "recipe")
    pool, selected = Counter(sources), Counter(sources[row] for row in rows)
    assert len(found.sources) == min(5, len(selected))
    listed = [each.selection for each in found.sources]
    assert listed == sorted((number / len(rows) for number in selected.values()), reverse=True)[:5]
    for each in found.sources:
        assert each.selection == selected[each.source] / len(rows)
        assert each.pool == pool[each.source] / len(sources)


@pytest.mark.parametrize(
    ("lengths", "validation", "expected"),
    [
        (
            [2, 2, 90, 90, 90],
            {"t": [6]},
            "much shorter than the validation answers: the median is 2 tokens, against 6 for t and 90 in the pool",
        ),
        ([3, 2, 90, 90, 90], {"t": [6]}, None),  # 2.5 times 3 are more than 6
        (
            [60, 60, 4, 4, 4],
            {"t": [20]},
            "much longer than the validation answers: the median is 60 tokens, against 20 for t and 4 in the pool",
        ),
        ([59, 60, 4, 4, 4], {"t": [20]}, None),
        # Tasks of about one length are taken together, so 5 rows of 10 weigh more than one of 29.
        ([4, 4, 90, 90, 90], {"a": [10] * 5, "b": [29]}, None),
        ([4, 4, 90, 90, 90], {"a": [10], "b": [29] * 5}, "against 29 for a and b and 90 in the pool"),
        # Tasks far apart: only what is far from all of them is told.
        ([4, 4, 90, 90, 90], {"a": [10], "b": [30] * 5}, None),
        (
            [3, 3, 90, 90, 90],
            {"a": [10], "b": [30] * 5},
            "against 10 (for a) to 30 (for b) and 90 in the pool",
        ),
        ([90, 90, 4, 4, 4], {"a": [10] * 5, "b": [30]}, "much longer than the validation answers: the median is 90"),
        ([89, 89, 4, 4, 4], {"a": [10] * 5, "b": [30]}, None),
    ],
)
def test_lengths_three_times_apart_are_told(lengths, validation, expected):
    lines = warned(scored(lengths, validation), 2)
    if expected is None:
        assert lines == []
    else:
        (line,) = lines
        assert expected in line
        assert line.endswith("try influence.normalize: cosine")


def test_only_the_tasks_selected_for_are_compared_with():
    table = scored([3, 3, 90, 90, 90], {"short": [3], "long": [60]})
    assert warned(table, 2) == []  # within the range of the two
    assert warned(table, 2, task="short") == warned(table, 2, weights={"long": 0.0}) == []
    for settings in ({"task": "long"}, {"weights": {"short": 0.0}}):
        (line,) = warned(table, 2, **settings)
        assert "against 60 for long" in line


@pytest.mark.parametrize(
    ("made_by", "settings", "tasks", "tried"),
    [
        ({}, {}, 1, "influence.normalize: cosine"),
        ({"estimator": "length"}, {}, 1, "influence.estimator: ekfac"),
        ({"normalize": "cosine"}, {"strategy": "top"}, 2, "select.strategy: round-robin"),
        ({"normalize": "cosine"}, {}, 1, None),
    ],
)
def test_the_setting_to_try_is_one_that_is_not_set(made_by, settings, tasks, tried):
    validation = {f"t{number}": [30] for number in range(tasks)}
    (line,) = warned(scored([2, 2, 90, 90, 90], validation, **made_by), 2, **settings)
    assert line.partition("; try ")[2] == (tried or "")


def test_what_the_pool_does_not_have_no_setting_finds():
    (line,) = warned(scored([2, 2, 3, 3, 4], {"t": [60]}), 2)
    assert line.endswith("3 in the pool; the pool has hardly any longer answers, so add some that fit the task")
    (line,) = warned(scored([300, 300, 250, 250, 250], {"t": [60]}), 2)
    assert line.endswith("250 in the pool; the pool has hardly any shorter answers, so add some that fit the task")


def test_nothing_is_said_of_lengths_that_are_not_known():
    table = scored([2, 2, 90, 90, 90], {"t": [60]})
    assert warned(table.drop_columns(["supervised"]), 2) == []
    assert warned(table.replace_schema_metadata(None), 2) == []
    old = guard(table.drop_columns(["supervised"]), np.arange(2), SelectSection(count=2), "recipe").as_dict()
    assert old["supervised"]["selection"] is old["supervised"]["pool"] is None


@pytest.mark.parametrize(
    ("setting", "recipe", "command", "python"),
    [
        (
            Setting("influence", "normalize", "cosine"),
            *(
                "influence.normalize: cosine",
                "--set influence.normalize=cosine when scoring",
                "normalize='cosine' in iprox.score",
            ),
        ),
        (
            Setting("select", "deduplicate", 0.8),
            "select.deduplicate: 0.8",
            "--set select.deduplicate=0.8",
            "deduplicate=0.8",
        ),
    ],
)
def test_settings_are_spelled_as_they_are_set(setting, recipe, command, python):
    assert [setting.spelled(how) for how in ("recipe", "command", "python")] == [recipe, command, python]


def jaccard(one, other):
    a, b = word_runs(one), word_runs(other)
    return len(a & b) / len(a | b)


def test_near_duplicates_are_those_of_a_better_row():
    """Texts of 60 words of which a tail is changed: from 0.9 the sketches' error is far from the threshold of 0.8."""
    rng = np.random.default_rng(0)
    originals = [rng.integers(0, 10_000, 60).astype(str).tolist() for _ in range(8)]
    texts = [" ".join(words) for words in originals]
    texts += [" ".join([*originals[n][:59], "changed"]) for n in (0, 0, 3)]  # near-duplicates
    texts += [" ".join([*originals[5][:20], *map(str, range(40))])]  # shares a third
    order = rng.permutation(len(texts)).tolist()
    kept = []
    for row in order:
        if all(jaccard(texts[row], texts[other]) < 0.8 for other in kept):
            kept.append(row)
    assert len(kept) == 9
    share, compared = duplicate_share(order, lambda rows: [texts[row] for row in rows])
    assert (share, compared) == (pytest.approx(1 - 9 / 12), 12)


def test_of_many_rows_a_sample_is_compared():
    asked = []

    def texts(rows):
        asked.extend(rows)
        return [str(row) for row in rows]

    rows = list(range(2 * COMPARED, 0, -1))
    assert duplicate_share(rows, texts) == (0.0, COMPARED)
    assert asked == sorted(asked, reverse=True)  # best first, as a better row is the one that is kept
    assert len(set(asked)) == COMPARED


def test_many_near_duplicates_are_told():
    table = scored([5] * 9, {"t": [5]})
    same = {0: "a", 1: "a", 2: "a", 3: "b"}  # the others are of their own
    for best, told in ((6, False), (5, True)):  # a third, and two of five
        lines = warned(table, best, texts=lambda rows: [same.get(row, f"row {row}") for row in rows])
        assert bool(lines) is told
    assert lines == [
        "40% of 5 selected rows say almost the same as a better selected row; "
        "leave them out with select.deduplicate: 0.8"
    ]
