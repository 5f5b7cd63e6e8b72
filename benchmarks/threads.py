"""How long do OpenMP threads wait by spinning, alone and beside busy processes? Seconds of scoring by waiting policy.

    python benchmarks/threads.py                     # the bundled model, beside as many busy processes as cores

`iprox` sets GOMP_SPINCOUNT to 1,000 (`iprox/models/cpu/threads.py`) unless OMP_WAIT_POLICY or it is set already. Each
figure is the least of some repeats in processes of their own, which score 300 rows by TracIn after a warm-up.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys

from common import RESULTS, Results

POLICIES = {
    "OpenMP's default": {},
    "OMP_WAIT_POLICY=PASSIVE": {"OMP_WAIT_POLICY": "PASSIVE"},
    "GOMP_SPINCOUNT=1000": {"GOMP_SPINCOUNT": "1000"},
    "GOMP_SPINCOUNT=20000": {"GOMP_SPINCOUNT": "20000"},
}
SCORE = """
import json, time
from importlib.resources import files
import iprox
from transformers import AutoModelForCausalLM

bundled = files("iprox.quickstart")
model = AutoModelForCausalLM.from_pretrained(str(bundled / "model"))
rows, task = ([json.loads(line) for line in (bundled / "data" / name).read_text().splitlines()]
              for name in ("pool.jsonl", "arithmetic.val.jsonl"))
for some in (rows[:40], rows[:300]):
    started = time.perf_counter()
    iprox.score(model, some, {"task": task[:6]}, estimator="tracin", progress=False)
print(time.perf_counter() - started)
"""


def main() -> None:
    """Measure what is missing and print the table."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--busy", type=int, default=os.cpu_count(), help="busy processes (default: one per core)")
    options.add_argument("--repeats", type=int, default=2)
    options.add_argument("--fresh", action="store_true", help="discard earlier results")
    arguments = options.parse_args()
    settings = {"busy": arguments.busy, "repeats": arguments.repeats}
    results = Results(RESULTS / "threads.jsonl", settings, fresh=arguments.fresh)
    for name, policy in POLICIES.items():
        cell = {
            beside: results(f"{name}, {beside} busy", lambda p=policy, b=beside: seconds(p, b, arguments.repeats))
            for beside in (0, arguments.busy)
        }
        print(f"{name:<26}" + "".join(f"  beside {beside} busy: {value:.1f} s" for beside, value in cell.items()))


def seconds(policy: dict[str, str], busy: int, repeats: int) -> float:
    """Return the least seconds of scoring with a waiting policy, beside some busy processes."""
    unset = {"OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT"}
    environment = {**{key: value for key, value in os.environ.items() if key not in unset}, **policy}
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(busy)]
    try:
        command = [sys.executable, "-c", SCORE]
        runs = (subprocess.run(command, env=environment, capture_output=True, check=True) for _ in range(repeats))
        return min(float(run.stdout) for run in runs)
    finally:
        for other in others:
            other.kill()
            other.wait()


if __name__ == "__main__":
    main()
