"""Factorize the layers of a model: measure spectra on a probe, choose ranks under a budget, replace the layers.

Memory beyond the model is bounded: moments are measured for as many layers at a time as fit, and spectra that do not
fit are kept on disk.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel

from iprox.kronecker.moments import MEMORY, LayerMoments, MomentSettings, collect_moments, layer_groups
from iprox.models.layers import LowRankLinear, dense_weight, layer_bias, weight_shape
from iprox.models.loss import LossFn
from iprox.proxy.baselines import PROBED, FactorMethod, layer_spectrum
from iprox.proxy.ipsvd import Ridge, Spectrum
from iprox.proxy.ranks import RULES, ErrorCurve, largest_rank

RankRule = Literal["global", "uniform"]


@dataclass(frozen=True, slots=True)
class FactorSettings:
    """Settings of the factorization.

    Attributes:
        method: `ipsvd` or a baseline (`iprox.proxy.baselines`).
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
        layers: compressible layers by name.
        by_layer: spectrum of each layer, truncated to its largest rank; in memory or on disk.
        rule: name of the rank rule.
        curves: error of each layer by rank, and its cost.
        ridges: ridges of each layer's input and gradient moments.
        probe_tokens: number of tokens that moments were measured on.
        passes: number of passes over the probe.
        unreached: layers with zero moments on the probe, which are compressed by the plain norm.
    """

    model: PreTrainedModel
    layers: Mapping[str, nn.Module]
    by_layer: SpectrumByName
    rule: RankRule
    curves: dict[str, ErrorCurve] = field(default_factory=dict)
    ridges: dict[str, tuple[float | None, float | None]] = field(default_factory=dict)
    probe_tokens: int = 0
    passes: int = 0
    unreached: list[str] = field(default_factory=list)

    def cut(self, budget: float) -> tuple[PreTrainedModel, dict[str, LayerReport]]:
        """Return a copy of the model with low-rank layers that together cost at most a budget, and a report per layer.

        Args:
            budget: largest cost, at least that of rank 1 in every layer.
        """
        ranks = RULES[self.rule](self.curves, budget)
        reports = {
            name: LayerReport(
                self.curves[name].shape,
                rank,
                0.0 if rank is None else self.by_layer[name].tail(rank),
                *self.ridges[name],
            )
            for name, rank in ranks.items()
        }
        return with_factors(self.model, self.layers, self.by_layer, ranks), reports


class SpectrumByName(Protocol):
    """Spectra by layer name."""

    def __getitem__(self, name: str, /) -> Spectrum: ...


class _SpectraOnDisk:
    """Spectra by layer name, one safetensors file each, without their ridges."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __setitem__(self, name: str, spectrum: Spectrum) -> None:
        parts = {part: getattr(spectrum, part).contiguous() for part in ("left", "singular_values", "right")}
        save_file(parts, self._folder / f"{name}.safetensors")

    def __getitem__(self, name: str) -> Spectrum:
        parts = load_file(self._folder / f"{name}.safetensors")
        return Spectrum(parts["left"], parts["singular_values"], parts["right"])


@contextmanager
def measured_spectra(
    model: PreTrainedModel,
    layers: Mapping[str, nn.Module],
    probe: Iterable[Any],
    prices: Mapping[str, float],
    settings: FactorSettings,
    loss_fn: LossFn,
    progress: Callable[[int], None] | None = None,
) -> Iterator[Spectra]:
    """Measure the spectrum of every layer of a model once.

    Args:
        model: target; unchanged afterwards.
        layers: compressible layers by name.
        probe: batches to measure second moments on.
        prices: cost of one parameter of each layer.
        settings: settings of the factorization.
        loss_fn: per-example losses.
        progress: function called with 1 after each layer.
    """
    shapes = {name: weight_shape(layer) for name, layer in layers.items()}
    with _kept(shapes, settings.memory) as by_layer:
        spectra = Spectra(model, layers, by_layer, settings.ranks)
        for name, spectrum in _measured(spectra, probe, settings, loss_fn):
            spectra.curves[name] = ErrorCurve(shapes[name], spectrum.comparable.cpu().numpy(), prices[name])
            spectra.ridges[name] = (spectrum.ridge_in, spectrum.ridge_out)
            by_layer[name] = spectrum.cut(largest_rank(shapes[name]))
            if progress is not None:
                progress(1)
        yield spectra


def _measured(
    spectra: Spectra, probe: Iterable[Any], settings: FactorSettings, loss_fn: LossFn
) -> Iterator[tuple[str, Spectrum]]:
    """Yield each layer's spectrum, a group of layers at a time, and fill in the probe's counts of `spectra`."""
    layers = spectra.layers
    generator = torch.Generator().manual_seed(settings.seed)
    probed = settings.method in PROBED
    numbers = {name: sum(map(settings.moments.numbers, weight_shape(layer))) for name, layer in layers.items()}
    groups = layer_groups(numbers, settings.memory) if probed else [list(layers)]
    if len(groups) > 1:
        probe = list(probe)  # read once per group
    for group in groups:
        moments: dict[str, LayerMoments] = {}
        if probed:
            chosen = {name: layers[name] for name in group}
            moments, read = collect_moments(spectra.model, chosen, probe, settings.moments, loss_fn)
            spectra.probe_tokens = read.tokens
            spectra.passes += 1
            spectra.unreached += [name for name in group if not moments[name].reached]
        for name in group:
            weight = dense_weight(layers[name]).detach()
            # pop frees each layer's moments after use.
            yield name, layer_spectrum(settings.method, weight, moments.pop(name, None), settings.ridge, generator)


@contextmanager
def _kept(
    shapes: Mapping[str, tuple[int, int]], memory: int
) -> Iterator[MutableMapping[str, Spectrum] | _SpectraOnDisk]:
    """Yield a mapping for spectra, on disk if they could be too large: at the largest rank they are like the layers."""
    if 4 * sum(m * n for m, n in shapes.values()) <= memory:
        yield {}
    else:
        with tempfile.TemporaryDirectory(prefix="iprox-spectra-") as folder:
            yield _SpectraOnDisk(Path(folder))


def with_factors(
    model: PreTrainedModel, layers: Mapping[str, nn.Module], spectra: SpectrumByName, ranks: Mapping[str, int | None]
) -> PreTrainedModel:
    """Return a copy of the model with each layer truncated to its rank; None leaves a layer dense."""
    replaced: dict[int, Any] = {}
    for name, layer in layers.items():
        rank = ranks[name]
        if rank is not None:
            up, down = spectra[name].factors(rank)
            bias = layer_bias(layer)
            replaced[id(layer)] = LowRankLinear.from_factors(
                up, down, None if bias is None else bias.detach(), dense_weight(layer).dtype
            )
    # deepcopy uses the memo's objects, so the replaced dense weights are never copied.
    return copy.deepcopy(model, memo=replaced)
