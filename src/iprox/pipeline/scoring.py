"""The steps that score: the audit, the pool, and what the target scores again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from iprox.data import Pool
from iprox.engine.ray import ray_engine
from iprox.engine.stream import Engine
from iprox.influence.estimators.base import QueryTokens
from iprox.influence.estimators.registry import estimator_of
from iprox.influence.job import Checkpoint
from iprox.models import flops
from iprox.models.loading import skeleton
from iprox.pipeline.run import Context, Run, common_key, draw
from iprox.run_folder import StageRecord, key_of
from iprox.stages import auditing, refinement, scoring
from iprox.stages.selection import selection_settings


def audit(run: Run, context: Context) -> None:
    """Score a sample on proxies and targets; and retrain on parts of it, if asked."""
    settings = run.recipe.audit
    if not settings or not context.proxies:
        return
    rows = draw(run, "audit", settings.sample)
    pairs = _checkpoints(run, context.proxies, context)
    context.audit = run.stage(
        "audit",
        [common_key(run), context.keys, run.recipe.influence.model_dump(), settings.model_dump(include={"sample"})],
        [run.folder.audit / "audit.json", run.folder.audit / "audit.parquet"],
        lambda: auditing.audit(
            run.session, pairs, run.pool.take(rows), run.pool, run.validation, run.folder.audit, run.recipe.influence
        )[0],
    )
    path, _ = context.targets[-1]
    for name, measure in auditing.MEASUREMENTS.items():
        if chosen := getattr(settings, name):
            run.stage(
                name,
                [context.audit, chosen.model_dump()],
                [run.folder.audit / f"{name}.json"],
                lambda measure=measure, chosen=chosen: measure(
                    run.session, path, run.pool.take(rows), run.validation, run.folder.audit, chosen
                ),
            )


def score(run: Run, context: Context) -> None:
    """Score the pool on the proxies, or on the targets where there are none."""
    proxy = run.recipe.proxy
    influence = run.recipe.influence
    from_target = proxy and proxy.factorized and influence.query == "target" and influence.traits.gradients
    models = _checkpoints(run, context.proxies, context)
    if not from_target:
        models = [replace(each, target=None) for each in models]
    identity = {"inputs": run.record["identity"], "stages": key_of([common_key(run), context.keys])}
    context.keys["score"] = run.stage(
        "score",
        [common_key(run), context.keys, run.recipe.influence.model_dump(), run.recipe.batch_tokens],
        [run.folder.scores],
        lambda: scoring.score(
            run.session, models, run.pool, run.validation, run.folder.scores, influence, identity, _engine(run)
        ),
    )
    context.scored, context.scores = models, run.folder.scores
    _cost(run)


def refine(run: Run, context: Context) -> None:
    """Have the target score the best rows again, if asked."""
    settings = run.recipe.refine
    if not settings:
        return
    influence, chosen = run.recipe.influence, run.recipe.select
    folder = run.folder.refined
    whole = influence.model_copy(update={"query_norm": None})  # as a model itself is asked
    ranked_by = [chosen.strategy, chosen.task, chosen.weights]
    models = [replace(each, target=None) for each in _checkpoints(run, [], context)]

    def on_target(candidates: Pool, file: Path) -> StageRecord:
        identity = {"candidates": candidates.scan().fingerprint, "stages": key_of([common_key(run), context.keys])}
        return scoring.score(
            *(run.session, models, candidates, run.validation, file, whole, identity, _engine(run)),
            part_of=run.pool,
        )

    context.keys["refine"] = run.stage(
        "refine",
        [context.keys, settings.model_dump(), ranked_by, run.recipe.batch_tokens],
        [folder / "scores.parquet", folder / "refine.json"],
        lambda: refinement.refine(
            folder=folder,
            scores=run.folder.scores,
            pool=run.pool,
            candidates=settings.candidates,
            chosen=selection_settings(chosen),
            score_on_target=on_target,
        ),
    )
    context.scores = folder / "scores.parquet"
    run.record["cost"]["refine_flops"] = run.record["stages"]["refine"]["flops"]
    run.save()


def _checkpoints(run: Run, proxies: Sequence[str], context: Context) -> list[Checkpoint]:
    """Return what is scored at each checkpoint: its proxy, or the target where there are none, with what it reads."""
    models = proxies or [path for path, _ in context.targets]
    state = run.recipe.influence.traits.optimizer
    return [
        Checkpoint(model, rate, path, path if state else None)
        for model, (path, rate) in zip(models, context.targets, strict=True)
    ]


def _engine(run: Run) -> Engine | None:
    """Where windows are scored, which does not change the scores, so that it is in no key; None: in this process."""
    chosen = run.recipe.engine
    return None if chosen == "local" else ray_engine(chosen.ray.workers, run.session.device.type)


def _cost(run: Run) -> None:
    """What scoring cost on the proxy, and what it would have cost on the target, with all construction counted."""
    entry = run.record["stages"]["score"]
    target = skeleton(run.recipe.model, trust_remote_code=run.recipe.trust_remote_code)
    checkpoints = entry["checkpoints"]
    # The contraction is charged to the target as it was to the proxy: the same gradients, as low-rank, and norms as
    # sketched.
    supervised = entry["supervised"] * checkpoints
    estimator = estimator_of(run.recipe.influence)
    on_target = estimator.candidate_flops(target, entry["tokens"], supervised, entry["contraction_flops"])
    on_target += checkpoints * estimator.query_flops(target, QueryTokens(**entry["query_tokens"]))
    construction = sum(run.record["stages"].get(name, {}).get("flops", 0.0) for name in ("compress", "align"))
    run.record["cost"] = {
        "proxy_flops_per_token": entry["flops_per_token"],
        "target_flops_per_token": flops.forward_flops(target),
        "proxy_parameters": entry["parameters"],
        "target_parameters": sum(p.numel() for p in target.parameters()),
        "score_flops": entry["flops"],
        "construction_flops": construction,
        "target_score_flops": on_target,
    }
    run.save()
