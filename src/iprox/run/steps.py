"""The steps of a run, in order: what each stage depends on, where it writes, and how its output is made."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

from iprox.data import Example, Pool
from iprox.engine.ray import ray_engine
from iprox.engine.windows import Engine
from iprox.errors import InputError
from iprox.files import remove
from iprox.influence.attribution import why_not_attributed
from iprox.influence.estimators.base import QueryTokens
from iprox.influence.estimators.ekfac import KroneckerInfluence
from iprox.influence.estimators.registry import estimator_of
from iprox.influence.job import Checkpoint
from iprox.models import flops
from iprox.models.loading import checkpoint_fingerprint, skeleton
from iprox.models.optimizer_state import OPTIMIZER_FILE
from iprox.models.saving import CHECKPOINTS, learning_rates_in
from iprox.proxy.align_state import discard_other_states
from iprox.records import StageRecord, key_of
from iprox.run.runner import Run
from iprox.session import pool_of, share, tasks_of
from iprox.settings import OF_GRADIENTS, EvaluateSection, Settings
from iprox.stages import alignment, attribution, auditing, compression, refinement, scoring, selection, training
from iprox.stages.curvature import measure_curvature
from iprox.stages.held_out import HeldOutRows
from iprox.stages.retraining import Retraining

# Number of rows in the report whose scores are attributed to tokens.
ATTRIBUTED = 120


def warm_up(run: Run) -> None:
    """Train the target on a small fraction of the pool, unless the warm-up is off."""
    settings = run.settings.warmup
    if not settings:
        run.targets = [(run.model, 1.0)]
        run.keys["warmup"] = "off"
        return
    rows = run.draw("warmup", settings.examples(run.total))
    folder = run.folder.warmup
    adam = run.settings.influence.traits.optimizer

    def outputs() -> list[Path]:
        kept = [folder / path for path, _ in _checkpoints(run)] or [folder / "checkpoint"]
        # The optimizer's state does not change checkpoints, so it is an output and not part of the key.
        return [folder / CHECKPOINTS, *kept, *(checkpoint / OPTIMIZER_FILE for checkpoint in kept if adam)]

    run.keys["warmup"] = run.stage(
        "warmup",
        [run.common_key(), settings.model_dump()],
        outputs,
        lambda: training.warm_up(run.session, run.model, run.pool.take(rows), folder, settings, optimizer_state=adam),
    )
    run.targets = [(str(folder / path), rate) for path, rate in _checkpoints(run)]


def _checkpoints(run: Run) -> list[tuple[str, float]]:
    """Return the warm-up's checkpoints that influence is computed at, with learning rates; [] without a sound list."""
    listing = run.folder.warmup / CHECKPOINTS
    try:
        known = list(learning_rates_in(listing).items())
    except InputError:
        return []  # the warm-up is done again
    return known if run.settings.influence.checkpoints == "all" else known[-1:]


def curvature(run: Run) -> None:
    """Measure the curvature of each checkpoint once, for all stages that score.

    Its files are large and are removed at the end of the run, so they are not outputs: the first stage that is done
    again later measures the curvature again. A proxy that gives its own validation gradients has its own curvature.
    """
    influence = run.settings.influence
    if not isinstance(estimator_of(influence), KroneckerInfluence) or not on_target(run.settings):
        return
    run.curvature = [run.folder.curvature / str(number) for number in range(len(run.targets))]
    how = influence.model_dump(include={"estimator", "curvature_examples"})
    run.keys["curvature"] = run.stage(
        "curvature",
        [run.common_key(), run.keys["warmup"], len(run.targets), how, run.session.batch_tokens],
        list,
        lambda: measure_curvature(run.session, [path for path, _ in run.targets], run.pool, run.curvature, influence),
        passing=[run.folder.curvature],
    )


def _held_out(run: Run, rows: list[int], number: int) -> HeldOutRows | None:
    """Return the rows that the fidelity of a checkpoint's proxy is measured on, if there are any."""
    if not rows:
        return None
    kept = run.curvature[number] if run.curvature else None
    return HeldOutRows(run.pool.take(rows), run.validation, run.settings.influence, run.pool, kept)


def compress(run: Run) -> None:
    """Make a proxy of each checkpoint, unless proxies are off."""
    settings = run.settings.proxy
    if not settings:
        return
    rows = run.draw("probe", share(run.total, settings.probe))
    by_fidelity = settings.fidelity is not None
    watched = run.draw("size", settings.held_out) if by_fidelity else []
    influence = run.settings.influence
    folders = _variants(run.folder.proxy, run)

    def work() -> StageRecord:
        examples = run.pool.take(rows)
        made = (
            compression.compress(run.session, path, examples, folder, settings, _held_out(run, watched, number))
            for number, ((path, _), folder) in enumerate(zip(run.targets, folders, strict=True))
        )
        return _replaced(run, run.folder.proxy, folders, "compression.json", made)

    chosen = settings.model_dump(exclude={"align", "model"})
    if settings.model is not None:
        chosen["model"] = checkpoint_fingerprint(settings.model)
    key = [run.common_key(), run.keys["warmup"], len(run.targets), chosen]
    if by_fidelity:
        key += [influence.model_dump(include=set(OF_GRADIENTS)), run.session.batch_tokens]
    run.keys["compress"] = run.stage("compress", key, lambda: _proxies(folders, "compression.json"), work)
    run.proxies = [str(folder) for folder in folders]


def align(run: Run) -> None:
    """Tune the factors of each proxy to its target, unless alignment is off."""
    proxy = run.settings.proxy
    settings = proxy and proxy.factorized and proxy.align
    if not settings:
        return
    rows = run.draw("align", share(run.total, settings.fraction))
    watched = run.draw("held-out", settings.held_out) if settings.held_out and run.validation else []
    influence = run.settings.influence
    folders = _variants(run.folder.aligned, run)
    proxies = run.proxies
    key = [run.common_key(), run.keys["compress"], settings.model_dump(), run.session.batch_tokens]
    if watched:
        key.append(influence.model_dump(include=set(OF_GRADIENTS)))
    identity = key_of(key)
    discard_other_states(run.folder.align_state, identity)

    def work() -> StageRecord:
        examples = run.pool.take(rows)
        made = (
            alignment.align_proxy(
                run.session,
                path,
                proxy,
                examples,
                folder,
                settings,
                held_out=_held_out(run, watched, number),
                state=run.folder.align_state / f"{folder.name}.safetensors",
                identity=identity,
            )
            for number, ((path, _), proxy, folder) in enumerate(zip(run.targets, proxies, folders, strict=True))
        )
        record = _replaced(run, run.folder.aligned, folders, "alignment.json", made)
        shutil.rmtree(run.folder.align_state, ignore_errors=True)
        return record

    run.keys["align"] = run.stage("align", key, lambda: _proxies(folders, "alignment.json"), work)
    run.proxies = [str(folder) for folder in folders]


def _proxies(folders: list[Path], description: str) -> list[Path]:
    """Return the outputs of a stage that makes proxies."""
    return [*folders, *(folder / description for folder in folders)]


def _variants(base: Path, run: Run) -> list[Path]:
    """Return one folder per checkpoint: `base` itself, or a folder below it for each of several."""
    if len(run.targets) == 1:
        return [base]
    return [base / Path(path).name for path, _ in run.targets]


def _replaced(
    run: Run, base: Path, folders: list[Path], description: str, records: Iterator[StageRecord]
) -> StageRecord:
    """Write proxies into an empty folder, and return one record: the last one's, with the sums of tokens and FLOPs.

    With several checkpoints, the last description is copied to where that of a single proxy would be.
    """
    if base != run.folder.path:
        remove(base)
    total: StageRecord = {}
    for record in records:
        for name in ("tokens", "flops"):
            record[name] = total.get(name, 0) + record[name]
        total = record
    if folders != [base]:
        shutil.copyfile(folders[-1] / description, base / description)
    return total


def audit(run: Run) -> None:
    """Score a sample on proxies and targets, and retrain on parts of it if asked for."""
    settings = run.settings.audit
    if not settings or not run.proxies:
        return
    rows = run.draw("audit", settings.sample)
    influence = run.settings.influence
    pairs = [replace(each, target=path) for each, (path, _) in zip(_scored_models(run), run.targets, strict=True)]
    folder = run.folder.audit
    audited = run.stage(
        "audit",
        [run.common_key(), run.keys, influence.model_dump(), settings.model_dump(include={"sample"})],
        lambda: [folder / "audit.json", folder / "audit.parquet"],
        lambda: auditing.audit(run.session, pairs, run.pool.take(rows), run.pool, run.validation, folder, influence)[0],
    )
    path, _ = run.targets[-1]
    for name, measure in auditing.MEASUREMENTS.items():
        if getattr(settings, name):
            run.stage(
                name,
                [audited, settings.model_dump(include={name, "learning_rate"})],
                lambda name=name: [folder / f"{name}.json"],
                lambda name=name, measure=measure: measure(
                    Retraining(run.session, path, run.pool.take(rows), run.validation, folder, settings, name)
                ),
            )


def score(run: Run) -> None:
    """Score the pool on the proxies, or on the targets if there are none."""
    influence = run.settings.influence
    models = run.scored = run.scored or _scored_models(run)
    identity = {"inputs": run.record["identity"], "stages": key_of([run.common_key(), run.keys])}
    run.keys["score"] = run.stage(
        "score",
        [run.common_key(), run.keys, influence.model_dump(), run.session.batch_tokens],
        lambda: [run.folder.scores],
        partial(
            scoring.score,
            *(run.session, models, run.pool, run.validation, run.folder.scores, influence, identity, _engine(run)),
        ),
    )
    run.scores = run.folder.scores


def on_target(settings: Settings) -> bool:
    """Return whether validation gradients are taken on the target: by the settings, or because there is no proxy."""
    proxy, influence = settings.proxy, settings.influence
    return not proxy or (proxy.comparable and influence.query == "target" and influence.traits.gradients)


def _scored_models(run: Run) -> list[Checkpoint]:
    from_target, adam = bool(run.proxies) and on_target(run.settings), run.settings.influence.traits.optimizer
    models = run.proxies or [path for path, _ in run.targets]
    return [
        Checkpoint(model, rate, path if from_target else None, path if adam else None, curvature)
        for model, (path, rate), curvature in zip(
            models, run.targets, run.curvature or [None] * len(models), strict=True
        )
    ]


def cost_of_scoring(run: Run) -> None:
    """Record the FLOPs of scoring on the proxy, of making it, and of scoring on the target instead."""
    entry = run.record["stages"]["score"]
    target = skeleton(run.model, trust_remote_code=run.settings.trust_remote_code)
    checkpoints = entry["checkpoints"]
    # The target is charged the same contraction as the proxy, with low-rank gradients and sketched norms.
    supervised = entry["supervised"] * checkpoints
    estimator = estimator_of(run.settings.influence)
    of_target = estimator.candidate_flops(target, entry["tokens"], supervised, entry["contraction_flops"])
    of_target += checkpoints * estimator.query_flops(target, QueryTokens(**entry["query_tokens"]))
    stages = run.record["stages"]
    construction = sum(stages.get(name, {}).get("flops", 0.0) for name in ("compress", "align"))
    # Needed with and without a proxy; after a finished run it is measured again, as a part of the stage.
    apart = entry["query_tokens"]["curvature_tokens"] == 0
    measured = stages.get("curvature", {}).get("flops", 0.0) if apart else 0.0
    run.record["cost"] = {
        "proxy_flops_per_token": entry["flops_per_token"],
        "target_flops_per_token": flops.forward_flops(target),
        "proxy_parameters": entry["parameters"],
        "target_parameters": flops.parameters(target),
        "score_flops": measured + entry["flops"],
        "construction_flops": construction,
        "target_score_flops": measured + of_target,
    }
    run.save()


def refine(run: Run) -> None:
    """Score the best rows again on the target, if asked for."""
    settings, chosen = run.settings.refine, run.settings.select
    if not settings:
        return
    assert run.scores is not None  # set by an earlier step or by the command
    scores, folder, again = run.scores, run.folder.refined, settings.share(chosen.rows_of(run.total), run.total)
    if settings.candidates is None and again == 1:
        run.session.reporter.warn("refine: left out, because it would score the whole pool again on the target")
        return
    influence = run.settings.influence.model_copy(update={"query_norm": None})  # the default for a model itself
    adam = influence.traits.optimizer
    models = [
        Checkpoint(path, rate, None, path if adam else None, kept)
        for (path, rate), kept in zip(run.targets, run.curvature or [None] * len(run.targets), strict=True)
    ]

    def on_target(candidates: Pool, file: Path) -> StageRecord:
        identity = {"candidates": candidates.scan().fingerprint, "stages": key_of([run.common_key(), run.keys])}
        return scoring.score(
            *(run.session, models, candidates, run.validation, file, influence, identity, _engine(run)),
            part_of=run.pool,
        )

    run.keys["refine"] = run.stage(
        "refine",
        [run.keys, again, chosen.strategy, chosen.task, chosen.weights, run.session.batch_tokens],
        lambda: [folder / "scores.parquet", folder / "refine.json"],
        lambda: refinement.refine(
            folder=folder,
            scores=scores,
            pool=run.pool,
            candidates=again,
            chosen=chosen,
            score_on_target=on_target,
        ),
    )
    run.scores = folder / "scores.parquet"
    if "cost" in run.record:
        run.record["cost"]["refine_flops"] = run.record["stages"]["refine"]["flops"]
        run.save()


def _engine(run: Run) -> Engine | None:
    """Return the Ray engine, or None to score in this process. Scores do not depend on it, so it is in no key."""
    workers = run.settings.ray_workers
    return ray_engine(workers, run.session.device.type) if workers else None


def select(run: Run) -> None:
    """Select rows by their scores."""
    settings, scores = run.settings.select, run.scores
    assert scores is not None  # set by an earlier step
    run.keys["select"] = run.stage(
        "select",
        [run.keys.get("refine", run.keys["score"]), settings.model_dump()],
        lambda: [run.folder.selected, run.folder.selection],
        lambda: selection.select(
            run.session, scores, run.pool, run.folder.selected, run.folder.selection, settings, "recipe"
        ),
    )


def finetune(run: Run) -> None:
    """Fine-tune the original target on the selection, test it and run benchmarks on it, if asked for."""
    settings = run.settings.finetune
    if not settings:
        return
    tests = tasks_of(settings.test, run.settings)
    fingerprints = {task: source.scan().fingerprint for task, source in tests.items()}
    run.keys["finetune"] = run.stage(
        "finetune",
        [run.common_key(), run.keys["select"], settings.model_dump(exclude={"test", "evaluate"}), fingerprints],
        lambda: [run.folder.finetune / "finetune.json", run.folder.finetune / "model"],
        lambda: training.finetune(
            run.session,
            run.model,
            _selected(run) if run.selected is None else run.selected,
            run.folder.finetune,
            settings,
            tests,
        ),
    )

    if settings.evaluate:
        _evaluate(run, settings.evaluate)


def _evaluate(run: Run, settings: EvaluateSection) -> None:
    """Run benchmarks on the model before and after fine-tuning."""
    from iprox.harness import tasks_key

    folder = run.folder.finetune
    run.stage(
        "evaluate",
        [run.common_key(), run.keys["finetune"], tasks_key(settings)],
        lambda: [folder / training.BENCHMARKS],
        lambda: training.benchmark(run.session, run.model, folder, settings),
    )


def _selected(run: Run) -> list[Example]:
    return list(pool_of([str(run.folder.selected)], run.settings, "selection"))


def report(run: Run) -> None:
    """Write the report. If scores are sums over tokens, those of the rows it shows are attributed to tokens first."""
    _attribute(run)

    def work() -> StageRecord:
        from iprox.report.page import build_report

        build_report(run.folder.path, run.pool)
        return {}

    run.stage("report", [stage["key"] for stage in run.record["stages"].values()], lambda: [run.folder.report], work)


def _attribute(run: Run) -> None:
    from iprox.report.page import shown_rows

    settings = run.settings.influence
    on = skeleton(run.scored[0].read_by[0], trust_remote_code=run.settings.trust_remote_code)
    why = why_not_attributed(settings, on, pairs=run.pool.pairs)
    if why is not None:
        run.record["unattributed"] = why
        run.session.reporter.say(f"the report does not shade tokens: {why}")
        return
    rows = shown_rows(run.folder.path)[:ATTRIBUTED]
    run.stage(
        "attribute",
        [run.keys["score"], rows],
        lambda: [run.folder.attribution],
        lambda: attribution.attribute(
            *(run.session, run.scored, run.pool, rows, run.validation),
            *(run.folder.scores, run.folder.attribution, settings),
        ),
    )
