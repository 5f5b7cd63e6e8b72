"""The stage that derives a proxy from its target: with a given size, or with the size that a given fidelity needs."""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path

from transformers import PreTrainedModel

from iprox.data import Batch, ChatEncoder, Example
from iprox.errors import InputError
from iprox.models import flops
from iprox.models.checkpoint import IproxConfig, limit_depth, make_low_rank, mark_as_proxy, proxy_config
from iprox.models.layers import first_graded
from iprox.models.loading import skeleton
from iprox.models.saving import save_model
from iprox.proxy.compress import CompressionReport, adopt, derive_proxy, extract_layers, keep_weights, proxies_of
from iprox.proxy.extraction import first_layers, fitting_layers
from iprox.proxy.factorize import FactorSettings
from iprox.proxy.ranks import uniform_ranks
from iprox.proxy.search import FURTHER, LEAST, Try, cost_of, most_tries, smallest_faithful
from iprox.proxy.size import Size, layer_costs, reachable_budget
from iprox.records import StageRecord, write_json
from iprox.session import Session, tokens_of
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
        model: folder of the target.
        examples: the probe.
        output: folder to write.
        settings: how to make the proxy.
        held_out: rows to measure fidelity on, if the size is given as a fidelity.
    """
    encoder = session.encoder(model)
    tokenizer = encoder.tokenizer
    encoded = encoder.encode(examples)
    target = session.model(model)
    batches = list(session.batches(encoded))
    searched: StageRecord = {"flops": 0.0}
    started = time.perf_counter()
    if settings.fidelity is None:
        proxy, report = make_proxy(session, target, model, batches, settings)
        limit_depth(proxy, settings.given_depth)
    else:
        assert held_out is not None
        proxy, report, searched = _search(session, target, model, encoder, batches, settings, held_out)
    report.seconds = time.perf_counter() - started
    save_model(proxy, tokenizer, output)
    write_json(output / "compression.json", {**report.as_dict(), **searched})
    tokens, supervised = tokens_of(encoded)
    # Baselines that factorize no layer cost nothing here.
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
    """Refuse a size that no proxy of a model can have, before any work. The model may be without weights.

    Raises:
        InputError: the size is out of reach; the message has the bound.
    """
    if settings.fidelity is not None or settings.method in ("off-the-shelf", "target"):
        return
    size = Size(settings.sparsity, settings.flops)
    if settings.method == "layers":
        fitting_layers(model, size)
    else:
        reachable_budget(model, size, layer_costs(model, size))


def proxy_skeleton(model: PreTrainedModel, settings: ProxySection, *, trust_remote_code: bool) -> PreTrainedModel:
    """Return a proxy without weights of the size that a recipe's will have, its ranks uniform, to count costs.

    Args:
        model: the target without weights.
        settings: of the recipe.
        trust_remote_code: whether the code of an off-the-shelf proxy may run.
    """
    if settings.method == "off-the-shelf":
        return skeleton(str(settings.model), trust_remote_code=trust_remote_code)
    proxy, ranks = copy.deepcopy(model), {}
    if settings.method != "target":
        size = Size(SPARSITY_BY_FIDELITY) if settings.fidelity is not None else Size(settings.sparsity, settings.flops)
        if settings.method == "layers":
            return first_layers(model, size)
        costs = layer_costs(model, size)
        ranks = uniform_ranks(costs, reachable_budget(model, size, costs))
        make_low_rank(proxy, ranks)
    mark_as_proxy(proxy, IproxConfig(ranks, depth=settings.given_depth))
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
    """Return the smallest proxy that reaches the fidelity asked for, its report, and the sizes that were tried."""
    assert settings.fidelity is not None
    watched = held_out_fidelity(session, target, encoder, held_out)
    with ExitStack() as stack:
        if settings.method == "target":
            make = partial(_of_depth, target, name)
        else:
            layers = len(flops.compressible_layers(target))
            progress = stack.enter_context(session.reporter.bar("compress", layers, "layers"))
            how, least = factor_settings(session, settings), Size(sparsity=LEAST)
            common = {"loss_fn": session.loss_fn(), "target": name, "progress": progress}
            factorized = stack.enter_context(proxies_of(target, batches, how, least, **common))

            def make(size: Size) -> tuple[PreTrainedModel, CompressionReport]:
                proxy, report = factorized(size)
                limit_depth(proxy, settings.given_depth)
                return proxy, report

        tried = stack.enter_context(session.reporter.bar("size", most_tries(), "sizes"))
        known: dict[int, tuple[float, float]] = {}  # by lowest layer, as depths are rounded to whole layers

        def measure(proxy: PreTrainedModel) -> tuple[float, float]:
            lowest = first_graded(proxy) if settings.method == "target" else len(known)
            if lowest not in known:
                known[lowest] = watched.with_bound(proxy)
            return known[lowest]

        proxy, report, tries = smallest_faithful(make, settings.fidelity, measure, tried)
    report.size = {"fidelity": settings.fidelity}
    session.reporter.say(_found(tries, proxy, report))
    record: StageRecord = {
        "tries": [asdict(each) for each in tries],
        "further": cost_of(FURTHER, tries),
        "flops": watched.cost.flops(target, [proxy] * len(known)),
    }
    return proxy, report, record


def _of_depth(target: PreTrainedModel, name: str, size: Size) -> tuple[PreTrainedModel, CompressionReport]:
    """Return a proxy that keeps the target's weights and leaves out the gradients of a share of its layers."""
    assert size.sparsity is not None
    proxy, report = keep_weights(target, name)
    limit_depth(proxy, 1 - size.sparsity)
    report.relative_flops = flops.scoring_flops(proxy, 1, 0, 0.0) / flops.scoring_flops(target, 1, 0, 0.0)
    return proxy, report


def _found(tries: Sequence[Try], proxy: PreTrainedModel, report: CompressionReport) -> str:
    """Return a sentence about the proxy that was found and the cost of a higher fidelity."""
    chosen = max((each for each in tries if each.relative_flops == report.relative_flops), key=lambda each: each.lower)
    config = proxy_config(proxy)
    assert config is not None
    size = f"sparsity {report.achieved_sparsity:.2f}" if config.depth == 1 else f"depth {config.depth:.2f}"
    said = (
        f"{size} reaches a fidelity of {chosen.fidelity:.3f} (at least "
        f"{chosen.lower:.3f}) at {chosen.relative_flops:.0%} of the target's FLOPs"
    )
    further = cost_of(FURTHER, list(tries))
    if further is not None:
        said += f"; {FURTHER} would take about {further['relative_flops']:.0%}"
    return said


def factor_settings(session: Session, settings: ProxySection) -> FactorSettings:
    """Return the settings of factorization for a recipe's proxy section."""
    return FactorSettings(settings.method, settings.ranks, seed=session.seed)  # pyright: ignore[reportArgumentType]


def make_proxy(
    session: Session, target: PreTrainedModel, name: str, batches: Sequence[Batch], settings: ProxySection
) -> tuple[PreTrainedModel, CompressionReport]:
    """Return a proxy of a loaded target, made by the method of the recipe, and its report.

    `name` is where the target was loaded from, and `batches` are the probe.
    """
    if settings.method == "off-the-shelf":
        assert settings.model is not None
        ours, theirs = (session.tokenizer(each).get_vocab() for each in (name, settings.model))
        if ours != theirs:
            raise InputError(
                f"{settings.model}: its tokenizer differs from the target's; choose a model of the target's family"
            )
        return adopt(target, session.model(settings.model), name)
    if settings.method == "target":
        return keep_weights(target, name)
    size = Size(settings.sparsity, settings.flops)
    if settings.method == "layers":
        return extract_layers(target, size, name)
    how = factor_settings(session, settings)
    with session.reporter.bar("compress", len(flops.compressible_layers(target)), "layers") as progress:
        return derive_proxy(target, batches, size, how, loss_fn=session.loss_fn(), target=name, progress=progress)
