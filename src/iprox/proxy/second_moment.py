"""Second moments C = E[x xᵀ] from rows that come batch by batch: exact, or as a sketch; their ridge, their roots.

A root R of the ridged moment is all that compression needs: C + λ·mean(eigenvalue)·I = R Rᵀ.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from iprox.proxy.thin_svd import thin_svd

# The ridge that the rule below may choose, as a share of the mean eigenvalue. The lower end keeps every root
# invertible in float64; the upper end is as good as the plain norm.
LEAST_RIDGE, LARGEST_RIDGE = 1e-4, 1e2


class Root(ABC):
    """R [d, d] with R Rᵀ = C."""

    @abstractmethod
    def weigh(self, X: Tensor) -> Tensor:
        """Rᵀ X, for X [d, k]."""

    @abstractmethod
    def unweigh(self, X: Tensor) -> Tensor:
        """R⁻ᵀ X, for X [d, k]: what `weigh` is undone by."""


@dataclass(frozen=True, slots=True)
class CholeskyRoot(Root):
    """R lower triangular. n³/3 FLOPs to make, where an eigendecomposition costs about 9n³."""

    factor: Tensor

    def weigh(self, X: Tensor) -> Tensor:
        """Rᵀ X, for X [d, k]: d²k FLOPs."""
        return self.factor.mT @ X

    def unweigh(self, X: Tensor) -> Tensor:
        """R⁻ᵀ X, for X [d, k]: d²k FLOPs."""
        return torch.linalg.solve_triangular(self.factor.mT, X, upper=True)


@dataclass(frozen=True, slots=True)
class DiagonalRoot(Root):
    """R = diag(scale) [d]."""

    scale: Tensor

    def weigh(self, X: Tensor) -> Tensor:
        """R X, for X [d, k]."""
        return self.scale[:, None] * X

    def unweigh(self, X: Tensor) -> Tensor:
        """R⁻¹ X, for X [d, k]."""
        return X / self.scale[:, None]


@dataclass(frozen=True, slots=True)
class LowRankRoot(Root):
    """R = √level · I + V (√(level + spread) - √level) Vᵀ, symmetric: a low-rank moment over a flat complement.

    Attributes:
        basis: V [d, k], orthonormal.
        spread: eigenvalues above `level` in that basis [k].
        level: eigenvalue of everything else.
    """

    basis: Tensor
    spread: Tensor
    level: float

    def weigh(self, X: Tensor) -> Tensor:
        """R X, for X [d, j]: 4dkj FLOPs."""
        flat = math.sqrt(self.level)
        gain = (self.spread + self.level).sqrt() - flat
        return flat * X + self.basis @ (gain[:, None] * (self.basis.mT @ X))

    def unweigh(self, X: Tensor) -> Tensor:
        """R⁻¹ X, for X [d, j]: 4dkj FLOPs."""
        flat = 1 / math.sqrt(self.level)
        gain = (self.spread + self.level).rsqrt() - flat
        return flat * X + self.basis @ (gain[:, None] * (self.basis.mT @ X))


class SecondMoment(ABC):
    """A running Σ x xᵀ over tokens, in float32 or better, with what the ridge rule needs.

    Attributes:
        width: d.
        tokens: rows counted; set by `finish`.
        examples: examples counted.
        trace: Σ ‖x‖².
        block_squares: Σ_z ‖X_zᵀ X_z‖_F² over examples z with rows X_z.
    """

    def __init__(self, width: int) -> None:
        self.width = width
        self.tokens = 0
        self.examples = 0
        self.trace = 0.0
        self.block_squares = 0.0

    def add(self, x: Tensor) -> None:
        """Count examples in: x [B, L, d], rows that do not count (padding) zero.

        2·B·L·d² FLOPs for the sum (see `_accumulate`) and 2·B·L²·d for the blocks, by their Gram matrices
        (‖XᵀX‖_F = ‖XXᵀ‖_F).
        """
        self.examples += x.shape[0]
        grams = x @ x.mT
        self.trace += float(grams.diagonal(dim1=1, dim2=2).sum(dtype=torch.float64))
        self.block_squares += float(torch.linalg.vector_norm(grams, dtype=torch.float64) ** 2)
        self._accumulate(x.reshape(-1, self.width))

    @abstractmethod
    def _accumulate(self, rows: Tensor) -> None:
        """Count rows [T, d] in."""

    def finish(self, tokens: int) -> None:
        """Turn the sum into a mean over this many tokens."""
        self.tokens = tokens

    @property
    def mean_eigenvalue(self) -> float:
        """tr(C)/d; 0 where no row was reached."""
        return self.trace / max(self.tokens, 1) / self.width

    @abstractmethod
    def squared_norm(self) -> float:
        """‖C‖_F²."""

    @abstractmethod
    def diagonal(self) -> Tensor:
        """E[x_i²] [d]."""

    @abstractmethod
    def root(self, ridge: float) -> Root:
        """A root of C + ridge · mean(eigenvalue) · I, in float64; of I where C is zero."""

    def shrinkage(self) -> float:
        """The ridge by the rule of Ledoit and Wolf, as a share of the mean eigenvalue μ.

        Source: Ledoit and Wolf 2004, "A well-conditioned estimator for large-dimensional covariance matrices". The
        estimate (1-s)·C + s·μI of least expected squared error has s = E‖Ĉ - C‖² / E‖Ĉ - μI‖²; up to a factor it is
        C + s/(1-s)·μI. The error of Ĉ is estimated from its parts. Tokens of one example depend on each other, so
        the parts are examples, not tokens: with Y_z = (N/T) X_zᵀ X_z, whose mean over N examples is Ĉ,
        E‖Ĉ - C‖² ≈ (Σ_z ‖Y_z‖² - N‖Ĉ‖²) / (N(N-1)). Few or very unequal examples thus give a large ridge.
        """
        count, squares = self.examples, self.squared_norm()
        spread = squares - self.width * self.mean_eigenvalue**2
        if count < 2 or spread <= 0:
            return LARGEST_RIDGE  # one example says nothing of how far its moment can be trusted
        error = ((count / self.tokens) ** 2 * self.block_squares - count * squares) / (count * (count - 1))
        share = min(max(error / spread, 0.0), 1.0)
        return min(max(share / max(1 - share, 1 / LARGEST_RIDGE), LEAST_RIDGE), LARGEST_RIDGE)


class ExactMoment(SecondMoment):
    """C itself: d² numbers. 2·T·d² FLOPs for T rows."""

    def __init__(self, width: int, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__(width)
        self.sum = torch.zeros(width, width, device=device, dtype=dtype)

    def _accumulate(self, rows: Tensor) -> None:
        self.sum.addmm_(rows.mT, rows)

    @property
    def matrix(self) -> Tensor:
        """C [d, d]."""
        return self.sum / max(self.tokens, 1)

    def squared_norm(self) -> float:
        """‖C‖_F²."""
        return float(torch.linalg.vector_norm(self.sum, dtype=torch.float64) / max(self.tokens, 1)) ** 2

    def diagonal(self) -> Tensor:
        """E[x_i²] [d]."""
        return self.matrix.diagonal()

    def root(self, ridge: float) -> CholeskyRoot:
        """The Cholesky factor of the ridged moment."""
        level = self.mean_eigenvalue * ridge if self.mean_eigenvalue > 0 else 1.0
        ridged = self.matrix.double()
        ridged.diagonal().add_(level)
        return CholeskyRoot(torch.linalg.cholesky(ridged))


class SketchedMoment(SecondMoment):
    """C by frequent directions: at most 2ℓ·d numbers, for widths whose d² would be too many.

    Source: Ghashami, Liberty, Phillips and Woodruff 2016, "Frequent Directions". The sketch S [≤ 2ℓ, d] holds
    ‖Σ x xᵀ - SᵀS‖₂ ≤ ‖Σ x xᵀ - best rank k‖_F² / (ℓ - k) for every k < ℓ, deterministically and in one pass; with
    d ≤ ℓ or no more than 2ℓ rows it is exact. The trace it loses is known and is spread evenly over all directions,
    as the ridge is. About 25·T·ℓ·d FLOPs for T rows.
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
        """The sketch in ℓ rows: every squared singular value less the (ℓ+1)-th."""
        squares, basis = self._eigen()
        cut = squares[self.directions] if len(squares) > self.directions else squares.new_zeros(())
        kept = (squares[: self.directions] - cut).clamp(min=0).sqrt()
        return (kept[:, None] * basis[:, : self.directions].mT).to(self.sketch.dtype)

    def _eigen(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues [k], descending, and eigenvectors [d, k] of SᵀS; those that are nothing but rounding left out."""
        _, sigma, basis = thin_svd(self.sketch.double())
        kept = sigma > 1e-7 * sigma[:1]
        return sigma[kept].square(), basis[kept].mT

    def squared_norm(self) -> float:
        """‖C‖_F², with the lost trace spread evenly."""
        squares, _ = self._eigen()
        lost = self._lost(squares)
        total = squares.square().sum() + 2 * lost * squares.sum() + self.width * lost**2
        return float(total) / max(self.tokens, 1) ** 2

    def diagonal(self) -> Tensor:
        """E[x_i²] [d], with the lost trace spread evenly."""
        squares = self.sketch.double().square().sum(0)
        return (squares + self._lost(squares)) / max(self.tokens, 1)

    def _lost(self, squares: Tensor) -> float:
        return max(self.trace - float(squares.sum()), 0.0) / self.width

    def root(self, ridge: float) -> LowRankRoot:
        """The symmetric root of the sketch over a flat complement."""
        squares, basis = self._eigen()
        count = max(self.tokens, 1)
        level = self._lost(squares) / count + self.mean_eigenvalue * ridge if self.mean_eigenvalue > 0 else 1.0
        return LowRankRoot(basis, squares / count, level)
