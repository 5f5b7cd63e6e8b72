"""Scoring on Ray workers against scoring in one process, the driver's memory, and the bytes that move.

Efficiency is the rate of N workers over N times the rate of one process; all have one thread each. A rate leaves out
the first quarter of the windows, in which Ray starts and models load. `simulated` workers wait instead of computing,
each on a node of its own, so that more workers than cores can be measured: what they lose is the engine's own cost.

    python benchmarks/scaling.py                                    # speed: needs two idle cores
    python benchmarks/scaling.py --cells simulated reading driver   # memory of the driver is up to 1 million rows
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import pickle
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common import RESULTS, Results, parser, settings_of
from iprox.data import Pool
from iprox.engine.ray import ray_engine
from iprox.engine.stream import local_engine
from iprox.engine.windows import Engine, ScoredWindow, ScoringStats, Windows
from iprox.influence.job import Checkpoint, Job
from iprox.models.loading import load_model
from iprox.progress import Reporter
from iprox.scores import scores_table
from iprox.session import Session, encode_validation
from iprox.settings import InfluenceSection
from streaming import make_model, write_pool

CELLS = ("local", "ray-1", "ray-2", "simulated", "reading", "driver")


class Waiting:
    """A worker that waits as long as a window of a model would take."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def __call__(self, window: Any, progress: Any = None) -> ScoredWindow:
        """Return scores of 0."""
        time.sleep(self.seconds)
        return zeros(window, 1), ScoringStats(rows=len(window))


def zeros(window: Any, tasks: int) -> Any:
    """Return a table of scores of 0."""
    ids, names = [example.id for example in window], [f"task-{number}" for number in range(tasks)]
    return scores_table(ids, [None] * len(ids), [1] * len(ids), np.zeros((len(ids), tasks)), names)


def rate(engine: Engine, make: Callable[[], Any], windows: Windows) -> dict[str, float]:
    """Return the rows per second after the first quarter of the windows, and the seconds before it."""
    started = time.perf_counter()
    arrivals = [(time.perf_counter(), stats.rows) for _, (_, stats) in engine(make, windows)]
    first = len(arrivals) // 4
    seconds, rows = arrivals[-1][0] - arrivals[first][0], sum(rows for _, rows in arrivals[first + 1 :])
    return {"rows_per_second": rows / seconds, "rows": rows, "seconds_before": arrivals[first][0] - started}


def job_of(arguments: Any) -> Job:
    """Return the job that scores by TracIn's cosine on the model itself, in float32."""
    session = Session.create("cpu", "float32", max_length=512, reporter=Reporter(quiet=True))
    encoder = session.encoder(arguments.model)
    validation = encode_validation(encoder, {"task": Pool([arguments.validation])})
    few = {task: rows[:8] for task, rows in validation.items()}
    settings = InfluenceSection(estimator="tracin", per_example=False)
    load = functools.partial(load_model, dtype=torch.float32)
    return Job.of(settings, [Checkpoint(arguments.model)], few, encoder, None, load=load)


def scored(cell: str, arguments: Any) -> dict[str, float]:
    """Score a part of the pool in this process or on Ray workers of one thread each."""
    torch.set_num_threads(1)
    windows = Windows(list(islice(Pool(arguments.pool), arguments.examples)), arguments.window)
    make = job_of(arguments).workers[0]
    if cell == "local":
        return rate(local_engine, make, windows)
    import ray

    workers = int(cell.partition("-")[2])
    ray.init(num_cpus=workers, include_dashboard=False, log_to_driver=False)
    return rate(ray_engine(workers, "cpu"), make, windows)


def simulated(arguments: Any) -> dict[str, float]:
    """Return the efficiency of waiting workers, one per node, by their number."""
    import ray
    from ray.cluster_utils import Cluster

    node = {"num_cpus": 1, "object_store_memory": 100 << 20, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=node)
    for _ in range(3):
        cluster.add_node(**node)
    ray.init(address=cluster.address, log_to_driver=False)
    pool, found = list(islice(Pool(arguments.pool), 16)), {}
    for workers in (1, 2, 4):
        windows = Windows(pool * (arguments.examples // 16 * workers), 16)
        result = rate(ray_engine(workers, "cpu"), functools.partial(Waiting, arguments.wait), windows)
        found[str(workers)] = result["rows_per_second"] * arguments.wait / 16 / workers
    ray.shutdown()
    cluster.shutdown()
    return found


def reading(arguments: Any) -> dict[str, float]:
    """Return how fast one core reads and pickles windows, and bytes per row: in the file, of windows, and of scores."""
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "pool.jsonl"
        write_pool(path, max(arguments.rows[0], 1024))
        rows, size, started = 0, 0, time.process_time()
        for _, window in Windows(Pool([path])):
            rows, size = rows + len(window), size + len(pickle.dumps(window))
        found = {"rows_per_second": rows / (time.process_time() - started)}
        found |= {"file_bytes": path.stat().st_size / rows, "window_bytes": size / rows}
    for tasks in (1, 32):
        found[f"score_bytes_{tasks}"] = len(pickle.dumps(zeros(window, tasks))) / len(window)
    return found


def driver(rows: int) -> dict[str, float]:
    """Return the driver's peak memory in `iprox score` on one Ray worker; it scores lengths, so reading counts most."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_model(folder / "model")
        write_pool(folder / "validation.jsonl", 16)
        write_pool(folder / "pool.jsonl", rows)
        given = ["--model", folder / "model", "--pool", folder / "pool.jsonl", "--output", folder / "scores", "--quiet"]
        given += ["--validation", f"task={folder / 'validation.jsonl'}"]
        given += ["--set", "influence.estimator=length", "ray_workers=1", "device=cpu"]
        started, peak = time.perf_counter(), 0
        child = subprocess.Popen([sys.executable, "-m", "iprox.cli", "score", *given], stdout=subprocess.DEVNULL)
        while child.poll() is None:  # the peak of this process alone: that of `wait4` is also Ray's
            status = Path(f"/proc/{child.pid}/status").read_text()
            peak = next((int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")), peak)
            time.sleep(0.2)
    if child.returncode:
        raise SystemExit("iprox score failed")
    return {"peak_megabytes": peak / 1024, "seconds": time.perf_counter() - started}


def apart(cell: str) -> dict[str, float]:
    """Measure a cell in a process of its own, with one thread."""
    run = [sys.executable, __file__, *sys.argv[1:], "--one", cell]
    done = subprocess.run(run, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def one(cell: str, arguments: Any) -> dict[str, float]:
    """Measure a cell in this process."""
    if cell.startswith("driver"):
        return driver(int(cell.partition("-")[2]))
    return {"simulated": simulated, "reading": reading}.get(cell, functools.partial(scored, cell))(arguments)


def names(arguments: Any) -> Iterator[str]:
    """Yield the cells to measure."""
    for cell in arguments.cells:
        yield from (f"driver-{rows}" for rows in arguments.rows) if cell == "driver" else [cell]


def main() -> None:
    """Measure and print."""
    made = parser(
        __doc__, "model pool validation examples output fresh", examples=512, output=RESULTS / "scaling.jsonl"
    )
    made.add_argument("--window", type=int, default=16, help="rows per window (%(default)s)")
    made.add_argument("--wait", type=float, default=0.25, help="seconds that a simulated window takes (%(default)s)")
    made.add_argument("--rows", type=int, nargs="+", default=[10_000, 1_000_000], help="rows of the driver's pools")
    made.add_argument("--cells", nargs="+", choices=CELLS, default=["local", "ray-1", "ray-2"])
    made.add_argument("--one", help=argparse.SUPPRESS)
    arguments = made.parse_args()
    if arguments.one:
        print(json.dumps(one(arguments.one, arguments)))
        return
    results = Results(arguments.output, settings_of(arguments, "cells", "one", "rows"), fresh=arguments.fresh)
    for cell in names(arguments):
        results(cell, functools.partial(apart, cell))
    for cell, found in results.cells.items():
        print(cell, json.dumps({key: round(value, 3) for key, value in found.items()}))
    if all(f"{cell}/0" in results.cells for cell in ("local", "ray-1", "ray-2")):
        local, alone, two = (results.cells[f"{cell}/0"]["rows_per_second"] for cell in ("local", "ray-1", "ray-2"))
        print(f"overhead of one worker {local / alone - 1:.1%}; efficiency of two workers {two / local / 2:.2f}")


if __name__ == "__main__":
    main()
