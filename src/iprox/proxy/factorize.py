"""Factorize the layers of a model: measure spectra on a probe, choose ranks under a budget, replace the layers.

Memory beyond the model is bounded: moments are measured for as many layers at a time as fit, and spectra that do not
fit are kept on disk.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from iprox.kronecker.moments import MEMORY, LayerMoments, MomentSettings, collect_moments, layer_groups
from iprox.models.layers import compressible_layers, copied, dense_weight, layer_bias, low_rank_like
from iprox.models.loss import LossFn
from iprox.models.quantized import is_quantized, plain
from iprox.proxy.factorizations import PROBED, FactorMethod, layer_spectrum
from iprox.proxy.ipsvd import Ridge, Spectrum
from iprox.proxy.ranks import RULES, ErrorCurve, LayerCost

RankRule = Literal["global", "uniform"]


@dataclass(frozen=True, slots=True)
class FactorSettings:
    """Settings of the factorization.

    Attributes:
        method: `ipsvd` or a baseline (`iprox.proxy.factorizations`).
        ranks: `global` or `uniform` (`iprox.proxy.ranks`).
        ridge: share of the mean eigenvalue added to every direction of a moment, or `auto` (Ledoit and Wolf).
        moments: settings of the moments.
        memory: bytes that moments may take at once. If they would take more, the probe is read once per group of
            layers; spectra that would take more are kept on disk.
        refit_norms: whether to rescale the norms of an `ipsvd` proxy after truncation (`iprox.proxy.norms`); baselines
            stay as published.
        seed: seed for random factors.
    """

    method: FactorMethod = "ipsvd"
    ranks: RankRule = "global"
    ridge: Ridge = "auto"
    moments: MomentSettings = field(default_factory=MomentSettings)
    memory: int = MEMORY
    refit_norms: bool = True
    seed: int = 0


@dataclass(frozen=True, slots=True)
class LayerReport:
    """Report on the compression of one layer.

    Attributes:
        shape: (m, n).
        rank: rank; None if the layer was left dense.
        tail: share of the weighted squared norm that was lost.
        ridge_in: ridge of the input moment, as a share of the mean eigenvalue; None if the method uses none.
        ridge_out: ridge of the gradient moment, likewise.
    """

    shape: tuple[int, int]
    rank: int | None
    tail: float
    ridge_in: float | None = None
    ridge_out: float | None = None


@dataclass(slots=True)
class Spectra:
    """The spectra of all layers of a model, from which proxies of any size are made.

    Attributes:
        model: target; unchanged.
        by_layer: spectrum of each layer, truncated to its largest rank; in memory or on disk.
        rule: name of the rank rule.
        curves: error of each layer by rank, and its cost.
        probe_tokens: number of tokens that moments were measured on.
        passes: number of passes over the probe.
        unreached: layers with zero moments on the probe, which are compressed by the plain norm.
    """

    model: PreTrainedModel
    by_layer: dict[str, Spectrum] | _SpectraOnDisk
    rule: RankRule
    curves: dict[str, ErrorCurve] = field(default_factory=dict)
    probe_tokens: int = 0
    passes: int = 0
    unreached: list[str] = field(default_factory=list)

    def cut(self, budget: float) -> tuple[PreTrainedModel, dict[str, LayerReport]]:
        """Return a copy of the model with low-rank layers that together cost at most a budget, and a report per layer.

        Args:
            budget: largest cost, at least that of rank 1 in every layer.
        """
        ranks = RULES[self.rule](self.curves, budget)
        reports = {}
        for name, rank in ranks.items():
            spectrum = self.by_layer[name]
            tail = 0.0 if rank is None else spectrum.tail(rank)
            reports[name] = LayerReport(self.curves[name].shape, rank, tail, spectrum.ridge_in, spectrum.ridge_out)
        return with_factors(self.model, self.by_layer, ranks), reports


class _SpectraOnDisk:
    """Spectra by layer name, one safetensors file each; ridges and device stay in memory."""

    def __init__(self, folder: str) -> None:
        self._folder = Path(folder)
        self._kept: dict[str, tuple[float | None, float | None, torch.device]] = {}

    def __setitem__(self, name: str, spectrum: Spectrum) -> None:
        parts = {part: getattr(spectrum, part).contiguous() for part in ("left", "singular_values", "right")}
        save_file(parts, self._folder / f"{name}.safetensors")
        self._kept[name] = spectrum.ridge_in, spectrum.ridge_out, spectrum.left.device

    def __getitem__(self, name: str) -> Spectrum:
        ridge_in, ridge_out, device = self._kept[name]
        parts = load_file(self._folder / f"{name}.safetensors", device=str(device))
        return Spectrum(**parts, ridge_in=ridge_in, ridge_out=ridge_out)


@contextmanager
def measured_spectra(
    model: PreTrainedModel,
    costs: Mapping[str, LayerCost],
    probe: Iterable[Any],
    settings: FactorSettings,
    loss_fn: LossFn,
    progress: Callable[[int], None] | None = None,
) -> Iterator[Spectra]:
    """Measure the spectrum of every compressible layer of a model once.

    Args:
        model: target; unchanged afterwards.
        costs: cost of each layer.
        probe: batches to measure second moments on.
        settings: settings of the factorization.
        loss_fn: per-example losses.
        progress: function called with 1 after each layer.
    """
    layers = compressible_layers(model)
    generator = torch.Generator().manual_seed(settings.seed)
    groups = [list(layers)]
    if settings.method in PROBED:
        numbers = {name: sum(map(settings.moments.numbers, cost.shape)) for name, cost in costs.items()}
        groups = layer_groups(numbers, settings.memory)
    if len(groups) > 1:
        probe = list(probe)  # read once per group
    # At the largest rank, spectra are about as large as the layers.
    in_memory = 4 * sum(m * n for m, n in (cost.shape for cost in costs.values())) <= settings.memory
    with nullcontext() if in_memory else tempfile.TemporaryDirectory(prefix="iprox-spectra-") as folder:
        spectra = Spectra(model, {} if folder is None else _SpectraOnDisk(folder), settings.ranks)
        for group in groups:
            moments: dict[str, LayerMoments] = {}
            if settings.method in PROBED:
                chosen = {name: layers[name] for name in group}
                moments, read = collect_moments(model, chosen, probe, settings.moments, loss_fn)
                spectra.probe_tokens = read.tokens
                spectra.passes += 1
                spectra.unreached += [name for name in group if not moments[name].reached]
            for name in group:
                cost, weight = costs[name], dense_weight(layers[name]).detach()
                # pop frees each layer's moments after use.
                spectrum = layer_spectrum(settings.method, weight, moments.pop(name, None), settings.ridge, generator)
                spectra.curves[name] = ErrorCurve(cost.shape, cost.price, spectrum.comparable.cpu().numpy())
                spectra.by_layer[name] = spectrum.cut(cost.largest_rank)
                if progress is not None:
                    progress(1)
        yield spectra


def with_factors(
    model: PreTrainedModel, spectra: Mapping[str, Spectrum] | _SpectraOnDisk, ranks: Mapping[str, int | None]
) -> PreTrainedModel:
    """Return a copy of the model with each layer truncated to its rank; None leaves a layer dense."""
    replaced: dict[int, Any] = {}
    for name, layer in compressible_layers(model).items():
        rank = ranks[name]
        if rank is not None:
            up, down = spectra[name].factors(rank)
            replaced[id(layer)] = low_rank_like(layer, rank, model.dtype if is_quantized(layer) else None)
            replaced[id(layer)].fill(up, down, layer_bias(layer))
        elif is_quantized(layer):
            replaced[id(layer)] = plain(layer, model.dtype)
    # deepcopy uses the memo's objects, so the replaced dense weights are never copied.
    return copied(model, replaced)
