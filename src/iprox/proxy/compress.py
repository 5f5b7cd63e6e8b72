"""Stage 1: derive a proxy from a model, by IPSVD or by a baseline."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel

from iprox.errors import InputError
from iprox.models import flops
from iprox.models.checkpoint import IproxConfig, mark_as_proxy, proxy_config
from iprox.models.layers import copied, output_head
from iprox.models.loading import model_fingerprint
from iprox.models.loss import LossFn, causal_lm_losses
from iprox.models.quantized import quantized_layers
from iprox.proxy.extraction import first_layers
from iprox.proxy.factorize import FactorSettings, LayerReport, measured_spectra
from iprox.proxy.norms import refit_norms
from iprox.proxy.size import Size, layer_costs, reachable_budget

# Models of one family pad their vocabularies to different multiples (Qwen2, Gemma 3).
PADDING = 256


@dataclass(slots=True)
class CompressionReport:
    """Report on a compression, written next to the proxy as `compression.json`.

    Attributes:
        method: method that made the proxy.
        ranks_rule: `global` or `uniform`; None if nothing was factorized.
        size: requested size, e.g. {"sparsity": 0.7}.
        achieved_sparsity: share of the compressible parameters that was removed.
        relative_flops: FLOPs of a token's forward pass (linear layers and head), as a fraction of the target's.
        probe_tokens: number of tokens that moments were measured on.
        passes: number of passes over the probe.
        unreached: layers with zero moments on the probe, which were compressed by the plain norm.
        norm_scales: factor of each norm of the proxy, by module name (`iprox.proxy.norms`).
        seconds: wall time, set by the stage.
        layers: report of each layer by module name; empty if nothing was factorized.
    """

    method: str
    ranks_rule: str | None
    size: dict[str, float]
    achieved_sparsity: float = 0.0
    relative_flops: float = 1.0
    probe_tokens: int = 0
    passes: int = 0
    unreached: list[str] = field(default_factory=list)
    norm_scales: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    layers: dict[str, LayerReport] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return asdict(self)


def derive_proxy(
    model: PreTrainedModel,
    probe: Iterable[Any],
    size: Size,
    settings: FactorSettings | None = None,
    *,
    loss_fn: LossFn = causal_lm_losses,
    target: str | None = None,
    progress: Callable[[int], None] | None = None,
) -> tuple[PreTrainedModel, CompressionReport]:
    """Derive a low-rank proxy from a model; the model is unchanged.

    Layers that are not compressed (embeddings, norms, the head, layers left dense) are copied.

    Args:
        model: target.
        probe: batches to measure second moments on; not read by methods without moments.
        size: size of the proxy.
        settings: settings of the factorization.
        loss_fn: per-example losses, for a model that is not a language model.
        target: name of the target in the proxy's config.
        progress: function called with 1 after each layer.

    Returns:
        The proxy, in the model's dtype and on its device, and a report.

    Raises:
        InputError: the size is out of reach, or the model is already a proxy.
        FloatingPointError: a moment is not finite (the message names the layer).
    """
    settings = settings or FactorSettings()
    with proxies_of(model, probe, settings, size, loss_fn=loss_fn, target=target, progress=progress) as make:
        return make(size)


# A size -> the proxy of that size, and a report.
MakeProxy = Callable[[Size], tuple[PreTrainedModel, CompressionReport]]


@contextmanager
def proxies_of(
    model: PreTrainedModel,
    probe: Iterable[Any],
    settings: FactorSettings,
    largest: Size,
    *,
    loss_fn: LossFn = causal_lm_losses,
    target: str | None = None,
    progress: Callable[[int], None] | None = None,
) -> Iterator[MakeProxy]:
    """Yield a function that makes proxies of any size; moments and spectra are measured once (see `derive_proxy`).

    Args:
        model: target.
        probe: batches to measure second moments on.
        settings: settings of the factorization.
        largest: largest size, refused here if it is out of reach; later sizes must be in the same unit.
        loss_fn: per-example losses.
        target: name of the target in the proxy's config.
        progress: function called with 1 after each layer.
    """
    _refuse_proxy(model)
    costs = layer_costs(model, largest)
    reachable_budget(model, largest, costs)  # refuses a size out of reach
    refit = settings.method == "ipsvd" and settings.refit_norms
    if refit:
        probe = list(probe)  # read again for the norms

    with measured_spectra(model, costs, probe, settings, loss_fn, progress) as spectra:

        def make(size: Size) -> tuple[PreTrainedModel, CompressionReport]:
            proxy, layers = spectra.cut(reachable_budget(model, size, costs))
            report = CompressionReport(settings.method, settings.ranks, size.as_dict(), layers=layers)
            if refit:
                report.norm_scales = refit_norms(proxy, model, probe, loss_fn)
            report.probe_tokens, report.passes = spectra.probe_tokens, spectra.passes
            report.unreached = spectra.unreached
            if report.unreached:
                warnings.warn(
                    f"no probe token reached {len(report.unreached)} layers (first: {report.unreached[0]}), so they "
                    "are compressed by the plain norm; use more probe examples",
                    stacklevel=2,
                )
            return _finished(model, proxy, report, target)

        yield make


def extract_layers(
    model: PreTrainedModel, size: Size, target: str | None = None
) -> tuple[PreTrainedModel, CompressionReport]:
    """Return the baseline `layers`: the first decoder layers of the model, as many as the size allows."""
    _refuse_proxy(model)
    proxy = first_layers(model, size)
    return _finished(model, proxy, CompressionReport("layers", None, size.as_dict()), target)


def keep_weights(model: PreTrainedModel, target: str | None = None) -> tuple[PreTrainedModel, CompressionReport]:
    """Return a proxy that shares the model's weights, which `limit_depth` then makes cheaper."""
    _refuse_proxy(model)
    shared = {id(each): each for each in (*model.parameters(), *model.buffers(), *quantized_layers(model))}
    return _finished(model, copied(model, shared), CompressionReport("target", None, {}), target)


def adopt(
    model: PreTrainedModel, other: PreTrainedModel, target: str | None = None
) -> tuple[PreTrainedModel, CompressionReport]:
    """Return the baseline `off-the-shelf`: a copy of another model as a proxy of this one.

    Raises:
        InputError: the vocabularies differ by more than padding, so the models do not share tokens.
    """
    sizes = [getattr(output_head(each), "weight", torch.empty(0)).shape[0] for each in (model, other)]
    if abs(sizes[0] - sizes[1]) > PADDING:
        raise InputError(
            f"the off-the-shelf model has a vocabulary of {sizes[1]:,}, the target one of {sizes[0]:,}: "
            "choose a model of the target's family"
        )
    return _finished(model, copied(other), CompressionReport("off-the-shelf", None, {}), target)


def _refuse_proxy(model: PreTrainedModel) -> None:
    if proxy_config(model) is not None:
        raise InputError("the model is already an iprox proxy; compress its target instead")


def _finished(
    model: PreTrainedModel, proxy: PreTrainedModel, report: CompressionReport, target: str | None
) -> tuple[PreTrainedModel, CompressionReport]:
    """Mark a model as a proxy, and return it with the sizes in its report."""
    report.achieved_sparsity = 1 - flops.linear_parameters(proxy) / flops.linear_parameters(model)
    head = flops.head_flops(model)
    report.relative_flops = (flops.forward_flops(proxy) + head) / (flops.forward_flops(model) + head)
    if isinstance(proxy, PreTrainedModel):
        mark_as_proxy(
            proxy,
            IproxConfig(
                ranks={name: layer.rank for name, layer in report.layers.items() if layer.rank is not None},
                method=report.method,
                sparsity=report.achieved_sparsity,
                target=target or getattr(model.config, "_name_or_path", None) or None,
                target_fingerprint=model_fingerprint(model),
            ),
        )
    return proxy, report
