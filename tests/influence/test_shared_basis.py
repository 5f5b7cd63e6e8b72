"""Examples in shared bases: against each example's whole gradient, in float64."""

from dataclasses import replace

import pytest
import torch
from jobs import preconditioned, scorer_of_batches

from iprox.influence.gradients import LowRankGradient
from iprox.influence.scorer import BatchScorer
from iprox.influence.shared_basis import shared_in_turn, shared_queries
from iprox.influence.validation_gradients import example_gradients, gradients_in_turn, mean_gradient
from iprox.kronecker.eigen import EigenBasis, kronecker_curvature, together
from iprox.models.layers import influence_layers
from iprox.proxy.compress import derive_proxy
from iprox.proxy.size import Size

FAMILIES = ["qwen3", "gpt2"]  # without biases, and with


def brute_force(model, pool, rows, damping=None, sample=None):
    """Scores [B, V] with the whole gradient of one example at a time, divided by EK-FAC's curvature if asked."""
    columns = []
    for row in rows:
        query = {"t": mean_gradient(model, [row])}
        if damping is not None:
            query = preconditioned(model, query, sample, damping=damping)
        columns.append(BatchScorer(model, query)(pool)[0])
    return torch.cat(columns, dim=1)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("curved", [False, True])
def test_whole_bases_give_the_score_of_every_example(tiny, family, curved):
    model = tiny.model(family)
    pool, validation = tiny.batch([9, 3, 7, 12], padding=3), tiny.batch([8, 5, 6], seed=1)
    sample = [tiny.batch([6, 10, 7, 4], seed=2)]
    bases = together(kronecker_curvature(model, influence_layers(model), sample)) if curved else None
    queries = shared_queries(example_gradients(model, [validation]), 1.0, bases, 0.2, torch.float64)
    expected = brute_force(model, pool, tiny.rows(validation), *((0.2, sample) if curved else ()))
    scorer = BatchScorer(model, {"t": queries})
    assert scorer.widths == [3]
    torch.testing.assert_close(scorer(pool)[0], expected, rtol=1e-8, atol=1e-11)
    torch.testing.assert_close(scorer(pool, by_token=True)[0].sum(1), expected, rtol=1e-8, atol=1e-11)
    torch.testing.assert_close(queries.kept, torch.ones(3, dtype=torch.float64))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("curved", [False, True])
def test_gradients_of_some_layers_at_a_time_give_the_same_scores(tiny, family, curved):
    model, pool = tiny.model(family), tiny.batch([9, 3, 7, 12], padding=3)
    batches = [tiny.batch([8, 5], seed=1), replace(tiny.batch([6, 4, 7], seed=3), indices=[4, 2, 3])]
    bases = together(kronecker_curvature(model, influence_layers(model), [pool])) if curved else None
    whole = shared_queries(example_gradients(model, batches), 0.9, bases, 0.2, torch.float64)
    norms, parts = gradients_in_turn(model, batches, memory=5_000)
    parts = list(parts)
    assert len(parts) > 2
    assert all(0 < len(each[0]) < len(influence_layers(model)) for each in parts)
    queries = shared_in_turn(parts, norms, 0.9, bases, 0.2, torch.float64)
    expected, scores = (BatchScorer(model, {"t": each})(pool)[0] for each in (whole, queries))
    torch.testing.assert_close(scores, expected, rtol=1e-8, atol=1e-11)
    torch.testing.assert_close(queries.norms, whole.norms)
    (whole_norms, [at_once]) = gradients_in_turn(model, batches)
    torch.testing.assert_close(norms, whole_norms)
    assert len(at_once[0]) == len(influence_layers(model))


@pytest.mark.parametrize("family", FAMILIES)
def test_bases_hold_the_share_that_was_asked_for_and_cost_less(tiny, family):
    model, pool = tiny.model(family), tiny.batch([9, 3, 7, 12])
    gradients = example_gradients(model, [tiny.batch([12, 9, 10, 7, 11, 8], seed=1)])
    whole, cut = (shared_queries(gradients, keep, dtype=torch.float64) for keep in (1.0, 0.9))
    assert (cut.kept**2).mean() >= 0.9**2 - 0.02  # the bases are found from random columns
    assert cut.kept.max() < 1
    torch.testing.assert_close(cut.norms, whole.norms)
    for name, query in cut.layers.items():
        full = whole.layers[name]
        # What is left out is what the score of the whole gradient has beyond this one's.
        left, right = query.left.mT @ query.left, query.right.mT @ query.right
        torch.testing.assert_close(left, torch.eye(len(left), dtype=left.dtype), rtol=0, atol=1e-10)
        torch.testing.assert_close(right, torch.eye(len(right), dtype=right.dtype), rtol=0, atol=1e-10)
        assert query.flops <= full.flops
    assert sum(q.flops for q in cut.layers.values()) < 0.9 * sum(q.flops for q in whole.layers.values())
    exact, _ = BatchScorer(model, {"t": whole})(pool)
    near, _ = BatchScorer(model, {"t": cut})(pool)
    assert torch.corrcoef(torch.stack([exact.flatten(), near.flatten()]))[0, 1] > 0.95


@pytest.mark.parametrize("family", FAMILIES)
def test_examples_cosines_sum_to_the_cosine_with_their_mean(tiny, family):
    model, pool, validation = tiny.model(family), tiny.batch([9, 3, 7]), tiny.batch([4, 8, 5], seed=1)
    expected, _ = BatchScorer(model, {"t": mean_gradient(model, [validation])}, normalize="cosine")(pool)
    queries = shared_queries(example_gradients(model, [validation]), 1.0, dtype=torch.float64)
    scorer = BatchScorer(model, {"t": queries}, normalize="cosine")
    (weights,) = scorer.weights
    scores, _ = scorer(pool)
    torch.testing.assert_close((scores * torch.tensor(weights)).sum(1, keepdim=True), expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("estimator", ["tracin", "ekfac", "kfac"])
@pytest.mark.parametrize("on_proxy", [False, True])
def test_scores_by_example_average_to_the_score_of_the_task(tiny, estimator, on_proxy):
    model, pool = tiny.model("qwen2"), tiny.batch([9, 3, 7])
    sample = [tiny.batch([12, 9], seed=2)]
    proxy, _ = derive_proxy(model, sample, Size(sparsity=0.5))
    validation = {"a": [tiny.batch([8, 5], seed=1)], "b": [tiny.batch([6, 7, 4], seed=3)]}
    on, target = (proxy, model) if on_proxy else (model, None)
    how = {"estimator": estimator, "query_norm": 1.0, "target": target, "sample": sample}
    mean = scorer_of_batches(on, validation, **how)
    each = scorer_of_batches(on, validation, **how, per_example=True)
    assert each.widths == [2, 3]
    scores, _ = each(pool)
    together = torch.stack([part.mean(1) for part in scores.split(each.widths, dim=1)], dim=1)
    torch.testing.assert_close(together, mean(pool)[0], rtol=1e-7, atol=1e-10)


def test_a_layer_that_no_example_moves_costs_nothing(tiny):
    model = tiny.model()
    gradients = example_gradients(model, [tiny.batch([6, 5], seed=1)])
    silent = next(iter(influence_layers(model)))
    for each in gradients:
        each[silent].left.zero_()
    queries = shared_queries(gradients, 0.9, dtype=torch.float64)
    assert silent not in queries.layers
    assert torch.isfinite(queries.kept).all()
    other = shared_queries(example_gradients(model, [tiny.batch([5], seed=2)]), 1.0, dtype=torch.float64)
    pool = tiny.batch([9, 3])
    together = BatchScorer(model, {"a": queries, "b": other})
    apart = [BatchScorer(model, {"t": each})(pool)[0] for each in (queries, other)]
    torch.testing.assert_close(together(pool)[0], torch.cat(apart, dim=1))
    torch.testing.assert_close(together(pool, by_token=True)[0].sum(1), torch.cat(apart, dim=1))


def test_layers_that_the_curvature_sample_does_not_move_are_warned_of(tiny, monkeypatch):
    model, batch = tiny.model(), tiny.batch([6, 5])
    real = together(kronecker_curvature(model, influence_layers(model), [batch]))
    silent = sorted(real)[0]
    del real[silent]
    monkeypatch.setattr("iprox.influence.estimators.ekfac.kronecker_curvature", lambda *_, **__: iter([real]))
    with pytest.warns(UserWarning, match=f"no gradient for {silent}"):
        scorer_of_batches(model, {"t": [batch]}, estimator="ekfac", per_example=True, sample=[batch])


def heavy_tailed(rank, tokens, examples, seed):
    """A layer's curvature with eigenvalues that fall like 1/i², and gradients that have it as second moments."""
    generator = torch.Generator().manual_seed(seed)
    falling = 1 / torch.arange(1, rank + 1, dtype=torch.float64) ** 2
    bases = [torch.linalg.qr(torch.randn(rank, rank, generator=generator, dtype=torch.float64))[0] for _ in range(2)]
    left, right = (
        (basis * falling.sqrt()) @ torch.randn(examples, rank, tokens, generator=generator, dtype=torch.float64)
        for basis in bases
    )
    basis = EigenBasis(*bases, tokens * torch.outer(falling, falling))
    return basis, [{"layer": LowRankGradient(*each, None, torch.zeros(()))} for each in zip(left, right, strict=True)]


def test_scaled_bases_cost_less_for_the_same_scores(monkeypatch):
    basis, gradients = heavy_tailed(rank=40, tokens=6, examples=40, seed=0)
    validation, pool = gradients[:8], gradients[8:]
    delta, h = (torch.stack([getattr(each["layer"], side).mT for each in pool]) for side in ("left", "right"))

    def scores(keep):
        query = shared_queries(validation, keep, {"layer": basis}, 0.1, torch.float64).layers["layer"]
        return query.contract(h, delta), query.flops

    exact, _ = scores(1.0)
    scaled, cost = scores(0.95)
    monkeypatch.setattr("iprox.influence.shared_basis.FLOOR", 1e9)  # all scales are equal
    plain, plain_cost = scores(0.95)
    assert cost < 0.8 * plain_cost
    near, far = (torch.corrcoef(torch.stack([exact.flatten(), each.flatten()]))[0, 1] for each in (scaled, plain))
    assert near > 0.9 > far


@pytest.mark.parametrize("curved", [False, True])
def test_bases_of_wide_layers_are_found_in_random_combinations(monkeypatch, curved):
    monkeypatch.setattr("iprox.influence.shared_basis.COLUMNS", 32)
    basis, gradients = heavy_tailed(rank=48, tokens=6, examples=8, seed=1)
    curvature = {"layer": basis} if curved else None
    near = shared_queries(gradients, 0.9, curvature, dtype=torch.float64)
    monkeypatch.setattr("iprox.influence.shared_basis.COLUMNS", 48)
    whole = shared_queries(gradients, 0.9, curvature, dtype=torch.float64)
    torch.testing.assert_close(near.norms, whole.norms)
    assert near.mean == pytest.approx(whole.mean)
    assert near.kept.mean() >= whole.kept.mean() - 0.01
    assert near.layers["layer"].flops <= 1.1 * whole.layers["layer"].flops


def test_gradients_that_are_not_finite_are_refused():
    basis, gradients = heavy_tailed(rank=8, tokens=3, examples=2, seed=0)
    gradients[1]["layer"].left[0, 0] = float("inf")
    with pytest.raises(FloatingPointError, match="not finite"):
        shared_queries(gradients, 0.9, {"layer": basis})
