"""The whole method, stage by stage: each reads and writes the run folder and is skipped when it is done (design 3).

data → warm-up → compress → align → audit → score → refine → select → fine-tune → report. A stage is done when
`run.json` has its key (its settings, its inputs' fingerprints and the keys of the stages it reads) and its output is
there. Keys hold no paths, so a run folder can be moved.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from iprox import align_stage, attribute_stage, compress_stage, lds_stage, refine_stages, score_stages, stages
from iprox.data import Pool
from iprox.held_out_rows import HeldOutRows
from iprox.influence.index import GradientIndex
from iprox.influence.ray_engine import ray_engine
from iprox.models import flops
from iprox.models.loading import checkpoint_fingerprint, skeleton
from iprox.models.optimizer_state import OPTIMIZER_FILE
from iprox.progress import Reporter
from iprox.proxy.align_state import discard_other_states
from iprox.recipe import OF_GRADIENTS, STAGES, Recipe
from iprox.report import build_report, shown_rows
from iprox.run_folder import RunFolder, environment, key_of, read_json, write_json, write_text
from iprox.session import AT_LEAST, Session, draw_rows, encode_validation, share
from iprox.tracking import Tracker, check_tracking


@dataclass(slots=True)
class Run:
    """A run in progress: its recipe, its folder, and what is known so far.

    `earlier` holds what earlier starts say of stages that this one has not reached, or that are switched off now.
    """

    recipe: Recipe
    folder: RunFolder
    session: Session
    pool: Pool
    validation: dict[str, Pool]
    command: str
    earlier: dict[str, Any]
    template: str | None
    record: dict[str, Any] = field(default_factory=dict)
    rows: dict[str, list[int]] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """Rows of the pool."""
        return self.pool.scan().rows

    def stage(self, name: str, key: Any, outputs: Sequence[Path], work: Callable[[], stages.StageRecord]) -> str:
        """Do a stage, or skip it when it is done. Returns the stage's key for the stages that read it."""
        key = key_of([name, key])
        before = self.earlier.pop(name, None)
        if before is not None and before["key"] == key and all(output.exists() for output in outputs):
            self.session.reporter.take_warnings()  # the entry has them from when the stage was done
            entry = {**before, "skipped": True}
            self.session.reporter.say(f"✓ {name}: done already")
        else:
            self.save()  # without the stage: from here on its output is neither the earlier one nor the new one
            try:
                with self.session.metered() as usage:
                    entry = {"tokens": 0, "flops": 0.0, **work()}
            except BaseException:
                self.folder.remove_partial()
                raise
            entry |= {
                "seconds": usage.seconds,
                "peak_memory_bytes": usage.peak_memory_bytes,
                "warnings": self.session.reporter.take_warnings(),
                "skipped": False,
                "key": key,
            }
        self.record["stages"][name] = entry
        self.save()
        if not entry["skipped"]:
            self.session.tracker.stage(name, entry)
        return key

    def save(self) -> None:
        """Write `run.json`."""
        seconds = sum(stage["seconds"] for stage in self.record["stages"].values())
        write_json(self.folder.run, {**self.record, "seconds": seconds, "earlier": self.earlier})


def run_recipe(
    recipe: Recipe,
    *,
    reporter: Reporter,
    fresh: bool = False,
    stop_after: str | None = None,
    command: str = "iprox run",
) -> Run:
    """Run a recipe, or go on with it where it stopped.

    Args:
        recipe: validated.
        reporter: where progress goes.
        fresh: forget what an earlier run left in the output folder.
        stop_after: last stage to do, one of `STAGES`.
        command: how it was started, for `run.json`.

    Returns:
        The run; `run.record` is what `run.json` holds.

    Raises:
        InputError: bad input, before any long work.
    """
    recipe = recipe.resolved()
    run = _open(recipe, reporter, fresh, command)
    steps = (_warmup, _compress, _align, _audit, _score, _refine, _select, _finetune, _report)
    context = _Context()
    if stop_after == "data":
        return run
    with Tracker(recipe.tracking, run.folder.path, recipe.model_dump(mode="json"), reporter.warn) as tracker:
        run.session.tracker = tracker
        for name, step in zip(STAGES[1:], steps, strict=True):
            step(run, context)
            if name == stop_after:
                break
    return run


@dataclass(slots=True)
class _Context:
    """What later stages need of earlier ones: model folders with learning rates, the scores, and stage keys."""

    targets: list[tuple[str, float]] = field(default_factory=list)
    proxies: list[str] = field(default_factory=list)
    scored: list[score_stages.ScoredModel] = field(default_factory=list)
    scores: Path | None = None
    audit: str = ""  # its key, apart: scores do not hang on it
    keys: dict[str, str] = field(default_factory=dict)


def _open(recipe: Recipe, reporter: Reporter, fresh: bool, command: str) -> Run:
    """Check every input, claim the folder, write the resolved recipe."""
    session = Session.of_recipe(recipe, reporter)
    pool = Pool(recipe.data.pool, on_bad_row=recipe.data.on_bad_row)
    validation = _tasks(recipe.data.validation, recipe)
    check_tracking(recipe.tracking)
    with session.metered() as usage:
        fingerprint = checkpoint_fingerprint(recipe.model)
        stages.selection_settings(recipe.select, recipe.seed)
        summary = session.read(pool)
        refine_stages.check_sample(recipe, summary.rows)
        encoder = session.encoder(session.tokenizer(recipe.model))
        encode_validation(encoder, validation)
        encoder.encode(pool.take(range(min(32, summary.rows))))  # a template that fails, fails now
        flops.compressible_layers(skeleton(recipe.model, trust_remote_code=recipe.trust_remote_code))
        if recipe.finetune:
            encode_validation(encoder, _tasks(recipe.finetune.test, recipe))
        if summary.bad_rows:
            reporter.warn(f"{summary.bad_rows} bad rows left out (first: {summary.bad_row_messages[0]})")
    inputs = {
        "pool": {"files": list(summary.files), "rows": summary.rows, "fingerprint": summary.fingerprint},
        "validation": {
            task: {"rows": source.scan().rows, "fingerprint": source.scan().fingerprint}
            for task, source in validation.items()
        },
    }
    identity = {
        "model": fingerprint,
        "pool": summary.fingerprint,
        "validation": {task: entry["fingerprint"] for task, entry in inputs["validation"].items()},
    }
    folder = RunFolder(recipe.output)
    earlier = folder.claim(identity, fresh)
    done_before = {**earlier.get("earlier", {}), **earlier.get("stages", {})}
    run = Run(recipe, folder, session, pool, validation, command, done_before, encoder.chat_template)
    run.record = {
        **environment(),
        "command": command,
        "identity": identity,
        "seed": recipe.seed,
        "device": str(session.device),
        "dtype": str(session.dtype).removeprefix("torch."),
        "model": recipe.model,
        "inputs": inputs,
        "stages": {},
    }
    run.record["stages"]["data"] = {
        "tokens": 0,
        "flops": 0.0,
        "seconds": usage.seconds,
        "peak_memory_bytes": usage.peak_memory_bytes,
        "warnings": reporter.take_warnings(),
        "skipped": False,
        "key": key_of([identity, encoder.describe]),
        "sources": summary.sources,
        "labels": encoder.describe,
    }
    run.earlier.pop("data", None)
    run.save()
    write_text(folder.recipe, recipe.to_yaml())
    return run


def _tasks(files: Mapping[str, str | list[str]], recipe: Recipe) -> dict[str, Pool]:
    """The examples of each task, validation or test."""
    return {task: Pool(names, name=task, on_bad_row=recipe.data.on_bad_row) for task, names in files.items()}


def _common(run: Run) -> list[Any]:
    """What every stage depends on beside its own settings."""
    recipe = run.recipe
    data = recipe.data
    return [
        run.record["identity"],
        run.record["dtype"],
        recipe.seed,
        data.max_length,
        run.template,
        data.on_bad_row,
    ]


def _draw(run: Run, name: str, count: int) -> list[int]:
    """Rows for a stage: a seeded sample that no earlier stage has used, or, where the pool is too small, has."""
    used = [row for rows in run.rows.values() for row in rows]
    rows = draw_rows(name, run.recipe.seed, run.total, count, used)
    shared = draw_rows(name, run.recipe.seed, run.total, min(count, AT_LEAST) - len(rows), rows)
    if shared:
        run.session.reporter.warn(
            f"{name}: the pool is small, so {len(shared)} of its {len(rows) + len(shared)} examples "
            f"are ones that {', '.join(run.rows)} use too"
        )
    elif len(rows) < count:
        run.session.reporter.warn(f"{name}: {count} examples asked for, {len(rows)} are left of the pool")
    run.rows[name] = sorted(rows + shared)
    return run.rows[name]


def _warmup(run: Run, context: _Context) -> None:
    settings = run.recipe.warmup
    if not settings:
        context.targets = [(run.recipe.model, 1.0)]
        context.keys["warmup"] = "off"
        return
    rows = _draw(run, "warmup", max(1, round(run.total * settings.fraction)))
    folder = run.folder.warmup
    adam = run.recipe.influence.estimator == "adam"
    kept = [folder / entry["path"] for entry in _checkpoints(run)]
    # The optimizer's state changes no checkpoint, so it is in no key: a run without it lacks an output.
    states = [checkpoint / OPTIMIZER_FILE for checkpoint in kept] if adam else []
    context.keys["warmup"] = run.stage(
        "warmup",
        [_common(run), settings.model_dump()],
        [folder / "checkpoints.json", *kept, *states],
        lambda: stages.warm_up(
            run.session, run.recipe.model, run.pool.take(rows), folder, settings, optimizer_state=adam
        ),
    )
    context.targets = [(str(folder / entry["path"]), entry["learning_rate"]) for entry in _checkpoints(run)]


def _checkpoints(run: Run) -> list[dict[str, Any]]:
    """The checkpoints of the warm-up that influence is taken at; none before it is done."""
    listing = run.folder.warmup / "checkpoints.json"
    known = read_json(listing) if listing.is_file() else []
    return known if run.recipe.influence.checkpoints == "all" else known[-1:]


def _variants(base: Path, context: _Context) -> list[Path]:
    """One folder for one checkpoint; with several, one below it for each."""
    if len(context.targets) == 1:
        return [base]
    return [base / Path(path).name for path, _ in context.targets]


def _afresh(base: Path, folders: list[Path], description: str, records: Iterator[stages.StageRecord]) -> Any:
    """Make the variants of a proxy in an empty folder, with the last one's description where a single one's is."""
    shutil.rmtree(base, ignore_errors=True)
    record = _total(records)
    if folders != [base]:
        shutil.copyfile(folders[-1] / description, base / description)
    return record


def _compress(run: Run, context: _Context) -> None:
    settings = run.recipe.proxy
    if not settings:
        return
    rows = _draw(run, "probe", share(run.total, settings.probe.fraction))
    by_fidelity = settings.fidelity is not None
    watched = _draw(run, "size", settings.held_out) if by_fidelity else []
    influence = run.recipe.influence
    folders = _variants(run.folder.proxy, context)

    def work() -> stages.StageRecord:
        examples = run.pool.take(rows)
        held_out = HeldOutRows(run.pool.take(watched), run.validation, influence, run.pool) if by_fidelity else None
        paths = [path for path, _ in context.targets]

        def made() -> Iterator[stages.StageRecord]:
            if not settings.shared_start:
                for path, folder in zip(paths, folders, strict=True):
                    yield compress_stage.compress(run.session, path, examples, folder, settings, held_out)
                return
            last = compress_stage.compress(run.session, paths[-1], examples, folders[-1], settings, held_out)
            for path, folder in zip(paths[:-1], folders[:-1], strict=True):
                yield compress_stage.start_from(run.session, paths[-1], folders[-1], path, folder)
            yield last

        return _afresh(run.folder.proxy, folders, "compression.json", made())

    key = [_common(run), context.keys["warmup"], len(context.targets), settings.model_dump(exclude={"align"})]
    if by_fidelity:
        key += [influence.model_dump(include=set(OF_GRADIENTS)), run.recipe.batch_tokens]
    context.keys["compress"] = run.stage(
        "compress",
        key,
        [folder / "compression.json" for folder in folders],
        work,
    )
    context.proxies = [str(folder) for folder in folders]


def _align(run: Run, context: _Context) -> None:
    proxy = run.recipe.proxy
    settings = proxy and proxy.factorised and proxy.align
    if not settings:
        return
    rows = _draw(run, "align", share(run.total, settings.fraction))
    watched = _draw(run, "held-out", settings.held_out) if settings.held_out else []
    influence = run.recipe.influence
    folders = _variants(run.folder.aligned, context)
    proxies = context.proxies
    # The order of patterns counts, which a mapping in a key does not keep.
    patterns = list(settings.layer_weights.items())
    chosen = settings.model_dump(exclude={"precompute"})  # which changes no factor
    key = [_common(run), context.keys["compress"], chosen, patterns, run.recipe.batch_tokens]
    curved = align_stage.CurvedBy.of(influence, run.pool)
    if watched or curved:
        key.append(influence.model_dump(include=set(OF_GRADIENTS)))
    identity = key_of(key)
    discard_other_states(run.folder.align_state, identity)

    def work() -> stages.StageRecord:
        examples = run.pool.take(rows)
        held_out = HeldOutRows(run.pool.take(watched), run.validation, influence, run.pool)
        made = (
            align_stage.align_proxy(
                run.session,
                path,
                proxy,
                examples,
                folder,
                settings,
                held_out=held_out if watched else None,
                curved=curved,
                state=run.folder.align_state / f"{folder.name}.safetensors",
                identity=identity,
            )
            for (path, _), proxy, folder in zip(context.targets, proxies, folders, strict=True)
        )
        record = _afresh(run.folder.aligned, folders, "alignment.json", made)
        shutil.rmtree(run.folder.align_state, ignore_errors=True)
        return record

    context.keys["align"] = run.stage("align", key, [folder / "alignment.json" for folder in folders], work)
    context.proxies = [str(folder) for folder in folders]


def _audit(run: Run, context: _Context) -> None:
    settings = run.recipe.audit
    if not settings or not context.proxies:
        return
    rows = _draw(run, "audit", settings.sample)
    pairs = [(path, proxy, rate) for (path, rate), proxy in zip(context.targets, context.proxies, strict=True)]
    context.audit = run.stage(
        "audit",
        [_common(run), context.keys, run.recipe.influence.model_dump(), settings.model_dump(exclude={"lds"})],
        [run.folder.audit / "audit.json", run.folder.audit / "audit.parquet"],
        lambda: score_stages.audit(
            run.session, pairs, run.pool.take(rows), run.pool, run.validation, run.folder.audit, run.recipe.influence
        )[0],
    )
    if not settings.lds:
        return
    chosen, (path, _) = settings.lds, context.targets[-1]
    run.stage(
        "lds",
        [context.audit, chosen.model_dump()],
        [run.folder.audit / lds_stage.RESULT],
        lambda: lds_stage.measure_lds(run.session, path, run.pool.take(rows), run.validation, run.folder.audit, chosen),
    )


def _score(run: Run, context: _Context) -> None:
    proxy = run.recipe.proxy
    influence = run.recipe.influence
    from_target = proxy and proxy.factorised and influence.query == "target" and not influence.gradient_free
    models = [
        score_stages.ScoredModel(
            model, rate, path if from_target else None, path if influence.estimator == "adam" else None
        )
        for model, (path, rate) in zip(
            context.proxies or [path for path, _ in context.targets], context.targets, strict=True
        )
    ]
    identity = {"inputs": run.record["identity"], "stages": key_of([_common(run), context.keys])}
    chosen = run.recipe.engine
    # Where windows are scored does not change the scores, so the engine is in no key.
    engine = None if chosen == "local" else ray_engine(chosen.ray.workers, run.session.device.type)
    context.keys["score"] = run.stage(
        "score",
        [_common(run), context.keys, run.recipe.influence.model_dump(), run.recipe.batch_tokens],
        [run.folder.scores],
        lambda: score_stages.score(
            run.session, models, run.pool, run.validation, run.folder.scores, run.recipe.influence, identity, engine
        ),
    )
    context.scored, context.scores = models, run.folder.scores
    _cost(run)


def _refine(run: Run, context: _Context) -> None:
    settings = run.recipe.refine
    if not settings:
        return
    influence, chosen = run.recipe.influence, run.recipe.select
    folder = run.folder.refined
    # A cascade hangs on how many rows are selected, and by which ranking; a correction on neither.
    by_task = chosen.strategy in refine_stages.BY_TASK
    looked_for = settings.recall and [chosen.fraction, chosen.count, by_task]
    models = [
        score_stages.ScoredModel(path, rate, None, path if influence.estimator == "adam" else None)
        for path, rate in context.targets
    ]

    def on_target(candidates: Pool, file: Path) -> stages.StageRecord:
        identity = {"candidates": candidates.scan().fingerprint, "stages": key_of([_common(run), context.keys])}
        return score_stages.score(run.session, models, candidates, run.validation, file, influence, identity)

    context.keys["refine"] = run.stage(
        "refine",
        [context.keys, context.audit, settings.model_dump(), looked_for, run.recipe.batch_tokens],
        [folder / "scores.parquet", folder / "refine.json"],
        lambda: refine_stages.refine(
            folder=folder,
            scores=run.folder.scores,
            audit=run.folder.audit,
            pool=run.pool,
            settings=settings,
            chosen=chosen,
            how=score_stages.scoring_settings(run.session, influence).aggregation,
            score_on_target=on_target,
        ),
    )
    context.scores = folder / "scores.parquet"
    run.record["cost"]["refine_flops"] = run.record["stages"]["refine"]["flops"]
    run.save()


def _cost(run: Run) -> None:
    """What scoring cost on the proxy, and what it would have cost on the target, with all construction counted."""
    entry = run.record["stages"]["score"]
    target = skeleton(run.recipe.model, trust_remote_code=run.recipe.trust_remote_code)
    checkpoints = entry["checkpoints"]
    # The contraction is charged to the target as it was to the proxy: the same gradients, as low-rank.
    on_target = flops.scoring_flops(
        target, entry["tokens"], entry["supervised"] * checkpoints, entry["contraction_flops"] * checkpoints
    )
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


def _select(run: Run, context: _Context) -> None:
    settings = run.recipe.select
    scores = context.scores
    assert scores is not None  # the stage before has written it
    context.keys["select"] = run.stage(
        "select",
        [
            context.keys.get("refine", context.keys["score"]),
            settings.model_dump(exclude={"features"}),
            run.recipe.seed,
            GradientIndex.open(settings.features).description if settings.features else None,
        ],
        [run.folder.selected, run.folder.selection],
        lambda: stages.select(run.session, scores, run.pool, run.folder.selected, run.folder.selection, settings),
    )


def _finetune(run: Run, context: _Context) -> None:
    settings = run.recipe.finetune
    if not settings:
        return
    tests = _tasks(settings.test, run.recipe)
    fingerprints = {task: source.scan().fingerprint for task, source in tests.items()}
    context.keys["finetune"] = run.stage(
        "finetune",
        [_common(run), context.keys["select"], settings.model_dump(exclude={"test"}), fingerprints],
        [run.folder.finetune / "finetune.json", run.folder.finetune / "model"],
        lambda: stages.finetune(
            run.session,
            run.recipe.model,
            list(Pool([run.folder.selected], name="selection")),
            run.folder.finetune,
            settings,
            tests,
        ),
    )


def _attribute(run: Run, context: _Context) -> None:
    settings, count = run.recipe.influence, run.recipe.report.attributed
    if not count:
        return
    on = skeleton(context.scored[0].path, trust_remote_code=run.recipe.trust_remote_code)
    why = attribute_stage.why_not_attributed(settings, on)
    if why is not None:
        run.record["unattributed"] = why
        run.session.reporter.say(f"the report shades no tokens: {why}")
        return
    rows = shown_rows(run.folder.path)[:count]
    run.stage(
        "attribute",
        [context.keys["score"], rows],
        [run.folder.attribution],
        lambda: attribute_stage.attribute(
            run.session,
            context.scored,
            run.pool,
            rows,
            run.validation,
            run.folder.scores,
            run.folder.attribution,
            settings,
        ),
    )


def _report(run: Run, context: _Context) -> None:
    _attribute(run, context)

    def work() -> stages.StageRecord:
        build_report(run.folder.path, run.pool)
        return {}

    run.stage("report", [stage["key"] for stage in run.record["stages"].values()], [run.folder.report], work)


def _total(records: Any) -> stages.StageRecord:
    """Records of the same stage at several checkpoints as one: work adds up, the rest is the last one's."""
    total: stages.StageRecord = {}
    for record in records:
        for name in ("tokens", "flops"):
            record[name] = total.get(name, 0) + record[name]
        total = record
    return total
