"""Scores beside each other, against scipy and brute force."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from iprox.audits import compare
from iprox.errors import InputError
from iprox.scores import scores_table

ROWS = 60


def table(scores, ids=None, tasks=("a", "b")):
    ids = [f"row-{i}" for i in range(len(scores))] if ids is None else ids
    return scores_table(ids, [None] * len(ids), [1] * len(ids), np.asarray(scores, dtype=float), tasks)


def drawn(seed, tasks=2):
    return np.random.default_rng(seed).normal(size=(ROWS, tasks))


def test_each_pair_is_what_scipy_and_counting_say():
    values = {"x": drawn(0), "y": drawn(0) + drawn(1), "z": drawn(2).round(0)}  # z has ties
    found = compare({name: table(scores) for name, scores in values.items()}, share=0.1)
    assert (found.names, found.tasks, found.rows) == (["x", "y", "z"], ["a", "b"], ROWS)
    for number, task in enumerate("ab"):
        for i, one in enumerate(values.values()):
            tops = set(np.argsort(-one[:, number], kind="stable")[:6])
            for j, other in enumerate(values.values()):
                theirs = set(np.argsort(-other[:, number], kind="stable")[:6])
                expected = stats.spearmanr(one[:, number], other[:, number])[0]
                assert found.spearman[task][i, j] == pytest.approx(expected)
                assert found.overlap[task][i, j] == pytest.approx(len(tops & theirs) / 6)
    # What selection goes by is the column `influence`, here the mean over tasks.
    together = [scores.mean(1) for scores in values.values()]
    tops = [set(np.argsort(-each, kind="stable")[:6]) for each in together]
    assert found.spearman["influence"][0, 2] == pytest.approx(stats.spearmanr(together[0], together[2])[0])
    assert found.overlap["influence"][1, 2] == pytest.approx(len(tops[1] & tops[2]) / 6)
    assert found.head() == ["a", "b", "influence", "top 10 % shared"]
    assert found.lines()["y"] == [
        *(f"{found.spearman[column][0, 1]:.3f}" for column in ("a", "b", "influence")),
        f"{len(tops[0] & tops[1]) / 6:.0%}",
    ]
    assert list(found.lines()) == ["y", "z"]
    assert str(found).splitlines()[0] == "Spearman with x on 60 rows"
    plain = found.as_dict()
    assert plain["influence"]["spearman"][0][1] == found.spearman["influence"][0, 1]
    assert plain["tasks"]["a"]["overlap"][1][2] == found.overlap["a"][1, 2]


@settings(deadline=None)
@given(st.permutations(range(ROWS)))
def test_rows_are_matched_by_id_whatever_their_order(order):
    one, other = drawn(0), drawn(1)
    straight = compare({"x": table(one), "y": table(other)})
    moved = compare({"x": table(one), "y": table(other[order], [f"row-{i}" for i in order])})
    for task in "ab":
        assert np.array_equal(straight.spearman[task], moved.spearman[task])
        assert np.array_equal(straight.overlap[task], moved.overlap[task])


def test_rows_and_tasks_that_one_lacks_are_left_out_of_all():
    one, other = drawn(0, 3), drawn(1)
    other[5, 1] = np.nan
    kept = [i for i in range(1, ROWS) if i != 5]
    found = compare(
        {"x": table(one, tasks=("b", "c", "a")), "y": table(other[1:], [f"row-{i}" for i in range(1, ROWS)])}
    )
    assert (found.tasks, found.rows) == (["b", "a"], ROWS - 2)
    assert found.left_out == {"x": 0, "y": 2}
    assert found.describe() == "Spearman with x on 58 rows (y lacks 2)"
    assert found.spearman["b"][0, 1] == pytest.approx(stats.spearmanr(one[kept, 0], other[kept, 1])[0])
    assert found.spearman["a"][0, 1] == pytest.approx(stats.spearmanr(one[kept, 2], other[kept, 0])[0])


def test_what_is_constant_has_no_correlation_and_json_says_null():
    found = compare({"x": table(drawn(0)), "y": table(np.ones((ROWS, 2)))})
    assert np.isnan(found.spearman["a"][0, 1])
    assert found.as_dict()["influence"]["spearman"] == [[pytest.approx(1.0), None], [None, None]]
    assert found.as_dict()["influence"]["overlap"] == [[1.0, None], [None, None]]
    assert found.lines() == {"y": ["equal scores"] * 4}
    found.plot()


@pytest.mark.parametrize(
    ("scores", "share", "message"),
    [
        ({"x": table(drawn(0))}, 0.05, "two or more scores"),
        ({"x": table(drawn(0)), "y": table(drawn(1))}, 1.0, "above 0 and below 1, not 1.0"),
        ({"x": table(drawn(0)), "y": table(drawn(1), tasks=("c", "d"))}, 0.05, "x has a, b; y has c, d"),
        ({"x": table(drawn(0)), "y": table(drawn(1)[:9])}, 0.05, "only 9 rows have all"),
        (
            {"x": table(drawn(0)), "y": table(drawn(1), [f"other-{i}" for i in range(ROWS)])},
            0.05,
            "only 0 rows have all of the scores.*ids are such as row-0 in x and other-0 in y",
        ),
        ([table(drawn(0)), table(drawn(1))], 0.05, "takes scores tables by name"),
        ({"x": "scores", "y": table(drawn(1))}, 0.05, "takes scores tables by name"),
        ({"x": table(drawn(0)), "y": table(drawn(1), ["row-0"] * ROWS)}, 0.05, "y: an id occurs twice"),
    ],
)
def test_what_cannot_be_compared_is_refused(scores, share, message):
    with pytest.raises(InputError, match=message):
        compare(scores, share=share)


def test_generated_ids_match_rows_of_one_pool_only():
    def of_pool(pool, own=False):
        ids = [f"row-{i}" if own else f"pool-{i:08d}" for i in range(1, ROWS + 1)]
        return scores_table(ids, [None] * ROWS, [1] * ROWS, drawn(0), ("a", "b"), {"inputs": {"pool": pool}})

    assert compare({"x": of_pool("one"), "y": of_pool("one")}).rows == ROWS
    assert compare({"x": of_pool("one", own=True), "y": of_pool("two", own=True)}).rows == ROWS
    with pytest.raises(InputError, match=r"x and y are of different pools, .*such as pool-00000001"):
        compare({"x": of_pool("one"), "y": of_pool("two")})


def test_it_shows_itself():
    found = compare({"<x>": table(drawn(0)), "y": table(drawn(1))})
    html = found._repr_html_()
    assert "Spearman with &lt;x&gt; on 60 rows" in html
    assert found.lines()["y"][2] in html
    assert np.allclose(found.plot().data[0].z, found.spearman["influence"])
    assert np.allclose(found.plot("a").data[1].z, found.overlap["a"])
    with pytest.raises(InputError, match="no task 'c'"):
        found.plot("c")
