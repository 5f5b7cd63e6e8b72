"""How each factorizing method weighs a layer before its SVD: IPSVD and its baselines, side by side (pure maths).

All of them minimize ‖R_outᵀ (W - AB) R_in‖_F over rank r; they differ in the roots only.

| method | R_out | R_in | source |
| --- | --- | --- | --- |
| ipsvd | C_δ^{1/2} | C_h^{1/2} | arXiv:2602.17835 |
| svd | I | I | Eckart and Young 1936 |
| svd-llm | I | C_h^{1/2} | arXiv:2403.07378 |
| asvd | I | diag(rms(h))^{1/2} | arXiv:2312.05821 (α = 0.5; root mean square for mean absolute value) |
| fwsvd | diag(rms(δ)) | I | arXiv:2207.00112 (Fisher of a row, by K-FAC: C_δ,ii · tr C_h) |
| random | – | – | the span of random directions, W projected on it |
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from iprox.proxy.ipsvd import Spectrum, weighted_svd
from iprox.proxy.moments import Moments
from iprox.proxy.second_moment import DiagonalRoot, Root, SecondMoment
from iprox.proxy.thin_svd import along

FactorMethod = Literal["ipsvd", "svd", "svd-llm", "asvd", "fwsvd", "random"]

# What needs a probe at all.
PROBED: tuple[FactorMethod, ...] = ("ipsvd", "svd-llm", "asvd", "fwsvd")

Ridge = float | Literal["auto"]


@dataclass(frozen=True, slots=True)
class Weighing:
    """A layer's spectrum, and the ridges it was made with (None where no moment was used)."""

    spectrum: Spectrum
    ridge_in: float | None = None
    ridge_out: float | None = None

    @property
    def comparable(self) -> Tensor:
        """The singular values as they compare across layers, whatever ridge each was given.

        A ridge λ makes the trace of a moment 1 + λ times what it was: a change of the loss that no probe saw. Layers
        with few or unequal examples behind their moments, which get the largest ridges, would seem to matter most.
        """
        inflation = (1 + (self.ridge_in or 0.0)) * (1 + (self.ridge_out or 0.0))
        return self.spectrum.singular_values / inflation**0.5


class RootCache:
    """The root of the last moment asked for: layers that share an input follow each other."""

    def __init__(self) -> None:
        self._moment: SecondMoment | None = None
        self._ridge = 0.0
        self._root: Root | None = None

    def __call__(self, moment: SecondMoment, ridge: float) -> Root:
        """The root of this moment at this ridge."""
        if self._root is None or self._moment is not moment or self._ridge != ridge:
            self._moment, self._ridge, self._root = moment, ridge, moment.root(ridge)
        return self._root


def weigh_layer(
    method: FactorMethod,
    weight: Tensor,
    moments: Moments | None,
    ridge: Ridge,
    input_roots: RootCache,
    generator: torch.Generator,
) -> Weighing:
    """The spectrum of one layer by a method, computed in float64.

    Cost: a Cholesky factorization of each moment used (n³/3, m³/3) and one SVD (4·m·n·k + 9k³, k = min(m, n)).

    Args:
        method: which.
        weight: W [m, n].
        moments: of the layer; not read by `svd` and `random`.
        ridge: share of the mean eigenvalue added to every direction, or `auto`: chosen for each moment by
            `SecondMoment.shrinkage`.
        input_roots: shared between the layers of a model.
        generator: of random directions.
    """
    weight = weight.double()
    if method == "svd":
        return Weighing(weighted_svd(weight, None, None))
    if method == "random":
        return Weighing(random_spectrum(weight, generator))
    if moments is None:
        raise ValueError(f"{method} needs moments")

    def ridge_of(moment: SecondMoment) -> float:
        return moment.shrinkage() if ridge == "auto" else ridge

    if method == "asvd":
        root = diagonal_root(moments.inputs.diagonal().double().sqrt())
        return Weighing(weighted_svd(weight, None, root))
    if method == "fwsvd":
        root = diagonal_root(moments.gradients.diagonal().double())
        return Weighing(weighted_svd(weight, root, None))
    ridge_in = ridge_of(moments.inputs)
    root_in = input_roots(moments.inputs, ridge_in)
    if method == "svd-llm":
        return Weighing(weighted_svd(weight, None, root_in), ridge_in)
    ridge_out = ridge_of(moments.gradients)
    return Weighing(weighted_svd(weight, moments.gradients.root(ridge_out), root_in), ridge_in, ridge_out)


def diagonal_root(squares: Tensor) -> DiagonalRoot:
    """diag(√squares), entries no smaller than a thousandth of their mean, so that it can be undone."""
    floor = float(squares.mean()) * 1e-3
    return DiagonalRoot(squares.clamp(min=floor or 1.0).sqrt())


def random_spectrum(weight: Tensor, generator: torch.Generator) -> Spectrum:
    """W projected on random orthonormal input directions, in the order of what each carries."""
    m, n = weight.shape
    noise = torch.randn(n, min(m, n), generator=generator, dtype=weight.dtype).to(weight.device)
    directions, _ = torch.linalg.qr(noise)
    return Spectrum(*along(weight, directions))
