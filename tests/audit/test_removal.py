import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from iprox.audits.removal import length_strata, random_rows, removal_effect, removed_count, top_rows


def test_the_top_rows_are_the_highest_and_of_equal_ones_the_first():
    assert np.flatnonzero(top_rows(np.array([0.0, 3.0, 1.0, 3.0, 1.0]), 3)).tolist() == [1, 2, 3]
    assert [removed_count(500, 0.05), removed_count(9, 0.05)] == [25, 1]


def test_strata_are_tenths_by_supervised_tokens():
    supervised = np.random.default_rng(0).permutation(200) + 1
    strata = length_strata(supervised)
    assert np.bincount(strata).tolist() == [20] * 10
    for stratum in range(10):
        assert sorted(supervised[strata == stratum]) == list(range(20 * stratum + 1, 20 * stratum + 21))


@given(st.integers(2, 60), st.integers(0, 1000), st.data())
def test_random_rows_have_the_lengths_of_the_top_rows(rows, seed, data):
    rng = np.random.default_rng(seed)
    supervised = rng.integers(1, 30, rows)
    top = top_rows(rng.normal(size=rows), data.draw(st.integers(1, rows)))
    strata = length_strata(supervised)
    found = random_rows(top, strata, rng.permutation(rows))
    for stratum in range(10):  # as many of each, and so as many in all
        assert (found & (strata == stratum)).sum() == (top & (strata == stratum)).sum()


def test_every_row_of_a_stratum_is_as_likely():
    supervised = np.arange(100)
    top, strata = np.arange(100) >= 97, length_strata(supervised)
    orders = [np.random.default_rng([0, draw]).permutation(100) for draw in range(2000)]
    shares = np.mean([random_rows(top, strata, order) for order in orders], axis=0)
    assert not shares[:90].any()
    np.testing.assert_allclose(shares[90:], 0.3, atol=0.05)  # five standard errors


def test_a_ranking_by_length_alone_finds_nothing_that_random_rows_of_like_length_do_not():
    supervised = np.arange(100)
    top, strata = top_rows(supervised, 20), length_strata(supervised)
    np.testing.assert_array_equal(random_rows(top, strata, np.random.default_rng(0).permutation(100)), top)


def test_the_effect_is_the_mean_over_repeats_and_its_standard_error():
    rng = np.random.default_rng(1)
    everything, without_top, without_random = rng.normal(size=(3, 7))
    found = removal_effect(everything, without_top, without_random)
    rises = [
        (top - whole, other - whole) for whole, top, other in zip(everything, without_top, without_random, strict=True)
    ]
    assert found["top"] == pytest.approx(sum(top for top, _ in rises) / 7)
    assert found["random"] == pytest.approx(sum(other for _, other in rises) / 7)
    differences = [top - other for top, other in rises]
    assert found["difference"] == pytest.approx(sum(differences) / 7)
    assert found["standard_error"] == pytest.approx(stats.sem(differences))
