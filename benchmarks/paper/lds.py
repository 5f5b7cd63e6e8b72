"""Linear datamodeling scores of proxy and target, on the bundled model.

    python benchmarks/paper/lds.py                    # 400 subsets, TracIn and K-FAC influence functions

The bundled model is warmed up, 300 rows are scored on it and on its proxy (sparsity 0.5), and it is retrained on 400
random halves of them; both estimators use the same retrainings. (With 60 halves, intervals are half a correlation
wide.) The score is the Spearman correlation, over subsets, of the sum of the scores with the validation loss after
training (`iprox.audits.datamodels`).
"""

from __future__ import annotations

import argparse
import sys
from importlib.resources import files
from pathlib import Path
from typing import Any

from iprox.records import read_json
from iprox.stages.retraining import LDS

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import RESULTS, Results, parser, run, settings_of

BUNDLED = files("iprox.quickstart")


def main() -> None:
    """Measure what is missing and print it."""
    made = parser(
        __doc__,
        "model pool targets tasks learning-rate seed work output fresh",
        model=str(BUNDLED / "model"),
        pool=[str(BUNDLED / "data/pool.jsonl")],
        targets=Path(str(BUNDLED / "data")),
        tasks=["arithmetic", "spelling"],
        learning_rate=1e-3,
        work=Path("runs/paper-lds"),
        output=RESULTS / "paper-lds.jsonl",
    )
    made.add_argument("--sample", type=int, default=300, help="rows scored and retrained on")
    made.add_argument("--subsets", type=int, default=400)
    made.add_argument("--sparsity", type=float, default=0.5)
    arguments = made.parse_args()
    results = Results(arguments.output, settings_of(arguments), fresh=arguments.fresh)
    for estimator in ("tracin", "kfac"):
        cell = results(estimator, lambda e=estimator: measured(arguments, e), arguments.seed)
        for task, sides in cell["tasks"].items():
            shown = (f"{side} {entry['lds']:.2f} ({entry['interval'][0]:.2f} to {entry['interval'][1]:.2f})"
                     for side, entry in sides.items())  # fmt: skip
            print(f"{estimator:<20}{task:<14}{', '.join(shown)}", flush=True)


def measured(arguments: argparse.Namespace, estimator: str) -> dict[str, Any]:
    """Return the linear datamodeling scores of one estimator; the shared run folder has the retrainings of both."""
    folder = arguments.work
    recipe = {
        "model": arguments.model,
        "data": {
            "pool": arguments.pool,
            "validation": {task: str(arguments.targets / f"{task}.val.jsonl") for task in arguments.tasks},
        },
        "warmup": {"fraction": 0.05, "epochs": 2, "learning_rate": arguments.learning_rate},
        "proxy": {"sparsity": arguments.sparsity},
        "influence": {"estimator": estimator, "normalize": "none", "per_example": False},
        "audit": {
            "sample": arguments.sample,
            "lds": arguments.subsets,
            "learning_rate": arguments.learning_rate,
        },
        "seed": arguments.seed,
        "output": str(folder),
    }
    run(recipe, stop_after="audit")
    audit = read_json(folder / "audit/audit.json")
    return {**read_json(folder / "audit" / LDS), "fidelity": audit["mean"]["spearman"]}


if __name__ == "__main__":
    main()
