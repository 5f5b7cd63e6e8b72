import json
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from iprox.audit.cascade import best_rows, candidate_share, rows_needed
from iprox.data.columns import Columns
from iprox.errors import InputError
from iprox.influence.aggregate import Aggregation
from iprox.influence.scores import read_scores, scores_metadata, scores_table
from iprox.recipe import RefineSection, SelectSection
from iprox.stages.refinement import refine


def population(noise, rows=20_000, seed=0):
    rng = np.random.default_rng(seed)
    target = rng.normal(size=rows)
    return target + noise * rng.normal(size=rows), target


@pytest.mark.parametrize("noise", [0.2, 1.0, 5.0])
@pytest.mark.parametrize("recall", [0.75, 0.9])
def test_the_promised_recall_is_kept_over_many_samples(noise, recall):
    """However faithful the proxy: the mean recall over the pool, of shares chosen from samples of 300 rows."""
    proxy, target = population(noise)
    wanted = set(best_rows(target, 0.05).tolist())
    rng = np.random.default_rng(1)
    found, shares = [], []
    for _ in range(150):
        rows = rng.choice(len(proxy), 300, replace=False)
        share = candidate_share(proxy[rows], target[rows], 0.05, recall)
        found.append(len(wanted & set(best_rows(proxy, share).tolist())) / len(wanted))
        shares.append(share)
    error = np.std(found) / np.sqrt(len(found))
    assert np.mean(found) >= recall - 2 * error
    assert np.mean(found) <= recall + 0.1 or np.mean(shares) < 0.06  # no deeper than it takes


def test_a_perfect_proxy_needs_no_more_than_the_selection():
    scores = np.random.default_rng(0).normal(size=1000)
    assert candidate_share(scores, scores, 0.05, 0.9) == 0.05


def test_too_small_a_sample_is_refused_with_the_size_it_takes():
    scores = np.arange(100.0)
    with pytest.raises(InputError, match="audit 170 or more"):
        candidate_share(scores, scores, 0.05, 0.9)


@pytest.mark.parametrize(("share", "recall"), [(0.05, 0.9), (0.1, 0.9), (0.01, 0.9), (0.02, 0.9), (0.1, 0.95)])
def test_exactly_the_size_asked_for_is_enough(share, recall):
    """Half a row is rounded up, as the size is reckoned, not to the even number."""
    scores = np.random.default_rng(0).normal(size=rows_needed(share, recall))
    assert share <= candidate_share(scores, scores, share, recall) <= share + 1 / len(scores)


@given(st.floats(0.01, 0.5), st.floats(0.5, 0.97))
@settings(max_examples=50)
def test_the_size_asked_for_is_enough_and_not_much_too_large(share, recall):
    scores = np.random.default_rng(0).normal(size=rows_needed(share, recall) + 1)
    assert share <= candidate_share(scores, scores, share, recall) <= 1
    few = np.random.default_rng(0).normal(size=max(1, int((recall / (1 - recall) - 1.5) / share)))
    if round(share * len(few)) >= 1 and recall > 0.7:  # a single best row always promises a half
        with pytest.raises(InputError):
            candidate_share(few, few, share, recall)


def test_best_rows_leaves_out_rows_without_a_score():
    assert best_rows(np.array([1.0, np.nan, 3.0, 2.0]), 0.5).tolist() == [2, 3]
    assert best_rows(np.array([np.nan, 1.0]), 1.0).tolist() == [1]


@pytest.mark.parametrize("tasks", ["standardised", "mean"])
def test_the_recall_is_kept_where_one_task_of_two_is_corrected(tmp_path, tasks):
    """However tasks are weighed: the pool is ranked as the sample was that the share was read off."""
    rng, rows = np.random.default_rng(0), 20_000
    source = rng.integers(0, 2, rows)
    target = rng.normal(size=(rows, 2))
    proxy = np.empty_like(target)
    proxy[:, 0] = target[:, 0] + 0.3 * rng.normal(size=rows) + 5 * source  # off by source, and so corrected
    proxy[:, 1] = 0.001 * (rng.normal(size=rows) - 0.3 * target[:, 1])  # of another unit, and of no use
    ids, sources = [str(row) for row in range(rows)], np.array(["x", "y"])[source].tolist()
    lengths, made_by = np.arange(rows) % 9, {"normalise": "none"}
    scores = scores_table(ids, sources, [10] * rows, proxy, ["a", "b"], made_by, supervised=lengths)
    pq.write_table(scores, tmp_path / "scores.parquet")
    seen = np.sort(rng.choice(rows, 2000, replace=False))
    columns = {f"{side}/{task}": scores[seen, n] for side, scores in (("proxy", proxy), ("target", target))
               for n, task in enumerate("ab")}  # fmt: skip
    audited = {
        "id": [ids[row] for row in seen],
        "source": [sources[row] for row in seen],
        "tokens": pa.array([10] * len(seen), pa.int32()),
        **columns,
    }
    (tmp_path / "audit").mkdir()
    pq.write_table(pa.table(audited), tmp_path / "audit/audit.parquet")

    class Rows:
        columns = Columns()

        def scan(self):
            return SimpleNamespace(rows=len(ids))

        def write_rows(self, numbers, file, ids):
            self.chosen = np.array(numbers)
            file.write_text(json.dumps({"text": "x"}) + "\n")

    pool = Rows()

    def on_target(_candidates, file):
        again = target[pool.chosen]
        named = [str(row) for row in pool.chosen]
        pq.write_table(scores_table(named, [None] * len(again), [1] * len(again), again, ["a", "b"]), file)
        return {"tokens": 0, "flops": 0.0}

    record = refine(
        scores=tmp_path / "scores.parquet",
        audit=tmp_path / "audit",
        pool=pool,
        folder=tmp_path / "refined",
        settings=RefineSection(recall=0.9),
        chosen=SelectSection(fraction=0.05),
        how=Aggregation(tasks),
        score_on_target=on_target,
    )
    assert [entry["used"] for entry in record["correction"].values()] == [True, False]
    mean = (target / (target.std(0) if tasks == "standardised" else 1)).mean(1)
    # Promised in the mean over samples; of one it has a standard error of 0.03.
    assert np.isin(best_rows(mean, 0.05), pool.chosen).mean() >= 0.8
    assert record["candidate_share"] < 0.95
    refined = read_scores(tmp_path / "refined")
    np.testing.assert_array_equal(refined["supervised"].to_numpy(), lengths)
    assert scores_metadata(refined) == made_by
