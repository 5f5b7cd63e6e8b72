import numpy as np
import pytest
from scipy import stats

from iprox.audit import compare_scores
from iprox.audit.fidelity import top_overlap
from iprox.errors import InputError
from iprox.influence.scores import scores_table


def table(matrix, tasks=("a", "b"), start=0):
    count = len(matrix)
    return scores_table([f"r{start + i}" for i in range(count)], ["s"] * count, [5] * count, matrix, tasks)


@pytest.fixture
def matrices():
    rng = np.random.default_rng(0)
    target = rng.normal(size=(200, 2))
    return target + rng.normal(size=target.shape) * [0.1, 1.0], target


def test_metrics_are_those_of_scipy_and_of_sets(matrices):
    proxy, target = matrices
    report = compare_scores(table(proxy), table(target))
    for column, task in enumerate(("a", "b")):
        entry = report.tasks[task]
        assert entry["spearman"] == pytest.approx(stats.spearmanr(proxy[:, column], target[:, column])[0])
        assert entry["kendall"] == pytest.approx(stats.kendalltau(proxy[:, column], target[:, column])[0])
        for share in (0.01, 0.05, 0.1):
            k = round(200 * share)
            best = [set(np.argsort(-scores[:, column])[:k]) for scores in (proxy, target)]
            assert entry["overlap"][str(share)] == pytest.approx(len(best[0] & best[1]) / k)
    assert report.tasks["a"]["spearman"] > report.tasks["b"]["spearman"]
    assert report.mean["spearman"] == pytest.approx(np.mean([report.tasks[t]["spearman"] for t in "ab"]))
    assert report.scores.column_names == ["id", "source", "proxy/a", "target/a", "proxy/b", "target/b"]
    np.testing.assert_array_equal(report.scores["target/b"].to_numpy(), target[:, 1])


def test_the_same_scores_agree_wholly_and_reversed_ones_not_at_all(matrices):
    _, target = matrices
    same = compare_scores(table(target * 3), table(target)).mean
    assert same["spearman"] == same["kendall"] == pytest.approx(1)
    assert same["overlap"]["0.05"] == 1
    other = compare_scores(table(-target), table(target)).mean
    assert other["spearman"] == pytest.approx(-1)
    assert other["overlap"]["0.05"] == 0


def test_rows_without_a_score_are_left_out(matrices):
    proxy, target = matrices
    full = compare_scores(table(proxy[10:], start=10), table(target[10:], start=10))
    holed = proxy.copy()
    holed[:10] = np.nan
    report = compare_scores(table(holed), table(target))
    assert report.sample == 190
    assert report.tasks == full.tasks


def test_overlap_has_at_least_one_row():
    assert top_overlap(np.array([1.0, 2.0]), np.array([3.0, 4.0]), 0.01) == 1


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (table(np.zeros((12, 2)), start=1), "same examples"),
        (table(np.zeros((12, 2)), ("a", "c")), "scored on"),
        (table(np.full((12, 2), np.nan)), "at least 10"),
    ],
)
def test_what_cannot_be_compared_is_refused(other, message):
    with pytest.raises(InputError, match=message):
        compare_scores(table(np.zeros((12, 2))), other)
