"""Random projections of gradients to a few thousand numbers that preserve inner products (pure maths).

Layer ℓ has two matrices of random signs, L_ℓ [a, m] and R_ℓ [b, n], and an example's features are

    f(z) = Σ_ℓ L_ℓ G_ℓ(z) R_ℓᵀ / √(ab) = Σ_ℓ Σ_t (L_ℓ δ_t)(R_ℓ h_t)ᵀ / √(ab)        [a, b], D = ab numbers.

E⟨f(z), f(z′)⟩ = Σ_ℓ ⟨G_ℓ(z), G_ℓ(z′)⟩: the signs are independent with E[LᵀL] = aI, and the cross terms of different
layers vanish in expectation. The projection is two-sided, as in LoGra (Choe et al., arXiv:2405.13954) and Bergson, so
G is never formed and L and R are small. Those concatenate the features of layers; summing them lets every layer have
all D numbers. The error for the same D is then far smaller (figures in docs/results/speed.md), because a layer's
gradient is close to low-rank, so that a and b matter rather than their product.

A bias's gradient Σ_t δ_t is the gradient of one more column of W, whose input is always 1.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from iprox.errors import InputError
from iprox.influence.gradients import LayerGradient, LowRankGradient
from iprox.models.precision import accumulation_dtype


def sides(dimension: int) -> tuple[int, int]:
    """Return the divisors a ≤ b of D = ab that are closest to each other.

    Raises:
        InputError: b is more than 4 times a.
    """
    a = next((a for a in range(math.isqrt(max(dimension, 0)), 0, -1) if dimension % a == 0), 0)
    if a < 1 or dimension > 4 * a * a:
        raise InputError(f"dimension {dimension}: must be a product of two similar numbers; use a power of two")
    return a, dimension // a


def signs(key: str, rows: int, columns: int) -> Tensor:
    """Return a matrix of ±1, int8 [rows, columns], the same for a key on every machine and in every version.

    The bits are PCG64's raw output, which numpy keeps stable, unlike the distributions built on it.
    """
    seed = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=16).digest(), "little")
    words = np.random.PCG64(seed).random_raw(-(-rows * columns // 64)).astype("<u8")
    bits = np.unpackbits(words.view(np.uint8), count=rows * columns)
    return torch.from_numpy(bits.reshape(rows, columns).astype(np.int8) * 2 - 1)


@dataclass(frozen=True, slots=True)
class LayerProjection:
    """L and R of one layer.

    Attributes:
        left: L, ±1 [a, m].
        right: R, ±1 [b, n].
        bias: R's column for the bias, ±1 [b].
    """

    left: Tensor
    right: Tensor
    bias: Tensor

    @classmethod
    def of(cls, key: str, shape: tuple[int, int], dimension: int, like: Tensor) -> LayerProjection:
        """Return the projection of a layer.

        Args:
            key: key that determines the signs.
            shape: (m, n).
            dimension: D.
            like: tensor with the device and dtype of the signs.
        """
        a, b = sides(dimension)
        left, right = signs(f"{key}/left", a, shape[0]), signs(f"{key}/right", b, shape[1] + 1)
        return cls(left.to(like), right[:, :-1].contiguous().to(like), right[:, -1].to(like))

    @property
    def scale(self) -> float:
        """1/√(ab)."""
        return (len(self.left) * len(self.right)) ** -0.5

    def of_tokens(self, h: Tensor, delta: Tensor, bias: bool) -> Tensor:
        """Return the features of a batch [B, a, b], in float32 or better. 2(am + bn + ab) FLOPs per token.

        Args:
            h: inputs [B, L, n].
            delta: output gradients [B, L, m], zero on padding.
            bias: whether the layer has a bias.
        """
        inputs = h @ self.right.mT
        if bias:
            inputs = inputs + self.bias
        return ((delta @ self.left.mT).mT @ inputs).to(accumulation_dtype(h)) * self.scale

    def of_gradient(self, gradient: LayerGradient) -> Tensor:
        """Return the features [..., a, b] of dense gradients, weight [..., m, n] and bias [..., m]."""
        left, right = self.left.to(gradient.weight.dtype), self.right.to(gradient.weight.dtype)
        features = left @ gradient.weight @ right.mT
        if gradient.bias is not None:
            features = features + (gradient.bias @ left.mT)[..., None] * self.bias.to(left.dtype)
        return features * self.scale

    def of_low_rank(self, gradient: LowRankGradient) -> Tensor:
        """Return the features [a, b] of a low-rank gradient."""
        dtype = accumulation_dtype(gradient.left)
        left, right = self.left.to(dtype), self.right.to(dtype)
        features = (left @ gradient.left.to(dtype)) @ (right @ gradient.right.to(dtype)).mT
        if gradient.bias is not None:
            features = features + torch.outer(left @ gradient.bias.to(dtype), self.bias.to(dtype))
        return features * self.scale
