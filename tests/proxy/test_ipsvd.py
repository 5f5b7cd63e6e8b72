import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from iprox.kronecker.roots import CholeskyRoot
from iprox.proxy.ipsvd import Spectrum, weighted_svd


def weighted_error(error, moment_out, moment_in):
    """‖C_δ^{1/2} E C_h^{1/2}‖_F² = tr(C_δ E C_h Eᵀ), for E [m, n]."""
    return ((moment_out @ error @ moment_in) * error).sum()


def ridged(C: torch.Tensor, ridge: float) -> torch.Tensor:
    return C + ridge * C.diagonal().mean() * torch.eye(len(C), dtype=C.dtype)


def problem(m: int, n: int, seed: int, samples: int | None = None):
    """A weight and the moments of `samples` random tokens, all float64."""
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(m, n, generator=generator, dtype=torch.float64)
    count = samples or 4 * max(m, n)
    h = torch.randn(count, n, generator=generator, dtype=torch.float64) * torch.logspace(0, -2, n, dtype=torch.float64)
    d = torch.randn(count, m, generator=generator, dtype=torch.float64) * torch.logspace(0, -1, m, dtype=torch.float64)
    return W, ridged(h.mT @ h / count, 1e-3), ridged(d.mT @ d / count, 1e-3)


def solve(W, C_h, C_d) -> Spectrum:
    return weighted_svd(W, CholeskyRoot(torch.linalg.cholesky(C_d)), CholeskyRoot(torch.linalg.cholesky(C_h)))


@given(m=st.integers(2, 12), n=st.integers(2, 12), seed=st.integers(0, 1000), data=st.data())
@settings(max_examples=40, deadline=None)
def test_weighted_error_is_the_tail_of_the_singular_values(m, n, seed, data):
    W, C_h, C_d = problem(m, n, seed)
    rank = data.draw(st.integers(1, min(m, n)))
    spectrum = solve(W, C_h, C_d)
    up, down = spectrum.factors(rank)
    error = weighted_error(W - up @ down, C_d, C_h)
    assert error.item() == pytest.approx(spectrum.singular_values[rank:].square().sum().item(), rel=1e-8, abs=1e-10)
    whole = weighted_error(W, C_d, C_h).item()
    assert spectrum.tail(rank) == pytest.approx(error.item() / whole, rel=1e-6, abs=1e-10)


def test_equals_the_closed_form_with_symmetric_roots():
    """The paper's C^{1/2} and our Cholesky factors give the same product up·down."""

    def root(C, power):
        values, vectors = torch.linalg.eigh(C)
        return (vectors * values**power) @ vectors.mT

    W, C_h, C_d = problem(9, 7, 3)
    U, sigma, Vh = torch.linalg.svd(root(C_d, 0.5) @ W @ root(C_h, 0.5), full_matrices=False)
    product = root(C_d, -0.5) @ (U[:, :3] * sigma[:3]) @ Vh[:3] @ root(C_h, -0.5)
    up, down = solve(W, C_h, C_d).factors(3)
    torch.testing.assert_close(up @ down, product)


def test_weighted_error_is_the_dense_kronecker_form():
    W, C_h, C_d = problem(5, 4, 1)
    vec = W.reshape(-1)  # row-major vec: (C_d ⊗ C_h)
    dense = vec @ torch.kron(C_d, C_h) @ vec
    torch.testing.assert_close(weighted_error(W, C_d, C_h), dense)


def test_no_rank_r_factors_do_better():
    """Not plain SVD, not SVD-LLM whitening, not 200 random pairs fitted by weighted least squares."""
    W, C_h, C_d = problem(10, 8, 5)
    rank = 3
    up, down = solve(W, C_h, C_d).factors(rank)
    best = weighted_error(W - up @ down, C_d, C_h).item()
    identity_m, identity_n = torch.eye(10, dtype=W.dtype), torch.eye(8, dtype=W.dtype)
    for C_out, C_in in ((identity_m, identity_n), (identity_m, C_h), (C_d, identity_n)):
        up, down = solve(W, C_in, C_out).factors(rank)
        assert weighted_error(W - up @ down, C_d, C_h).item() > best
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        up = torch.randn(10, rank, generator=generator, dtype=W.dtype)
        down = torch.linalg.solve(up.mT @ C_d @ up, up.mT @ C_d @ W)  # the best `down` for this `up`
        assert weighted_error(W - up @ down, C_d, C_h).item() >= best


def test_full_rank_gives_the_weight_back_even_where_no_probe_looked():
    """Two probe tokens span two directions; the ridge keeps the others (a fault of the reference code)."""
    W, C_h, C_d = problem(6, 9, 2, samples=2)
    up, down = solve(W, C_h, C_d).factors(6)
    torch.testing.assert_close(up @ down, W, rtol=1e-8, atol=1e-8)


def test_factors_are_balanced_whatever_the_scale_of_the_moments():
    W, C_h, C_d = problem(6, 9, 4)
    up, down = solve(W, C_h, 1e-8 * C_d).factors(4)
    torch.testing.assert_close(up.norm(), down.norm())
    same, _ = solve(W, C_h, C_d).factors(4)
    torch.testing.assert_close(up.norm(), same.norm())


def test_a_zero_weight_has_zero_factors():
    up, down = weighted_svd(torch.zeros(3, 4), None, None).factors(2)
    assert (up @ down == 0).all()
