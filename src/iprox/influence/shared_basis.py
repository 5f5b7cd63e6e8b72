"""Gradients of many validation examples in shared bases (pure maths), for scores by validation example.

Contracting a candidate with V gradients one by one costs V times as much as with their mean. The examples of a task
have similar directions, so each layer gets one basis for outputs and one for inputs (a Tucker-2 decomposition,
De Lathauwer et al. 2000): G_v ≈ U C_v Wᵀ. A candidate is projected once, to Uᵀ G(z) W, whose inner product with the
small C_v is its score for v.

The inverse curvature of an influence function is applied in its eigenbases, where it is a division.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from iprox.influence.gradients import LowRankGradient
from iprox.kronecker.eigen import EigenBasis
from iprox.kronecker.moments import append_ones
from iprox.models.layers import weight_shape
from iprox.models.precision import accumulation_dtype

# Smallest number of random columns that an example's gradient is multiplied by to find the bases.
PROBES = 16


@dataclass(frozen=True, slots=True)
class SharedQuery:
    """The gradients of V examples in one layer, prepared for contraction.

    Attributes:
        left: U [m, r].
        right: W [n, s], where n includes the bias.
        cores: C_v, flattened [V, r·s].
        bias: whether the layer has a bias.
    """

    left: Tensor
    right: Tensor
    cores: Tensor
    bias: bool

    @property
    def flops(self) -> float:
        """FLOPs per token: 2(mr + ns + rs)."""
        r, s = self.left.shape[1], self.right.shape[1]
        return 2.0 * (self.left.numel() + self.right.numel() + r * s)

    @property
    def example_flops(self) -> float:
        """FLOPs per candidate: 2Vrs."""
        return 2.0 * self.cores.numel()

    def contract(self, h: Tensor, delta: Tensor, by_token: bool = False) -> Tensor:
        """Return ⟨G(z), G_v⟩ for every candidate z of a batch and every v, [B, V].

        Args:
            h: inputs [B, L, n].
            delta: output gradients [B, L, m], zero on padding.
            by_token: return the terms of the sum over tokens, [B, L, V]. 2Vrs FLOPs per token.
        """
        dtype = accumulation_dtype(h)
        inputs, outputs = append_ones(h, self.bias) @ self.right, delta @ self.left
        if by_token:
            cores = self.cores.unflatten(1, (outputs.shape[-1], inputs.shape[-1]))
            return torch.einsum("blr,vrs,bls->blv", outputs.to(dtype), cores, inputs.to(dtype))
        return (outputs.mT @ inputs).flatten(1).to(dtype) @ self.cores.mT


@dataclass(frozen=True, slots=True)
class SharedQueries:
    """The gradients of V examples of one task.

    Attributes:
        layers: queries by layer name, without the layers that hold almost nothing.
        norms: norm of each whole gradient, float64 [V].
        kept: share of each norm that the bases keep [V].
    """

    layers: dict[str, SharedQuery]
    norms: Tensor
    kept: Tensor

    def of_layer(self, name: str, layer: nn.Module) -> SharedQuery:
        """Return the examples' gradients in one layer, with rank 0 if it was left out."""
        if name in self.layers:
            return self.layers[name]
        (m, n), weight = weight_shape(layer), next(layer.parameters())
        cores = weight.new_zeros(len(self.norms), 0, dtype=accumulation_dtype(weight))
        return SharedQuery(weight.new_zeros(m, 0), weight.new_zeros(n, 0), cores, bias=False)

    def mean_norm(self) -> float:
        """Return the norm of the mean gradient as the bases represent it. Vrs FLOPs per layer."""
        squares = [query.cores.mean(0).double().square().sum().item() for query in self.layers.values()]
        return sum(squares) ** 0.5


class _Layer:
    """One layer's gradients, in the eigenbases of its curvature if it has one."""

    def __init__(self, parts: Sequence[LowRankGradient], curvature: EigenBasis | None, damping: float) -> None:
        self.bias = parts[0].bias is not None
        self.curvature = curvature
        self.parts = [_with_bias(part) for part in parts]
        if curvature is not None:
            rotate = curvature.left.mT, curvature.right.mT
            self.parts = [(rotate[0] @ left, rotate[1] @ right) for left, right in self.parts]
            ridge = damping * curvature.eigenvalues.mean()
            self.divisors = curvature.eigenvalues + ridge if ridge > 0 else None  # None: all gradients were zero
        else:
            self.divisors = None

    def gradient(self, index: int) -> Tensor:
        """Return the dense gradient of one example, divided by the curvature, [m, n]. 2kmn FLOPs for k tokens."""
        left, right = self.parts[index]
        whole = left @ right.mT
        return whole if self.divisors is None else whole / self.divisors

    def moments(self, weights: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return unbiased estimates of Σ_v w_v G_v G_vᵀ [m, m] and Σ_v w_v G_vᵀ G_v [n, n] from random columns."""
        (m, _), (n, _) = (part.shape for part in self.parts[0])
        probes = max(PROBES, -(-2 * max(m, n) // len(self.parts)))
        outputs, inputs = self.parts[0][0].new_zeros(m, m), self.parts[0][0].new_zeros(n, n)
        for index, weight in enumerate(weights):
            whole = self.gradient(index)
            noise = torch.randn(max(m, n), probes, generator=generator).to(whole)
            image, other = whole @ noise[:n], whole.mT @ noise[:m]
            outputs.addmm_(image, image.mT, alpha=float(weight) / probes)
            inputs.addmm_(other, other.mT, alpha=float(weight) / probes)
        return outputs, inputs

    def query(self, left: Tensor, right: Tensor, dtype: torch.dtype) -> tuple[SharedQuery, Tensor, Tensor]:
        """Return the layer's query in these bases, each example's squared norm in them [V], and in full [V]."""
        cores, norms = [], []
        for index in range(len(self.parts)):
            whole = self.gradient(index)
            cores.append((left.mT @ whole @ right).flatten())
            norms.append(whole.square().sum(dtype=torch.float64))
        stacked = torch.stack(cores)
        if self.curvature is not None:
            left, right = self.curvature.left @ left, self.curvature.right @ right
        query = SharedQuery(left.to(dtype), right.to(dtype), stacked, self.bias)
        return query, stacked.double().square().sum(1), torch.stack(norms)


def shared_queries(
    examples: Sequence[Mapping[str, LowRankGradient]],
    keep: float,
    curvature: Mapping[str, EigenBasis] | None = None,
    damping: float = 0.1,
    dtype: torch.dtype = torch.float32,
) -> SharedQueries:
    """Return the examples' gradients, divided by the curvature if there is one, in shared bases.

    Reads each gradient twice, one layer at a time: 4V(k + PROBES)mn + 2V·mn·min(r, s) FLOPs per layer, and
    memory for one dense gradient and the cores.

    Args:
        examples: exact gradients of a task's examples by layer (`iprox.influence.validation_gradients` with keep 1).
        keep: share of the Frobenius norm that the bases keep, over all layers and examples; every example has the
            same weight, whatever its norm. Directions with the least squared norm per FLOP are dropped first.
        curvature: curvature by layer, for (F + λI)⁻¹; the gradients of other layers are used as they are.
        damping: λ as a share of the mean eigenvalue of each layer's curvature.
        dtype: dtype of the products with candidates.

    Raises:
        FloatingPointError: a gradient divided by the curvature is not finite.
    """
    names, curvature = list(examples[0]), curvature or {}
    norms = torch.stack([torch.stack([part.squared_norm() for part in each.values()]).sum() for each in examples])
    weights = torch.where(norms > 0, 1 / norms, torch.zeros_like(norms)).double().cpu()
    generator = torch.Generator().manual_seed(0)

    def layer(name: str) -> _Layer:
        return _Layer([each[name] for each in examples], curvature.get(name), damping)

    spectra: list[tuple[Tensor, Tensor]] = []
    for name in names:
        for moment in layer(name).moments(weights, generator):
            values, vectors = torch.linalg.eigh(moment)
            spectra.append((values.flip(0).clamp(min=0), vectors.flip(1)))
    ranks = _ranks([values for values, _ in spectra], keep)
    queries: dict[str, SharedQuery] = {}
    held = totals = torch.zeros(len(examples), dtype=torch.float64)
    for place, name in enumerate(names):
        (_, left), (_, right) = spectra[2 * place], spectra[2 * place + 1]
        r, s = ranks[2 * place], ranks[2 * place + 1]
        query, part, total = layer(name).query(left[:, :r], right[:, :s], dtype)
        held, totals = held + part.cpu(), totals + total.cpu()
        if r and s:
            queries[name] = query
    if not torch.isfinite(totals).all():
        raise FloatingPointError(
            "a validation gradient divided by the curvature is not finite; try --set dtype=float32"
        )
    kept = torch.where(totals > 0, held / totals, torch.ones_like(totals)).sqrt()
    return SharedQueries(queries, totals.sqrt(), kept)


def _ranks(spectra: Sequence[Tensor], keep: float) -> list[int]:
    """Return how many leading directions of each basis to keep so that the rest hold at most 1 − keep² of the total.

    A direction of a basis of m costs 2m FLOPs per token. The error of a Tucker decomposition is at most the sum of
    the squared norms that its two bases drop.
    """
    if keep >= 1:
        return [len(values) for values in spectra]
    total = sum(float(values.sum()) for values in spectra) / 2
    held = torch.cat(list(spectra))
    worth = torch.cat([values / len(values) for values in spectra])
    order = worth.argsort(stable=True)
    dropped = torch.zeros_like(order, dtype=torch.bool)
    dropped[order[held[order].cumsum(0) <= (1 - keep**2) * total]] = True
    return [int((~part).sum()) for part in dropped.split([len(values) for values in spectra])]


def _with_bias(gradient: LowRankGradient) -> tuple[Tensor, Tensor]:
    """Return the factors [m, k] and [n, k] in float32 or better, with the bias as the gradient's last column."""
    dtype = accumulation_dtype(gradient.left)
    left, right = gradient.left.to(dtype), gradient.right.to(dtype)
    if gradient.bias is None:
        return left, right
    left = torch.cat([left, gradient.bias.to(dtype)[:, None]], dim=1)
    corner = torch.block_diag(right, right.new_ones(1, 1))
    return left, corner
