"""How long do short commands take? CPU seconds of new processes: help, version, a refusal, the import, and a plan.

    python benchmarks/startup.py
    python benchmarks/startup.py --repeats 1 --output /tmp/startup.jsonl

The plan uses the bundled quickstart model. CPU seconds (user and system time) depend less on other load of the machine
than wall time. `tests/test_startup.py` tests which modules these commands import.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from importlib.resources import files
from pathlib import Path

from common import RESULTS, Results, parser, settings_of

BUNDLED = files("iprox.quickstart")


def commands(folder: Path) -> dict[str, tuple[list[str], int]]:
    """Return the arguments of Python and the expected exit code of each row of the table."""
    recipe = {
        "model": str(BUNDLED / "model"),
        "data": {
            "pool": str(BUNDLED / "data/pool.jsonl"),
            "validation": {"arithmetic": str(BUNDLED / "data/arithmetic.val.jsonl")},
        },
        "output": str(folder / "run"),
    }
    good, bad = folder / "recipe.yaml", folder / "bad.yaml"
    good.write_text(json.dumps(recipe))
    bad.write_text(json.dumps({**recipe, "proxy": {"sparsty": 0.5}}))
    cli = ["-m", "iprox.cli"]
    return {
        "python": (["-c", "pass"], 0),
        "import iprox": (["-c", "import iprox"], 0),
        "iprox --version": ([*cli, "--version"], 0),
        "iprox --help": ([*cli, "--help"], 0),
        "a refused recipe": ([*cli, "run", str(bad)], 2),
        "iprox plan": ([*cli, "plan", str(good)], 0),
    }


def measured(arguments: list[str], expected: int, repeats: int) -> dict[str, float]:
    """Return the smallest CPU and wall seconds over several processes."""
    taken = []
    for _ in range(repeats + 1):  # the first one reads files from disk and writes byte code
        started = time.perf_counter()
        child = subprocess.Popen([sys.executable, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        assert child.stderr is not None
        said = child.stderr.read().decode()
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode != expected:
            raise SystemExit(f"{' '.join(arguments)}: exit code {child.returncode}, not {expected}\n{said}")
        taken.append((usage.ru_utime + usage.ru_stime, time.perf_counter() - started))
    return dict(zip(("cpu_seconds", "seconds"), map(min, zip(*taken[1:], strict=True)), strict=True))


def main() -> None:
    """Measure and print the table."""
    made = parser(__doc__, "output fresh", output=RESULTS / "startup.jsonl")
    made.add_argument("--repeats", type=int, default=3, help="processes per row, of which the fastest counts")
    arguments = made.parse_args()
    results = Results(arguments.output, settings_of(arguments), fresh=arguments.fresh)
    print(f"{'':<20}{'CPU s':>8}{'wall s':>8}")
    with tempfile.TemporaryDirectory() as name:
        for row, (command, expected) in commands(Path(name)).items():
            found = results(row, lambda c=command, e=expected: measured(c, e, arguments.repeats))
            print(f"{row:<20}{found['cpu_seconds']:>8.2f}{found['seconds']:>8.2f}", flush=True)


if __name__ == "__main__":
    main()
