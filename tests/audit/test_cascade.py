import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from iprox.audit.cascade import best_rows, candidate_share, rows_needed
from iprox.errors import InputError


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
