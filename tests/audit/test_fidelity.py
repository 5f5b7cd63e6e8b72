import json

import numpy as np
import pytest
from scipy import stats

from iprox.audits import compare_scores
from iprox.audits.agreement import bootstrap_intervals, disagreements, telling_share, top_overlap
from iprox.errors import InputError
from iprox.scores import scores_table


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
        for share in (0.01, 0.02, 0.05, 0.1, 0.2):
            k = round(200 * share)
            best = [set(np.argsort(-scores[:, column])[:k]) for scores in (proxy, target)]
            assert entry["overlap"][str(share)] == pytest.approx(len(best[0] & best[1]) / k)
            candidates = set(np.argsort(-proxy[:, column])[: 3 * k])
            assert entry["refined"][str(share)] == pytest.approx(len(candidates & best[1]) / k)
    assert report.tasks["a"]["spearman"] > report.tasks["b"]["spearman"]
    assert report.mean["spearman"] == pytest.approx(np.mean([report.tasks[t]["spearman"] for t in "ab"]))
    assert report.scores.column_names == ["id", "source", "tokens", "proxy/a", "target/a", "proxy/b", "target/b"]
    np.testing.assert_array_equal(report.scores["target/b"].to_numpy(), target[:, 1])


def test_intervals_hold_the_figure_and_narrow_with_the_sample(matrices):
    proxy, target = matrices
    wide = compare_scores(table(proxy[:50]), table(target[:50]))
    narrow = compare_scores(table(proxy), table(target))
    for report in (wide, narrow):
        for entry in (*report.tasks.values(), report.mean):
            low, high = entry["intervals"]["spearman"]
            assert low <= entry["spearman"] <= high
            assert entry["intervals"]["overlap"]["0.2"][0] <= entry["overlap"]["0.2"]
    spans = [np.diff(report.mean["intervals"]["spearman"])[0] for report in (wide, narrow)]
    assert spans[1] < 0.7 * spans[0]
    json.dumps(narrow.as_dict(), allow_nan=False)


def test_intervals_cover_the_truth_as_often_as_they_say():
    """The mean of 40 normal numbers: 95 % intervals miss 0 in about one of twenty draws."""
    rng = np.random.default_rng(1)
    missed = 0
    for _ in range(100):
        sample = rng.normal(size=40)
        low, high = bootstrap_intervals(lambda rows, sample=sample: {"mean": sample[rows].mean()}, 40)["mean"]
        missed += not low <= 0 <= high
    assert 1 <= missed <= 14


def test_breakdowns_by_source_and_length(matrices):
    proxy, target = matrices
    sources = ["x"] * 120 + ["y"] * 75 + ["few"] * 5
    lengths = np.arange(200) // 2
    tables = [
        scores_table([str(i) for i in range(200)], sources, lengths, matrix, ["a", "b"]) for matrix in (proxy, target)
    ]
    report = compare_scores(*tables)
    assert list(report.by_source) == ["x", "y"]
    assert report.by_source["y"]["rows"] == 75
    within = [stats.spearmanr(proxy[120:195, task], target[120:195, task])[0] for task in range(2)]
    assert report.by_source["y"]["spearman"] == pytest.approx(np.mean(within))
    assert [entry["tokens"] for entry in report.by_length] == [[0, 19], [20, 39], [40, 59], [60, 79], [80, 99]]
    assert sum(entry["rows"] for entry in report.by_length) == 200


def test_disagreements():
    target = np.arange(100, dtype=float)
    proxy = target.copy()
    proxy[[3, 96]] = proxy[[96, 3]]  # one row is rated far too high, one far too low
    apart = disagreements(proxy, target)
    assert [entry["position"] for entry in apart] == [3, 96]
    assert apart[0]["proxy"] == pytest.approx(0.035)
    assert apart[0]["target"] == pytest.approx(0.965)


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


@pytest.mark.parametrize("collapsed", ["proxy", "target"])
def test_equal_scores_have_no_fidelity(matrices, collapsed):
    """They would have an overlap of 100 %, as ties go to the earlier row on both sides."""
    sides = {name: np.array(matrix) for name, matrix in zip(("proxy", "target"), matrices, strict=True)}
    sides[collapsed][:, 1] = 0.25 * (1 + 1e-9 * np.arange(len(sides[collapsed])))
    with pytest.raises(InputError, match=f"the {collapsed}'s scores of the 200 audited rows for b are all equal"):
        compare_scores(table(sides["proxy"]), table(sides["target"]))


def test_a_notebook_shows_a_table_and_plots(matrices):
    proxy, target = matrices
    report = compare_scores(table(proxy, ("a", "<b>")), table(target, ("a", "<b>")))
    shown = report._repr_html_()
    assert f"{report.tasks['a']['spearman']:.3f}" in shown
    assert "&lt;b&gt;" in shown
    assert "<b>" not in shown
    whole, one = report.plot(), report.plot("a")
    assert len(whole.data) == 2 * len(one.data)
    drawn = [(x, y) for trace in one.data for x, y in zip(trace.x, trace.y, strict=True)]
    assert sorted(drawn) == sorted(zip(target[:, 0], proxy[:, 0], strict=True))
    with pytest.raises(KeyError):
        report.plot("c")


@pytest.mark.parametrize(("sample", "share"), [(500, 0.05), (200, 0.05), (120, 0.1), (60, 0.2), (12, 0.2)])
def test_the_overlap_named_first_is_of_ten_rows_or_more_where_there_are_so_many(sample, share):
    assert telling_share(sample) == share
