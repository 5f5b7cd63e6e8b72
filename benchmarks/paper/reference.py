"""Proxies by the rules of the published code (github.com/csr16/IProX), before alignment, as a row of the main table.

Differences from `iprox.proxy`: moments of 14 examples (a tenth of 1 % of the pool), 73 random tokens of each, with the
loss on all tokens, including prompts; factors in the span of those columns only, with a ridge of 0.001 for moments of
any size; the same rank rule for all layers, with ranks rounded up to multiples of 128; a layer whose rank reaches its
smaller side is not changed, and one whose rank exceeds the number of columns keeps random values. This reproduces the
behavior of that code without copying it.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from iprox.data import ChatEncoder, Pool, iter_batches
from iprox.influence.job import Checkpoint
from iprox.models import flops
from iprox.models.checkpoint import IproxConfig, mark_as_proxy
from iprox.models.layers import LowRankLinear, compressible_layers, dense_weight, layer_bias, replace_module
from iprox.models.loading import checkpoint_fingerprint, load_model, load_tokenizer, model_fingerprint
from iprox.models.loss import causal_lm_losses
from iprox.models.observe import frozen, watched_backward
from iprox.progress import Reporter
from iprox.recipe import parse_recipe
from iprox.records import read_json
from iprox.session import Session, pool_of, tasks_of
from iprox.stages.scoring import score as score_pool

EXAMPLES, COLUMNS, MULTIPLE, SPARSITY = 14, 1024, 128, 0.7
RIDGE = 1e-3


def score(recipe: dict[str, Any], warmed: Path, folder: Path) -> dict[str, Any]:
    """Make the proxy of a run's warmed target, score the pool with its validation gradients, and return the cost."""
    settings = parse_recipe(recipe, "reference.py")
    session = Session.of(settings, Reporter(quiet=True))
    checkpoint = warmed / "warmup" / read_json(warmed / "warmup/checkpoints.json")[-1]["path"]
    pool = pool_of(settings.data.pool, settings)
    with session.metered() as making:
        proxy, cost = make_proxy(checkpoint, pool, settings.data.max_length, settings.seed)
        proxy.save_pretrained(folder / "proxy")
        load_tokenizer(checkpoint).save_pretrained(folder / "proxy")
    validation = tasks_of(settings.data.validation, settings)
    influence = settings.influence.model_copy(update={"query": "proxy"})
    path = str(folder / "proxy")
    identity = {
        "model": checkpoint_fingerprint(path),
        "pool": pool.scan().fingerprint,
        "validation": {task: source.scan().fingerprint for task, source in validation.items()},
    }
    with session.metered() as usage:
        entry = score_pool(
            session, [Checkpoint(path)], pool, validation, folder / "scores.parquet", influence, identity
        )
    return {
        "parameters": entry["parameters"],
        "flops": {"compress": cost, "score": entry["flops"]},
        "seconds": {"compress": making.seconds, "score": usage.seconds},
        "peak_memory_bytes": max(making.peak_memory_bytes, usage.peak_memory_bytes),
        "achieved_sparsity": proxy.config.quantization_config.sparsity,
    }


def make_proxy(checkpoint: Path, pool: Pool, max_length: int, seed: int) -> tuple[Any, float]:
    """Return the proxy and the FLOPs of making it."""
    target, encoder = load_model(checkpoint), ChatEncoder(load_tokenizer(checkpoint), max_length)
    encoded = encoder.encode(pool.take(range(EXAMPLES)))
    layers = compressible_layers(target)
    columns: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in layers}
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.empty(0, dtype=torch.long)

    def keep(name: str, h: Tensor, delta: Tensor) -> None:
        columns[name].append((h[0, chosen], delta[0, chosen].detach()))

    tokens = 0
    with frozen(target):
        for row in encoded:  # one at a time, so that no column is padding
            (batch,) = iter_batches([row], max_length)
            batch = replace(batch, labels=batch.input_ids.clone())
            chosen = torch.randperm(int(batch.lengths[0]), generator=generator)[: COLUMNS // EXAMPLES]
            watched_backward(target, layers, lambda batch=batch: causal_lm_losses(target, batch), keep)
            tokens += int(batch.lengths[0])
    ranks: dict[str, int] = {}
    spent = flops.training_flops(target, tokens, tokens)
    for name, layer in layers.items():
        weight = dense_weight(layer).detach()
        m, n = weight.shape
        rank = -(-max(1, round((1 - SPARSITY) * m * n / (m + n))) // MULTIPLE) * MULTIPLE
        if rank >= min(m, n):
            continue  # not changed
        h, delta = (torch.cat(parts).double() for parts in zip(*columns[name], strict=True))
        A, B = span_factors(weight.double(), h, delta, rank)
        if A.shape[1] < rank:  # the factors do not fit the layer, which silently keeps random values
            A, B = (
                (2 * torch.rand(shape, generator=generator) - 1) / shape[1] ** 0.5 for shape in ((m, rank), (rank, n))
            )
        ranks[name] = rank
        spent += svd_flops(len(h), n) + svd_flops(len(delta), m) + svd_flops(m, n)
        bias = layer_bias(layer)
        replace_module(target, name, LowRankLinear.from_factors(A.float(), B.float(), bias, weight.dtype))
    whole = load_model(checkpoint)
    sparsity = 1 - flops.linear_parameters(target) / flops.linear_parameters(whole)
    config = IproxConfig(ranks, "reference", sparsity, str(checkpoint), model_fingerprint(whole))
    mark_as_proxy(target, config)
    return target, spent


def svd_flops(rows: int, columns: int) -> float:
    """Return the FLOPs of a thin SVD with both sets of vectors: 14 m n² + 8 n³, m ≥ n (Golub and Van Loan, 8.6.3)."""
    m, n = max(rows, columns), min(rows, columns)
    return 14.0 * m * n**2 + 8.0 * n**3


def span_factors(weight: Tensor, h: Tensor, delta: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return factors of W [m, n] in the spans of probe columns h [N, n] and δ [N, m], of lower rank if N is small.

    The same ridge is added to the second moments of h and of δ inside the spans, though those of δ are far smaller.
    """

    def root(x: Tensor) -> tuple[Tensor, Tensor]:
        _, values, Vh = torch.linalg.svd(x, full_matrices=False)
        return (values.square() / len(x) + RIDGE).sqrt(), Vh.mT

    scale_in, basis_in = root(h)
    scale_out, basis_out = root(delta)
    core = scale_out[:, None] * (basis_out.mT @ weight @ basis_in) * scale_in
    U, sigma, Vh = torch.linalg.svd(core, full_matrices=False)
    half = sigma[:rank].sqrt()
    A = basis_out @ (U[:, :rank] / scale_out[:, None]) * half
    B = half[:, None] * (Vh[:rank] / scale_in) @ basis_in.mT
    return A, B
