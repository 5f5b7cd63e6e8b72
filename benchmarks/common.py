"""Shared parts of the benchmarks: options, data, warm-ups, pipeline runs, agreement of scores, and results files."""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch

from iprox.audits.fidelity import fidelity_metrics
from iprox.data import Example, Pool
from iprox.data.sampling import draw_rows
from iprox.metering import measured_gemm_rate
from iprox.models.precision import DTYPES, cast_parameters
from iprox.progress import Reporter
from iprox.recipe import parse_recipe
from iprox.records import key_of, read_json, write_json
from iprox.run.folder import environment
from iprox.run.whole import run_recipe
from iprox.scores import score_matrix
from iprox.session import Session
from iprox.settings import WarmupSection
from iprox.stages.training import warm_up

SHARED = Path(__file__).resolve().parents[2] / "shared"
RESULTS = Path(__file__).resolve().parent / "results"

# Options of several scripts, for `parser`.
OPTIONS: dict[str, dict[str, Any]] = {
    "model": {"default": str(SHARED / "models/target-17m"), "help": "model folder or hub id"},
    "sibling": {"default": str(SHARED / "models/sibling-7m"), "help": "off-the-shelf proxy"},
    "pool": {"nargs": "+", "default": [str(SHARED / "data/pool.jsonl")]},
    "targets": {"type": Path, "default": SHARED / "data/targets", "help": "folder of TASK.val.jsonl"},
    "tasks": {"nargs": "+", "default": ["gsm8k", "code", "summarization", "science", "bbh"]},
    "examples": {"type": int, "default": 1000, "help": "number of pool rows to score (%(default)s)"},
    "validation": {"default": str(SHARED / "data/targets/gsm8k.val.jsonl")},
    "learning-rate": {"type": float, "default": 3e-4, "help": "learning rate of the warm-up (%(default)s)"},
    "batch-tokens": {"type": int, "default": 4096},
    "dtype": {"choices": sorted(DTYPES), "default": "bfloat16", "help": "dtype of scoring (%(default)s)"},
    "seed": {"type": int, "default": 0},
    "seeds": {"type": int, "default": 3, "help": "number of seeds (%(default)s)"},
    "work": {"type": Path, "help": "folder for models and runs (%(default)s)"},
    "output": {"type": Path, "help": "results file (%(default)s)"},
    "fresh": {"action": "store_true", "help": "discard earlier results"},
}
# Options that do not change the results.
UNRECORDED = ("work", "output", "fresh", "seeds")


def parser(description: str | None, options: str, **defaults: Any) -> argparse.ArgumentParser:
    """Return a parser with some of `OPTIONS`.

    Args:
        description: docstring of the script.
        options: names of the options, separated by spaces.
        defaults: defaults that differ from those in `OPTIONS`, by name with underscores.
    """
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in options.split():
        key = name.replace("-", "_")
        made.add_argument(f"--{name}", **OPTIONS[name] | ({"default": defaults[key]} if key in defaults else {}))
    return made


def settings_of(arguments: argparse.Namespace, *unrecorded: str) -> dict[str, Any]:
    """Return the arguments that results depend on, as plain data."""
    left_out = (*UNRECORDED, *unrecorded)
    return {k: str(v) if isinstance(v, Path) else v for k, v in vars(arguments).items() if k not in left_out}


class Results:
    """Cells in a file with one JSON object per line, so that an interrupted benchmark resumes.

    The first line has the settings. Every other line is a cell: its name and seed, the git revision and machine that
    made it, and its metrics. A cell that was computed again has several lines, of which the last one counts.

    Args:
        path: file of the results.
        settings: settings that the cells depend on.
        fresh: whether to discard earlier results.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any], *, fresh: bool = False) -> None:
        # The location of the checkout or the package does not matter.
        text = json.dumps(dict(settings)).replace(str(SHARED), "../shared")
        settings = json.loads(text.replace(str(resources.files("iprox.quickstart")), "quickstart"))
        self.path, here = path, environment()
        self._made = {"revision": revision(), "machine": here["machine"], "torch": here["versions"]["torch"]}
        self.cells: dict[str, Any] = {}
        if path.is_file() and not fresh:
            known = read_results(path)
            if known["settings"] != settings:
                raise SystemExit(f"{path}: made with other settings; give another --output, or --fresh to forget it")
            self.cells = known["cells"]
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps({"settings": settings}) + "\n")

    def __call__(self, cell: str, work: Callable[[], Any], seed: int = 0, of: str = "") -> Any:
        """Return the metrics of a cell; compute and write them if they are missing, or belong to another `of`."""
        name = f"{cell}/{seed}"
        known = self.cells.get(name)
        if known is None or (of and known.get("of") != of):
            metrics = {**work(), "of": of} if of else work()
            line = {"cell": cell, "seed": seed, **self._made, "metrics": metrics}
            with self.path.open("a") as file:
                file.write(json.dumps(line) + "\n")
            self.cells[name] = json.loads(json.dumps(metrics))
        return self.cells[name]


def read_results(path: Path) -> dict[str, Any]:
    """Return a results file as `settings`, `cells` (metrics by `CELL/SEED`) and `machines` that made them."""
    first, *lines = map(json.loads, path.read_text().splitlines())
    machines = {(line["machine"], line["torch"]): None for line in lines}
    return {
        "settings": first["settings"],
        "cells": {f"{line['cell']}/{line['seed']}": line["metrics"] for line in lines},
        "machines": [{"machine": machine, "versions": {"torch": torch}} for machine, torch in machines],
    }


def write_block(name: str, text: str) -> None:
    """Replace what stands between `<!-- NAME -->` and `<!-- /NAME -->` in docs/results/NAME.md."""
    page = RESULTS.parents[1] / f"docs/results/{name}.md"
    before, start, rest = page.read_text(encoding="utf-8").partition(f"<!-- {name} -->\n")
    _, end, after = rest.partition(f"<!-- /{name} -->")
    if not end:
        raise SystemExit(f"{page}: has no block {name}")
    page.write_text(f"{before}{start}{text}\n{end}{after}", encoding="utf-8")


def revision() -> str:
    """Return the git revision of this checkout, with a `+` if it has changes."""
    command = ["git", "-C", str(RESULTS.parent), "describe", "--always", "--dirty=+", "--exclude=*"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def examples_of(arguments: argparse.Namespace, part: str = "val") -> dict[str, list[Example]]:
    """Return the examples of each task, from TASK.PART.jsonl."""
    return {task: list(Pool([str(arguments.targets / f"{task}.{part}.jsonl")])) for task in arguments.tasks}


def as_rows(examples: Iterable[Example]) -> list[dict[str, Any]]:
    """Return examples as the rows that iprox's Python functions take."""
    fields = ("id", "source", "messages", "prompt", "completion", "text")
    known = ({name: getattr(example, name) for name in fields} for example in examples)
    return [{name: value for name, value in row.items() if value is not None} for row in known]


def warmed(
    model: str, pool: Pool, work: Path, *, seed: int, learning_rate: float, epochs: int = 2
) -> list[tuple[Path, float]]:
    """Return the checkpoints of a model's warm-up on 5 % of a pool with their learning rates; cached in `work`."""
    total = pool.scan().rows
    rows = draw_rows("warmup", seed, total, round(0.05 * total))
    key = key_of([model, pool.scan().fingerprint, seed, learning_rate, epochs])[:8]
    folder = work / f"warm-up-{key}"
    listing = folder / "checkpoints.json"
    if not listing.is_file():
        session = Session.create(max_length=512, seed=seed, reporter=Reporter(quiet=True))
        settings = WarmupSection(epochs=epochs, learning_rate=learning_rate, batch_size=16)  # pyright: ignore
        warm_up(session, model, pool.take(rows), folder, settings)
    return [(folder / entry["path"], entry["learning_rate"]) for entry in read_json(listing)]


def run(recipe: dict[str, Any], warmed: Path | None = None, stop_after: str = "score") -> dict[str, Any]:
    """Start or resume a pipeline run, and return its `run.json`.

    Args:
        recipe: recipe with its `output`.
        warmed: folder of a run with the same data and warm-up, whose checkpoints are copied.
        stop_after: last stage to run.
    """
    folder = Path(recipe["output"])
    if warmed is not None and not folder.exists():
        record = read_json(warmed / "run.json")
        record["stages"] = {name: record["stages"][name] for name in ("data", "warmup")}
        shutil.copytree(warmed / "warmup", folder / "warmup")
        write_json(folder / "run.json", record)
    run_recipe(parse_recipe(recipe, "benchmark"), reporter=Reporter(quiet=True), stop_after=stop_after)
    return read_json(folder / "run.json")


def scores_in(folder: Path) -> np.ndarray:
    """Return the scores [N, tasks] of a run."""
    return score_matrix(pq.read_table(folder / "scores.parquet"))


def agreement(scores: np.ndarray, truth: np.ndarray, tasks: Sequence[str]) -> dict[str, Any]:
    """Return the agreement of scores [N, tasks] with the truth: Spearman (by task, mean, minimum) and mean overlap."""
    found = [fidelity_metrics(x, y) for x, y in zip(scores.T, truth.T, strict=True)]
    spearman = [entry["spearman"] for entry in found]
    return {
        "spearman": float(np.mean(spearman)),
        "least": float(min(spearman)),
        "overlap": float(np.mean([entry["overlap"]["0.05"] for entry in found])),
        "by_task": dict(zip(tasks, spearman, strict=True)),
    }


def standard_error(values: Sequence[float]) -> float:
    """Return the standard error of a mean over seeds; NaN for one seed."""
    return float(np.std(values, ddof=1) / len(values) ** 0.5) if len(values) > 1 else float("nan")


def timed(action: Callable[[], Any]) -> tuple[float, Any]:
    """Return the seconds that a call takes, and its result."""
    started = time.perf_counter()
    result = action()
    return time.perf_counter() - started, result


def gemm_rate(dtype: torch.dtype) -> float:
    """Return the FLOP/s of matrix products on the CPU, measured by the function that `iprox plan` uses."""
    return measured_gemm_rate(torch.device("cpu"), dtype)


def in_bfloat16(model: Any) -> Any:
    """Cast the parameters of a model to bfloat16 in place, except its rotary frequencies, and return it."""
    cast_parameters(model, torch.bfloat16)
    return model
