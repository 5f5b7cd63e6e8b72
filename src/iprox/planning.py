"""What a recipe would cost, before anything runs: tokens, FLOPs, memory and time of each stage."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from iprox.data import Pool
from iprox.influence.gradients import norm_flops
from iprox.influence.scoring import NORM_SKETCH
from iprox.models import flops
from iprox.models.loading import skeleton
from iprox.proxy.align_signals import AUTO_BYTES
from iprox.proxy.search import most_tries
from iprox.proxy.size import Size
from iprox.recipe import CURVED, Recipe
from iprox.session import Session, encode_validation, share, tokens_of
from iprox.stages.attribution import why_not_attributed
from iprox.stages.query_cost import QueryTokens, candidate_flops, query_flops

# Share of the machine's GEMM rate that a stage reaches: an estimate, from the FLOPs and seconds in the `run.json` of a
# 17 M-parameter model on two CPU cores. Attention, norms, activations, padding and Python take the rest.
EFFICIENCY = 0.25
SAMPLE = 512
# Share of the linear parameters that a proxy sized by its fidelity keeps: a guess, as the search is yet to come.
KEPT_BY_FIDELITY = 0.5
# What low-rank validation gradients that keep 0.9 of the norm cost beside whole ones: an estimate, as their ranks are
# known only once they are made.
LOW_RANK_QUERY = 0.02
# The same for the 0.95 that a target keeps of them where a proxy is watched on held-out rows.
WATCHED_QUERY = 0.06


def measured_gemm_rate(device: torch.device, dtype: torch.dtype, seconds: float = 0.5) -> float:
    """FLOP/s of a matrix product [4096, 1024] × [1024, 1024] on this machine."""
    x = torch.randn(4096, 1024, device=device).to(dtype)
    w = torch.randn(1024, 1024, device=device).to(dtype)

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    for _ in range(3):
        nn.functional.linear(x, w)
    wait()
    started, count = time.perf_counter(), 0
    while time.perf_counter() - started < seconds:
        nn.functional.linear(x, w)
        wait()
        count += 1
    return 2 * x.shape[0] * x.shape[1] * w.shape[0] * count / (time.perf_counter() - started)


def kept_share(recipe: Recipe, model: PreTrainedModel) -> float:
    """Share of the target's linear parameters that the proxy of a recipe keeps."""
    settings = recipe.proxy
    assert settings
    if settings.method == "off-the-shelf":
        other = skeleton(str(settings.model), trust_remote_code=recipe.trust_remote_code)
        return flops.forward_flops(other) / flops.forward_flops(model)
    if settings.fidelity is not None:
        return KEPT_BY_FIDELITY
    dense = flops.linear_parameters(model)
    return Size(settings.sparsity, settings.parameters, settings.flops).budget(model, dense) / dense


def plan_recipe(recipe: Recipe, session: Session, rate: float) -> dict[str, Any]:
    """Plan a recipe.

    The pool is read once (counted and checked); a sample of it is tokenised to know the mean length.

    Args:
        recipe: resolved.
        session: for the tokenizer and dtype.
        rate: FLOP/s of the machine's matrix products.

    Returns:
        `rows`, `tokens_per_row`, `supervised_per_row`, `gemm_rate`, `parameters` of target and proxy, `stages`: by
        name `tokens`, `flops`, `seconds`, `memory_bytes`; and `total_seconds`, `relative_score_cost`: making and
        scoring the proxy over scoring the target.
    """
    pool = Pool(recipe.data.pool, on_bad_row=recipe.data.on_bad_row)
    total = session.read(pool).rows
    encoder = session.encoder(session.tokenizer(recipe.model))
    validation = {
        task: Pool(files, name=task, on_bad_row=recipe.data.on_bad_row)
        for task, files in recipe.data.validation.items()
    }
    encoded = encode_validation(encoder, validation)
    step = max(1, total // SAMPLE)
    tokens, supervised = tokens_of(encoder.encode(pool.take(range(0, total, step))))
    sampled = len(range(0, total, step))
    mean, mean_supervised = tokens / sampled, supervised / sampled
    model = skeleton(recipe.model, trust_remote_code=recipe.trust_remote_code)
    tasks = len(recipe.data.validation)
    parameters = sum(p.numel() for p in model.parameters())
    linear = flops.forward_flops(model) / 2
    bytes_per = 2 if session.dtype == torch.bfloat16 else 4
    # What a batch keeps for its backward pass: about 16 numbers of the hidden size a layer and token.
    config = model.config.get_text_config()
    activations = 16 * bytes_per * recipe.batch_tokens * config.hidden_size * config.num_hidden_layers
    gradient = recipe.influence.gradient
    stages: dict[str, dict[str, float]] = {}

    def add(name: str, rows: float, cost: float, memory: float) -> None:
        stages[name] = {
            "tokens": rows * mean,
            "flops": cost,
            "seconds": cost / (rate * EFFICIENCY),
            "memory_bytes": memory,
        }

    checkpoints = 1
    if recipe.warmup:
        rows = recipe.warmup.epochs * max(1, round(total * recipe.warmup.fraction))
        checkpoints = recipe.warmup.epochs if recipe.influence.checkpoints == "all" else 1
        cost = flops.training_flops(model, round(rows * mean), round(rows * mean_supervised))
        add("warmup", rows, cost, 16 * parameters + 2 * activations)  # weights, gradients, Adam's two, in float32
    scored = total * checkpoints
    whole = tasks * flops.contraction_flops(model, gradient)
    kept_whole = recipe.influence.query_norm == 1 or (recipe.influence.query_norm is None and not recipe.proxy)
    exact_norms = norms = 0.0  # FLOPs a token on a target, and on what candidates are scored on
    if recipe.influence.normalise == "cosine":
        shapes: dict[float, list[tuple[int, int]]] = {}
        for m, n, part in flops.layers_of(model, "weight"):
            shapes.setdefault(part, []).append((m, n))
        sketch = NORM_SKETCH if recipe.influence.norm_sketch is None else recipe.influence.norm_sketch
        # Of rows of one length; exact ones of longer rows cost more. Experts', which see a part of a row, are exact.
        exact_norms, norms = (
            sum(norm_flops(each, [mean * part], size if part == 1 else 0) for part, each in shapes.items()) / mean
            for size in (0, sketch if recipe.proxy else 0)
        )
    formed = recipe.influence.estimator == "adam"  # whole gradients, whose norms are to be had for nothing
    contraction = whole * (1 if kept_whole else LOW_RANK_QUERY) + (0.0 if formed else norms)
    # The target's own scores are of whole gradients unless asked otherwise, and of exact norms.
    own = whole * (LOW_RANK_QUERY if (recipe.influence.query_norm or 1) < 1 else 1) + (0.0 if formed else exact_norms)
    curved = min(recipe.influence.curvature_examples, total) if recipe.influence.estimator in CURVED else 0
    validation = QueryTokens.of(encoded)
    counted = QueryTokens(
        tasks, validation.tokens, validation.supervised, round(curved * mean), round(curved * mean_supervised)
    )
    queries = query_flops(model, recipe.influence, counted)  # at one checkpoint
    read = round(scored * mean), round(scored * mean_supervised)
    on_target = candidate_flops(model, recipe.influence, *read, read[0] * contraction) + checkpoints * queries
    exactly = candidate_flops(model, recipe.influence, *read, read[0] * own)  # the target's own scores
    kept = 1.0
    construction = 0.0

    def watching(rows: int, proxies: int) -> float:
        """At one checkpoint, held-out rows scored on the target and on some proxies, with the gradients they meet."""
        each = round(min(rows, total) * mean), round(min(rows, total) * mean_supervised)
        cut = recipe.influence.query_norm != 1
        on_target = whole * (WATCHED_QUERY if cut and not curved else 1) + exact_norms
        cost = flops.scoring_flops(model, *each, each[0] * on_target)
        per_token = 2 * kept * flops.forward_flops(model) + whole * (LOW_RANK_QUERY if cut else 1) + norms
        cost += proxies * (each[0] * per_token + each[1] * 2 * flops.head_flops(model))
        fixed = gradient == "weight" and recipe.influence.query == "target"  # else taken anew for each proxy
        return cost + (1 if fixed else 1 + proxies) * queries

    if recipe.proxy:
        kept = kept_share(recipe, model)
        measured = 1 if recipe.proxy.shared_start else checkpoints
        rows = measured * share(total, recipe.proxy.probe.fraction)
        cost = flops.compression_flops(model, round(rows * mean), round(rows * mean_supervised))
        if recipe.proxy.fidelity is not None:
            cost += measured * watching(recipe.proxy.held_out, most_tries())
        construction += cost
        add("compress", rows, cost, bytes_per * parameters + 16 * linear + activations)
        if recipe.proxy.factorised and recipe.proxy.align:
            rows = checkpoints * recipe.proxy.align.epochs * share(total, recipe.proxy.align.fraction)
            # As `flops.alignment_flops` counts, before there is a proxy.
            passes, heads = (3 + 8 * kept, 8) if recipe.proxy.align.gradient_weight else (1 + 3 * kept, 4)
            per_token = passes * flops.forward_flops(model)
            cost = rows * (mean * per_token + mean_supervised * heads * flops.head_flops(model))
            # What the target says is kept from the first epoch on, where it is not too large to be.
            batches = share(total, recipe.proxy.align.fraction) / recipe.proxy.align.batch_size
            kept_signals = recipe.proxy.align.precompute
            if kept_signals is True or (kept_signals == "auto" and 4 * batches * linear <= AUTO_BYTES):
                asked = 3 if recipe.proxy.align.gradient_weight else 1
                again = rows * (1 - 1 / recipe.proxy.align.epochs)
                cost -= again * mean * asked * flops.forward_flops(model)
            if recipe.proxy.align.held_out:
                cost += checkpoints * watching(recipe.proxy.align.held_out, 1 + recipe.proxy.align.evaluations)
            construction += cost
            add("align", rows, cost, 2 * bytes_per * parameters + 20 * kept * linear + 4 * activations)
        if gradient == "factors":
            contraction -= (1 - kept) * whole * (1 if kept_whole else LOW_RANK_QUERY)
    per_token = 2 * kept * flops.forward_flops(model) + contraction
    per_row = mean * per_token + mean_supervised * 2 * flops.head_flops(model)
    if recipe.influence.gradient_free:
        forward = mean * kept * flops.forward_flops(model)
        head = mean_supervised * flops.head_flops(model) if recipe.influence.estimator == "perplexity" else 0.0
        per_row = forward + head if recipe.influence.runs_model else 0.0
    if recipe.influence.estimator == "adam":
        # A gradient a candidate is formed, whatever the number of tasks; on a proxy of the target's shapes.
        per_row += mean * (flops.contraction_flops(model, "weight") - contraction)
    if recipe.proxy and recipe.audit:
        rows = min(recipe.audit.sample, total) * checkpoints
        cost = rows * (per_row + exactly / scored)
        cost += 2 * checkpoints * queries
        add("audit", 2 * rows, cost, 2 * bytes_per * parameters + activations)
        if lds := recipe.audit.lds:
            rows = lds.subsets * lds.epochs * lds.fraction * min(recipe.audit.sample, total)
            cost = flops.training_flops(model, round(rows * mean), round(rows * mean_supervised))
            add("lds", rows, cost, 16 * parameters + 2 * activations)
    memory = bytes_per * (parameters - (1 - kept) * linear + tasks * kept * linear) + activations
    add("score", scored, scored * per_row + checkpoints * queries, memory)
    if recipe.refine and recipe.refine.recall:
        # At least the selection itself; how many more, the audit will say.
        share_again = recipe.select.fraction or (recipe.select.count or 0) / total
        cost = share_again * exactly + checkpoints * queries
        add("refine", share_again * scored, cost, memory)
    if recipe.report.attributed and why_not_attributed(recipe.influence, model) is None:
        rows = min(recipe.report.attributed, total) * checkpoints
        add("attribute", rows, rows * per_row + checkpoints * queries, memory)
    if recipe.finetune:
        size = recipe.select.count or round((recipe.select.fraction or 0) * total)
        if recipe.select.tokens:
            size = round(recipe.select.tokens / mean)
        rows = recipe.finetune.epochs * size
        cost = flops.training_flops(model, round(rows * mean), round(rows * mean_supervised))
        add("finetune", rows, cost, 16 * parameters + 2 * activations)
    return {
        "rows": total,
        "tokens_per_row": mean,
        "supervised_per_row": mean_supervised,
        "gemm_rate": rate,
        "parameters": {"target": parameters, "proxy": round(parameters - (1 - kept) * linear)},
        "stages": stages,
        "total_seconds": sum(stage["seconds"] for stage in stages.values()),
        "relative_score_cost": (construction + stages["score"]["flops"]) / on_target if on_target else 1.0,
    }
