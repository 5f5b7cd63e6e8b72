import numpy as np
import pytest
from scipy import stats

from iprox.audit.correction import Covariates, fit_correction


def rows(count, offset, seed=0):
    """A target, a proxy that rates source b too low by `offset` and long rows too high, and what is known of them."""
    rng = np.random.default_rng(seed)
    sources = rng.choice(np.array(["a", "b", None], dtype=object), count)
    tokens = rng.integers(10, 1000, count)
    target = rng.normal(size=count)
    proxy = 0.5 * target + 0.2 * rng.normal(size=count) - offset * (sources == "b") + offset * np.log(tokens / 100)
    return proxy, target, Covariates(sources, tokens)


def test_offsets_of_sources_and_lengths_are_taken_out():
    fitted = fit_correction(*rows(400, 1.0))
    assert fitted.helps
    proxy, target, known = rows(3000, 1.0, seed=1)
    before, after = (stats.spearmanr(x, target).statistic for x in (proxy, fitted.apply(proxy, known)))
    assert before < 0.5
    assert after > 0.85
    assert fitted.after == pytest.approx(after, abs=0.05)  # what cross-validation promised


def test_within_a_source_and_length_the_order_stays():
    fitted = fit_correction(*rows(400, 1.0))
    scores = np.sort(np.random.default_rng(0).normal(size=50))
    same = Covariates(np.array(["a"] * 50, dtype=object), np.full(50, 77))
    assert (np.diff(fitted.apply(scores, same)) > 0).all()


def test_a_proxy_without_such_errors_is_left_alone_about_as_often_as_not_and_never_harmed_much():
    for seed in range(5):
        fitted = fit_correction(*rows(400, 0.0, seed))
        proxy, target, known = rows(2000, 0.0, 100 + seed)
        before, after = (stats.spearmanr(x, target).statistic for x in (proxy, fitted.apply(proxy, known)))
        assert after > before - 0.02


def test_held_out_scores_are_not_fitted_to_their_own_rows():
    """Noise in, no fidelity out: 300 rows with 100 sources could be fitted well, and are not."""
    rng = np.random.default_rng(0)
    sources = rng.choice(np.array([f"s{i}" for i in range(100)], dtype=object), 300)
    fitted = fit_correction(rng.normal(size=300), rng.normal(size=300), Covariates(sources, np.full(300, 9)))
    assert abs(fitted.after) < 0.2


def test_the_fit_is_the_ridge_regression_of_the_formula():
    proxy, target, known = rows(60, 1.0)
    fitted = fit_correction(proxy, target, known)
    log = np.log(known.tokens) - np.log(known.tokens).mean()
    names = list(dict.fromkeys(known.sources.tolist()))
    one_hot = np.array([[source == name for name in names] for source in known.sources], dtype=float)
    design = np.column_stack([np.ones(60), proxy / proxy.std(), log, one_hot])
    penalty = np.diag([0, 0, 3, 3, 3, 3])
    # The same minimum as ordinary least squares with a pseudo-row for each penalty.
    stacked = np.vstack([design, np.sqrt(penalty)])
    weights = np.linalg.lstsq(stacked, np.concatenate([target, np.zeros(6)]), rcond=None)[0]
    np.testing.assert_allclose(fitted.apply(proxy, known), design @ weights, rtol=1e-5)


@pytest.mark.parametrize("constant", ["proxy", "target"])
def test_constant_scores_are_left_alone(constant):
    proxy, target, known = rows(100, 1.0)
    proxy, target = (np.zeros(100) if constant == name else x for name, x in (("proxy", proxy), ("target", target)))
    with np.errstate(all="ignore"):
        fitted = fit_correction(proxy, target, known)
    assert np.isfinite(fitted.apply(proxy, known)).all()
    if constant == "target":
        assert not fitted.helps


def test_unknown_sources_and_missing_scores():
    fitted = fit_correction(*rows(400, 1.0))
    new = Covariates(np.array(["new", "a"], dtype=object), np.array([100, 100]))
    found = fitted.apply(np.array([0.3, np.nan]), new)
    assert np.isfinite(found[0])
    assert np.isnan(found[1])
