"""The commands for whole runs; each returns plain data for `--json`."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

from iprox.cli import summary
from iprox.cli.doctor import examine
from iprox.pipeline import run_recipe
from iprox.planning import plan_recipe
from iprox.planning.rate import measured_gemm_rate
from iprox.progress import Reporter, say_plainly
from iprox.recipe import resolved
from iprox.report.page import build_report
from iprox.session import Session


def quickstart(arguments: Namespace) -> dict[str, Any]:
    """`iprox quickstart`."""
    return _run(arguments, None)


def run(arguments: Namespace) -> dict[str, Any]:
    """`iprox run`."""
    return _run(arguments, arguments.stop_after)


def plan(arguments: Namespace) -> dict[str, Any]:
    """`iprox plan`."""
    recipe = resolved(arguments.checked)
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


def _run(arguments: Namespace, stop_after: str | None) -> dict[str, Any]:
    done = run_recipe(
        arguments.checked,
        reporter=Reporter(arguments.quiet),
        fresh=arguments.fresh,
        stop_after=stop_after,
        command=arguments.started_as,
    )
    if not arguments.json:
        summary.print_run(done.folder)
    return summary.run_summary(done.folder)
