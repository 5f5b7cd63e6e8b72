"""Do the scores foretell what training does? Linear datamodeling scores of proxy and target, on the bundled model.

    python benchmarks/paper/lds.py                    # 400 subsets, TracIn and the influence function (K-FAC)

The bundled model is warmed up, 300 rows are scored on it and on its proxy (sparsity 0.5), and it is retrained on 400
random halves of them; the retrainings serve both estimators. (Of 60 halves intervals are half a correlation wide.) The
score is the Spearman correlation, over subsets, of the sum of the scores with the validation loss that training leaves
(`iprox.audits.datamodels`).
"""

from __future__ import annotations

import argparse
from importlib.resources import files
from pathlib import Path
from typing import Any

from runs import Results, run

from iprox.run.folder import read_json
from iprox.stages.lds import RESULT

BUNDLED = files("iprox.quickstart")
TASKS = ("arithmetic", "spelling")


def main() -> None:
    """Measure what is missing and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(BUNDLED / "model"))
    parser.add_argument("--pool", nargs="+", default=[str(BUNDLED / "data/pool.jsonl")])
    parser.add_argument("--targets", type=Path, default=Path(str(BUNDLED / "data")), help="folder of TASK.val.jsonl")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS))
    parser.add_argument("--sample", type=int, default=300, help="rows scored and retrained on")
    parser.add_argument("--subsets", type=int, default=400)
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, default=Path("runs/paper-lds"))
    parser.add_argument("--output", type=Path, default=Path(__file__).parents[1] / "results/paper-lds.json")
    parser.add_argument("--fresh", action="store_true", help="forget earlier results")
    arguments = parser.parse_args()
    kept = ("work", "output", "fresh")
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(arguments).items() if k not in kept}
    results = Results(arguments.output, settings, fresh=arguments.fresh)
    for estimator in ("tracin", "kfac"):
        cell = results(estimator, lambda e=estimator: measured(arguments, e))
        for task, sides in cell["tasks"].items():
            told = (f"{side} {entry['lds']:.2f} ({entry['interval'][0]:.2f} to {entry['interval'][1]:.2f})"
                    for side, entry in sides.items())  # fmt: skip
            print(f"{estimator:<20}{task:<14}{', '.join(told)}", flush=True)


def measured(arguments: argparse.Namespace, estimator: str) -> dict[str, Any]:
    """The linear datamodeling scores of one estimator. Both share a run folder, and with it the retrainings."""
    folder = arguments.work
    recipe = {
        "model": arguments.model,
        "data": {
            "pool": arguments.pool,
            "validation": {task: str(arguments.targets / f"{task}.val.jsonl") for task in arguments.tasks},
        },
        "warmup": {"fraction": 0.05, "epochs": 2, "learning_rate": arguments.learning_rate},
        "proxy": {"sparsity": arguments.sparsity},
        "influence": {"estimator": estimator},
        "audit": {
            "sample": arguments.sample,
            "lds": {"subsets": arguments.subsets, "learning_rate": arguments.learning_rate},
        },
        "seed": arguments.seed,
        "output": str(folder),
    }
    run(recipe, stop_after="audit")
    audit = read_json(folder / "audit/audit.json")
    return {**read_json(folder / "audit" / RESULT), "fidelity": audit["mean"]["spearman"]}


if __name__ == "__main__":
    main()
