"""The published code's proxies, by its rules (github.com, code of arXiv:2602.17835), as a row to compare with.

What differs from `iprox.proxy` (design 11): moments of the first 1,024 columns gathered on 14 examples (a tenth of
1 % of the pool), the loss taken on all tokens, prompts too; factors in the span of those columns only; one rank rule
for all layers, ranks rounded up to multiples of 128; a layer whose rank is above the number of columns would be left
at random values. Rewritten from its behaviour: no line of it is here.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from iprox.data import ChatEncoder, Pool, iter_batches
from iprox.models import flops
from iprox.models.checkpoint import IproxConfig, mark_as_proxy
from iprox.models.layers import LowRankLinear, compressible_layers, dense_weight, layer_bias, replace_module
from iprox.models.loading import checkpoint_fingerprint, load_model, load_tokenizer, model_fingerprint
from iprox.models.loss import causal_lm_losses
from iprox.models.observe import frozen, watched_backward
from iprox.progress import Reporter
from iprox.recipe import parse_recipe
from iprox.session import Session
from iprox.stages.scoring import ScoredModel
from iprox.stages.scoring import score as score_pool

EXAMPLES, COLUMNS, MULTIPLE, SPARSITY = 14, 1024, 128, 0.7
RIDGE = 1e-6  # on the eigenvalues inside the span, against division by nothing


def score(recipe: dict[str, Any], warmed: Path, folder: Path, norm_sketch: int) -> dict[str, Any]:
    """Make the proxy of a run's warmed target, score its pool as the paper does, and say what it cost."""
    settings = parse_recipe(recipe, "reference.py")
    session = Session.of_recipe(settings, Reporter(quiet=True))
    checkpoint = warmed / "warmup" / json.loads((warmed / "warmup/checkpoints.json").read_text())[-1]["path"]
    pool = Pool(settings.data.pool)
    with session.metered() as making:
        proxy, cost = make_proxy(checkpoint, pool, settings.data.max_length)
        proxy.save_pretrained(folder / "proxy")
        load_tokenizer(checkpoint).save_pretrained(folder / "proxy")
    validation = {task: Pool(files) for task, files in settings.data.validation.items()}
    influence = settings.influence.model_copy(
        update={"gradient": "factors", "query": "proxy", "norm_sketch": norm_sketch}
    )
    path = str(folder / "proxy")
    identity = {
        "model": checkpoint_fingerprint(path),
        "pool": pool.scan().fingerprint,
        "validation": {task: source.scan().fingerprint for task, source in validation.items()},
    }
    with session.metered() as usage:
        entry = score_pool(
            session, [ScoredModel(path)], pool, validation, folder / "scores.parquet", influence, identity
        )
    return {
        "parameters": entry["parameters"],
        "flops": {"compress": cost, "score": entry["flops"]},
        "seconds": {"compress": making.seconds, "score": usage.seconds},
        "peak_memory_bytes": max(making.peak_memory_bytes, usage.peak_memory_bytes),
        "achieved_sparsity": proxy.config.quantization_config.sparsity,
    }


def make_proxy(checkpoint: Path, pool: Pool, max_length: int) -> tuple[Any, float]:
    """The proxy, and the FLOPs of its probe."""
    target, encoder = load_model(checkpoint), ChatEncoder(load_tokenizer(checkpoint), max_length)
    encoded = encoder.encode(pool.take(range(EXAMPLES)))
    layers = compressible_layers(target)
    columns: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in layers}

    def keep(name: str, h: Tensor, delta: Tensor) -> None:
        if sum(len(part) for part, _ in columns[name]) < COLUMNS:
            columns[name].append((h.flatten(0, 1), delta.detach().flatten(0, 1)))

    tokens = 0
    with frozen(target):
        for batch in iter_batches(encoded, max_length, 0):
            on_all = batch.input_ids.clone()
            on_all[torch.arange(on_all.shape[1]) >= batch.lengths[:, None]] = -100
            batch = replace(batch, labels=on_all)
            watched_backward(target, layers, lambda batch=batch: causal_lm_losses(target, batch), keep)
            tokens += int(batch.lengths.sum())
    generator = torch.Generator().manual_seed(0)
    ranks = {}
    for name, layer in layers.items():
        weight = dense_weight(layer).detach()
        h, delta = (torch.cat(parts)[:COLUMNS].double() for parts in zip(*columns[name], strict=True))
        m, n = weight.shape
        uniform = (1 - SPARSITY) * m * n / (m + n)
        rank = min(-(-int(uniform) // MULTIPLE) * MULTIPLE, min(m, n))
        if rank > len(h):
            A, B = (torch.randn(shape, generator=generator) * 0.02 for shape in ((m, rank), (rank, n)))
        else:
            A, B = span_factors(weight.double(), h, delta, rank)
        ranks[name] = rank
        bias = layer_bias(layer)
        replace_module(target, name, LowRankLinear.from_factors(A.float(), B.float(), bias, weight.dtype))
    whole = load_model(checkpoint)
    sparsity = 1 - flops.linear_parameters(target) / flops.linear_parameters(whole)
    config = IproxConfig(ranks, "reference", sparsity, str(checkpoint), model_fingerprint(whole))
    mark_as_proxy(target, config)
    return target, flops.training_flops(whole, tokens, tokens)


def span_factors(weight: Tensor, h: Tensor, delta: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Factors of W [m, n] inside the spans of probe columns h [N, n] and δ [N, m]."""

    def root(x: Tensor) -> tuple[Tensor, Tensor]:
        values, vectors = torch.linalg.eigh(x.mT @ x / len(x))
        inside = values > values[-1] * 1e-10
        return (values[inside] + RIDGE * values[-1]).sqrt(), vectors[:, inside]

    scale_in, basis_in = root(h)
    scale_out, basis_out = root(delta)
    core = scale_out[:, None] * (basis_out.mT @ weight @ basis_in) * scale_in
    U, sigma, Vh = torch.linalg.svd(core, full_matrices=False)
    half = sigma[:rank].sqrt()
    A = basis_out @ (U[:, :rank] / scale_out[:, None]) * half
    B = half[:, None] * (Vh[:rank] / scale_in) @ basis_in.mT
    short = rank - len(sigma)
    if short > 0:  # the span is smaller than the rank: the rest of the factors stays zero
        A, B = torch.nn.functional.pad(A, (0, short)), torch.nn.functional.pad(B, (0, 0, 0, short))
    return A, B
