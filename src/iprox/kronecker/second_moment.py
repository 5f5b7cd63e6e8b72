"""Second moments C = E[x xᵀ], accumulated batch by batch, exactly or as a sketch, and their ridge.

Compression only needs a root R of the ridged moment: C + λ·mean(eigenvalue)·I = R Rᵀ.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from iprox.kronecker.roots import CholeskyRoot, LowRankRoot, Root
from iprox.kronecker.svd import thin_svd

# Bounds of the ridge from `SecondMoment.shrinkage`, as shares of the mean eigenvalue. The lower bound keeps every root
# invertible in float64; at the upper bound the weighted norm is close to the plain norm.
LEAST_RIDGE, LARGEST_RIDGE = 1e-4, 1e2


class SecondMoment(ABC):
    """A running sum Σ x xᵀ over tokens, in float32 or better, and the sums for the ridge rule.

    Attributes:
        width: d.
        blocks: whether to sum `block_squares`, which only the ridge rule needs.
        count: divisor of the sum, at least 1; set by `finish`.
        rows: number of nonzero rows.
        examples: number of examples.
        trace: Σ ‖x‖².
        block_squares: Σ_z ‖X_zᵀ X_z‖_F² over examples z with rows X_z.
    """

    def __init__(self, width: int, blocks: bool = True) -> None:
        self.width = width
        self.blocks = blocks
        self.count = 1
        self.rows = 0
        self.examples = 0
        self.trace = 0.0
        self.block_squares = 0.0
        self._root: tuple[float, Root] | None = None  # cached for layers with the same input

    def add(self, x: Tensor) -> None:
        """Add examples x [B, L, d]; rows that do not count (padding) must be zero.

        2·B·L·d² FLOPs for the sum (see `_accumulate`) and 2·B·L²·d for the blocks, by their Gram matrices
        (‖XᵀX‖_F = ‖XXᵀ‖_F).
        """
        self.examples += x.shape[0]
        if self.blocks:
            grams = x @ x.mT
            squares = grams.diagonal(dim1=1, dim2=2)
            self.block_squares += float(torch.linalg.vector_norm(grams, dtype=torch.float64) ** 2)
        else:
            squares = x.square().sum(-1)
        self.rows += int(squares.count_nonzero())
        self.trace += float(squares.sum(dtype=torch.float64))
        self._accumulate(x.reshape(-1, self.width))

    @abstractmethod
    def _accumulate(self, rows: Tensor) -> None:
        """Add rows [T, d]."""

    def finish(self, count: int) -> None:
        """Turn the sum into a mean over this many tokens or examples."""
        self.count = max(count, 1)
        self._root = None

    @property
    def mean_eigenvalue(self) -> float:
        """tr(C)/d; 0 without rows."""
        return self.trace / self.count / self.width

    @abstractmethod
    def squared_norm(self) -> float:
        """Return ‖C‖_F²."""

    @abstractmethod
    def diagonal(self) -> Tensor:
        """Return E[x_i²] [d]."""

    def root(self, ridge: float) -> Root:
        """Return a root of C + ridge · mean(eigenvalue) · I in float64, or of I if C is zero; caches the last one."""
        if self._root is None or self._root[0] != ridge:
            self._root = (ridge, self._make_root(self.mean_eigenvalue * ridge if self.mean_eigenvalue > 0 else 1.0))
        return self._root[1]

    @abstractmethod
    def _make_root(self, level: float) -> Root:
        """Return a root of C + level · I, in float64."""

    def shrinkage(self) -> float:
        """Return the ridge by the rule of Ledoit and Wolf, as a share of the mean eigenvalue μ.

        Source: Ledoit and Wolf 2004, "A well-conditioned estimator for large-dimensional covariance matrices". The
        estimate (1-s)·Ĉ + s·μI with the least expected squared error has s = E‖Ĉ - C‖² / E‖Ĉ - μI‖²; up to a factor it
        is Ĉ + s/(1-s)·μI. The error of Ĉ is estimated from examples rather than tokens, as the tokens of an example
        depend on each other: with Y_z = (N/T) X_zᵀ X_z, whose mean over N examples is Ĉ,
        E‖Ĉ - C‖² ≈ (Σ_z ‖Y_z‖² - N‖Ĉ‖²) / (N(N-1)). Few or very unequal examples thus give a large ridge.
        """
        N, squares = self.examples, self.squared_norm()
        spread = squares - self.width * self.mean_eigenvalue**2
        if N < 2 or spread <= 0:
            return LARGEST_RIDGE  # one example does not show the error of its moment
        error = ((N / self.count) ** 2 * self.block_squares - N * squares) / (N * (N - 1))
        share = min(max(error / spread, 0.0), 1.0)
        return min(max(share / max(1 - share, 1 / LARGEST_RIDGE), LEAST_RIDGE), LARGEST_RIDGE)


class ExactMoment(SecondMoment):
    """C itself: d² numbers. 2·T·d² FLOPs for T rows."""

    def __init__(self, width: int, device: torch.device, dtype: torch.dtype, blocks: bool = True) -> None:
        super().__init__(width, blocks)
        self.sum = torch.zeros(width, width, device=device, dtype=dtype)

    def _accumulate(self, rows: Tensor) -> None:
        torch.addmm(self.sum, rows.mT, rows, out=self.sum)  # `addmm_` is not in torch's FLOP counter

    @property
    def matrix(self) -> Tensor:
        """C [d, d]."""
        return self.sum / self.count

    def squared_norm(self) -> float:
        """Return ‖C‖_F²."""
        return float(torch.linalg.vector_norm(self.sum, dtype=torch.float64) / self.count) ** 2

    def diagonal(self) -> Tensor:
        """Return E[x_i²] [d]."""
        return self.matrix.diagonal()

    def _make_root(self, level: float) -> CholeskyRoot:
        """Return the Cholesky factor of the ridged moment."""
        ridged = self.matrix.double()
        ridged.diagonal().add_(level)
        return CholeskyRoot(torch.linalg.cholesky(ridged))


class SketchedMoment(SecondMoment):
    """C by frequent directions: at most 2ℓ·d numbers, for widths whose d² would take too much memory.

    Source: Ghashami, Liberty, Phillips and Woodruff 2016, "Frequent Directions". The sketch S [≤ 2ℓ, d] satisfies
    ‖Σ x xᵀ - SᵀS‖₂ ≤ ‖Σ x xᵀ - best rank k‖_F² / (ℓ - k) for every k < ℓ, deterministically and in one pass; with
    d ≤ ℓ or at most 2ℓ rows it is exact. The lost trace is known and is spread evenly over all directions, like the
    ridge. About 25·T·ℓ·d FLOPs for T rows.
    """

    def __init__(self, width: int, directions: int, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__(width)
        self.directions = min(directions, width)
        self.sketch = torch.zeros(0, width, device=device, dtype=dtype)

    def _accumulate(self, rows: Tensor) -> None:
        room = 2 * self.directions
        for chunk in rows.to(self.sketch.dtype).split(self.directions):
            self.sketch = torch.cat([self.sketch, chunk])
            if len(self.sketch) > room:
                self.sketch = self._shrunk()

    def _shrunk(self) -> Tensor:
        """Return the sketch in ℓ rows: the (ℓ+1)-th squared singular value is subtracted from all others."""
        squares, basis = self._eigen()
        cut = squares[self.directions] if len(squares) > self.directions else squares.new_zeros(())
        kept = (squares[: self.directions] - cut).clamp(min=0).sqrt()
        return (kept[:, None] * basis[:, : self.directions].mT).to(self.sketch.dtype)

    def _eigen(self) -> tuple[Tensor, Tensor]:
        """Return eigenvalues [k], descending, and eigenvectors [d, k] of SᵀS, without those that are rounding error."""
        _, sigma, basis = thin_svd(self.sketch.double())
        kept = sigma > 1e-7 * sigma[:1]
        return sigma[kept].square(), basis[kept].mT

    def squared_norm(self) -> float:
        """Return ‖C‖_F², with the lost trace spread evenly."""
        squares, _ = self._eigen()
        lost = self._lost(squares)
        total = squares.square().sum() + 2 * lost * squares.sum() + self.width * lost**2
        return float(total) / self.count**2

    def diagonal(self) -> Tensor:
        """Return E[x_i²] [d], with the lost trace spread evenly."""
        squares = self.sketch.double().square().sum(0)
        return (squares + self._lost(squares)) / self.count

    def _lost(self, squares: Tensor) -> float:
        """Return the trace that the sketch lost, per direction."""
        return max(self.trace - float(squares.sum()), 0.0) / self.width

    def _make_root(self, level: float) -> LowRankRoot:
        """Return the symmetric root of the sketch plus a multiple of the identity."""
        squares, basis = self._eigen()
        return LowRankRoot(basis, squares / self.count, self._lost(squares) / self.count + level)
