import numpy as np
import pytest
from scipy import stats

from iprox.audits.datamodels import datamodeling_score, draw_subsets


def test_subsets_are_of_one_size_and_the_first_stay_as_more_are_drawn():
    few, many = draw_subsets(40, 5, 0.25, seed=3), draw_subsets(40, 12, 0.25, seed=3)
    assert (many.sum(1) == 10).all()
    np.testing.assert_array_equal(few, many[:5])
    assert len({tuple(row) for row in many}) == 12
    assert not np.array_equal(few, draw_subsets(40, 5, 0.25, seed=4))


def test_scores_that_foretell_the_losses_have_an_lds_of_one_whatever_the_scale():
    rng = np.random.default_rng(0)
    scores = rng.normal(size=60)
    members = draw_subsets(60, 30, 0.5, seed=0)
    losses = np.exp(-(members @ scores))  # the more influence, the lower the loss
    found = datamodeling_score(3 * scores, members, losses)
    assert found["lds"] == pytest.approx(1)
    assert datamodeling_score(-scores, members, losses)["lds"] == pytest.approx(-1)


def test_it_is_the_spearman_correlation_over_subsets():
    rng = np.random.default_rng(1)
    scores, members, losses = rng.normal(size=20), draw_subsets(20, 25, 0.4, seed=1), rng.normal(size=25)
    sums = [sum(score for score, inside in zip(scores, row, strict=True) if inside) for row in members]
    found = datamodeling_score(scores, members, losses)
    assert found["lds"] == pytest.approx(-stats.spearmanr(sums, losses).statistic)
    low, high = found["interval"]
    assert low < found["lds"] < high


def test_a_constant_side_has_no_lds():
    members = draw_subsets(10, 12, 0.5, seed=0)
    assert np.isnan(datamodeling_score(np.ones(10), members, np.arange(12.0))["lds"])
    assert np.isnan(datamodeling_score(np.arange(10.0), members, np.ones(12))["lds"])
