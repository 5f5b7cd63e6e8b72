"""Recall of the target's own best rows against what finding them costs: proxies, best rows scored again, baselines.

    python benchmarks/selection.py                               # the whole shared pool
    python benchmarks/selection.py --examples 2500 --work runs/selection-2500

Every method is a run of the pipeline (proxy, scores), all with the warm-up of the truth, which is a run without
a proxy. They are kept in the work folder, so a stopped benchmark goes on where it was. Costs are FLOPs over those of
scoring the pool on the target: making the proxy and the rows that the target scores again count.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from iprox.data import Pool
from iprox.run.folder import environment, write_json
from iprox.selection.strategies import top
from iprox.settings import ESTIMATORS
from paper.runs import SHARED, run, scores_in

CANDIDATES = (0.05, 0.075, 0.1, 0.15, 0.2, 0.3)
# The target as the engine scores it at its cheapest, with validation gradients made low-rank as on a proxy: what all
# others are charged against. (The truth is of whole gradients, which with several tasks cost several times as much.)
CHARGED = "target, low-rank"
METHODS: dict[str, dict[str, Any]] = {
    CHARGED: {"proxy": False, "influence": {"query_norm": ESTIMATORS["tracin"].query_norm}},
    "ipsvd 0.5": {"proxy": {"sparsity": 0.5, "align": False}},
    "ipsvd 0.7": {"proxy": {"sparsity": 0.7, "align": False}},
    "ipsvd 0.85": {"proxy": {"sparsity": 0.85, "align": False}},
    "ipsvd 0.7, aligned": {"proxy": {"sparsity": 0.7}},
    "sibling": {"proxy": {"method": "off-the-shelf"}},
    "first layers 0.7": {"proxy": {"method": "layers", "sparsity": 0.7}},
    "rds": {"proxy": False, "influence": {"estimator": "rds"}},
}


def main() -> None:
    """Run what is missing, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(SHARED / "models/target-17m"))
    parser.add_argument("--sibling", default=str(SHARED / "models/sibling-7m"))
    parser.add_argument("--pool", default=str(SHARED / "data/pool.jsonl"))
    parser.add_argument("--targets", type=Path, default=SHARED / "data/targets", help="folder of TASK.val.jsonl")
    parser.add_argument("--tasks", nargs="+", default=["gsm8k", "code", "summarization", "science", "bbh"])
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--examples", type=int, help="rows of the pool, evenly spaced (default: all)")
    parser.add_argument("--share", type=float, default=0.05, help="of the pool that is selected")
    parser.add_argument("--work", type=Path, default=Path("runs/selection"))
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results/selection.json")
    arguments = parser.parse_args()
    pool = subset(arguments)
    truth = scores_of(arguments, pool, "target", {"proxy": False})
    found = {}
    for method in dict.fromkeys([CHARGED, *arguments.methods]):
        scores = scores_of(arguments, pool, method, METHODS[method])
        found[method] = figures(arguments, method, scores, truth)
        print_method(method, found[method])
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(arguments).items()}
    write_json(arguments.output, {**environment(), "settings": settings, "rows": len(truth), "methods": found})


def subset(arguments: argparse.Namespace) -> Path:
    """The pool's rows that are used, as a file."""
    if arguments.examples is None:
        return Path(arguments.pool)
    file = arguments.work / f"pool-{arguments.examples}.jsonl"
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        source = Pool([arguments.pool])
        total = source.scan().rows
        source.write_rows(np.linspace(0, total - 1, arguments.examples).astype(int).tolist(), file)
    return file


def scores_of(arguments: argparse.Namespace, pool: Path, name: str, sections: dict[str, Any]) -> np.ndarray:
    """Scores [N, tasks] of a run, done now if it is not."""
    sections = {**sections}
    if name == "sibling":
        sections["proxy"] = {**sections["proxy"], "model": arguments.sibling}
    recipe = {
        "model": arguments.model,
        "data": {
            "pool": str(pool),
            "validation": {task: str(arguments.targets / f"{task}.val.jsonl") for task in arguments.tasks},
        },
        "audit": False,
        "output": str(folder_of(arguments, name)),
        **sections,
    }
    run(recipe, folder_of(arguments, "target") if name != "target" else None)
    return scores_in(folder_of(arguments, name))


def folder_of(arguments: argparse.Namespace, name: str) -> Path:
    """Of a method's run."""
    return arguments.work / name.replace(",", "").replace(" ", "-")


def stages_of(arguments: argparse.Namespace, name: str) -> dict[str, Any]:
    """What each stage of a method's run took."""
    return json.loads((folder_of(arguments, name) / "run.json").read_text())["stages"]


def figures(arguments: argparse.Namespace, method: str, scores: np.ndarray, truth: np.ndarray) -> dict[str, Any]:
    """Recall by task and costs of a method, alone and with its best rows scored again on the target."""
    record = json.loads((folder_of(arguments, method) / "run.json").read_text())
    stages, cost = record["stages"], record["cost"]
    charged = stages_of(arguments, CHARGED)["score"]
    whole = charged["flops"]
    construction = cost["construction_flops"] / whole
    alone = construction + stages["score"]["flops"] / whole
    taken = sum(stages[name]["seconds"] for name in ("compress", "align", "score") if name in stages)
    return {
        "cost": {"construction": construction, "scoring": stages["score"]["flops"] / whole},
        "relative_seconds": taken / charged["seconds"],
        "alone": {"cost": alone, "recall": recalls(arguments, scores, truth, arguments.share)},
        "cascade": [
            {"candidates": share, "cost": alone + share, "recall": recalls(arguments, scores, truth, share)}
            for share in CANDIDATES[1:]
        ],
    }


def recalls(arguments: argparse.Namespace, scores: np.ndarray, truth: np.ndarray, share: float) -> dict[str, float]:
    """By task, the part of the target's best rows among a share of the best by these scores; and the mean."""
    found = {}
    for number, task in enumerate(arguments.tasks):
        wanted, best = (
            top(column[:, number], math.ceil(part * len(column)))
            for column, part in ((truth, arguments.share), (scores, share))
        )
        found[task] = len(np.intersect1d(wanted, best)) / len(wanted)
    return {**found, "mean": float(np.mean(list(found.values())))}


def print_method(name: str, entry: dict[str, Any]) -> None:
    """A line for each way of using the method's scores."""
    print(f"{name}: scoring {entry['cost']['scoring']:.2f} of the target's, {entry['relative_seconds']:.2f} in seconds")
    ways = [("alone", entry["alone"])]
    ways += [(f"best {way['candidates']:.1%} again", way) for way in entry["cascade"]]
    for label, way in ways:
        recall = way["recall"]
        least = min(value for task, value in recall.items() if task != "mean")
        print(f"  {label:<22} cost {way['cost']:.2f}  recall {recall['mean']:.2f} (least {least:.2f})", flush=True)


if __name__ == "__main__":
    main()
