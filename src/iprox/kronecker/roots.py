"""Square roots of second moments (pure maths): R [d, d] with R Rᵀ = C, and products with Rᵀ and its inverse."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor


class Root(ABC):
    """R [d, d] with R Rᵀ = C."""

    @abstractmethod
    def weigh(self, X: Tensor) -> Tensor:
        """Return Rᵀ X, for X [d, k]."""

    @abstractmethod
    def unweigh(self, X: Tensor) -> Tensor:
        """Return R⁻ᵀ X, for X [d, k], the inverse of `weigh`."""


@dataclass(frozen=True, slots=True)
class CholeskyRoot(Root):
    """R lower triangular. It costs n³/3 FLOPs; an eigendecomposition costs about 9n³."""

    factor: Tensor

    def weigh(self, X: Tensor) -> Tensor:
        """Return Rᵀ X, for X [d, k]: d²k FLOPs."""
        return self.factor.mT @ X

    def unweigh(self, X: Tensor) -> Tensor:
        """Return R⁻ᵀ X, for X [d, k]: d²k FLOPs."""
        return torch.linalg.solve_triangular(self.factor.mT, X, upper=True)


@dataclass(frozen=True, slots=True)
class DiagonalRoot(Root):
    """R = diag(scale) [d]."""

    scale: Tensor

    @classmethod
    def of_squares(cls, squares: Tensor) -> DiagonalRoot:
        """Return diag(√squares), with `squares` at least a thousandth of their mean, so that it can be inverted."""
        floor = float(squares.mean()) * 1e-3
        return cls(squares.clamp(min=floor or 1.0).sqrt())

    def weigh(self, X: Tensor) -> Tensor:
        """Return R X, for X [d, k]."""
        return self.scale[:, None] * X

    def unweigh(self, X: Tensor) -> Tensor:
        """Return R⁻¹ X, for X [d, k]."""
        return X / self.scale[:, None]


@dataclass(frozen=True, slots=True)
class LowRankRoot(Root):
    """R = √level · I + V (√(level + spread) - √level) Vᵀ, symmetric: a low-rank moment over a flat complement.

    Attributes:
        basis: V [d, k], orthonormal.
        spread: eigenvalues above `level` in that basis [k].
        level: eigenvalue of all other directions.
    """

    basis: Tensor
    spread: Tensor
    level: float

    def weigh(self, X: Tensor) -> Tensor:
        """Return R X, for X [d, j]: 4dkj FLOPs."""
        flat = math.sqrt(self.level)
        return self._scaled(X, flat, (self.spread + self.level).sqrt() - flat)

    def unweigh(self, X: Tensor) -> Tensor:
        """Return R⁻¹ X, for X [d, j]: 4dkj FLOPs."""
        flat = 1 / math.sqrt(self.level)
        return self._scaled(X, flat, (self.spread + self.level).rsqrt() - flat)

    def _scaled(self, X: Tensor, flat: float, gain: Tensor) -> Tensor:
        """Return (flat · I + V diag(gain) Vᵀ) X."""
        return flat * X + self.basis @ (gain[:, None] * (self.basis.mT @ X))
