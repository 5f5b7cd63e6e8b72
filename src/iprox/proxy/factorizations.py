"""The factorizations of a layer, by name: IPSVD and its baselines.

All minimize ‖R_outᵀ (W - up·down) R_in‖_F over rank r and differ only in the roots.

| method | R_out | R_in | source |
| --- | --- | --- | --- |
| ipsvd | C_δ^{1/2} | C_h^{1/2} | arXiv:2602.17835 (`iprox.proxy.ipsvd`) |
| svd | I | I | Eckart and Young 1936 |
| svd-llm | I | C_h^{1/2} | arXiv:2403.07378 |
| asvd | I | diag(rms(h))^{1/2} | arXiv:2312.05821 (α = 0.5; root mean square for mean absolute value) |
| fwsvd | diag(rms(δ)) | I | arXiv:2207.00112 (Fisher of a row, by K-FAC: C_δ,ii · tr C_h) |
| random | – | – | W projected on the span of random directions |
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from iprox.kronecker.moments import LayerMoments
from iprox.kronecker.roots import DiagonalRoot
from iprox.kronecker.second_moment import SecondMoment
from iprox.kronecker.svd import along
from iprox.proxy.ipsvd import Ridge, Spectrum, weighted_svd

FactorMethod = Literal["ipsvd", "svd", "svd-llm", "asvd", "fwsvd", "random"]

# The methods whose roots are made from moments, which need a probe.
PROBED = ("ipsvd", "svd-llm", "asvd", "fwsvd")


def layer_spectrum(
    method: FactorMethod, weight: Tensor, moments: LayerMoments | None, ridge: Ridge, generator: torch.Generator
) -> Spectrum:
    """Return the spectrum of one layer by a method, computed in float64.

    Cost: a Cholesky factorization of each moment (n³/3, m³/3) and one SVD (4·m·n·k + 9k³, k = min(m, n)).

    Args:
        method: name of the method.
        weight: W [m, n].
        moments: second moments of the layer; not read by `svd` and `random`.
        ridge: ridge of the moments of `ipsvd` and `svd-llm`, or `auto` for one each.
        generator: generator of random directions.

    Raises:
        ValueError: a method that needs moments, without them.
    """

    def ridge_of(moment: SecondMoment) -> float:
        return moment.shrinkage() if ridge == "auto" else ridge

    weight = weight.double()
    if method == "svd":
        return weighted_svd(weight, None, None)
    if method == "random":
        return random_spectrum(weight, generator)
    if moments is None:
        raise ValueError(f"{method} needs moments")
    if method == "asvd":
        return weighted_svd(weight, None, DiagonalRoot.of_squares(moments.inputs.diagonal().double().sqrt()))
    if method == "fwsvd":
        return weighted_svd(weight, DiagonalRoot.of_squares(moments.gradients.diagonal().double()), None)
    ridge_in = ridge_of(moments.inputs)
    root_in = moments.inputs.root(ridge_in)
    if method == "svd-llm":
        return replace(weighted_svd(weight, None, root_in), ridge_in=ridge_in)
    ridge_out = ridge_of(moments.gradients)
    spectrum = weighted_svd(weight, moments.gradients.root(ridge_out), root_in)
    return replace(spectrum, ridge_in=ridge_in, ridge_out=ridge_out)


def random_spectrum(weight: Tensor, generator: torch.Generator) -> Spectrum:
    """Return W projected on random orthonormal input directions, sorted by the norms of their images."""
    m, n = weight.shape
    noise = torch.randn(n, min(m, n), generator=generator, dtype=weight.dtype).to(weight.device)
    directions, _ = torch.linalg.qr(noise)
    return Spectrum(*along(weight, directions))
