"""Low-rank validation gradients: what they keep, and that they contract as the truncated gradient does."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from iprox.influence import low_rank as low_rank_module
from iprox.influence.gradients import LayerGradient, LowRankGradient, contract
from iprox.influence.low_rank import leading_directions, truncated
from iprox.influence.query import DenseQuery, LowRankQuery, layer_query


def gradient(m: int, n: int, decay: float, seed: int = 0, bias: bool = False) -> LayerGradient:
    generator = torch.Generator().manual_seed(seed)
    U, _ = torch.linalg.qr(torch.randn(m, min(m, n), generator=generator, dtype=torch.float64))
    V, _ = torch.linalg.qr(torch.randn(n, min(m, n), generator=generator, dtype=torch.float64))
    sigma = torch.logspace(0, -decay, min(m, n), dtype=torch.float64)
    return LayerGradient((U * sigma) @ V.mT, torch.randn(m, generator=generator, dtype=torch.float64) if bias else None)


@given(
    m=st.integers(2, 20),
    n=st.integers(2, 20),
    decay=st.floats(0, 6),
    keep=st.floats(0.3, 0.999),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_what_is_kept_is_at_least_what_was_asked_and_no_more_ranks_than_that(m, n, decay, keep, seed):
    weight = gradient(m, n, decay, seed).weight
    left, right, lost = truncated(weight, keep)
    rest = (weight - left @ right.mT).square().sum().item()
    total = weight.square().sum().item()
    assert lost.item() == pytest.approx(rest, abs=1e-9)
    assert rest <= (1 - keep**2) * total + 1e-9
    sigma = torch.linalg.svdvals(weight)
    rank = left.shape[1]
    if rank > 1:  # one rank fewer would not do
        assert sigma[rank - 1 :].square().sum() > (1 - keep**2) * total - 1e-9


def low_rank(weight: torch.Tensor, bias: torch.Tensor | None) -> LowRankGradient:
    left, right, lost = truncated(weight, 0.9)
    return LowRankGradient(left, right, bias, lost)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(24, 16), (16, 24)])
def test_contracting_equals_the_truncated_gradient(shape, bias):
    m, n = shape
    tasks = [gradient(m, n, 3, seed, bias) for seed in (0, 1, 2)]
    query = layer_query([low_rank(task.weight, task.bias) for task in tasks], torch.float64)
    assert isinstance(query, LowRankQuery)
    assert query.flops == 2 * sum(query.ranks) * (m + n) < 2 * 3 * m * n
    h, delta = torch.randn(5, 7, n, dtype=torch.float64), torch.randn(5, 7, m, dtype=torch.float64)
    scores = query.contract(h, delta)
    for column, task in enumerate(tasks):
        left, right, _ = truncated(task.weight, 0.9)
        expected = contract(h, delta, LayerGradient(left @ right.mT, task.bias))
        torch.testing.assert_close(scores[:, column], expected, rtol=1e-9, atol=1e-9)


def test_a_gradient_of_rank_zero_adds_nothing_but_its_bias():
    whole, bias = gradient(8, 6, 1, bias=True), torch.randn(8, dtype=torch.float64)
    nothing = LowRankGradient(whole.weight[:, :0], whole.weight.mT[:, :0], bias, torch.zeros(()))
    h, delta = torch.randn(3, 4, 6, dtype=torch.float64), torch.randn(3, 4, 8, dtype=torch.float64)
    for others in ([], [low_rank(whole.weight, whole.bias)]):
        scores = layer_query([nothing, *others], torch.float64).contract(h, delta)
        torch.testing.assert_close(scores[:, 0], delta.sum(1) @ bias)


def test_whole_gradients_are_contracted_with_as_they_are():
    tasks = [gradient(12, 10, 3, seed) for seed in (0, 1)]
    query = layer_query(tasks, torch.float64)
    assert isinstance(query, DenseQuery)
    assert query.flops == 2 * 2 * 12 * 10
    h, delta = torch.randn(3, 4, 10, dtype=torch.float64), torch.randn(3, 4, 12, dtype=torch.float64)
    torch.testing.assert_close(query.contract(h, delta)[:, 1], contract(h, delta, tasks[1]))
    with pytest.raises(ValueError, match="all low-rank or all dense"):
        layer_query([tasks[0], low_rank(tasks[1].weight, None)], torch.float64)


def test_wide_gradients_are_sketched_until_enough_is_kept(monkeypatch):
    weight = gradient(60, 50, 1.5).weight
    exact, _, _ = truncated(weight, 0.97)
    monkeypatch.setattr(low_rank_module, "WHOLE_GRAM", 10)
    monkeypatch.setattr(low_rank_module, "FIRST_SKETCH", 4)
    left, right, lost = truncated(weight, 0.97)
    assert (weight - left @ right.mT).square().sum().item() == pytest.approx(lost.item(), rel=1e-6)
    assert lost <= (1 - 0.97**2) * weight.square().sum()
    assert exact.shape[1] <= left.shape[1] <= exact.shape[1] + 2
    state = torch.get_rng_state()
    again, _, _ = truncated(weight, 0.97)
    assert torch.equal(again, left)
    assert torch.equal(torch.get_rng_state(), state)  # the caller's random numbers are not touched
    squares, directions = leading_directions(weight, 8)
    torch.testing.assert_close(squares[:4].sqrt(), torch.linalg.svdvals(weight)[:4], rtol=5e-2, atol=0)
    torch.testing.assert_close(directions.mT @ directions, torch.eye(8, dtype=torch.float64))
