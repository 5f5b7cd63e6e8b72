"""The main table: test loss per task after fine-tuning on the 5 % that each method selects, and the cost of selecting.

    python benchmarks/paper/main_table.py                                     # shared model and data, 3 seeds
    python benchmarks/paper/main_table.py --seeds 1 --methods random target 'ipsvd 0.5'    # quicker
    python benchmarks/paper/main_table.py --estimator kfac                    # the K-FAC version of the table

For each seed, the target is warmed up on 5 % of the pool, the pool is scored on the target and on every proxy, the
*original* target is fine-tuned on the best 5 % for each task, and loss and exact matches are measured on the task's
test set. Scores are cosine-normalized, as raw ones select the shortest answers. Every cell is kept in the results file,
so an interrupted benchmark resumes; run folders and selected rows are in `--work`.

With hub ids the same command runs on a GPU, see benchmarks/paper/README.md.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import math
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import reference
import scorer

from iprox.audits.fidelity import fidelity_metrics
from iprox.data import Pool
from iprox.data.sampling import draw_rows
from iprox.progress import Reporter
from iprox.records import key_of, read_json, write_json
from iprox.selection.strategies import top
from iprox.session import Session
from iprox.settings import ESTIMATORS, FinetuneSection
from iprox.stages.training import finetune

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import RESULTS, Results, parser, run, scores_in, settings_of, standard_error, warmed

# Row -> the proxy section of its recipe. SVD and SVD-LLM keep the same share of every layer, as published, and are also
# run with global ranks, as in IPSVD, though their singular values do not estimate changes of the loss.
PROXIES: dict[str, Any] = {
    "target": False,
    **{f"ipsvd {size}, aligned": {"sparsity": size} for size in (0.3, 0.5, 0.7)},
    **{f"ipsvd {size}": {"sparsity": size, "align": False} for size in (0.3, 0.5, 0.7)},
    "svd-llm 0.7": {"method": "svd-llm", "sparsity": 0.7, "ranks": "uniform", "align": False},
    "svd-llm 0.7, global ranks": {"method": "svd-llm", "sparsity": 0.7, "align": False},
    "svd 0.7": {"method": "svd", "sparsity": 0.7, "ranks": "uniform", "align": False},
    "svd 0.7, global ranks": {"method": "svd", "sparsity": 0.7, "align": False},
    "first layers 0.7": {"method": "layers", "sparsity": 0.7},
    "sibling": {"method": "off-the-shelf"},  # warmed up like the target
    "sibling, not warmed": {"method": "off-the-shelf"},
}
# Rows without gradients; those that run a model run the target.
WITHOUT_GRADIENTS = ("rds", "bm25", "length")
# Rows made by scripts in this folder: the published code's proxies, and a model that predicts influence from text.
OWN = ("reference code 0.7", "influence scorer")
# Rows with the same selection for all tasks, so that one fine-tuning is enough.
FOR_ALL_TASKS = ("random", "full pool")
# Random rows of the task's own source, for tasks that have one: the gain from knowing the sources.
OWN_SOURCE = "own source"
WITHOUT_SCORES = (*FOR_ALL_TASKS, OWN_SOURCE)
METHODS = ("random", OWN_SOURCE, *PROXIES, *OWN, *WITHOUT_GRADIENTS, "full pool")
# A task's own source in the pool, where its name differs from the task's.
SOURCE_OF = {"code": "codealpaca"}
# Shares of the pool that are scored again on the target.
CANDIDATES = (0.05, 0.1, 0.15, 0.2, 0.3)


def main() -> None:
    """Compute what is missing and print the table."""
    arguments = parse()
    settings = settings_of(arguments, "methods", "scores_only", "keep_models")
    results = Results(arguments.output, settings, fresh=arguments.fresh)
    for seed in range(arguments.seeds):
        needed = [name for name in arguments.methods if name not in WITHOUT_SCORES]
        for method in dict.fromkeys(["target", *needed]) if needed else ():  # the others share its warm-up
            results(f"{method}/scores", lambda m=method, s=seed: scored(arguments, m, s), seed)
        if arguments.scores_only:
            continue
        for method in [name for name in arguments.methods if name in FOR_ALL_TASKS]:
            once = functools.cache(lambda m=method, s=seed: finetuned(arguments, m, arguments.tasks, s))
            for task in arguments.tasks:
                results(f"{method}/{task}", lambda t=task, o=once: o()[t], seed)
        sourced = {example.source for example in Pool(arguments.pool)}
        for method, task in itertools.product(arguments.methods, arguments.tasks):
            if method == OWN_SOURCE and SOURCE_OF.get(task, task) not in sourced:
                continue
            chosen = results.cells.get(f"{method}/scores/{seed}", {}).get("selected", {}).get(task, "")
            work = functools.partial(finetuned, arguments, method, [task], seed, chosen)
            results(f"{method}/{task}", lambda t=task, w=work: w()[t], seed, of=chosen)
    print_table(results.cells, arguments)
    print_costs(results.cells, arguments)


def parse() -> argparse.Namespace:
    """Return the arguments."""
    options = "model sibling pool targets tasks seeds learning-rate batch-tokens work output fresh"
    made = parser(__doc__, options, tasks=["gsm8k", "code", "bbh", "summarization"])
    made.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    made.add_argument("--fraction", type=float, default=0.05, help="share of the pool to select")
    made.add_argument("--estimator", choices=("tracin", "kfac"), default="tracin")
    made.add_argument("--normalize", choices=("none", "cosine"), default="cosine")
    made.add_argument("--warmup-epochs", type=int, default=2)
    made.add_argument("--epochs", type=int, default=4, help="epochs of fine-tuning")
    made.add_argument("--max-length", type=int, default=512)
    made.add_argument("--keep-models", action="store_true", help="keep each fine-tuned model, in --work")
    made.add_argument("--scores-only", action="store_true", help="no fine-tuning: fidelity and cost")
    arguments = made.parse_args()
    name = f"paper-{arguments.estimator}"
    # Scores with other settings go to another folder.
    scoring = (arguments.model, arguments.pool, arguments.tasks, arguments.normalize)
    training = (arguments.warmup_epochs, arguments.learning_rate, arguments.max_length, arguments.batch_tokens)
    arguments.work = arguments.work or Path("runs") / f"{name}-{key_of([scoring, training])[:6]}"
    arguments.output = arguments.output or RESULTS / f"{name}.jsonl"
    return arguments


def recipe_of(arguments: argparse.Namespace, method: str, seed: int) -> dict[str, Any]:
    """Return the recipe of one row's run."""
    proxy = PROXIES.get(method, False)
    if method.startswith("sibling"):
        proxy = {**proxy, "model": warmed_sibling(arguments, seed) if method == "sibling" else arguments.sibling}
    return {
        "model": arguments.model,
        "data": {
            "pool": arguments.pool,
            "validation": {task: str(arguments.targets / f"{task}.val.jsonl") for task in arguments.tasks},
            "max_length": arguments.max_length,
        },
        "warmup": {"fraction": 0.05, "epochs": arguments.warmup_epochs, "learning_rate": arguments.learning_rate},
        "proxy": proxy,
        "influence": {"estimator": method}
        if method in WITHOUT_GRADIENTS
        else {
            "estimator": arguments.estimator,
            "normalize": arguments.normalize,
            "per_example": False,
            # The default for low-rank proxies when the table was made; influence functions keep more now.
            "query_norm": ESTIMATORS["tracin"].query_norm if method.startswith(("ipsvd", "svd")) else None,
        },
        "audit": False,
        "batch_tokens": arguments.batch_tokens,
        "seed": seed,
        "output": str(folder_of(arguments, method, seed)),
    }


def warmed_sibling(arguments: argparse.Namespace, seed: int) -> str:
    """Return the sibling after the target's warm-up: on the same rows, with the same settings."""
    options = {"learning_rate": arguments.learning_rate, "epochs": arguments.warmup_epochs}
    return str(warmed(arguments.sibling, Pool(arguments.pool), arguments.work, seed=seed, **options)[-1][0])


def folder_of(arguments: argparse.Namespace, method: str, seed: int) -> Path:
    """Return the folder of a row's run."""
    return arguments.work / f"seed-{seed}" / method.replace(",", "").replace(" ", "-")


def scored(arguments: argparse.Namespace, method: str, seed: int) -> dict[str, Any]:
    """Score the pool; return the cost, and the agreement with the target's scores of whole gradients."""
    folder, target = (folder_of(arguments, name, seed) for name in (method, "target"))
    if method != "target" and not (target / "scores.parquet").is_file():
        run(recipe_of(arguments, "target", seed))  # the results were made on another machine, without its run folders
    if method in OWN:
        recipe = recipe_of(arguments, method, seed)
        if method == "influence scorer":
            record = scorer.score(recipe, arguments.sibling, target, folder)
        else:
            record = reference.score(recipe, target, folder)
    else:
        done = run(recipe_of(arguments, method, seed), target if method != "target" else None)
        stages = {name: done["stages"][name] for name in ("compress", "align", "score") if name in done["stages"]}
        record = {
            "parameters": done["cost"]["proxy_parameters"],
            "flops": {name: stage["flops"] for name, stage in stages.items()},
            "seconds": {name: stage["seconds"] for name, stage in stages.items()},
            "peak_memory_bytes": max(stage["peak_memory_bytes"] for stage in stages.values()),
        }
        if method == "target":  # which every proxy needs, and which no row's cost includes
            record["warmup_flops"] = done["stages"]["warmup"]["flops"]
        if done["cost"]["construction_flops"]:
            # Scoring on the target with low-rank validation gradients and norms as on a proxy.
            record["target_flops"] = done["cost"]["target_score_flops"]
    truth, scores = scores_in(target), scores_in(folder)
    count, tasks = round(arguments.fraction * len(scores)), list(enumerate(arguments.tasks))
    chosen = {task: top(scores[:, number], count).tolist() for number, task in tasks}
    write_json(selection_file(arguments, method, seed), {"method": method, "rows": chosen})
    source = np.array([example.source or "" for example in Pool(arguments.pool)])
    large = [name for name in set(source.tolist()) if (source == name).sum() >= 100]
    known = np.isfinite(scores).all(1) & np.isfinite(truth).all(1)

    def fidelity(rows: np.ndarray, number: int) -> dict[str, Any]:
        return fidelity_metrics(scores[rows, number], truth[rows, number])

    return {
        **record,
        "selected": {task: key_of(rows) for task, rows in chosen.items()},
        "fidelity": {task: fidelity(known, number) for number, task in tasks},
        # Share of the target's own best rows that is found when the best candidates are scored again on the target.
        "recall": {
            str(share): {
                task: float(np.isin(best(truth[:, n], arguments.fraction), best(scores[:, n], share)).mean())
                for n, task in tasks
            }
            for share in CANDIDATES
        },
        # By task that has a source of its own: the share of the selection from this source.
        "own_source": {
            task: float((source[rows] == SOURCE_OF.get(task, task)).mean())
            for task, rows in chosen.items()
            if SOURCE_OF.get(task, task) in large
        },
        # Mean over tasks and large sources of the correlation with the target's scores inside a source.
        "within_sources": float(
            np.mean([fidelity(known & (source == each), number)["spearman"] for each in large for number, _ in tasks])
        ),
    }


def selection_file(arguments: argparse.Namespace, method: str, seed: int) -> Path:
    """Return the file with the rows that a method selects for each task."""
    return folder_of(arguments, method, seed) / "selected.json"


def selected(arguments: argparse.Namespace, method: str, task: str, seed: int, key: str) -> list[int]:
    """Return the rows that a method selects for a task, whose key is in the results."""
    file = selection_file(arguments, method, seed)
    rows = read_json(file)["rows"][task] if file.is_file() else None
    if rows is None or key_of(rows) != key:
        raise SystemExit(f"{file}: does not hold the selection in {arguments.output}; score again with --fresh")
    return rows


def best(scores: np.ndarray, share: float) -> np.ndarray:
    """Return the row numbers of the best share of scores [N]."""
    return top(scores, math.ceil(share * len(scores)))


def finetuned(
    arguments: argparse.Namespace, method: str, tasks: list[str], seed: int, chosen: str = ""
) -> dict[str, Any]:
    """Fine-tune the target on a row's selection (`chosen`: its key), and return the test results by task."""
    pool = Pool(arguments.pool)
    total = pool.scan().rows
    if method == "full pool":
        rows = list(range(total))
    elif method == "random":
        rows = draw_rows("random", seed, total, round(arguments.fraction * total))
    elif method == OWN_SOURCE:
        (task,) = tasks
        of_source = [example.row for example in pool if example.source == SOURCE_OF.get(task, task)]
        drawn = draw_rows(OWN_SOURCE, seed, len(of_source), round(arguments.fraction * total))
        rows = [of_source[place] for place in drawn]
    else:
        rows = selected(arguments, method, tasks[0], seed, chosen)
    session = Session.create(
        max_length=arguments.max_length, batch_tokens=arguments.batch_tokens, seed=seed, reporter=Reporter(quiet=True)
    )
    training = FinetuneSection(epochs=arguments.epochs, learning_rate=arguments.learning_rate)
    folder = folder_of(arguments, f"{method}-{tasks[0]}-tuned", seed)
    tests = {task: Pool([str(arguments.targets / f"{task}.test.jsonl")]) for task in tasks}
    with session.metered() as usage:
        record = finetune(session, arguments.model, pool.take(rows), folder, training, tests)
    if not arguments.keep_models:
        shutil.rmtree(folder)
    cost = {"rows": len(rows), "tokens": record["tokens"], "seconds": usage.seconds}
    return {task: {**record["test"][task], **cost} for task in tasks}


def print_table(cells: dict[str, Any], arguments: argparse.Namespace) -> None:
    """Print test losses by task with standard errors over seeds, and costs, as far as they are known."""
    print(f"{'selected by':<22}" + "".join(f"{task:>18}" for task in arguments.tasks) + f"{'mean':>17}{'FLOPs':>7}")
    for method in arguments.methods:
        losses = [
            [
                cells[f"{method}/{task}/{seed}"]["after"]
                for seed in range(arguments.seeds)
                if f"{method}/{task}/{seed}" in cells
            ]
            for task in arguments.tasks
        ]
        if not any(losses):
            continue
        columns = "".join(
            f"{np.mean(each):>9.3f} ± {standard_error(each):.3f}" if each else f"{'–':>17}" for each in losses
        )
        means = mean_losses(cells, method, arguments.tasks)[: arguments.seeds]
        mean = f"{np.mean(means):.3f} ± {standard_error(means):.3f}" if means else "–"
        print(f"{method:<22}{columns}{mean:>17}{relative_flops(cells, method):>7.2f}")


def print_costs(cells: dict[str, Any], arguments: argparse.Namespace) -> None:
    """Print the cost of each row's selection over the target's, without and with the target's warm-up."""
    warm_up = cells.get("target/scores/0", {}).get("warmup_flops")
    for method in arguments.methods:
        cell = cells.get(f"{method}/scores/0", {})
        if warm_up is None or "target_flops" not in cell:
            continue
        spent, on_target = sum(cell["flops"].values()), cell["target_flops"]
        print(f"{method}: {spent / on_target:.2f}, with the warm-up {(spent + warm_up) / (on_target + warm_up):.2f}")


def relative_flops(cells: dict[str, Any], method: str) -> float:
    """Return the cost of a row's selection, including its proxy, over that of scoring the pool on the target."""
    of_target = [cell["target_flops"] for name, cell in cells.items() if "/scores/" in name and "target_flops" in cell]
    if not of_target or f"{method}/scores/0" not in cells:
        return 0.0 if method in WITHOUT_SCORES else float("nan")
    cell = cells[f"{method}/scores/0"]
    # Rows without low-rank gradients in the target's shapes are compared with the target at its cheapest.
    return sum(cell["flops"].values()) / cell.get("target_flops", min(of_target))


def mean_losses(cells: dict[str, Any], method: str, tasks: list[str]) -> list[float]:
    """Return the mean test loss over the tasks, for each seed that has all tasks."""
    by_seed = [[cells.get(f"{method}/{task}/{seed}") for task in tasks] for seed in range(10)]
    return [float(np.mean([cell["after"] for cell in each if cell])) for each in by_seed if all(each)]


if __name__ == "__main__":
    main()
