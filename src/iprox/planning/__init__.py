"""What a recipe would cost, before anything runs: tokens, FLOPs, memory and time of each stage."""

from __future__ import annotations

from typing import Any

from iprox.files import check_output
from iprox.models.loading import skeleton
from iprox.planning.costs import Costs, Rows
from iprox.planning.stages import PLANS
from iprox.run.whole import check_recipe, judging
from iprox.session import Session, encode_validation, pool_of, refuse_shared_files, tasks_of, tokens_of
from iprox.settings import Recipe

# Share of the machine's GEMM rate that a stage reaches: an estimate, from the FLOPs and seconds in the `run.json` of a
# 17 M-parameter model on two CPU cores. Attention, norms, activations, padding and Python take the rest.
EFFICIENCY = 0.25
SAMPLE = 512


def plan_recipe(recipe: Recipe, session: Session, rate: float) -> dict[str, Any]:
    """Plan a recipe.

    The pool is read once (counted and checked); a sample of it is tokenized to know the mean length.

    Args:
        recipe: resolved.
        session: for the tokenizer and dtype.
        rate: FLOP/s of the machine's matrix products.

    Returns:
        `rows`, `tokens_per_row`, `supervised_per_row`, `gemm_rate`, `parameters` of target and proxy, `stages`: by
        name `tokens`, `flops`, `seconds`, `memory_bytes`; and `total_seconds`, `relative_score_cost`: making and
        scoring the proxy over scoring the target.

    Raises:
        InputError: bad input, or something that the run would refuse before its first stage.
    """
    check_output(recipe.output)
    check_recipe(recipe, session)
    pool, validation = pool_of(recipe.data.pool, recipe), tasks_of(recipe.data.validation, recipe)
    tests = tasks_of(recipe.finetune.test, recipe) if recipe.finetune else {}
    refuse_shared_files(pool, judging(validation, tests))
    total = session.read(pool).rows
    encoder = session.encoder(recipe.model)
    encoded = encode_validation(encoder, validation)
    step = max(1, total // SAMPLE)
    tokens, supervised = tokens_of(encoder.encode(pool.take(range(0, total, step))))
    sampled = len(range(0, total, step))
    rows = Rows(total, tokens / sampled, supervised / sampled)
    model = skeleton(recipe.model, trust_remote_code=recipe.trust_remote_code)
    costs = Costs.of(recipe, model, rows, encoded, session.dtype)
    works = {name: work for name, plan in PLANS.items() if (work := plan(costs)) is not None}
    stages = {
        name: {
            "tokens": work.rows * rows.tokens,
            "flops": work.flops,
            "seconds": work.flops / (rate * EFFICIENCY),
            "memory_bytes": work.memory,
        }
        for name, work in works.items()
    }
    spent = sum(works[name].flops for name in ("compress", "align", "score") if name in works)
    return {
        "rows": total,
        "tokens_per_row": rows.tokens,
        "supervised_per_row": rows.supervised,
        "gemm_rate": rate,
        "parameters": {"target": costs.parameters, "proxy": round(costs.parameters - (1 - costs.kept) * costs.linear)},
        "stages": stages,
        "total_seconds": sum(stage["seconds"] for stage in stages.values()),
        "relative_score_cost": spent / costs.on_target if costs.on_target else 1.0,
    }
