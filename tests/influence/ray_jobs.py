"""Rows and workers without a model, whose modules Ray's processes import fast.

Started as a program, it is a driver that scores into a folder until it is killed.
"""

import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from iprox.engine.windows import ScoringStats, Windows
from iprox.scores import scores_table

COUNT = 14
QUIET = {"log_to_driver": False, "logging_level": "ERROR"}


@dataclass
class Row:
    """What an engine needs of an example."""

    row: int

    @property
    def id(self):
        return f"row-{self.row}"


POOL = [Row(number) for number in range(53)]
WINDOWS = Windows(POOL, 4)


class Sines:
    """A worker that gives each row the sine of its number."""

    def __call__(self, window, progress=None):
        if progress is not None:
            progress(len(window))
        rows, count = [example.row for example in window], len(window)
        ids, scores = [each.id for each in window], np.sin(rows)[:, None]
        table = scores_table(ids, [None] * count, rows, scores, ["task"], supervised=rows)
        return table, ScoringStats(rows=count, tokens=sum(rows))


class Watched(Sines):
    """From a row on, it leaves a file with its process and node, and waits for the file `go`."""

    def __init__(self, folder, since=0):
        self.folder, self.since = folder, since

    def __call__(self, window, progress=None):
        import ray

        if window[0].row >= self.since:
            (self.folder / f"{os.getpid()}.{ray.get_runtime_context().get_node_id()}").touch()
            wait_for(lambda: (self.folder / "go").exists())
        return super().__call__(window, progress)


def wait_for(what):
    end = time.monotonic() + 200
    while not what():
        assert time.monotonic() < end, "what is waited for did not happen in 200 s"
        time.sleep(0.02)


def scored(folder, make, engine):
    """Score the pool into a file, and return the scores."""
    from iprox.engine.shards import score_to_file
    from iprox.scores import read_scores

    score_to_file([make], [1.0], POOL, folder / "scores.parquet", identity={"a": 1}, window=4, engine=engine)
    return read_scores(folder / "scores.parquet")


if __name__ == "__main__":
    import ray

    from iprox.engine.ray import ray_engine

    ray.init(address=sys.argv[1], **QUIET)
    place = Path(sys.argv[2])
    scored(place, lambda: Watched(place, 24), ray_engine(2, "cpu"))
