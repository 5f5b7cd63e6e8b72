"""The steps that make what candidates are scored on: warm-up, compression, alignment."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from iprox.models.loading import checkpoint_fingerprint
from iprox.models.optimizer_state import OPTIMIZER_FILE
from iprox.models.saving import CHECKPOINTS
from iprox.pipeline.run import Context, Run, common_key, draw
from iprox.proxy.align_state import discard_other_states
from iprox.run_folder import StageRecord, key_of, read_json
from iprox.session import share
from iprox.settings import OF_GRADIENTS
from iprox.stages import alignment, compression, training
from iprox.stages.held_out import HeldOutRows


def warm_up(run: Run, context: Context) -> None:
    """Train the target on a small share of the pool, unless it is to be scored as it is."""
    settings = run.recipe.warmup
    if not settings:
        context.targets = [(run.recipe.model, 1.0)]
        context.keys["warmup"] = "off"
        return
    rows = draw(run, "warmup", settings.examples(run.total))
    folder = run.folder.warmup
    adam = run.recipe.influence.traits.optimizer
    kept = [folder / entry["path"] for entry in _checkpoints(run)]
    # The optimizer's state changes no checkpoint, so it is in no key: a run without it lacks an output.
    states = [checkpoint / OPTIMIZER_FILE for checkpoint in kept] if adam else []
    context.keys["warmup"] = run.stage(
        "warmup",
        [common_key(run), settings.model_dump()],
        [folder / CHECKPOINTS, *kept, *states],
        lambda: training.warm_up(
            run.session, run.recipe.model, run.pool.take(rows), folder, settings, optimizer_state=adam
        ),
    )
    context.targets = [(str(folder / entry["path"]), entry["learning_rate"]) for entry in _checkpoints(run)]


def _checkpoints(run: Run) -> list[dict[str, Any]]:
    """The checkpoints of the warm-up that influence is taken at; none before it is done."""
    listing = run.folder.warmup / CHECKPOINTS
    known = read_json(listing) if listing.is_file() else []
    return known if run.recipe.influence.checkpoints == "all" else known[-1:]


def _variants(base: Path, context: Context) -> list[Path]:
    """One folder for one checkpoint; with several, one below it for each."""
    if len(context.targets) == 1:
        return [base]
    return [base / Path(path).name for path, _ in context.targets]


def _afresh(base: Path, folders: list[Path], description: str, records: Iterator[StageRecord]) -> Any:
    """Make the variants of a proxy in an empty folder, with the last one's description where a single one's is."""
    shutil.rmtree(base, ignore_errors=True)
    record = _total(records)
    if folders != [base]:
        shutil.copyfile(folders[-1] / description, base / description)
    return record


def compress(run: Run, context: Context) -> None:
    """Make a proxy of each checkpoint, if there are to be proxies."""
    settings = run.recipe.proxy
    if not settings:
        return
    rows = draw(run, "probe", share(run.total, settings.probe.fraction))
    by_fidelity = settings.fidelity is not None
    watched = draw(run, "size", settings.held_out) if by_fidelity else []
    influence = run.recipe.influence
    folders = _variants(run.folder.proxy, context)

    def work() -> StageRecord:
        examples = run.pool.take(rows)
        held_out = HeldOutRows(run.pool.take(watched), run.validation, influence, run.pool) if by_fidelity else None
        made = (
            compression.compress(run.session, path, examples, folder, settings, held_out)
            for (path, _), folder in zip(context.targets, folders, strict=True)
        )
        return _afresh(run.folder.proxy, folders, "compression.json", made)

    chosen = settings.model_dump(exclude={"align", "model"})
    if settings.model is not None:  # what it is, not where
        chosen["model"] = checkpoint_fingerprint(settings.model)
    key = [common_key(run), context.keys["warmup"], len(context.targets), chosen]
    if by_fidelity:
        key += [influence.model_dump(include=set(OF_GRADIENTS)), run.recipe.batch_tokens]
    context.keys["compress"] = run.stage(
        "compress",
        key,
        [folder / "compression.json" for folder in folders],
        work,
    )
    context.proxies = [str(folder) for folder in folders]


def align(run: Run, context: Context) -> None:
    """Tune the factors of each proxy to its target, unless that is off or there are none."""
    proxy = run.recipe.proxy
    settings = proxy and proxy.factorized and proxy.align
    if not settings:
        return
    rows = draw(run, "align", share(run.total, settings.fraction))
    watched = draw(run, "held-out", settings.held_out) if settings.held_out else []
    influence = run.recipe.influence
    folders = _variants(run.folder.aligned, context)
    proxies = context.proxies
    key = [common_key(run), context.keys["compress"], settings.model_dump(), run.recipe.batch_tokens]
    if watched:
        key.append(influence.model_dump(include=set(OF_GRADIENTS)))
    identity = key_of(key)
    discard_other_states(run.folder.align_state, identity)

    def work() -> StageRecord:
        examples = run.pool.take(rows)
        held_out = HeldOutRows(run.pool.take(watched), run.validation, influence, run.pool)
        made = (
            alignment.align_proxy(
                run.session,
                path,
                proxy,
                examples,
                folder,
                settings,
                held_out=held_out if watched else None,
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


def _total(records: Any) -> StageRecord:
    """Records of the same stage at several checkpoints as one: work adds up, the rest is the last one's."""
    total: StageRecord = {}
    for record in records:
        for name in ("tokens", "flops"):
            record[name] = total.get(name, 0) + record[name]
        total = record
    return total
