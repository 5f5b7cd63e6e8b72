"""Contractions of per-example gradients (pure maths): nothing here forms a per-example weight gradient.

An example's gradient of a linear layer is G = Σ_t δ_t h_tᵀ [m, n] (and Σ_t δ_t for the bias). Everything scoring
needs is a contraction of it with something, and a contraction never needs G itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from iprox.models.precision import accumulation_dtype


@dataclass(slots=True)
class LayerGradient:
    """A gradient of one linear layer: weight [m, n] and bias [m] (None for a layer without)."""

    weight: Tensor
    bias: Tensor | None

    def to(self, dtype: torch.dtype) -> LayerGradient:
        """The same gradient in another dtype."""
        return LayerGradient(self.weight.to(dtype), None if self.bias is None else self.bias.to(dtype))

    def squared_norm(self) -> Tensor:
        """‖weight‖² + ‖bias‖², a scalar."""
        total = self.weight.square().sum()
        return total if self.bias is None else total + self.bias.square().sum()


@dataclass(slots=True)
class LowRankGradient:
    """A gradient of one linear layer as a product: weight ≈ left rightᵀ.

    Attributes:
        left: [m, k].
        right: [n, k].
        bias: [m], or None for a layer without.
        lost: squared norm of what the product leaves out, a scalar.
    """

    left: Tensor
    right: Tensor
    bias: Tensor | None
    lost: Tensor

    def squared_norm(self) -> Tensor:
        """‖weight‖² + ‖bias‖², what was left out included; a scalar. 2k²(m+n) FLOPs."""
        dtype = accumulation_dtype(self.left)
        left, right = self.left.to(dtype), self.right.to(dtype)
        total = ((left.mT @ left) * (right.mT @ right)).sum() + self.lost
        return total if self.bias is None else total + self.bias.square().sum()


# A gradient of the whole model: layer name -> gradient of that layer.
ModelGradient = dict[str, LayerGradient]

# The same of one example, low-rank.
ExampleGradient = dict[str, LowRankGradient]

# A mean gradient that is low-rank in the layers where that is cheaper.
TruncatedGradient = dict[str, LayerGradient | LowRankGradient]

# A task's validation gradients: their mean, whole or low-rank, or those of its examples one by one.
TaskGradient = ModelGradient | TruncatedGradient | Sequence[ExampleGradient]


def mean_squared_norm(parts: Sequence[LowRankGradient]) -> Tensor:
    """‖mean of the gradients‖² of one layer, without what their products leave out; a scalar. 2mn·Σk FLOPs."""
    dtype = accumulation_dtype(parts[0].left)
    left, right = (torch.cat([getattr(part, side).to(dtype) for part in parts], 1) for side in ("left", "right"))
    total = (left @ right.mT).square().sum()
    biases = [part.bias for part in parts if part.bias is not None]
    if biases:
        total = total + torch.stack(biases).to(dtype).sum(0).square().sum()
    return total / len(parts) ** 2


def summed_gradient(h: Tensor, delta: Tensor, bias: bool) -> LayerGradient:
    """The gradient summed over a whole batch. 2·T·m·n FLOPs for T tokens.

    The product is taken in the inputs' dtype, which hardware for bfloat16 does four times as fast; it is summed in
    float32 inside and rounded once, by 2⁻⁹ at most. What comes of it is float32 or better, to be summed over batches.

    Args:
        h: inputs [B, L, n].
        delta: output gradients [B, L, m], zero on padding.
        bias: whether the layer has one.
    """
    dtype = accumulation_dtype(h)
    rows, gradients = h.flatten(0, -2), delta.flatten(0, -2)
    return LayerGradient((gradients.mT @ rows).to(dtype), gradients.sum(0, dtype=dtype) if bias else None)


def contract(h: Tensor, delta: Tensor, query: LayerGradient, by_token: bool = False) -> Tensor:
    """⟨G(z), query⟩ for every example z of a batch: Σ_t δ_tᵀ Q h_t, plus the bias term. Returns [B].

    2·T·m·n FLOPs, the same as a forward pass of the layer, and T·min(m, n) numbers of memory: the product is
    taken on the narrower side. Products are in the inputs' dtype, the sum in float32 or better.

    Args:
        h: inputs [B, L, n].
        delta: output gradients [B, L, m], zero on padding.
        query: what to contract with, in the dtype of h.
        by_token: leave the sum over t to the caller, and return its terms [B, L].
    """
    m, n = query.weight.shape
    dtype = accumulation_dtype(h)
    product = (delta @ query.weight) * h if n < m else (h @ query.weight.mT) * delta
    scores = product.sum(2 if by_token else (1, 2), dtype=dtype)
    if query.bias is not None:
        gradients = delta.to(dtype) if by_token else delta.sum(1, dtype=dtype)
        scores = scores + gradients @ query.bias.to(dtype)
    return scores


def sketch_pays(shape: tuple[int, int], sketch: int) -> bool:
    """Whether norms of a layer's gradients are sketched (`sketched_norms`), whatever an example's length.

    Where a sketch costs less than the gradient itself. Short examples would be cheaper by their Gram matrices, but then
    an example's score would hang on how far its batch is padded.
    """
    m, n = shape
    return 0 < sketch * (m + n) < m * n


def norm_flops(shapes: Sequence[tuple[int, int]], lengths: Sequence[float], sketch: int = 0) -> float:
    """FLOPs of norms for layers of shapes (m, n) and examples of some lengths: sketched where that pays, else exact."""
    length = np.asarray(lengths, float)
    total = 0.0
    for m, n in shapes:
        if sketch_pays((m, n), sketch):
            total += 2.0 * sketch * (m + n) * length.sum()
        else:
            total += np.minimum(2 * length**2 * (m + n), 2 * length * m * n).sum()
    return float(total)


def squared_norms(h: Tensor, delta: Tensor, bias: bool) -> Tensor:
    """‖G(z)‖² for every example of a batch, without G where that is cheaper. Returns [B].

    ‖Σ_t δ_t h_tᵀ‖² = Σ_{s,t} (δ_s·δ_t)(h_s·h_t): two Gram matrices, 2L²(m+n) FLOPs an example, against 2Lmn for
    G itself; short examples (L < mn/(m+n)) take the first way, long ones the second, a few examples at a time.
    Products are in the inputs' dtype, sums in float32 or better.

    Args:
        h: inputs [B, L, n].
        delta: output gradients [B, L, m], zero on padding.
        bias: whether the layer has one (adds ‖Σ_t δ_t‖²).
    """
    dtype = accumulation_dtype(h)
    count, length, n = h.shape
    m = delta.shape[2]
    if length * (m + n) < m * n:
        norms = ((h @ h.mT) * (delta @ delta.mT)).sum((1, 2), dtype=dtype)
    else:
        at_once = max(1, count * length * max(m, n) // (m * n))  # no more numbers than the inputs themselves
        parts = [
            torch.linalg.vector_norm(d.mT @ x, dim=(1, 2), dtype=dtype).square()
            for x, d in zip(h.split(at_once), delta.split(at_once), strict=True)
        ]
        norms = torch.cat(parts)
    return norms + _bias_norms(delta) if bias else norms


def sketched_norms(h: Tensor, delta: Tensor, bias: bool, signs: Tensor) -> Tensor:
    """‖G(z)‖² for every example of a batch, estimated without bias from k columns of random signs S. Returns [B].

    ‖G S‖²/k, or ‖GᵀS‖²/k where m > n, so that the k images of an example are of the narrower side. With
    G S = Σ_t δ_t (Sᵀh_t)ᵀ that is 2Lk(m+n) FLOPs an example, where two Gram matrices cost 2L²(m+n). The relative
    standard deviation is at most √(2/k), of a gradient of rank 1; layers with signs of their own average further
    (docs/method.md has what that comes to on a model).

    Args:
        h: inputs [B, L, n].
        delta: output gradients [B, L, m], zero on padding.
        bias: whether the layer has one (adds ‖Σ_t δ_t‖², exactly).
        signs: ±1 [max(m, n), k], in the dtype of h.
    """
    wide, narrow = (delta, h) if delta.shape[2] > h.shape[2] else (h, delta)
    images = (wide @ signs).mT @ narrow
    norms = torch.linalg.vector_norm(images, dim=(1, 2), dtype=accumulation_dtype(h)).square() / signs.shape[1]
    return norms + _bias_norms(delta) if bias else norms


def _bias_norms(delta: Tensor) -> Tensor:
    return delta.sum(1, dtype=accumulation_dtype(delta)).square().sum(-1)
