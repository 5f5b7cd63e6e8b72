import numpy as np
import pytest
from scipy import stats

from iprox.audits.held_out import FEWEST, HeldOutFidelity
from iprox.data import Encoded, iter_batches
from iprox.errors import InputError
from iprox.influence.estimators import base
from iprox.influence.job import Checkpoint, Job
from iprox.influence.scorer import BatchScorer
from iprox.influence.validation_gradients import mean_gradient
from iprox.proxy.compress import derive_proxy
from iprox.proxy.size import Size
from iprox.settings import InfluenceSection


def encoded(count, seed):
    """Random examples of several lengths, supervised on their second half."""
    rng = np.random.default_rng(seed)
    rows = [rng.integers(1, 64, int(rng.integers(6, 14))).astype(np.int32) for _ in range(count)]
    return [Encoded(row, np.where(np.arange(len(row)) < len(row) // 2, -100, row), False) for row in rows]


@pytest.fixture
def pair(tiny):
    """A target and a proxy of it, in float64."""
    model = tiny.model("gpt-neox")
    proxy, _ = derive_proxy(model, [tiny.batch([9, 6]), tiny.batch([8, 7], seed=1)], Size(0.5))
    return model, proxy


ROWS, VALIDATION = encoded(24, 1), {"a": encoded(3, 2), "b": encoded(4, 3)}


def job(model, target=None, sample=(), **settings):
    """TracIn of raw gradients unless a test says otherwise."""
    settings = InfluenceSection(**{"estimator": "tracin", "normalize": "none", "per_example": False, **settings})
    return Job(
        settings=settings,
        checkpoints=[Checkpoint(model, target=target)],
        validation=VALIDATION,
        encoder=object(),
        sample=sample,
        batch_tokens=64,
    )


def whole_scores(model, queries):
    scorer, scores = BatchScorer(model, queries), np.empty((len(ROWS), len(queries)))
    for batch in iter_batches(ROWS, 64):
        scores[batch.indices] = scorer(batch)[0].numpy()
    return scores


@pytest.mark.parametrize(("query_norm", "tolerance"), [(1.0, 1e-12), (None, 0.1)])
def test_fidelity_is_the_correlation_of_whole_gradients_or_nearly(pair, query_norm, tolerance):
    model, proxy = pair
    watched = HeldOutFidelity(job(model, query_norm=query_norm), ROWS)
    queries = {task: mean_gradient(model, iter_batches(rows, 64)) for task, rows in VALIDATION.items()}
    scores, truth = whole_scores(proxy, queries), whole_scores(model, queries)
    wanted = np.mean([stats.spearmanr(x, y).statistic for x, y in zip(scores.T, truth.T, strict=True)])
    assert 0.2 < wanted < 0.99  # a proxy that is neither useless nor perfect
    fidelity = watched.watch(proxy)
    assert fidelity() == fidelity() == pytest.approx(wanted, abs=tolerance)
    assert watched.with_bound(proxy)[1] < fidelity()
    cost = watched.cost.contraction
    assert cost["proxy"] == cost["target"] if query_norm == 1 else cost["proxy"] < cost["target"]


@pytest.mark.parametrize(
    ("changed", "on_target", "tolerance"),
    [
        ({"query_norm": 1.0}, False, 1e-9),  # the proxy's own
        ({"query_norm": 1.0, "normalize": "cosine"}, True, 1e-9),
        ({"query_norm": 1.0, "estimator": "ekfac"}, True, 1e-9),
        ({"query_norm": 1.0, "estimator": "ekfac"}, False, 1e-9),
        # With what the cuts lose.
        ({"query_norm": 0.97}, True, 0.1),
        ({}, False, 0.1),
        ({"estimator": "ekfac"}, True, 0.1),
        ({"estimator": "ekfac"}, False, 0.1),
    ],
)
def test_what_is_watched_is_how_candidates_are_scored(pair, changed, on_target, tolerance):
    """Against whole gradients scored by `iprox score`'s own means."""
    model, proxy = pair
    sample = ROWS[:12] if changed.get("estimator") == "ekfac" else []
    watched = HeldOutFidelity(job(model, sample=sample, **changed), ROWS, query_on_target=on_target)
    whole = {**changed, "query_norm": 1.0}
    of_proxy = job(proxy, target=model if on_target else None, sample=sample, **whole).scorer()[0]
    of_target = job(model, sample=sample, **whole).scorer()[0]
    columns = []
    for scorer in (of_proxy, of_target):
        scores = np.empty((len(ROWS), 2))
        for batch in iter_batches(ROWS, 64):
            scores[batch.indices] = scorer(batch)[0].numpy()
        columns.append(scores)
    wanted = np.mean([stats.spearmanr(x, y).statistic for x, y in zip(columns[0].T, columns[1].T, strict=True)])
    fidelity = watched.watch(proxy)
    assert fidelity() == fidelity() == pytest.approx(wanted, abs=tolerance)


def test_norms_are_sketched_on_proxies_and_exact_on_the_target(pair, monkeypatch):
    model, proxy = pair
    found, spent = [], []
    for size in (0, 3):
        monkeypatch.setattr(base, "NORM_SKETCH", size)
        watched = HeldOutFidelity(job(model, normalize="cosine"), ROWS)
        found.append(watched.watch(proxy)())
        spent.append(watched.cost.contraction)
    assert found[0] != found[1]
    assert spent[0]["target"] == spent[1]["target"]
    assert spent[0]["proxy"] > spent[1]["proxy"]


def test_the_target_is_faithful_to_itself(pair):
    model, _ = pair
    for query_norm in (None, 1.0):
        assert HeldOutFidelity(job(model, query_norm=query_norm), ROWS).watch(model)() > (
            0.97 if query_norm is None else 1 - 1e-9
        )


def test_too_few_rows_are_refused(pair):
    with pytest.raises(InputError, match="15 held-out examples"):
        HeldOutFidelity(job(pair[0]), ROWS[: FEWEST - 1])


def test_a_collapsed_model_has_no_fidelity(pair):
    """Of one whose last norm is zero all logits and all gradients are."""
    model, proxy = pair
    watched = HeldOutFidelity(job(model), ROWS)
    for parameter in proxy.gpt_neox.final_layer_norm.parameters():
        parameter.data.zero_()
    with pytest.raises(InputError, match="the proxy's scores of the 24 held-out rows for a are all equal"):
        watched.watch(proxy)()
    assert all(np.isnan(each) for each in watched.with_bound(proxy))  # which a search takes for not faithful enough
    for parameter in model.gpt_neox.final_layer_norm.parameters():
        parameter.data.zero_()
    with pytest.raises(InputError, match="the target's scores of the 24 held-out rows for a are all equal"):
        HeldOutFidelity(job(model), ROWS)
