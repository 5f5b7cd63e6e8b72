"""From a model and its probe to factors: spectra layer by layer, ranks under a budget, the layers replaced.

Memory beyond the model is bounded whatever its size: moments are measured for as many layers at a time as fit, and
spectra go to disk where they would not.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import PreTrainedModel

from iprox.models.layers import LowRankLinear, dense_weight, layer_bias, weight_shape
from iprox.models.loss import LossFn
from iprox.proxy import budget
from iprox.proxy.methods import PROBED, FactorMethod, Ridge, RootCache, Weighing, weigh_layer
from iprox.proxy.moments import Moments, MomentSettings, collect_moments
from iprox.proxy.spectra import SpectrumStore

RankRule = Literal["global", "uniform"]

# Bytes that moments may take at once, and spectra before they go to disk.
MEMORY = 4 << 30


@dataclass(frozen=True, slots=True)
class FactorSettings:
    """How layers are factorized.

    Attributes:
        method: `ipsvd` or a baseline (`iprox.proxy.methods`).
        ranks: `global` or `uniform` (`iprox.proxy.budget`).
        ridge: share of the mean eigenvalue added to every direction of a moment, or `auto` (Ledoit and Wolf).
        moments: how moments are measured.
        memory: bytes that moments may take at once. Where they would take more, the probe is read several times, a
            group of layers each; spectra that would take more go to disk.
        refit_norms: whether the norms of an `ipsvd` proxy are scaled to what truncation left (`iprox.proxy.norms`);
            baselines are left as published.
        seed: of random factors.
    """

    method: FactorMethod = "ipsvd"
    ranks: RankRule = "global"
    ridge: Ridge = "auto"
    moments: MomentSettings = field(default_factory=MomentSettings)
    memory: int = MEMORY
    refit_norms: bool = True
    seed: int = 0


@dataclass(slots=True)
class Factorization:
    """What was measured and chosen.

    Attributes:
        ranks: by layer name; None is a layer left dense.
        tails: share of each layer's weighted squared norm lost.
        ridges: (of the input moment, of the gradient moment) as shares of the mean eigenvalue; None where not used.
        probe_tokens: tokens that moments were measured on.
        passes: how often the probe was read.
        unreached: layers that no probe token moved, so that their moments are zero: weighed by the plain norm.
    """

    ranks: budget.Ranks = field(default_factory=dict)
    tails: dict[str, float] = field(default_factory=dict)
    ridges: dict[str, tuple[float | None, float | None]] = field(default_factory=dict)
    probe_tokens: int = 0
    passes: int = 0
    unreached: list[str] = field(default_factory=list)


class Spectra:
    """The spectra of all layers of a model, from which proxies of any size are cut."""

    def __init__(
        self,
        model: PreTrainedModel,
        layers: Mapping[str, nn.Module],
        store: SpectrumStore,
        spectra: Mapping[str, budget.LayerSpectrum],
        done: Factorization,
        rule: RankRule,
    ) -> None:
        self._model, self._layers, self._store = model, layers, store
        self._spectra, self._done, self._rule = spectra, done, rule

    def cut(self, allowed: float) -> tuple[PreTrainedModel, Factorization]:
        """A copy of the model with its layers as factors of ranks that together cost no more than `allowed`.

        Args:
            allowed: the budget, at least that of rank 1 everywhere.
        """
        ranks = budget.RULES[self._rule](self._spectra, allowed)
        tails = {name: 0.0 if rank is None else self._store.get(name).tail(rank) for name, rank in ranks.items()}
        done = replace(self._done, ranks=ranks, tails=tails)
        return with_factors(self._model, self._layers, self._store, ranks), done


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
    """Measure every layer of a model once.

    Args:
        model: left as it was.
        layers: its compressible layers.
        probe: batches over which second moments are measured.
        prices: cost of one parameter of each layer.
        settings: how.
        loss_fn: per-example losses.
        progress: called with 1 as each layer is done.
    """
    shapes = {name: weight_shape(layer) for name, layer in layers.items()}
    done = Factorization()
    with _store(shapes, settings.memory) as store:
        spectra: dict[str, budget.LayerSpectrum] = {}
        for name, weighing in _weighed_layers(model, layers, probe, settings, loss_fn, done):
            spectrum = weighing.spectrum
            spectra[name] = budget.LayerSpectrum(shapes[name], weighing.comparable.cpu().numpy(), prices[name])
            done.ridges[name] = (weighing.ridge_in, weighing.ridge_out)
            store.put(name, spectrum.cut(budget.largest_rank(shapes[name])))
            if progress is not None:
                progress(1)
        yield Spectra(model, layers, store, spectra, done, settings.ranks)


def _weighed_layers(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    probe: Iterable[Any],
    settings: FactorSettings,
    loss_fn: LossFn,
    done: Factorization,
) -> Iterator[tuple[str, Weighing]]:
    """Each layer's spectrum in its method's space, a group of layers at a time.

    Fills in what `done` says of the probe.
    """
    input_roots = RootCache()
    generator = torch.Generator().manual_seed(settings.seed)
    probed = settings.method in PROBED
    groups = layer_groups(layers, settings) if probed else [list(layers)]
    if len(groups) > 1:
        probe = list(probe)  # read once a group
    for group in groups:
        moments: dict[str, Moments] = {}
        if probed:
            chosen = {name: layers[name] for name in group}
            moments, done.probe_tokens = collect_moments(model, chosen, probe, settings.moments, loss_fn)
            done.passes += 1
            done.unreached += [name for name in group if not moments[name].reached]
        for name in group:
            weight = dense_weight(layers[name]).detach()
            # Each layer's moments go as soon as they are used.
            of_layer = moments.pop(name, None)
            yield name, weigh_layer(settings.method, weight, of_layer, settings.ridge, input_roots, generator)


def layer_groups(layers: Mapping[str, nn.Module], settings: FactorSettings) -> list[list[str]]:
    """Layers in model order, in groups whose moments fit in memory together; a group holds one layer at least."""
    groups: list[list[str]] = []
    room = 0
    for name, layer in layers.items():
        needed = 4 * sum(settings.moments.numbers(width) for width in weight_shape(layer))
        if not groups or needed > room:
            groups.append([])
            room = settings.memory
        groups[-1].append(name)
        room -= needed
    return groups


@contextmanager
def _store(shapes: Mapping[str, tuple[int, int]], memory: int) -> Iterator[SpectrumStore]:
    """Where spectra are kept until ranks are chosen: factors of the largest rank are as large as the layers."""
    if 4 * sum(m * n for m, n in shapes.values()) <= memory:
        yield SpectrumStore()
    else:
        with tempfile.TemporaryDirectory(prefix="iprox-spectra-") as folder:
            yield SpectrumStore(Path(folder))


def with_factors(
    model: PreTrainedModel,
    layers: Mapping[str, nn.Module],
    spectra: SpectrumStore,
    ranks: dict[str, int | None],
) -> PreTrainedModel:
    """A copy of the model with each layer cut to its rank; None leaves a layer dense."""
    replaced: dict[int, Any] = {}
    for name, layer in layers.items():
        rank = ranks[name]
        if rank is not None:
            A, B = spectra.get(name).factors(rank)
            bias = layer_bias(layer)
            replaced[id(layer)] = LowRankLinear.from_factors(
                A, B, None if bias is None else bias.detach(), dense_weight(layer).dtype
            )
    # deepcopy takes what the memo already holds, so dense weights that go are never copied.
    return copy.deepcopy(model, memo=replaced)
