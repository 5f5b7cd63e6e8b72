"""Value of the rankings of proxy and target: retraining without their top rows, on the bundled model and pool.

    python benchmarks/removal.py                      # 500 rows, without the top 25, three repeats
    python benchmarks/removal.py --repeats 5 --output results/removal-five.json

The bundled model is warmed up, 500 rows are scored on it and on its proxy (sparsity 0.5, TracIn), and it is trained on
all of them, without the top rows of each ranking, and without random rows of similar length (`iprox.audits.removal`).
An interrupted benchmark resumes.
"""

from __future__ import annotations

import argparse
from importlib.resources import files
from pathlib import Path

from iprox.progress import Reporter
from iprox.recipe import parse_recipe
from iprox.records import read_json, write_json
from iprox.run.folder import environment
from iprox.run.whole import run_recipe
from iprox.stages.retraining import REMOVAL

BUNDLED = files("iprox.quickstart")
TASKS = ("arithmetic", "spelling")


def main() -> None:
    """Measure, print, and write the results to `--output`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sample", type=int, default=500, help="rows scored and trained on")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--normalize", choices=("none", "cosine"), default="none")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, default=Path("runs/removal"))
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results/removal-quickstart.json")
    arguments = parser.parse_args()
    settings = {key: value for key, value in vars(arguments).items() if key not in ("work", "output")}
    recipe = {
        "model": str(BUNDLED / "model"),
        "data": {
            "pool": [str(BUNDLED / "data/pool.jsonl")],
            "validation": {task: str(BUNDLED / f"data/{task}.val.jsonl") for task in TASKS},
        },
        "warmup": {"fraction": 0.05, "epochs": 2, "learning_rate": arguments.learning_rate},
        "proxy": {"sparsity": arguments.sparsity},
        "influence": {"estimator": "tracin", "normalize": arguments.normalize},
        "audit": {
            "sample": arguments.sample,
            "removal": arguments.repeats,
            "learning_rate": arguments.learning_rate,
        },
        "seed": arguments.seed,
        "output": str(arguments.work),
    }
    run_recipe(parse_recipe(recipe, "benchmark"), reporter=Reporter(), stop_after="audit")
    found = read_json(arguments.work / "audit" / REMOVAL)
    fidelity = read_json(arguments.work / "audit/audit.json")["mean"]["spearman"]
    write_json(arguments.output, {"machine": environment(), "settings": settings, "fidelity": fidelity, **found})
    for task, entry in [*found["tasks"].items(), ("mean", found["mean"])]:
        for side in ("proxy", "target"):
            effect = entry[side]
            rises = f"{effect['top']:+.4f} without the top rows, {effect['random']:+.4f} without random ones"
            print(f"{task:<12}{side:<8}{rises}: {effect['difference']:+.4f} ± {effect['standard_error']:.4f}")


if __name__ == "__main__":
    main()
