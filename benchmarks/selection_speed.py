"""Seconds to select 5 % of many random scores, by strategy and constraint.

    python benchmarks/selection_speed.py                 # 10 million rows, 4 tasks
    python benchmarks/selection_speed.py --rows 1000000

Near-duplicates are not measured, as their cost depends on the texts.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from common import RESULTS, Results, parser, settings_of, timed
from iprox.scores import AGGREGATE
from iprox.selection import select_rows
from iprox.settings import SelectSection

CASES = {
    "top": {"strategy": "top"},
    "round-robin": {"strategy": "round-robin"},
    "5 % of all tokens": {"strategy": "top", "fraction": None},
    "sources capped at 0.1": {"strategy": "top", "source_cap": 0.1},
    "round-robin, a floor": {"strategy": "round-robin", "source_floor": {"s3": 0.2}},
}


def random_scores(rows: int, tasks: int) -> pa.Table:
    """Return a scores table with 20 sources."""
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
    made = parser(__doc__, "output fresh", output=RESULTS / "selection-speed.jsonl")
    made.add_argument("--rows", type=int, default=10_000_000)
    made.add_argument("--tasks", type=int, default=4)
    arguments = made.parse_args()
    results = Results(arguments.output, settings_of(arguments), fresh=arguments.fresh)
    table = random_scores(arguments.rows, arguments.tasks)
    for name, settings in CASES.items():
        tokens = None if "fraction" not in settings else int(0.05 * np.sum(table["tokens"].to_numpy()))
        chosen = SelectSection(**{"fraction": 0.05, "tokens": tokens, **settings})

        def work(chosen: SelectSection = chosen) -> dict[str, float]:
            seconds, selection = timed(lambda: select_rows(table, chosen))
            return {"seconds": seconds, "rows": len(selection.rows)}

        found = results(name, work)
        print(f"{name:<24}{found['seconds']:>7.1f} s{found.get('rows', 0):>10,} rows", flush=True)


if __name__ == "__main__":
    main()
