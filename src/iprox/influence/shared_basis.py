"""Gradients of many validation examples in shared bases (pure maths), for scores by validation example.

Contracting a candidate with V gradients one by one costs V times as much as with their mean. The examples of a task
have similar directions, so each layer gets one basis for outputs and one for inputs (a Tucker-2 decomposition,
De Lathauwer et al. 2000): G_v ≈ U C_v Wᵀ. A candidate is projected once, to Uᵀ G(z) W, whose inner product with the
small C_v is its score for v.

The inverse curvature of an influence function is applied in its eigenbases, where it is a division. Divided gradients
have no low rank, but most of what they hold is in directions that candidates have little of. The bases are therefore
found in coordinates that are scaled by what candidates have, as the curvature measured it: a direction is worth what it
adds to the variance of the scores, not to the norm (`benchmarks/bases.py` measures the gain).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from iprox.influence.gradients import LowRankGradient
from iprox.kronecker.eigen import EigenBasis
from iprox.kronecker.moments import append_ones
from iprox.models.layers import signal_like, weight_shape
from iprox.models.precision import accumulation_dtype

# The ordered directions of wide layers are found in what this many random combinations of a task's gradients span.
COLUMNS = 512

# Directions that together hold less than this fraction of what may be lost are dropped early: those of each layer,
# and after every CUT layers those of all layers so far, which bounds memory. One threshold chooses among the rest.
UNSEEN, CUT = 0.25, 14

# Smallest mean eigenvalue of an output or input, as a share of the layer's mean, that its scale follows.
FLOOR = 1e-2


@dataclass(frozen=True, slots=True)
class SharedQuery:
    """The gradients of V examples in one layer, prepared for contraction.

    Attributes:
        left: U [m, r], orthonormal unless the layer has a curvature.
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
        inputs, outputs = append_ones(h, delta, self.bias) @ self.right, delta @ self.left
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
        mean: norm of the mean of the whole gradients.
        kept: share of each norm that the bases keep [V]; with a curvature, of the norm in scaled coordinates.
    """

    layers: dict[str, SharedQuery]
    norms: Tensor
    mean: float
    kept: Tensor

    def of_layer(self, name: str, layer: nn.Module) -> SharedQuery:
        """Return the examples' gradients in one layer, with rank 0 if it was left out."""
        if name in self.layers:
            return self.layers[name]
        (m, n), weight = weight_shape(layer), signal_like(layer)
        cores = weight.new_zeros(len(self.norms), 0, dtype=accumulation_dtype(weight))
        return SharedQuery(weight.new_zeros(m, 0), weight.new_zeros(n, 0), cores, bias=False)


@dataclass(slots=True)
class _Tucker:
    """One layer's gradients in bases whose directions are ordered by the weighted squared norm that they hold.

    Attributes:
        left: U [m, r].
        right: W [n, s].
        cores: C_v [V, r, s].
        held: what each direction of U and of W holds of Σ_v w_v ‖G_v‖², [r] and [s], descending.
        captured: what all directions hold, including those that were dropped.
        totals: ‖G_v‖² of the whole gradients in the same coordinates, float64 [V].
        norms: ‖G_v‖² without scaling, float64 [V].
        mean: squared norm of their mean without scaling, float64 scalar.
        bias: whether the layer has a bias.
    """

    left: Tensor
    right: Tensor
    cores: Tensor
    held: tuple[Tensor, Tensor]
    captured: float
    totals: Tensor
    norms: Tensor
    mean: Tensor
    bias: bool

    def cut(self, r: int, s: int) -> None:
        """Drop all but the leading directions."""
        self.left, self.right = self.left[:, :r].clone(), self.right[:, :s].clone()
        self.cores = self.cores[:, :r, :s].clone()
        self.held = self.held[0][:r].clone(), self.held[1][:s].clone()

    def query(self, dtype: torch.dtype) -> SharedQuery:
        """Return the layer's query."""
        return SharedQuery(self.left.to(dtype), self.right.to(dtype), self.cores.flatten(1), self.bias)


class _Layer:
    """One layer's gradients; if it has a curvature, in its eigenbases, divided by it, and scaled by its square root."""

    def __init__(
        self, parts: Sequence[LowRankGradient], curvature: EigenBasis | None, damping: float, dtype: torch.dtype
    ) -> None:
        self.bias, self.dtype = parts[0].bias is not None, dtype
        self.curvature = curvature
        self.divisors = self.scales = None
        self.parts = [_with_bias(part, dtype) for part in parts]
        if curvature is not None:
            rotate = curvature.left.mT.to(dtype), curvature.right.mT.to(dtype)
            self.parts = [(rotate[0] @ left, rotate[1] @ right) for left, right in self.parts]
            ridge = damping * curvature.eigenvalues.mean()
            if ridge > 0:  # else all gradients of the curvature sample were zero
                self.divisors = curvature.eigenvalues + ridge
                # Roots of the mean squares that candidates have in each output and each input; the product of two
                # squares is an eigenvalue of K-FAC.
                mean = curvature.eigenvalues.mean()
                outputs, inputs = (curvature.eigenvalues.mean(side).clamp(min=FLOOR * mean) for side in (1, 0))
                self.scales = (outputs / mean).sqrt(), inputs.sqrt()

    def gradient(self, index: int) -> Tensor:
        """Return the dense gradient of one example, divided by the curvature, [m, n]. 2kmn FLOPs for k tokens."""
        left, right = self.parts[index]
        whole = left @ right.mT
        whole = whole.to(accumulation_dtype(whole))
        return whole if self.divisors is None else whole.div_(self.divisors)

    def scaled(self, whole: Tensor) -> Tensor:
        """Scale a gradient in place by the root of what candidates have in each direction."""
        return whole if self.scales is None else whole.mul_(self.scales[0][:, None]).mul_(self.scales[1])

    def ranges(self, weights: Tensor, generator: torch.Generator) -> tuple[Tensor | None, Tensor | None]:
        """Return orthonormal bases [m, c] and [n, c] of random combinations of the columns and rows of the gradients.

        This is the range finder of Halko, Martinsson and Tropp (2011, algorithm 4.1). A side of at most c dimensions
        needs no basis: None.
        """
        (m, _), (n, _) = (part.shape for part in self.parts[0])
        probes = -(-COLUMNS // len(self.parts))
        wide = [size > probes * len(self.parts) for size in (m, n)]
        columns: tuple[list[Tensor], list[Tensor]] = [], []
        for index, weight in enumerate(weights if any(wide) else ()):
            whole = self.scaled(self.gradient(index)).to(self.dtype)
            noise = (torch.randn(max(m, n), probes, generator=generator) * float(weight) ** 0.5).to(whole)
            columns[0].append(whole @ noise[:n])
            columns[1].append(whole.mT @ noise[:m])
        left, right = (
            torch.linalg.qr(_accumulated(torch.cat(each, 1)))[0].to(self.dtype) if is_wide else None
            for each, is_wide in zip(columns, wide, strict=True)
        )
        return left, right

    def tucker(self, weights: Tensor, keep: float, generator: torch.Generator) -> _Tucker:
        """Return the gradients in ordered bases, without directions that `keep` surely drops."""
        left, right = self.ranges(weights, generator) if keep < 1 else (None, None)
        cores, totals, norms = [], [], []
        mean: Tensor | None = None
        for index in range(len(self.parts)):
            core = self.gradient(index)
            norms.append(core.square().sum(dtype=torch.float64))
            mean = core.clone() if mean is None else mean.add_(core)
            core = self.scaled(core)
            totals.append(core.square().sum(dtype=torch.float64))
            core = core if left is None else left.mT @ core.to(self.dtype)
            cores.append(_accumulated(core if right is None else core.to(self.dtype) @ right))
        assert mean is not None
        if not torch.isfinite(mean).all():
            raise FloatingPointError(
                "a validation gradient divided by the curvature is not finite; try --set dtype=float32"
            )
        shares, stacked = weights.to(cores[0]), torch.stack(cores)
        slack = UNSEEN * (1 - keep**2) * float(weights.to(totals[0]) @ torch.stack(totals))
        captured = float(shares @ stacked.square().sum((1, 2)))
        weighted = stacked * shares.sqrt()[:, None, None]
        sides = (part.flatten(1) for part in (weighted.transpose(0, 1), weighted.permute(2, 0, 1)))
        (outputs, held_out), (inputs, held_in) = (_directions(part @ part.mT, slack) for part in sides)
        stacked = outputs.mT @ stacked @ inputs
        left, right = (
            basis if each is None else _accumulated(each) @ basis for each, basis in ((left, outputs), (right, inputs))
        )
        if self.scales is not None:
            left, right = left / self.scales[0][:, None], right / self.scales[1][:, None]
        if self.curvature is not None:
            left, right = self.curvature.left @ left, self.curvature.right @ right
        square = mean.square().sum(dtype=torch.float64) / len(norms) ** 2
        totals, norms = torch.stack(totals), torch.stack(norms)
        return _Tucker(left, right, stacked, (held_out, held_in), captured, totals, norms, square, self.bias)


def shared_queries(
    examples: Sequence[Mapping[str, LowRankGradient]],
    keep: float,
    curvature: Mapping[str, EigenBasis] | None = None,
    damping: float = 0.1,
    dtype: torch.dtype = torch.float32,
) -> SharedQueries:
    """Return the examples' gradients, divided by the curvature if there is one, in shared bases.

    Per example of k tokens and layer, with c = COLUMNS or the layer's width: 2k(m² + n²) FLOPs to rotate it into the
    eigenbases, 4kmn to form it twice, and about 4cmn for its core. Per layer, two eigendecompositions of c × c.
    Memory: one layer's gradients, one of them dense, and about twice the cores of all layers.

    Args:
        examples: exact gradients of a task's examples by layer (`iprox.influence.validation_gradients` with keep 1).
        keep: share of the Frobenius norm (in scaled coordinates, if there is a curvature) that the bases keep, over all
            layers and examples; an example's weight is the reciprocal of its squared norm before the division, so that
            all count about alike. Directions with the least squared norm per FLOP are dropped first.
        curvature: curvature by layer, for (F + λI)⁻¹; the gradients of other layers are used as they are.
        damping: λ as a share of the mean eigenvalue of each layer's curvature.
        dtype: dtype of the products, here and with candidates; sums are in float32 or better. bfloat16 rounds by 2⁻⁹ of
            a gradient's norm in any direction, as the gradients themselves are rounded; damping limits what becomes
            of it in the division.

    Raises:
        FloatingPointError: a gradient divided by the curvature is not finite.
    """
    norms = torch.stack([torch.stack([part.squared_norm() for part in each.values()]).sum() for each in examples])
    return shared_in_turn([examples], norms, keep, curvature, damping, dtype)


def shared_in_turn(
    parts: Iterable[Sequence[Mapping[str, LowRankGradient]]],
    norms: Tensor,
    keep: float,
    curvature: Mapping[str, EigenBasis] | None = None,
    damping: float = 0.1,
    dtype: torch.dtype = torch.float32,
) -> SharedQueries:
    """Return what `shared_queries` returns, from gradients of some layers at a time, so that memory is bounded.

    Args:
        parts: gradients of the examples in a group of layers, for each group in turn.
        norms: squared norm of each example's gradient over all layers [V].
        keep: as for `shared_queries`, like what follows.
    """
    curvature = curvature or {}
    weights = torch.where(norms > 0, 1 / norms, torch.zeros_like(norms)).double().cpu()
    generator = torch.Generator().manual_seed(0)
    layers: dict[str, _Tucker] = {}
    for examples in parts:
        for name in examples[0]:
            layer = _Layer([each[name] for each in examples], curvature.get(name), damping, dtype)
            layers[name] = layer.tucker(weights, keep, generator)
            if len(layers) % CUT == 0:
                _cut(list(layers.values()), weights, (1 - UNSEEN * (1 - keep**2)) ** 0.5)
    _cut(list(layers.values()), weights, keep)
    totals, squares, mean = (
        torch.stack([getattr(layer, part) for layer in layers.values()]).sum(0) for part in ("totals", "norms", "mean")
    )
    queries = {name: layer.query(dtype) for name, layer in layers.items() if layer.cores.numel()}
    held = torch.zeros_like(totals)
    for query in queries.values():
        held += query.cores.double().square().sum(1)
    kept = torch.where(totals > 0, held / totals, torch.ones_like(totals)).sqrt()
    return SharedQueries(queries, squares.sqrt().cpu(), float(mean.sqrt()), kept.cpu())


def _directions(moment: Tensor, slack: float) -> tuple[Tensor, Tensor]:
    """Return the eigenvectors [c, k] of a moment [c, c] and the eigenvalues [k], in descending order.

    The last ones are left out if they sum to at most `slack`.
    """
    values, vectors = torch.linalg.eigh(moment)
    values = values.clamp(min=0)
    few = int((values.double().cumsum(0) <= slack).sum()) if slack > 0 else 0
    return vectors[:, few:].flip(1), values[few:].flip(0)


def _cut(layers: Sequence[_Tucker], weights: Tensor, keep: float) -> None:
    """Drop the directions of least squared norm per FLOP, which together hold at most 1 − keep² of the total.

    A direction of a basis of m costs 2m FLOPs per token. The error of a Tucker decomposition is at most the sum of
    the squared norms that its two bases drop.
    """
    if keep >= 1:
        return
    sides = [side for layer in layers for side in zip(layer.held, (layer.left, layer.right), strict=True)]
    held = torch.cat([values for values, _ in sides])
    worth = torch.cat([values / len(basis) for values, basis in sides])
    order = worth.argsort(stable=True)
    total = sum(float(weights @ layer.totals.cpu()) for layer in layers)
    lost = total + sum(layer.captured for layer in layers) - float(held.sum())  # what is dropped already
    dropped = torch.zeros_like(order, dtype=torch.bool)
    dropped[order[held[order].cumsum(0) <= (1 - keep**2) * total - lost]] = True
    ranks = [int((~part).sum()) for part in dropped.split([len(values) for values, _ in sides])]
    for layer, r, s in zip(layers, ranks[::2], ranks[1::2], strict=True):
        layer.cut(r, s)


def _with_bias(gradient: LowRankGradient, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the factors [m, k] and [n, k], with the bias as the gradient's last column."""
    left, right = gradient.left.to(dtype), gradient.right.to(dtype)
    if gradient.bias is None:
        return left, right
    left = torch.cat([left, gradient.bias.to(dtype)[:, None]], dim=1)
    corner = torch.block_diag(right, right.new_ones(1, 1))
    return left, corner


def _accumulated(x: Tensor) -> Tensor:
    """Return a tensor in float32 or better."""
    return x.to(accumulation_dtype(x))
