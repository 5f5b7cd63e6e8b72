"""A run in progress: its folder, what is known of it so far, and how a stage is done or skipped."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from iprox.audits.held_out import FEWEST
from iprox.data import Pool
from iprox.data.sampling import draw_rows
from iprox.engine.ray import check_ray
from iprox.errors import InputError
from iprox.files import check_output
from iprox.influence.job import Checkpoint
from iprox.models import flops
from iprox.models.adapters import check_lora
from iprox.models.loading import checkpoint_fingerprint, skeleton
from iprox.pipeline.changes import changed_settings
from iprox.progress import Reporter
from iprox.recipe import parse_recipe, read_yaml, to_yaml
from iprox.run_folder import RunFolder, StageRecord, environment, key_of, write_json, write_text
from iprox.selection import check_feasible
from iprox.session import AT_LEAST, Session, encode_validation, pool_of, tasks_of
from iprox.settings import Recipe
from iprox.stages import refinement, selection
from iprox.stages.compression import check_size
from iprox.tracking import check_tracking


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
    earlier_version: str = field(default_factory=lambda: version("iprox"))
    record: dict[str, Any] = field(default_factory=dict)
    rows: dict[str, list[int]] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """Rows of the pool."""
        return self.pool.scan().rows

    def stage(self, name: str, key: Any, outputs: Sequence[Path], work: Callable[[], StageRecord]) -> str:
        """Do a stage, or skip it when it is done. Returns the stage's key for the stages that read it."""
        key = key_of([name, key])
        before = self.earlier.pop(name, None)
        if before is not None and before["key"] == key and all(output.exists() for output in outputs):
            self.session.reporter.take_warnings()  # the entry has them from when the stage was done
            entry = {**before, "skipped": True}
            by = before.get("iprox", self.earlier_version)
            older = f" by iprox {by}, and this is {version('iprox')}; --fresh does all again"
            self.session.reporter.say(f"✓ {name}: done already{older if by != version('iprox') else ''}")
        else:
            if before is not None:
                changed = "what it is made from has changed" if before["key"] != key else "what it made is gone"
                self.session.reporter.say(f"{name}: done again, as {changed}")
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
                "iprox": version("iprox"),
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


@dataclass(slots=True)
class Context:
    """What later stages need of earlier ones: model folders with learning rates, the scores, and stage keys."""

    targets: list[tuple[str, float]] = field(default_factory=list)
    proxies: list[str] = field(default_factory=list)
    scored: list[Checkpoint] = field(default_factory=list)
    scores: Path | None = None
    audit: str = ""  # its key, apart: scores do not hang on it
    keys: dict[str, str] = field(default_factory=dict)


def open_run(recipe: Recipe, reporter: Reporter, fresh: bool, command: str) -> Run:
    """Check every input, claim the folder, write the resolved recipe."""
    check_output(recipe.output)
    session = Session.of_recipe(recipe, reporter)
    check_recipe(recipe, session)
    pool = pool_of(recipe.data.pool, recipe)
    validation = tasks_of(recipe.data.validation, recipe)
    check_tracking(recipe.tracking)
    with session.metered() as usage:
        fingerprint = checkpoint_fingerprint(recipe.model)
        chosen = selection.selection_settings(recipe.select)
        tests = tasks_of(recipe.finetune.test, recipe) if recipe.finetune else {}
        summary = session.read(pool, judging(validation, tests))
        unnamed = summary.rows - sum(summary.sources.values())
        check_feasible(chosen, summary.rows, {**summary.sources, **({None: unnamed} if unnamed else {})})
        if recipe.refine:
            refinement.check_candidates(recipe.refine.candidates, chosen, summary.rows)
        check_watched(recipe, summary.rows)
        encoder = session.encoder(recipe.model)
        encode_validation(encoder, validation)
        encoder.encode(pool.take(range(min(32, summary.rows))))  # a template that fails, fails now
        encode_validation(encoder, tests)
        if summary.bad_rows:
            several = "s" if summary.bad_rows > 1 else ""
            reporter.warn(f"{summary.bad_rows} bad row{several} left out (first: {summary.bad_row_messages[0]})")
    inputs = {
        "pool": {
            "files": list(summary.files),
            "columns": recipe.data.columns,
            "rows": summary.rows,
            "fingerprint": summary.fingerprint,
        },
        "validation": {
            task: {"rows": source.scan().rows, "fingerprint": source.scan().fingerprint}
            for task, source in validation.items()
        },
    }
    identity: dict[str, Any] = {
        "model": fingerprint,
        "pool": summary.fingerprint,
        "validation": {task: entry["fingerprint"] for task, entry in inputs["validation"].items()},
    }
    if recipe.data.columns:  # they are in the fingerprints too, which cannot say so
        identity["data.columns"] = recipe.data.columns
    folder = RunFolder(recipe.output)
    earlier = folder.claim(identity, fresh)
    tell_changes(reporter, folder, recipe)
    done_before = {**earlier.get("earlier", {}), **earlier.get("stages", {})}
    run = Run(recipe, folder, session, pool, validation, command, done_before, encoder.chat_template)
    run.earlier_version = earlier.get("iprox", run.earlier_version)
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
    write_text(folder.recipe, to_yaml(recipe))
    return run


def check_recipe(recipe: Recipe, session: Session) -> None:
    """Refuse what can be known to fail from the recipe, the model's shapes and the machine, before the pool is read.

    Raises:
        InputError: the model is none to score, its proxy's size is out of reach, or Ray cannot hold the workers.
    """
    target = skeleton(recipe.model, trust_remote_code=recipe.trust_remote_code)
    flops.compressible_layers(target)
    if recipe.trains_adapters:
        check_lora(target, recipe.model)
    if recipe.proxy:
        check_size(target, recipe.proxy)
    if recipe.engine != "local":
        check_ray(recipe.engine.ray.workers, session.device.type)


def tell_changes(reporter: Reporter, folder: RunFolder, recipe: Recipe) -> None:
    """Say which settings are others than at the last start in the folder: stages that hang on them are done again."""
    try:
        before = read_yaml(folder.recipe.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return  # a first start, or a file that someone wrote over; it is written anew
    if not isinstance(before, dict):
        return
    with contextlib.suppress(InputError):  # of another version, which knew other keys
        before = yaml.safe_load(to_yaml(parse_recipe(before)))  # with the defaults that this one has more
    changed = changed_settings(before, yaml.safe_load(to_yaml(recipe)))
    if changed:
        reporter.say(f"settings changed since the last start: {', '.join(changed)}")


def judging(validation: Mapping[str, Pool], tests: Mapping[str, Pool]) -> dict[str, Pool]:
    """The sets that a selection is judged by, named for messages."""
    return {
        f"{kind} set of {task}": source
        for kind, sets in (("validation", validation), ("test", tests))
        for task, source in sets.items()
    }


def common_key(run: Run) -> list[Any]:
    """What every stage depends on beside its own settings."""
    recipe = run.recipe
    data = recipe.data
    # Of rows that are all good the same is made either way, so that `skip` can go on where a refused row stopped a run.
    # Which rows are bad is another version's to say otherwise, so how many are good counts where some are not.
    read = {None: run.pool, **run.validation}
    left = {task: source.scan().rows for task, source in read.items() if source.scan().bad_rows}
    bad_rows = [data.on_bad_row, sorted(left.items(), key=str)] if left else "stop"
    return [
        run.record["identity"],
        run.record["dtype"],
        recipe.seed,
        data.max_length,
        run.template,
        bad_rows,
    ]


def check_watched(recipe: Recipe, rows: int) -> None:
    """Refuse a pool too small to watch a proxy's fidelity on, before any work.

    Raises:
        InputError: it is.
    """
    proxy = recipe.proxy
    if not proxy or rows >= FEWEST:
        return
    if proxy.fidelity is not None:
        raise InputError(f"proxy.fidelity is measured on {FEWEST} rows or more, and the pool has {rows}: give a size")
    if proxy.align and proxy.align.held_out:
        raise InputError(
            f"alignment is watched on {FEWEST} rows or more, and the pool has {rows}: set proxy.align.held_out to 0 or "
            "proxy.align to false"
        )


def draw(run: Run, name: str, count: int) -> list[int]:
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
