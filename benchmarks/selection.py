"""Recall of the target's best rows against cost, for proxies (with and without scoring again) and baselines.

    python benchmarks/selection.py                               # the whole shared pool
    python benchmarks/selection.py --examples 2500 --work runs/selection-2500

Every method is a run of the pipeline (proxy, scores) with the same warm-up as the reference, a run without a proxy.
Runs are kept in the work folder, so an interrupted benchmark resumes. Costs are FLOPs divided by those of scoring the
pool on the target; they include making the proxy, and scoring rows again on the target.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import numpy as np

from common import RESULTS, Results, parser, run, scores_in, settings_of
from iprox.data import Pool
from iprox.records import read_json
from iprox.selection.strategies import top
from iprox.settings import ESTIMATORS

CANDIDATES = (0.05, 0.075, 0.1, 0.15, 0.2, 0.3)
# The cheapest scoring on the target, with low-rank validation gradients as on a proxy. Costs are relative to it. (The
# reference uses exact gradients, which with several tasks cost several times as much.)
CHARGED = "target, low-rank"
RAW = {"estimator": "tracin", "normalize": "none", "per_example": False}
METHODS: dict[str, dict[str, Any]] = {
    CHARGED: {"proxy": False, "influence": {**RAW, "query_norm": ESTIMATORS["tracin"].query_norm}},
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
    options = "model sibling pool targets tasks examples work output fresh"
    defaults = {"examples": None, "work": Path("runs/selection"), "output": RESULTS / "selection.jsonl"}
    made = parser(__doc__, options, **defaults)
    made.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    made.add_argument("--share", type=float, default=0.05, help="share of the pool to select")
    arguments = made.parse_args()
    results = Results(arguments.output, settings_of(arguments, "methods"), fresh=arguments.fresh)
    pool = subset(arguments)
    truth = scores_of(arguments, pool, "target", {"proxy": False})
    for method in dict.fromkeys([CHARGED, *arguments.methods]):
        scores = scores_of(arguments, pool, method, METHODS[method])
        print_method(method, results(method, lambda m=method, s=scores: figures(arguments, m, s, truth)))


def subset(arguments: argparse.Namespace) -> Path:
    """Return the file with the rows of the pool to use."""
    if arguments.examples is None and len(arguments.pool) == 1:
        return Path(arguments.pool[0])
    file = arguments.work / f"pool-{arguments.examples}.jsonl"
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        source = Pool(arguments.pool)
        total = source.scan().rows
        source.write_rows(np.linspace(0, total - 1, arguments.examples or total).astype(int).tolist(), file)
    return file


def scores_of(arguments: argparse.Namespace, pool: Path, name: str, sections: dict[str, Any]) -> np.ndarray:
    """Return the scores [N, tasks] of a run, and finish the run first if needed."""
    sections = {**sections}
    if name == "sibling":
        sections["proxy"] = {**sections["proxy"], "model": arguments.sibling}
    recipe = {
        "model": arguments.model,
        "data": {
            "pool": str(pool),
            "validation": {task: str(arguments.targets / f"{task}.val.jsonl") for task in arguments.tasks},
        },
        "influence": RAW,
        "audit": False,
        "output": str(folder_of(arguments, name)),
        **sections,
    }
    run(recipe, folder_of(arguments, "target") if name != "target" else None)
    return scores_in(folder_of(arguments, name))


def folder_of(arguments: argparse.Namespace, name: str) -> Path:
    """Return the folder of a method's run."""
    return arguments.work / name.replace(",", "").replace(" ", "-")


def figures(arguments: argparse.Namespace, method: str, scores: np.ndarray, truth: np.ndarray) -> dict[str, Any]:
    """Return recall by task and cost of a method, alone and with its best rows scored again on the target."""
    record = read_json(folder_of(arguments, method) / "run.json")
    stages, cost = record["stages"], record["cost"]
    charged = read_json(folder_of(arguments, CHARGED) / "run.json")["stages"]["score"]
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
    """Return the share of the target's best rows that are among the best by these scores, by task and on average."""
    found = {}
    for number, task in enumerate(arguments.tasks):
        wanted, best = (
            top(column[:, number], math.ceil(part * len(column)))
            for column, part in ((truth, arguments.share), (scores, share))
        )
        found[task] = len(np.intersect1d(wanted, best)) / len(wanted)
    return {**found, "mean": float(np.mean(list(found.values())))}


def print_method(name: str, entry: dict[str, Any]) -> None:
    """Print one line per way of using the method's scores."""
    print(f"{name}: scoring {entry['cost']['scoring']:.2f} of the target's, {entry['relative_seconds']:.2f} in seconds")
    ways = [("alone", entry["alone"])]
    ways += [(f"best {way['candidates']:.1%} again", way) for way in entry["cascade"]]
    for label, way in ways:
        recall = way["recall"]
        least = min(value for task, value in recall.items() if task != "mean")
        print(f"  {label:<22} cost {way['cost']:.2f}  recall {recall['mean']:.2f} (least {least:.2f})", flush=True)


if __name__ == "__main__":
    main()
