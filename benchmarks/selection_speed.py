"""Seconds that choosing 5 % of many random scores takes, by strategy and constraint.

    python benchmarks/selection_speed.py                 # 10 million rows, 4 tasks
    python benchmarks/selection_speed.py --rows 1000000

Near-duplicates are left out: they read texts, and cost by what is chosen.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import pyarrow as pa

from iprox.run.folder import environment, write_json
from iprox.scores import AGGREGATE
from iprox.selection import SelectionSettings, select_rows

CASES = {
    "top": {"strategy": "top"},
    "round-robin": {"strategy": "round-robin"},
    "5 % of all tokens": {"strategy": "top", "fraction": None},
    "sources capped at 0.1": {"strategy": "top", "source_cap": 0.1},
    "round-robin, a floor": {"strategy": "round-robin", "source_floor": {"s3": 0.2}},
}


def random_scores(rows: int, tasks: int) -> pa.Table:
    """A scores table of 20 sources."""
    generator = np.random.default_rng(0)
    scores = generator.standard_normal((rows, tasks))
    return pa.table(
        {
            "id": pa.array(np.arange(rows)).cast(pa.string()),
            "source": pa.DictionaryArray.from_arrays(
                generator.integers(0, 20, rows, dtype=np.int32), [f"s{number}" for number in range(20)]
            ),
            "tokens": generator.integers(20, 2000, rows),
            **{f"influence/task{task}": scores[:, task] for task in range(tasks)},
            AGGREGATE: scores.mean(1),
        }
    )


def main() -> None:
    """Time every case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--tasks", type=int, default=4)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results/selection-speed.json")
    arguments = parser.parse_args()
    table = random_scores(arguments.rows, arguments.tasks)
    seconds = {}
    for name, settings in CASES.items():
        tokens = None if "fraction" not in settings else int(0.05 * np.sum(table["tokens"].to_numpy()))
        start = time.perf_counter()
        chosen = select_rows(table, SelectionSettings(**{"fraction": 0.05, "tokens": tokens, **settings}))
        seconds[name] = time.perf_counter() - start
        print(f"{name:<24}{seconds[name]:>7.1f} s{len(chosen.rows):>10,} rows", flush=True)
    write_json(
        arguments.output, {**environment(), "rows": arguments.rows, "tasks": arguments.tasks, "seconds": seconds}
    )


if __name__ == "__main__":
    main()
