"""Stage 1: a model in, a low-rank proxy out."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from iprox.errors import InputError
from iprox.models.checkpoint import IproxConfig, mark_as_proxy, proxy_config
from iprox.models.layers import LowRankLinear, compressible_layers, weight_shape
from iprox.models.loading import model_fingerprint
from iprox.models.loss import LossFn, causal_lm_losses
from iprox.proxy import budget
from iprox.proxy.ipsvd import Spectrum, ridged, weighted_svd
from iprox.proxy.moments import Moments, collect_moments

Method = Literal["ipsvd", "svd"]
RankRule = Literal["global", "uniform"]

# The prototype's ridge (share of the mean eigenvalue); design 2.
RIDGE = 1e-2


@dataclass(frozen=True, slots=True)
class LayerReport:
    """What became of one layer: its shape (m, n), its rank (None: left dense), the share of error taken on."""

    shape: tuple[int, int]
    rank: int | None
    tail: float


@dataclass(slots=True)
class CompressionReport:
    """What compression did; written beside the proxy as `compression.json`."""

    method: str
    ranks_rule: str
    sparsity: float
    achieved_sparsity: float = 0.0
    probe_tokens: int = 0
    seconds: float = 0.0
    layers: dict[str, LayerReport] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


def derive_proxy(
    model: PreTrainedModel,
    probe: Iterable[Any],
    *,
    sparsity: float,
    method: Method = "ipsvd",
    ranks: RankRule = "global",
    ridge: float = RIDGE,
    loss_fn: LossFn = causal_lm_losses,
    target: str | None = None,
    progress: Callable[[int], None] | None = None,
) -> tuple[PreTrainedModel, CompressionReport]:
    """Derive a low-rank proxy from a model; the model itself is left as it was.

    Layers that are not compressed (embeddings, norms, the head, layers left dense) are copied.

    Args:
        model: the target.
        probe: batches over which second moments are measured; not read by `svd`.
        sparsity: share of the compressible parameters to remove, in (0, 1).
        method: `ipsvd` (design 2) or `svd` (of the weights alone).
        ranks: `global` or `uniform` (see `iprox.proxy.budget`).
        ridge: share of the mean eigenvalue added to every direction of the moments.
        loss_fn: per-example losses of a model that is no language model.
        target: what to name the target in the proxy's config.
        progress: called with 1 as each layer is done.

    Returns:
        The proxy, in the model's dtype and on its device, and a report.

    Raises:
        InputError: sparsity out of range or out of reach, or the model is a proxy already.
    """
    started = time.perf_counter()
    if not 0 < sparsity < 1:
        raise InputError(f"sparsity is {sparsity}; it must lie between 0 and 1, both excluded")
    if proxy_config(model) is not None:
        raise InputError("the model is an iprox proxy already; compress its target instead")
    layers = compressible_layers(model)
    moments: dict[str, Moments] | None = None
    probe_tokens = 0
    if method == "ipsvd":
        moments, probe_tokens = collect_moments(model, probe, loss_fn)
    spectra = layer_spectra(layers, moments, ridge, progress)
    shapes = {
        name: budget.LayerSpectrum(weight_shape(layer), spectra[name].singular_values.cpu().numpy())
        for name, layer in layers.items()
    }
    try:
        chosen = budget.RULES[ranks](shapes, sparsity)
    except ValueError as error:
        raise InputError(str(error)) from error
    proxy = with_factors(model, layers, spectra, chosen)

    report = CompressionReport(method, ranks, sparsity, probe_tokens=probe_tokens)
    dense = sum(shape.dense_cost for shape in shapes.values())
    report.achieved_sparsity = 1 - budget.kept_parameters(shapes, chosen) / dense
    for name, rank in chosen.items():
        tail = 0.0 if rank is None else spectra[name].tail(rank)
        report.layers[name] = LayerReport(shapes[name].shape, rank, tail)
    if isinstance(proxy, PreTrainedModel):
        mark_as_proxy(
            proxy,
            IproxConfig(
                ranks={name: rank for name, rank in chosen.items() if rank is not None},
                method=method,
                sparsity=report.achieved_sparsity,
                target=target or getattr(model.config, "_name_or_path", None) or None,
                target_fingerprint=model_fingerprint(model),
            ),
        )
    report.seconds = time.perf_counter() - started
    return proxy, report


def layer_spectra(
    layers: dict[str, nn.Linear],
    moments: dict[str, Moments] | None,
    ridge: float,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Spectrum]:
    """The (weighted) SVD of every layer, computed in float64 and kept in float32.

    Cost per layer: two Cholesky factorisations (n³/3 + m³/3, inputs shared where layers share them) and one
    SVD (about 14·m·n·min(m, n)).
    """
    spectra: dict[str, Spectrum] = {}
    roots: dict[int, Tensor] = {}
    for name, layer in layers.items():
        weight = layer.weight.detach().double()
        root_in = root_out = None
        if moments is not None:
            key = id(moments[name].inputs)
            if key not in roots:
                roots.clear()  # layers that share an input follow each other; keep one root
                roots[key] = torch.linalg.cholesky(ridged(moments[name].inputs.double(), ridge))
            root_in = roots[key]
            root_out = torch.linalg.cholesky(ridged(moments[name].gradients.double(), ridge))
        full = weighted_svd(weight, root_out, root_in)
        spectra[name] = Spectrum(full.left.float(), full.singular_values, full.right.float())
        if progress is not None:
            progress(1)
    return spectra


def with_factors(
    model: PreTrainedModel,
    layers: dict[str, nn.Linear],
    spectra: dict[str, Spectrum],
    ranks: dict[str, int | None],
) -> PreTrainedModel:
    """A copy of the model with each layer cut to its rank; None leaves a layer dense."""
    replaced: dict[int, Any] = {}
    for name, layer in layers.items():
        rank = ranks[name]
        if rank is not None:
            A, B = spectra[name].factors(rank)
            bias = None if layer.bias is None else layer.bias.detach()
            replaced[id(layer)] = LowRankLinear.from_factors(A, B, bias, layer.weight.dtype)
    # deepcopy takes what the memo already holds, so dense weights that go are never copied.
    return copy.deepcopy(model, memo=replaced)
