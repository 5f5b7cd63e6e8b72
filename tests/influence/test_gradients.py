import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from iprox.influence.gradients import (
    LayerGradient,
    NormShape,
    contract,
    norm_flops,
    sketch_pays,
    sketched_norms,
    squared_norms,
    summed_gradient,
)
from iprox.influence.projection import signs


def tensors(B, L, m, n, seed):
    generator = torch.Generator().manual_seed(seed)
    h = torch.randn(B, L, n, generator=generator, dtype=torch.float64)
    delta = torch.randn(B, L, m, generator=generator, dtype=torch.float64)
    query = LayerGradient(
        torch.randn(m, n, generator=generator, dtype=torch.float64),
        torch.randn(m, generator=generator, dtype=torch.float64),
    )
    return h, delta, query, torch.einsum("btm,btn->bmn", delta, h)


sizes = st.tuples(st.integers(1, 4), st.integers(1, 40), st.integers(1, 12), st.integers(1, 12), st.integers(0, 999))


@given(sizes)
@settings(max_examples=50, deadline=None)
def test_contractions_equal_those_of_the_dense_gradients(size):
    """Short and long examples, wide and narrow layers: every branch against the gradient itself."""
    h, delta, query, G = tensors(*size)
    bias = delta.sum(1)
    torch.testing.assert_close(contract(h, delta, query), (G * query.weight).sum((1, 2)) + bias @ query.bias)
    torch.testing.assert_close(contract(h, delta, LayerGradient(query.weight, None)), (G * query.weight).sum((1, 2)))
    torch.testing.assert_close(squared_norms(h, delta, bias=True), G.square().sum((1, 2)) + bias.square().sum(-1))
    torch.testing.assert_close(squared_norms(h, delta, bias=False), G.square().sum((1, 2)))
    total = summed_gradient(h, delta, bias=True)
    torch.testing.assert_close(total.weight, G.sum(0))
    torch.testing.assert_close(total.bias, bias.sum(0))
    assert summed_gradient(h, delta, bias=False).bias is None


def test_bfloat16_sums_are_kept_in_float32():
    h, delta, query, _ = tensors(2, 4000, 8, 8, 0)
    low = [tensor.bfloat16() for tensor in (h, delta)]
    scores = contract(*low, query.to(torch.bfloat16))
    assert scores.dtype == torch.float32
    rounded = LayerGradient(query.weight.bfloat16().double(), query.bias.bfloat16().double())
    exact = contract(low[0].double(), low[1].double(), rounded)
    # A sum kept in bfloat16 would be off by per cents after 4,000 tokens.
    scale = (h.norm(dim=(1, 2)) * delta.norm(dim=(1, 2))).max()
    assert ((scores.double() - exact).abs() / scale).max() < 1e-3
    assert summed_gradient(*low, bias=True).weight.dtype == torch.float32


def test_squared_norm_counts_the_bias():
    gradient = LayerGradient(torch.full((2, 2), 2.0), torch.full((2,), 3.0))
    assert gradient.squared_norm().item() == pytest.approx(16 + 18)
    assert LayerGradient(gradient.weight, None).squared_norm().item() == pytest.approx(16)


def test_norms_are_charged_the_cheaper_of_their_two_ways():
    short = 2 * 3 * 3 * (10 + 20)  # two Gram matrices
    long = 2 * 50 * 10 * 20  # the gradient itself
    assert norm_flops([NormShape(10, 20)], [3, 50]) == short + long
    assert norm_flops([NormShape(10, 20)] * 2, [3]) == 2 * short


def test_sketched_norms_are_charged_by_token_where_they_pay():
    assert sketch_pays((10, 20), 6)  # 6 · 30 < 200
    assert not sketch_pays((10, 20), 7)
    assert not sketch_pays((10, 20), 0)
    assert norm_flops([NormShape(10, 20, 6)], [3, 50]) == 2 * 53 * 6 * (10 + 20)
    assert norm_flops([NormShape(10, 20, 7)], [3, 50]) == norm_flops([NormShape(10, 20)], [3, 50])


@given(sizes)
@settings(max_examples=30, deadline=None)
def test_a_sketch_of_orthogonal_signs_is_exact(size):
    """With S Sᵀ = kI, ‖G S‖²/k is ‖G‖²."""
    B, L, m, n, seed = size
    h, delta, _, G = tensors(B, L, m, n, seed)
    hadamard = torch.ones(1, 1, dtype=torch.float64)
    for _ in range(4):
        hadamard = torch.cat([torch.cat([hadamard, hadamard], 1), torch.cat([hadamard, -hadamard], 1)])
    exact = G.square().sum((1, 2))
    torch.testing.assert_close(sketched_norms(h, delta, False, hadamard[: max(m, n)]), exact)
    with_bias = exact + delta.sum(1).square().sum(-1)
    torch.testing.assert_close(sketched_norms(h, delta, True, hadamard[: max(m, n)]), with_bias)


def test_sketched_norms_are_right_in_the_mean_and_spread_as_they_say():
    h, delta, _, G = tensors(4, 30, 10, 12, 0)
    exact = G.square().sum((1, 2))
    drawn = torch.stack([sketched_norms(h, delta, False, signs(f"{i}", 12, 8).double()) for i in range(2000)]) / exact
    assert (drawn.mean(0) - 1).abs().max() < 4 * drawn.std(0).max() / 2000**0.5
    assert (drawn.std(0) < (2 / 8) ** 0.5).all()
    # Of rank 1: the widest spread there is.
    one = torch.einsum("btm,btn->bmn", delta[:, :1], h[:, :1]).square().sum((1, 2))
    drawn = torch.stack(
        [sketched_norms(h[:, :1], delta[:, :1], False, signs(f"{i}", 12, 8).double()) for i in range(2000)]
    )
    assert ((drawn / one).std(0) > 0.7 * (2 / 8) ** 0.5).all()
    assert ((drawn / one).std(0) < 1.05 * (2 / 8) ** 0.5).all()
