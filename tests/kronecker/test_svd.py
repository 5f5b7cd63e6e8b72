import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from iprox.kronecker.svd import along, thin_svd


def with_spectrum(m: int, n: int, sigma: torch.Tensor, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    sides = [torch.randn(width, len(sigma), generator=generator, dtype=torch.float64) for width in (m, n)]
    U, V = (torch.linalg.qr(side)[0] for side in sides)
    return U * sigma @ V.mT


@settings(deadline=None)
@given(st.integers(1, 30), st.integers(1, 30), st.integers(0, 5), st.floats(0, 6))
def test_agrees_with_lapack_and_gives_the_matrix_back(m, n, seed, decades):
    k = min(m, n)
    S = with_spectrum(m, n, torch.logspace(0, -decades, k, dtype=torch.float64), seed)
    U, sigma, Vh = thin_svd(S)
    assert (U.shape, sigma.shape, Vh.shape) == ((m, k), (k,), (k, n))
    torch.testing.assert_close(sigma, torch.linalg.svdvals(S), rtol=1e-4, atol=1e-10)
    torch.testing.assert_close(U * sigma @ Vh, S, rtol=0, atol=1e-13)
    # Orthonormal as far as rounding, squared by the Gram matrix, lets it be.
    for basis in (U, Vh.mT):
        torch.testing.assert_close(basis.mT @ basis, torch.eye(k, dtype=S.dtype), rtol=0, atol=1e-3)


@pytest.mark.parametrize("shape", [(12, 7), (7, 12)])
def test_a_matrix_of_low_rank_comes_back_and_a_zero_one_is_zero(shape):
    S = with_spectrum(*shape, torch.tensor([3.0, 1e-9, 0.0], dtype=torch.float64), 0)
    U, sigma, Vh = thin_svd(S)
    torch.testing.assert_close(U * sigma @ Vh, S, rtol=0, atol=1e-14)
    U, sigma, Vh = thin_svd(torch.zeros_like(S))
    assert not sigma.any()
    assert not (U * sigma @ Vh).any()


def test_along_orders_images_by_length():
    S = torch.diag(torch.tensor([1.0, 3.0, 0.0], dtype=torch.float64))
    units, lengths, directions = along(S, torch.eye(3, dtype=torch.float64))
    assert lengths.tolist() == [3.0, 1.0, 0.0]
    torch.testing.assert_close(units * lengths @ directions, S)
