"""Contractions of per-example gradients (pure maths), without forming the gradients.

An example's gradient of a linear layer is G = Σ_t δ_t h_tᵀ [m, n] (and Σ_t δ_t for the bias). Scoring only needs
contractions of G, and these do not need G itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from iprox.models.precision import accumulation_dtype


@dataclass(slots=True)
class LayerGradient:
    """A gradient of one linear layer: weight [m, n] and bias [m] (None if the layer has none)."""

    weight: Tensor
    bias: Tensor | None

    def to(self, dtype: torch.dtype) -> LayerGradient:
        """Return the gradient in another dtype."""
        return LayerGradient(self.weight.to(dtype), None if self.bias is None else self.bias.to(dtype))

    def plus(self, other: LayerGradient, factor: float = 1.0) -> LayerGradient:
        """Return the sum with a multiple of another gradient of the same layer."""
        bias = None if self.bias is None or other.bias is None else self.bias + factor * other.bias
        return LayerGradient(self.weight + factor * other.weight, bias)

    def over(self, divisor: float) -> LayerGradient:
        """Return the gradient divided by a number."""
        return LayerGradient(self.weight / divisor, None if self.bias is None else self.bias / divisor)

    def squared_norm(self) -> Tensor:
        """Return ‖weight‖² + ‖bias‖², a scalar."""
        total = self.weight.square().sum()
        return total if self.bias is None else total + self.bias.square().sum()


@dataclass(slots=True)
class LowRankGradient:
    """A gradient of one linear layer as a product: weight ≈ left rightᵀ.

    Attributes:
        left: [m, k].
        right: [n, k].
        bias: [m], or None if the layer has none.
        lost: squared norm of the truncated part, a scalar.
    """

    left: Tensor
    right: Tensor
    bias: Tensor | None
    lost: Tensor

    def squared_norm(self) -> Tensor:
        """Return ‖weight‖² + ‖bias‖² including the truncated part, a scalar. 2k²(m+n) FLOPs."""
        dtype = accumulation_dtype(self.left)
        left, right = self.left.to(dtype), self.right.to(dtype)
        total = ((left.mT @ left) * (right.mT @ right)).sum() + self.lost
        return total if self.bias is None else total + self.bias.square().sum()


# A gradient of the whole model: layer name -> gradient of that layer.
ModelGradient = dict[str, LayerGradient]

# The low-rank gradient of one example, by layer name.
ExampleGradient = dict[str, LowRankGradient]

# A mean gradient that is low-rank in the layers where this is cheaper.
TruncatedGradient = dict[str, LayerGradient | LowRankGradient]

# A task's validation gradients: their mean, dense or low-rank, or one gradient per example.
TaskGradient = ModelGradient | TruncatedGradient | Sequence[ExampleGradient]


def mean_squared_norm(parts: Sequence[LowRankGradient]) -> Tensor:
    """Return ‖mean of the gradients‖² of one layer without the truncated parts, a scalar. 2mn·Σk FLOPs."""
    dtype = accumulation_dtype(parts[0].left)
    left, right = (torch.cat([getattr(part, side).to(dtype) for part in parts], 1) for side in ("left", "right"))
    total = (left @ right.mT).square().sum()
    biases = [part.bias for part in parts if part.bias is not None]
    if biases:
        total = total + torch.stack(biases).to(dtype).sum(0).square().sum()
    return total / len(parts) ** 2


def summed_gradient(h: Tensor, delta: Tensor, bias: bool) -> LayerGradient:
    """Return the gradient summed over a batch. 2·T·m·n FLOPs for T tokens.

    The product is computed in the inputs' dtype, four times as fast on hardware with bfloat16; it accumulates in
    float32 and rounds once, by at most 2⁻⁹. The result is float32 or better, so that batches can be summed.

    Args:
        h: inputs [B, L, n].
        delta: output gradients [B, L, m], zero on padding.
        bias: whether the layer has a bias.
    """
    dtype = accumulation_dtype(h)
    rows, gradients = h.flatten(0, -2), delta.flatten(0, -2)
    return LayerGradient((gradients.mT @ rows).to(dtype), gradients.sum(0, dtype=dtype) if bias else None)


def contract(h: Tensor, delta: Tensor, query: LayerGradient, by_token: bool = False) -> Tensor:
    """Return ⟨G(z), query⟩ for every example z of a batch, Σ_t δ_tᵀ Q h_t plus the bias term, [B].

    2·T·m·n FLOPs, as many as a forward pass of the layer, and T·min(m, n) numbers of memory, as the product is
    taken on the narrower side. Products are in the inputs' dtype, the sum in float32 or better.

    Args:
        h: inputs [B, L, n].
        delta: output gradients [B, L, m], zero on padding.
        query: gradient to contract with, in the dtype of h.
        by_token: return the terms of the sum over t, [B, L].
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
    """Return whether sketching a layer's gradient norms (`sketched_norms`) costs less than forming the gradient.

    Gram matrices would be cheaper for short examples, but then an example's score would depend on the padding of its
    batch.
    """
    m, n = shape
    return 0 < sketch * (m + n) < m * n


class NormShape(NamedTuple):
    """What the cost of a layer's gradient norms depends on.

    Attributes:
        m: number of outputs.
        n: number of inputs.
        sketch: number of random signs that estimate the norms where this is cheaper; 0 is exact.
        share: share of the tokens that use the layer.
    """

    m: int
    n: int
    sketch: int = 0
    share: float = 1.0


def norm_flops(layers: Iterable[NormShape], lengths: Sequence[float]) -> float:
    """Return the FLOPs of norms for examples of some lengths."""
    total = 0.0
    for m, n, sketch, share in layers:
        length = share * np.asarray(lengths, float)
        if sketch_pays((m, n), sketch):
            total += 2.0 * sketch * (m + n) * length.sum()
        else:
            total += np.minimum(2 * length**2 * (m + n), 2 * length * m * n).sum()
    return float(total)


def squared_norms(h: Tensor, delta: Tensor, bias: bool) -> Tensor:
    """Return ‖G(z)‖² for every example of a batch, without forming G where that is cheaper, [B].

    ‖Σ_t δ_t h_tᵀ‖² = Σ_{s,t} (δ_s·δ_t)(h_s·h_t): two Gram matrices, 2L²(m+n) FLOPs per example, against 2Lmn for
    G itself. Short examples (L < mn/(m+n)) use Gram matrices; long ones form G, a few examples at a time.
    Products are in the inputs' dtype, sums in float32 or better.

    Args:
        h: inputs [B, L, n].
        delta: output gradients [B, L, m], zero on padding.
        bias: whether the layer has a bias (adds ‖Σ_t δ_t‖²).
    """
    dtype = accumulation_dtype(h)
    count, length, n = h.shape
    m = delta.shape[2]
    if length * (m + n) < m * n:
        norms = ((h @ h.mT) * (delta @ delta.mT)).sum((1, 2), dtype=dtype)
    else:
        at_once = max(1, count * length * max(m, n) // (m * n))  # no more memory than the inputs
        parts = [
            torch.linalg.vector_norm(d.mT @ x, dim=(1, 2), dtype=dtype).square()
            for x, d in zip(h.split(at_once), delta.split(at_once), strict=True)
        ]
        norms = torch.cat(parts)
    return norms + _bias_norms(delta) if bias else norms


def sketched_norms(h: Tensor, delta: Tensor, bias: bool, signs: Tensor) -> Tensor:
    """Return an unbiased estimate of ‖G(z)‖² for every example of a batch from k columns of random signs S, [B].

    The estimate is ‖G S‖²/k, or ‖GᵀS‖²/k where m > n, so that the k images lie on the narrower side. With
    G S = Σ_t δ_t (Sᵀh_t)ᵀ that is 2Lk(m+n) FLOPs per example; two Gram matrices cost 2L²(m+n). The relative standard
    deviation is at most √(2/k), reached by a gradient of rank 1; independent signs per layer reduce it further
    (figures in docs/results/speed.md).

    Args:
        h: inputs [B, L, n].
        delta: output gradients [B, L, m], zero on padding.
        bias: whether the layer has a bias (adds ‖Σ_t δ_t‖², exactly).
        signs: ±1 [max(m, n), k], in the dtype of h.
    """
    wide, narrow = (delta, h) if delta.shape[2] > h.shape[2] else (h, delta)
    images = (wide @ signs).mT @ narrow
    norms = torch.linalg.vector_norm(images, dim=(1, 2), dtype=accumulation_dtype(h)).square() / signs.shape[1]
    return norms + _bias_norms(delta) if bias else norms


def _bias_norms(delta: Tensor) -> Tensor:
    return delta.sum(1, dtype=accumulation_dtype(delta)).square().sum(-1)
