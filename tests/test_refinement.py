import json
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest

from iprox.data.formats import Columns
from iprox.errors import InputError
from iprox.scores import ExampleScores, read_scores, score_matrix, scores_table
from iprox.selection import best_rows, select_rows
from iprox.settings import RefineSection, SelectSection
from iprox.stages.refinement import check_candidates, refine

ROWS, TASKS = 1000, ["a", "b"]
TOP = SelectSection(fraction=0.05, strategy="top")


class Rows:
    """A stand-in of a pool that keeps which of its rows were written."""

    columns, pairs = Columns(), False

    def scan(self):
        return SimpleNamespace(rows=ROWS)

    def write_rows(self, numbers, file, ids):
        self.chosen = np.array(numbers)
        file.write_text(json.dumps({"text": "x"}) + "\n")


@pytest.fixture
def scores():
    """Scores [N, tasks] of a proxy and of its target, of which the proxy has some noise."""
    rng = np.random.default_rng(0)
    target = rng.normal(size=(ROWS, 2)) * [1.0, 50.0]
    proxy = 0.1 * (target + 0.5 * rng.normal(size=target.shape) * [1.0, 50.0])
    proxy[:7] = np.nan
    return proxy, target


def table_of(scores):
    ids = [str(row) for row in range(len(scores))]
    influence = (scores / np.nanstd(scores, axis=0)).mean(1)
    return scores_table(ids, [None] * len(scores), [10] * len(scores), scores, TASKS, influence=influence)


def refined(folder, proxy, target, candidates, chosen, tasks=TASKS):
    """The rows scored again, the refined table, and the record."""
    pq.write_table(table_of(proxy), folder / "scores.parquet")
    pool = Rows()

    def on_target(_candidates, file):
        ids, again = [str(row) for row in pool.chosen], target[pool.chosen][:, : len(tasks)]
        pq.write_table(scores_table(ids, [None] * len(ids), [1] * len(ids), again, tasks), file)
        return {"tokens": 12, "flops": 3.0, "seconds": 9}

    record = refine(
        scores=folder, pool=pool, folder=folder / "refined", candidates=candidates, chosen=chosen,
        score_on_target=on_target,
    )  # fmt: skip
    return pool.chosen, read_scores(folder / "refined"), record


def best(column, count):
    return set(np.argsort(-np.where(np.isnan(column), -np.inf, column), kind="stable")[:count].tolist())


def test_only_the_proxys_best_rows_have_scores_and_they_are_the_targets(tmp_path, scores):
    proxy, target = scores
    rows, table, record = refined(tmp_path, proxy, target, 0.2, TOP)
    assert set(rows.tolist()) == best(table_of(proxy)["influence"].to_numpy(zero_copy_only=False), 200)
    found = score_matrix(table)
    np.testing.assert_array_equal(found[rows], target[rows])
    assert np.isnan(np.delete(found, rows, axis=0)).all()
    influence = table["influence"].to_numpy(zero_copy_only=False)
    np.testing.assert_allclose(influence[rows], (target[rows] / target[rows].std(0)).mean(1))
    assert record == {"tokens": 12, "flops": 3.0, "candidates": 200, "candidate_share": 0.2}
    assert json.loads((tmp_path / "refined/refine.json").read_text()) == record
    assert sorted(file.name for file in (tmp_path / "refined").iterdir()) == ["refine.json", "scores.parquet"]
    chosen = select_rows(table, TOP).rows
    assert set(chosen.tolist()) == best(influence, 50)


def test_the_selection_finds_more_of_the_targets_own_best_rows_than_the_proxys(tmp_path, scores):
    proxy, target = scores
    settings = TOP
    truth = best(table_of(target)["influence"].to_numpy(), 50)
    _, table, _ = refined(tmp_path, proxy, target, 0.2, settings)
    alone, again = (len(truth & set(select_rows(each, settings).rows.tolist())) for each in (table_of(proxy), table))
    assert alone < 0.8 * len(truth)
    assert again >= 0.9 * len(truth)


@pytest.mark.parametrize(
    ("chosen", "weights"),
    [
        (SelectSection(count=5, task="b"), [0, 1]),
        (SelectSection(count=5, strategy="top", weights={"a": 3}), [3, 1]),
        (SelectSection(count=5, weights={"a": 0}), [0, 1]),
    ],
)
def test_the_best_rows_are_those_of_what_selection_ranks_by(scores, chosen, weights):
    """One task's, or the weighted mean of standardized scores."""
    proxy, _ = scores
    standardized = proxy / np.nanstd(proxy, axis=0)
    rows = best_rows(table_of(proxy), 0.1, chosen)
    assert rows.tolist() == sorted(best(standardized @ np.array(weights), 100))


def test_the_best_rows_by_turns_are_those_that_would_be_selected_of_so_many(scores):
    table = table_of(scores[0])
    rows = best_rows(table, 0.1, SelectSection(count=5))
    assert rows.tolist() == sorted(select_rows(table, SelectSection(count=100)).rows.tolist())


def test_refined_scores_keep_those_by_validation_example(tmp_path, scores):
    """Of the candidates, from the target, so that the examples take turns among these."""
    proxy, target = scores
    pq.write_table(table_of(proxy), tmp_path / "scores.parquet")
    pool, by_example = Rows(), np.random.default_rng(1).normal(size=(ROWS, 3))

    def on_target(_candidates, file):
        ids, again = [str(row) for row in pool.chosen], target[pool.chosen]
        examples = [by_example[pool.chosen], by_example[pool.chosen, :1]]
        pq.write_table(scores_table(ids, [None] * len(ids), [1] * len(ids), again, TASKS, examples=examples), file)
        return {"tokens": 12, "flops": 3.0}

    refine(
        scores=tmp_path, pool=pool, folder=tmp_path / "refined", candidates=0.2, chosen=SelectSection(count=9),
        score_on_target=on_target,
    )  # fmt: skip
    chunks = ExampleScores.in_file(tmp_path / "refined").chunks(TASKS)
    found = np.concatenate(list(chunks))
    np.testing.assert_array_equal(found[pool.chosen], by_example[pool.chosen][:, [0, 1, 2, 0]])
    assert np.isnan(np.delete(found, pool.chosen, axis=0)).all()


def test_rows_without_a_score_are_not_scored_again(scores):
    proxy, _ = scores
    proxy[40:] = np.nan
    assert best_rows(table_of(proxy), 0.2, SelectSection(count=5)).tolist() == list(range(7, 40))


def test_a_table_without_scores_is_refused(tmp_path, scores):
    proxy, target = scores
    with pytest.raises(InputError, match="no row has a score"):
        refined(tmp_path, np.full_like(proxy, np.nan), target, 0.2, SelectSection(fraction=0.05))


def test_scores_of_other_tasks_are_refused(tmp_path, scores):
    proxy, target = scores
    with pytest.raises(InputError, match="the scores are for a, b; give the validation sets of exactly these tasks"):
        refined(tmp_path, proxy, target, 0.2, SelectSection(fraction=0.05), tasks=["a"])


def test_a_selection_of_more_rows_than_are_scored_again_is_refused():
    check_candidates(RefineSection(candidates=0.2), SelectSection(fraction=0.2), 1001)
    check_candidates(RefineSection(candidates=0.2), SelectSection(count=200), 1000)
    with pytest.raises(InputError, match=r"but refine.candidates 0.2 scores only 200 again"):
        check_candidates(RefineSection(candidates=0.2), SelectSection(count=201), 1000)
    with pytest.raises(InputError, match=r"give select.fraction or select.count"):
        check_candidates(RefineSection(candidates=0.2), SelectSection(tokens=100), 1000)


def test_three_times_the_selected_rows_are_scored_again_by_default():
    assert RefineSection().share(SelectSection(fraction=0.05).rows_of(1000), 1000) == 0.15
    assert RefineSection().share(SelectSection(count=300).rows_of(1000), 1000) == 0.9
    assert RefineSection().share(SelectSection(count=800).rows_of(1000), 1000) == 1
    check_candidates(RefineSection(), SelectSection(count=800), 1000)
