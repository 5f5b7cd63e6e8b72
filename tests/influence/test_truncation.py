"""Which directions of validation gradients are kept: those that hold most of the norm for what they cost."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from iprox.influence.gradients import LayerGradient, LowRankGradient
from iprox.influence.low_rank import Directions, chosen_ranks, low_rank_queries
from iprox.influence.scorer import BatchScorer
from iprox.influence.validation_gradients import mean_gradient


@settings(deadline=None, max_examples=40)
@given(m=st.integers(2, 14), n=st.integers(2, 14), keep=st.floats(0.5, 0.999), seed=st.integers(0, 50))
def test_what_a_cut_says_it_lost_is_lost_and_no_rank_could_lose_less(m, n, keep, seed):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(m, n, generator=generator, dtype=torch.float64)
    directions = Directions.of(weight, keep)
    sigma = torch.linalg.svdvals(weight)
    for rank in range(len(directions.squares) + 1):
        part = directions.cut(LayerGradient(weight, None), rank)
        error = (weight - part.left @ part.right.mT).square().sum()
        torch.testing.assert_close(error, part.lost, rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(error, sigma[rank:].square().sum(), rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(part.squared_norm(), weight.square().sum())
    # Enough of them to keep the share of this layer alone.
    assert directions.squares.sum() >= keep**2 * directions.total * (1 - 1e-12)


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(1, 5), st.integers(2, 9), st.lists(st.floats(0, 10), min_size=1, max_size=3)),
        min_size=1,
        max_size=3,
    ),
    st.floats(0.3, 0.99),
)
def test_the_one_threshold_is_the_cheapest_way_to_keep_what_it_keeps(shapes, keep):
    layers = []
    for m, n, squares in shapes:
        s = torch.tensor(sorted(squares, reverse=True), dtype=torch.float64)
        zeros = torch.zeros(1, len(s), dtype=torch.float64)
        layers.append(Directions(zeros.expand(m, -1), zeros.expand(n, -1), s, s.sum()))
    ranks = chosen_ranks(layers, keep)
    prices = [m + n for m, n, _ in shapes]

    def holds(chosen) -> float:
        return sum(float(each.squares[:rank].sum()) for each, rank in zip(layers, chosen, strict=True))

    def costs(chosen) -> int:
        return sum(price * rank for price, rank in zip(prices, chosen, strict=True))

    total = holds([len(each.squares) for each in layers])
    assert holds(ranks) >= keep**2 * total - 1e-9
    for other in itertools.product(*(range(len(each.squares) + 1) for each in layers)):
        if costs(other) <= costs(ranks):  # whatever else costs no more holds no more
            assert holds(other) <= holds(ranks) + 1e-9 * (1 + total)


def test_a_gradient_of_zero_has_rank_zero():
    assert chosen_ranks([Directions.of(torch.zeros(4, 3, dtype=torch.float64), 0.9)], 0.9) == [0]


@pytest.mark.parametrize("family", ["qwen3", "gpt2", "qwen3-moe"])  # without biases; with; with experts
def test_scores_are_those_of_the_cut_gradients_and_cheaper(tiny, family):
    model = tiny.model(family)
    queries = {task: mean_gradient(model, [tiny.batch([12, 9], seed=seed)]) for seed, task in enumerate("ab", 1)}
    cut = low_rank_queries(queries, 0.8)
    scorer, exact = BatchScorer(model, cut), BatchScorer(model, queries)
    assert scorer.contraction_flops < exact.contraction_flops
    dense = {
        task: {
            name: LayerGradient(part.left @ part.right.mT, part.bias) if isinstance(part, LowRankGradient) else part
            for name, part in layers.items()
        }
        for task, layers in cut.items()
    }
    for task, layers in queries.items():
        whole = sum(part.weight.square().sum() for part in layers.values())
        lost = sum((part.weight - dense[task][name].weight).square().sum() for name, part in layers.items())
        assert math.sqrt(1 - lost / whole) >= 0.8
        if family == "qwen3":  # of the norm with biases, which are kept whole, where there are any
            assert scorer.kept[task] == pytest.approx(math.sqrt(1 - lost / whole))
    batch = tiny.batch([12, 10, 7, 6], seed=6)
    torch.testing.assert_close(scorer(batch)[0], BatchScorer(model, dense)(batch)[0], rtol=1e-9, atol=1e-12)


def test_a_coarser_cut_costs_less(tiny):
    model = tiny.model()
    queries = {task: mean_gradient(model, [tiny.batch([12, 9], seed=seed)]) for seed, task in enumerate("ab", 1)}
    fine, coarse = (BatchScorer(model, low_rank_queries(queries, keep)) for keep in (0.95, 0.6))
    assert min(fine.kept.values()) >= 0.95
    assert 0.6 <= min(coarse.kept.values()) < 0.95
    assert coarse.contraction_flops < fine.contraction_flops


def test_a_share_near_one_leaves_gradients_whole(tiny):
    model = tiny.model()
    queries = {"a": mean_gradient(model, [tiny.batch([9, 8])])}
    cut = low_rank_queries(queries, 1 - 1e-12)
    assert any(part is queries["a"][name] for name, part in cut["a"].items())
    exact, batch = BatchScorer(model, queries), tiny.batch([8, 6], seed=4)
    torch.testing.assert_close(BatchScorer(model, cut)(batch)[0], exact(batch)[0], rtol=1e-4, atol=0)
