"""How near are the time and memory that `iprox plan` predicts to those of the run? By stage, on three models.

And how near is the time that is left, as progress shows it, to the time that it takes then? At each report after the
first tenth of a stage, and as long as more than two seconds are left.

    python benchmarks/planning.py                          # about 10 minutes
    python benchmarks/planning.py --only target-17m

Seconds are of the CPU, in the plan (the rate of matrix products) and in the run, as other work on the machine changes
wall time. Each model is planned and run in a process of its own, with a low-rank proxy and all stages up to the report.
"""

from __future__ import annotations

import json
import multiprocessing
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import files
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from common import RESULTS, SHARED, Results, parser, settings_of
from iprox.models.loading import hidden_size, load_config
from iprox.progress import Advance, Pace, Reporter
from iprox.recipe import parse_recipe
from iprox.run.plan import efficiency, plan_recipe
from iprox.run.whole import run_recipe
from iprox.session import Session

# Folder and number of pool rows of each model.
MODELS = {
    "quickstart": (Path(str(files("iprox.quickstart"))) / "model", 200),
    "target-17m": (SHARED / "models/target-17m", 96),
    "smollm2-135m": (SHARED.parent / "models/smollm2-135m-instruct", 24),
}
RECIPES: dict[str, dict[str, Any]] = {
    "default": {},
    "low-rank": {"proxy": {"sparsity": 0.5, "align": {"epochs": 2}}, "audit": {"sample": 50}},
}


MAX_LENGTH = 256
# Seconds that are left when a prediction of them matters no more.
SOON = 2.0


class Watched(Reporter):
    """A reporter that prints warnings only, and keeps what it would have said of the time that is left.

    Attributes:
        ratios: by stage, what was predicted over what it was, at each report.
    """

    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.ratios: dict[str, list[float]] = {}

    @contextmanager
    def bar(self, description: str, total: int | None, unit: str) -> Iterator[Advance]:
        """Yield a function that advances nothing that is shown."""
        pace, said = Pace(total), []

        def advance(count: int, /, *, earlier: bool = False) -> None:
            now = time.perf_counter()
            pace.add(now, count, earlier)
            left = pace.left(now)
            if left is not None and total is not None and pace.done >= total / 10:
                said.append((now, left))

        yield advance
        ended = time.perf_counter()
        ratios = [left / (ended - now) for now, left in said if ended - now > SOON]
        self.ratios.setdefault(description, []).extend(ratios)


def gemm_rate(dtype: torch.dtype) -> float:
    """Return the FLOP per CPU second of the products that `iprox.metering.measured_gemm_rate` times."""
    x, w = torch.randn(4096, 1024, dtype=dtype), torch.randn(1024, 1024, dtype=dtype)
    times = []
    for _ in range(10):
        started = time.process_time()
        torch.matmul(x, w.mT)
        times.append(time.process_time() - started)
    return 2 * x.numel() * len(w) / sorted(times)[len(times) // 2]


def compared(model: Path, rows: int, sections: dict[str, Any]) -> dict[str, Any]:
    """Return by stage the predicted and the measured CPU seconds and bytes."""
    with tempfile.TemporaryDirectory() as folder:
        pool, validation = Path(folder) / "pool.jsonl", Path(folder) / "validation.jsonl"
        for path, source, count in (
            (pool, SHARED / "data/pool.jsonl", rows),
            (validation, SHARED / "data/targets/gsm8k.val.jsonl", 16),
        ):
            with open(source, encoding="utf-8") as lines:
                path.write_text("".join(islice(lines, count)), encoding="utf-8")
        data = {"pool": [str(pool)], "validation": {"gsm8k": str(validation)}, "max_length": MAX_LENGTH}
        recipe = parse_recipe({"model": str(model), "data": data, "output": f"{folder}/run", **sections})
        time.perf_counter = time.process_time  # read by iprox.metering
        session = Session.of(recipe, Reporter(quiet=True))
        rate = gemm_rate(session.dtype)
        planned = plan_recipe(recipe, session, rate)["stages"]
        watched = Watched()
        run_recipe(recipe, reporter=watched)
        done = json.loads((Path(folder) / "run/run.json").read_text())["stages"]
    return {
        "rate": rate,
        "left": {name: ratios for name, ratios in watched.ratios.items() if ratios},
        "stages": {
            name: {
                "seconds": done[name]["seconds"],
                "predicted_bytes": stage["memory_bytes"],
                "bytes": done[name]["peak_memory_bytes"],
                "predicted_flops": stage["flops"],
                "flops": done[name]["flops"],
            }
            for name, stage in planned.items()
            if name in done
        },
    }


def main() -> None:
    """Measure what is missing and print the table."""
    options = parser(__doc__, "output fresh", output=RESULTS / "planning.jsonl")
    options.add_argument("--only", nargs="+", choices=MODELS, default=list(MODELS))
    arguments = options.parse_args()
    results = Results(
        arguments.output, {**settings_of(arguments, "only"), "max_length": MAX_LENGTH}, fresh=arguments.fresh
    )
    for name in arguments.only:
        for kind, sections in RECIPES.items():

            def apart(given: tuple[Any, ...] = (*MODELS[name], sections)) -> dict[str, Any]:
                with multiprocessing.get_context("spawn").Pool(1) as pool:
                    return pool.apply(compared, given)

            found = results(f"{name}, {kind}", apart)
            width = hidden_size(load_config(MODELS[name][0]))
            for stage, each in found["stages"].items():  # by today's shares of the rate, also for what was kept
                share = efficiency(stage, width, factorized="proxy" in sections)
                each["predicted_seconds"] = each["predicted_flops"] / (found["rate"] * share)
            print(f"{name}, {kind} ({found['rate'] / 1e9:.1f} GFLOP/s)")
            for stage, each in found["stages"].items():
                time_ratio, memory_ratio = (each[f"predicted_{of}"] / each[of] for of in ("seconds", "bytes"))
                print(
                    f"  {stage:<10} {each['seconds']:>8.1f} s, predicted {time_ratio:>6.2f} of it; "
                    f"{each['bytes'] / 1e6:>7.0f} MB, predicted {memory_ratio:>5.2f} of it; "
                    f"{each['flops'] / 1e9 / max(each['seconds'], 1e-9):>6.1f} GFLOP/s",
                    flush=True,
                )
            for stage, ratios in found["left"].items():
                near = sum(1 / 1.5 <= ratio <= 1.5 for ratio in ratios) / len(ratios)
                print(
                    f"  {stage:<10} time left: {min(ratios):.2f} to {max(ratios):.2f} of it in {len(ratios)} reports, "
                    f"{near:.0%} within a factor of 1.5"
                )
            every = [ratio for ratios in found["left"].values() for ratio in ratios]
            near = sum(1 / 1.5 <= ratio <= 1.5 for ratio in every) / max(1, len(every))
            print(f"  in all     time left: {near:.0%} of {len(every)} reports within a factor of 1.5")
            seconds = [sum(each[of] for each in found["stages"].values()) for of in ("predicted_seconds", "seconds")]
            print(f"  in all     {seconds[1]:>8.1f} s, predicted {seconds[0] / seconds[1]:>6.2f} of it")


if __name__ == "__main__":
    main()
