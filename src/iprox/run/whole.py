"""A whole run: check the inputs, claim the folder, and do the steps in order.

data → warm-up → curvature → compress → align → audit → score → refine → select → fine-tune → report
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import yaml
from transformers import PreTrainedModel

from iprox.audits.held_out import FEWEST
from iprox.data import Pool
from iprox.engine.cluster import check_ray
from iprox.errors import InputError
from iprox.files import check_output, write_text
from iprox.harness import check_harness
from iprox.kronecker.kept import discard_curvature
from iprox.models import flops
from iprox.models.adapters import check_lora
from iprox.models.loading import checkpoint_fingerprint, skeleton
from iprox.models.quantized import check_trainable
from iprox.progress import Reporter
from iprox.recipe import parse_recipe, read_yaml, resolved, to_yaml
from iprox.records import key_of
from iprox.run import steps
from iprox.run.folder import RunFolder
from iprox.run.runner import Run, new_record
from iprox.selection import check_feasible
from iprox.session import Session, encode_validation, pool_of, tasks_of
from iprox.settings import STAGES, Recipe
from iprox.stages import refinement
from iprox.stages.compression import check_size
from iprox.tracking import Tracker, check_tracking

# Most characters of a value in the list of changed settings.
_LONGEST = 40
# Only their contents matter: other contents are refused elsewhere, and a new path to the same contents is no change.
_PATHS = frozenset({"model", "output", "data.pool", "data.validation", "finetune.test", "proxy.model"})


def run_recipe(
    recipe: Recipe,
    *,
    reporter: Reporter,
    fresh: bool = False,
    stop_after: str | None = None,
    command: str = "iprox run",
    before: Callable[[Run], None] | None = None,
) -> Run:
    """Run a recipe, or resume it where it stopped.

    Args:
        recipe: validated recipe.
        reporter: reporter for progress and warnings.
        fresh: whether to remove the results of an earlier run in the output folder.
        stop_after: last stage to do, one of `STAGES`.
        command: command line, for `run.json`.
        before: called with the run before its first stage.

    Raises:
        InputError: bad input, found before any long work.
    """
    recipe = resolved(recipe)
    run = open_run(recipe, reporter, fresh, command)
    try:
        if stop_after != "data":
            if before is not None:
                before(run)
            with Tracker(recipe.tracking, run.folder.path, recipe.model_dump(mode="json"), reporter.warn) as tracker:
                run.session.tracker = tracker
                _do(run, stop_after)
    finally:
        run.folder.release()
    return run


def _do(run: Run, stop_after: str | None) -> None:
    for name in STAGES[1:]:
        getattr(steps, {"warmup": "warm_up"}.get(name, name))(run)
        if name == "score":
            steps.cost_of_scoring(run)
        if name == stop_after != STAGES[-1]:
            return
    for folder in run.curvature:
        discard_curvature(folder)
    shutil.rmtree(run.folder.curvature, ignore_errors=True)


def open_run(recipe: Recipe, reporter: Reporter, fresh: bool, command: str) -> Run:
    """Check all inputs, claim the folder, and write the resolved recipe."""
    RunFolder(check_output(recipe.output)).earlier()
    session = Session.of(recipe, reporter)
    check_recipe(recipe, session)
    pool = pool_of(recipe.data.pool, recipe)
    validation = tasks_of(recipe.data.validation, recipe)
    check_tracking(recipe.tracking)
    if recipe.finetune and recipe.finetune.evaluate:
        check_harness(recipe.finetune.evaluate)
    with session.metered() as usage:
        fingerprint = checkpoint_fingerprint(recipe.model)
        chosen = recipe.select
        tests = tasks_of(recipe.finetune.test, recipe) if recipe.finetune else {}
        summary = session.read(pool, judging(validation, tests))
        unnamed = summary.rows - sum(summary.sources.values())
        check_feasible(chosen, summary.rows, {**summary.sources, **({None: unnamed} if unnamed else {})})
        if recipe.refine:
            refinement.check_candidates(recipe.refine, chosen, summary.rows)
        check_watched(recipe, summary.rows)
        encoder = session.encoder(recipe.model)
        encode_validation(encoder, validation)
        encoder.encode(pool.take(range(min(32, summary.rows))))  # a template that fails should fail now
        encode_validation(encoder, tests)
        if summary.bad_rows:
            several = "s" if summary.bad_rows > 1 else ""
            reporter.warn(f"{summary.bad_rows} bad row{several} left out (first: {summary.bad_row_messages[0]})")
    inputs = {
        "pool": {
            "files": list(summary.files),
            "columns": recipe.data.columns,
            "pairs": pool.pairs,
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
    if recipe.data.columns:  # also part of the fingerprints, but named here for messages
        identity["data.columns"] = recipe.data.columns
    folder = RunFolder(recipe.output)
    earlier = folder.claim(identity, fresh)
    say_changes(reporter, folder, recipe)
    record = {**new_record(session, command, identity), "model": recipe.model, "inputs": inputs}
    run = Run(recipe, folder, session, pool, validation, record, template=encoder.chat_template)
    run.earlier = {**earlier.get("earlier", {}), **earlier.get("stages", {})}
    run.earlier_version = earlier.get("iprox", run.earlier_version)
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


def check_recipe(recipe: Recipe, session: Session) -> PreTrainedModel:
    """Refuse a recipe that must fail, given its settings, the model's shapes and the machine, before reading the pool.

    Returns:
        The target, without weights.

    Raises:
        InputError: the model cannot be scored, the proxy's size is out of reach, or Ray cannot start the workers.
    """
    target = skeleton(recipe.model, trust_remote_code=recipe.trust_remote_code)
    flops.compressible_layers(target)
    if recipe.warmup or recipe.finetune:
        check_trainable(target.config, recipe.model)
    if recipe.trains_adapters:
        check_lora(target, recipe.model)
    if recipe.proxy:
        check_size(target, recipe.proxy)
    if recipe.ray_workers:
        check_ray(recipe.ray_workers, session.device.type)
    return target


def check_watched(recipe: Recipe, rows: int) -> None:
    """Refuse a pool that is too small to measure a proxy's fidelity on."""
    proxy = recipe.proxy
    if not proxy or rows >= FEWEST:
        return
    if proxy.fidelity is not None:
        raise InputError(f"proxy.fidelity needs {FEWEST} rows or more, and the pool has {rows}; give a size instead")
    if proxy.align and proxy.align.held_out:
        raise InputError(
            f"watching the alignment needs {FEWEST} rows or more, and the pool has {rows}; set proxy.align.held_out to "
            "0 or proxy.align to false"
        )


def say_changes(reporter: Reporter, folder: RunFolder, recipe: Recipe) -> None:
    """Print which settings changed since the last start; stages that depend on them are done again."""
    try:
        before = read_yaml(folder.recipe.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return  # a first start, or a file that someone changed; it is written again
    if not isinstance(before, dict):
        return
    with contextlib.suppress(InputError):  # another version of iprox may have had other keys
        before = yaml.safe_load(to_yaml(parse_recipe(before)))  # adds the defaults of this version
    changed = list(_changed(before, yaml.safe_load(to_yaml(recipe)), ""))
    if changed:
        reporter.say(f"settings changed since the last start: {', '.join(changed)}")


def judging(validation: Mapping[str, Pool], tests: Mapping[str, Pool]) -> dict[str, Pool]:
    """Return the validation and test sets under the names that messages use."""
    return {
        f"{kind} set of {task}": source
        for kind, sets in (("validation", validation), ("test", tests))
        for task, source in sets.items()
    }


def _changed(before: Mapping[str, Any], after: Mapping[str, Any], prefix: str) -> Iterator[str]:
    """Yield each changed setting as `proxy.sparsity 0.7 → 0.5`, in the order of the recipe."""
    for key in dict.fromkeys([*after, *before]):
        one, other = before.get(key), after.get(key)
        name = f"{prefix}{key}"
        if one == other or name in _PATHS:
            continue
        if isinstance(one, bool) or isinstance(other, bool):  # a section is off, or has settings
            one, other = bool(one), bool(other)
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            yield from _changed(one, other, f"{name}.")
        else:
            yield f"{name} {_shown(one)} → {_shown(other)}"


def _shown(value: Any) -> str:
    if value is None:
        return "not set"
    if isinstance(value, bool):
        return "on" if value else "off"
    text = ", ".join(f"{key} {each}" for key, each in value.items()) if isinstance(value, Mapping) else str(value)
    return text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"
