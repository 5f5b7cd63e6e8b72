"""The stage that derives a proxy from its target: of a given size, or of the size that a fidelity takes."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
from transformers import PreTrainedModel

from iprox.data import Batch, ChatEncoder, Example
from iprox.errors import InputError
from iprox.kronecker.moments import MomentSettings
from iprox.models import flops
from iprox.models.checkpoint import make_low_rank
from iprox.models.layers import weight_shape
from iprox.models.loading import skeleton
from iprox.models.saving import save_model
from iprox.proxy import baselines
from iprox.proxy.compress import CompressionReport, adopt, derive_proxy, extract_layers, proxies_of
from iprox.proxy.factorize import FactorSettings
from iprox.proxy.ranks import ErrorCurve, uniform_ranks
from iprox.proxy.search import FURTHER, LEAST, Try, cost_of, most_tries, smallest_faithful
from iprox.proxy.size import Prices, Size
from iprox.records import StageRecord, write_json
from iprox.session import Session, pad_id_of, tokens_of
from iprox.settings import ProxySection
from iprox.stages.held_out import HeldOutRows, held_out_fidelity

# What a search for the size of a fidelity is taken to find, before it has: a guess.
SPARSITY_BY_FIDELITY = 0.5


def compress(
    session: Session,
    model: str,
    examples: Sequence[Example],
    output: Path,
    settings: ProxySection,
    held_out: HeldOutRows | None = None,
) -> StageRecord:
    """Derive a proxy from a model; writes a checkpoint folder with `compression.json`.

    Args:
        session: how to compute.
        model: the target's folder.
        examples: the probe.
        output: folder to write.
        settings: of the recipe.
        held_out: what fidelity is measured on, where the size is given by it.
    """
    encoder = session.encoder(model)
    tokenizer = encoder.tokenizer
    encoded = encoder.encode(examples)
    target = session.model(model)
    batches = list(session.batches(encoded, pad_id_of(tokenizer)))
    searched: StageRecord = {"flops": 0.0}
    if settings.fidelity is None:
        proxy, report = make_proxy(session, target, model, batches, settings)
    else:
        assert held_out is not None
        proxy, report, searched = _search(session, target, model, encoder, batches, settings, held_out)
    save_model(proxy, tokenizer, output)
    write_json(output / "compression.json", {**report.as_dict(), **searched})
    tokens, supervised = tokens_of(encoded)
    # Of the baselines that factorize nothing, there is nothing to count.
    made = flops.compression_flops(target, tokens, supervised, report.passes) if report.layers else 0.0
    return {
        **searched,
        "tokens": tokens,
        "flops": made + searched["flops"],
        "examples": len(examples),
        "labels": encoder.describe,
        "method": report.method,
        "sparsity": report.achieved_sparsity,
        "relative_flops": report.relative_flops,
        "parameters": flops.parameters(proxy),
        "target_parameters": flops.parameters(target),
    }


def check_size(model: PreTrainedModel, settings: ProxySection) -> None:
    """Refuse a size that no proxy of a model can have, before anything is trained or measured.

    Args:
        model: the target, with or without weights.
        settings: of the recipe.

    Raises:
        InputError: it is out of reach; the message has the bound.
    """
    if settings.fidelity is not None or settings.method == "off-the-shelf":
        return
    size = Size(settings.sparsity, settings.flops)
    prices = Prices.of(model, size)
    if settings.method == "layers":
        baselines.fitting_layers(model, size.budget(model, prices.dense))
    else:
        prices.budget(model, size)


def proxy_skeleton(model: PreTrainedModel, settings: ProxySection, *, trust_remote_code: bool) -> PreTrainedModel:
    """Return a proxy without weights of the size that a recipe's will have, its ranks uniform, to count costs.

    Args:
        model: the target without weights.
        settings: of the recipe.
        trust_remote_code: whether the code of an off-the-shelf proxy may run.
    """
    if settings.method == "off-the-shelf":
        return skeleton(str(settings.model), trust_remote_code=trust_remote_code)
    size = Size(SPARSITY_BY_FIDELITY) if settings.fidelity is not None else Size(settings.sparsity, settings.flops)
    prices = Prices.of(model, size)
    if settings.method == "layers":
        return baselines.first_layers(model, size.budget(model, prices.dense))[0]
    layers = flops.compressible_layers(model)
    curves = {name: ErrorCurve(weight_shape(layers[name]), np.empty(0), each) for name, each in prices.by_layer.items()}
    proxy = copy.deepcopy(model)
    make_low_rank(proxy, uniform_ranks(curves, prices.budget(model, size)))  # pyright: ignore[reportArgumentType]
    return proxy


def _search(
    session: Session,
    target: PreTrainedModel,
    name: str,
    encoder: ChatEncoder,
    batches: Sequence[Batch],
    settings: ProxySection,
    held_out: HeldOutRows,
) -> tuple[PreTrainedModel, CompressionReport, StageRecord]:
    """The smallest proxy that is as faithful as asked, its report, and what was tried."""
    assert settings.fidelity is not None
    how = factor_settings(session, settings)
    watched = held_out_fidelity(session, target, None, encoder, held_out)
    layers = len(flops.compressible_layers(target))
    with (
        session.reporter.bar("compress", layers, "layers") as progress,
        proxies_of(target, batches, how, Size(sparsity=LEAST), target=name, progress=progress) as make,
        session.reporter.bar("size", most_tries(), "sizes") as tried,
    ):
        proxy, report, tries = smallest_faithful(make, settings.fidelity, watched.with_bound, tried)
    report.size = {"fidelity": settings.fidelity}
    session.reporter.say(_found(tries, report))
    record: StageRecord = {
        "tries": [asdict(each) for each in tries],
        "further": cost_of(FURTHER, tries),
        "flops": watched.cost.flops(target, [proxy] * len(tries)),
    }
    return proxy, report, record


def _found(tries: Sequence[Try], report: CompressionReport) -> str:
    """What the search found, and what more fidelity would cost."""
    chosen = max((each for each in tries if each.relative_flops == report.relative_flops), key=lambda each: each.lower)
    said = (
        f"sparsity {report.achieved_sparsity:.2f} reaches a fidelity of {chosen.fidelity:.3f} (at least "
        f"{chosen.lower:.3f}) at {chosen.relative_flops:.0%} of the target's FLOPs"
    )
    further = cost_of(FURTHER, list(tries))
    if further is not None:
        said += f"; {FURTHER} would take about {further['relative_flops']:.0%}"
    return said


def factor_settings(session: Session, settings: ProxySection) -> FactorSettings:
    """How a recipe has layers factorized."""
    moments = MomentSettings(settings.probe.labels, settings.probe.tokens, seed=session.seed)
    return FactorSettings(settings.method, settings.ranks, settings.ridge, moments, seed=session.seed)  # pyright: ignore[reportArgumentType]


def make_proxy(
    session: Session, target: PreTrainedModel, name: str, batches: Sequence[Batch], settings: ProxySection
) -> tuple[PreTrainedModel, CompressionReport]:
    """A proxy of a loaded target by the method that a recipe names.

    Args:
        session: how to compute.
        target: the model.
        name: where it was loaded from.
        batches: the probe.
        settings: of the recipe.
    """
    if settings.method == "off-the-shelf":
        assert settings.model is not None
        ours, theirs = (session.tokenizer(each).get_vocab() for each in (name, settings.model))
        if ours != theirs:
            raise InputError(
                f"{settings.model}: its tokenizer is not the target's: tokens of one mean nothing to the other; "
                "choose a model of the target's family"
            )
        return adopt(target, session.model(settings.model), name)
    size = Size(settings.sparsity, settings.flops)
    if settings.method == "layers":
        return extract_layers(target, size, name)
    how = factor_settings(session, settings)
    with session.reporter.bar("compress", len(flops.compressible_layers(target)), "layers") as progress:
        return derive_proxy(target, batches, size, how, target=name, progress=progress)
