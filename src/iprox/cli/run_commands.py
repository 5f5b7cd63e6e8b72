"""The commands for whole runs; each returns plain data for `--json`."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

from iprox.cli import summary
from iprox.cli.doctor import examine
from iprox.errors import InputError
from iprox.pipeline import run_recipe
from iprox.planning import plan_recipe
from iprox.planning.rate import measured_gemm_rate
from iprox.progress import Reporter, say_plainly
from iprox.quickstart import quickstart_recipe
from iprox.recipe import STAGES, Recipe, load_recipe
from iprox.report import build_report
from iprox.session import Session

# The recipe keys that the options of every command stand for.
COMMON_OPTIONS = {
    "seed": "seed",
    "dtype": "dtype",
    "device": "device",
    "batch_tokens": "batch_tokens",
    "max_length": "data.max_length",
}


def quickstart(arguments: Namespace) -> dict[str, Any]:
    """`iprox quickstart`."""
    return _run(quickstart_recipe(arguments.output, _common_overrides(arguments)), arguments, None)


def run(arguments: Namespace) -> dict[str, Any]:
    """`iprox run`."""
    if arguments.stop_after is not None and arguments.stop_after not in STAGES:
        raise InputError(f"--stop-after {arguments.stop_after}: no such stage; stages: {', '.join(STAGES)}")
    recipe = load_recipe(arguments.recipe, [*arguments.overrides, *_common_overrides(arguments)])
    return _run(recipe, arguments, arguments.stop_after)


def plan(arguments: Namespace) -> dict[str, Any]:
    """`iprox plan`."""
    recipe = load_recipe(arguments.recipe, [*arguments.overrides, *_common_overrides(arguments)]).resolved()
    session = Session.of_recipe(recipe, Reporter(arguments.quiet))
    rate = arguments.tflops * 1e12 if arguments.tflops else measured_gemm_rate(session.device, session.dtype)
    planned = plan_recipe(recipe, session, rate)
    if not arguments.json:
        summary.print_plan(planned)
    return planned


def doctor(arguments: Namespace) -> dict[str, Any]:
    """`iprox doctor`."""
    session = Session.create(arguments.device or "auto")  # refuses a device that is not there
    found = examine(str(session.device))
    if not arguments.json:
        summary.print_machine(found)
    return found


def report(arguments: Namespace) -> dict[str, Any]:
    """`iprox report`."""
    path = build_report(Path(arguments.run_dir))
    if not arguments.json:
        say_plainly(str(path))
    return {"report": str(path)}


def _run(recipe: Recipe, arguments: Namespace, stop_after: str | None) -> dict[str, Any]:
    done = run_recipe(
        recipe,
        reporter=Reporter(arguments.quiet),
        fresh=arguments.fresh,
        stop_after=stop_after,
        command=arguments.started_as,
    )
    if not arguments.json:
        summary.print_run(done.folder)
    return summary.run_summary(done.folder)


def _common_overrides(arguments: Namespace) -> list[str]:
    """`--seed 3` as `seed=3`, for the options that were given."""
    given = {key: getattr(arguments, option) for option, key in COMMON_OPTIONS.items()}
    return [f"{key}={json.dumps(value)}" for key, value in given.items() if value is not None]
