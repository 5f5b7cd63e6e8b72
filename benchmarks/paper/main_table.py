"""The main table: what fine-tuning on the 5 % that each method selects does for each task, and what selecting cost.

    python benchmarks/paper/main_table.py                                     # shared model and data, 3 seeds
    python benchmarks/paper/main_table.py --seeds 1 --methods random target 'ipsvd 0.5'    # quicker
    python benchmarks/paper/main_table.py --estimator kfac                    # the K-FAC version of the table

A seed is: warm the target up on 5 % of the pool; score the pool on the target and on every proxy; for each task
fine-tune the *original* target on the best 5 %; measure loss and exact matches on the task's test set. Scores are
cosine-normalized (raw ones pick the shortest answers, see docs/method.md). Every cell is kept in the results file, so
a stopped benchmark goes on where it was; run folders are in `--work`.

With hub ids the same command runs on a GPU, see README.md here.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import reference
import scorer
from runs import SHARED, Results, run, scores_in

from iprox.audits.fidelity import fidelity_metrics
from iprox.data import Pool
from iprox.data.sampling import draw_rows
from iprox.progress import Reporter
from iprox.recipe import parse_recipe
from iprox.run.folder import key_of, read_json, write_json
from iprox.selection.strategies import top
from iprox.session import Session
from iprox.settings import ESTIMATORS, FinetuneSection
from iprox.stages.training import finetune, warm_up

# Row -> the proxy section of its recipe. SVD and SVD-LLM take the same share of every layer, as published; and with
# ranks that compete across layers, as IPSVD's do, which rests on what its singular values mean and theirs do not.
PROXIES: dict[str, Any] = {
    "target": False,
    **{f"ipsvd {size}, aligned": {"sparsity": size} for size in (0.3, 0.5, 0.7)},
    **{f"ipsvd {size}": {"sparsity": size, "align": False} for size in (0.3, 0.5, 0.7)},
    "svd-llm 0.7": {"method": "svd-llm", "sparsity": 0.7, "ranks": "uniform", "align": False},
    "svd-llm 0.7, global ranks": {"method": "svd-llm", "sparsity": 0.7, "align": False},
    "svd 0.7": {"method": "svd", "sparsity": 0.7, "ranks": "uniform", "align": False},
    "svd 0.7, global ranks": {"method": "svd", "sparsity": 0.7, "align": False},
    "first layers 0.7": {"method": "layers", "sparsity": 0.7},
    "sibling": {"method": "off-the-shelf"},  # warmed up as the target is
    "sibling, not warmed": {"method": "off-the-shelf"},
}
# Rows that take no gradients, which influence has to beat; on the target where they run a model.
WITHOUT_GRADIENTS = ("rds", "bm25", "length")
# Rows that are made here: the published code's proxies, and a model that predicts influence from text.
OWN = ("reference code 0.7", "influence scorer")
# Rows that select nothing by scores and for no task, so that one fine-tuning serves all.
FOR_ALL_TASKS = ("random", "full pool")
# Random rows of the source that a task has of its own, for tasks that have one: what knowing the sources does alone.
OWN_SOURCE = "own source"
WITHOUT_SCORES = (*FOR_ALL_TASKS, OWN_SOURCE)
METHODS = ("random", OWN_SOURCE, *PROXIES, *OWN, *WITHOUT_GRADIENTS, "full pool")
# The source of the pool that a task has of its own, where it is not named as the task is.
SOURCE_OF = {"code": "codealpaca"}
# Shares of the pool that are scored again on the target.
CANDIDATES = (0.05, 0.1, 0.15, 0.2, 0.3)


def main() -> None:
    """Compute what is missing and print the table."""
    arguments = parse()
    kept = ("work", "output", "fresh", "seeds", "methods", "scores_only", "keep_models")
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(arguments).items() if k not in kept}
    results = Results(arguments.output, settings, fresh=arguments.fresh)
    for seed in range(arguments.seeds):
        needed = [name for name in arguments.methods if name not in WITHOUT_SCORES]
        for method in dict.fromkeys(["target", *needed]) if needed else ():  # the others share its warm-up
            results(f"{method}/scores/{seed}", lambda m=method, s=seed: scored(arguments, m, s))
        if not arguments.scores_only:
            for method in [name for name in arguments.methods if name in FOR_ALL_TASKS]:
                once = functools.cache(lambda m=method, s=seed: tested(arguments, m, arguments.tasks, s, None))
                for task in arguments.tasks:
                    results(f"{method}/{task}/{seed}", lambda t=task, o=once: o()[t])
            sourced = {example.source for example in Pool(arguments.pool)}
            for method, task in itertools.product(arguments.methods, arguments.tasks):
                if method == OWN_SOURCE and SOURCE_OF.get(task, task) not in sourced:
                    continue
                chosen = results.content["cells"].get(f"{method}/scores/{seed}", {}).get("selected", {}).get(task)
                results(
                    f"{method}/{task}/{seed}",
                    lambda m=method, t=task, s=seed, c=chosen: tested(arguments, m, [t], s, c)[t],
                    of=key_of(chosen) if chosen else "",
                )
    note_sources(results, arguments)
    note_warm_ups(results, arguments)
    print_table(results.content["cells"], arguments)
    print_costs(results.content["cells"], arguments)


def note_sources(results: Results, arguments: argparse.Namespace) -> None:
    """Add to each row's cell what it knows beside the sources of the pool.

    `own_source`: by task that is a source of the pool, which part of the selection is of it. `within_sources`: mean
    over tasks and sources of the Spearman correlation with the target's scores within a source of 100 rows or more.
    """
    source = np.array([example.source or "" for example in Pool(arguments.pool)])
    large = [name for name in set(source.tolist()) if (source == name).sum() >= 100]
    for name, cell in results.content["cells"].items():
        method, kind, seed = name.split("/")
        if kind != "scores" or "own_source" in cell:
            continue
        cell["own_source"] = {
            task: float((source[[int(row) for row in rows.split()]] == SOURCE_OF.get(task, task)).mean())
            for task, rows in cell["selected"].items()
            if SOURCE_OF.get(task, task) in large
        }
        files = [folder_of(arguments, each, int(seed)) for each in (method, "target")]
        if all((file / "scores.parquet").is_file() for file in files):
            scores, truth = map(scores_in, files)
            known = np.isfinite(scores).all(1) & np.isfinite(truth).all(1)
            cell["within_sources"] = float(
                np.mean(
                    [
                        fidelity_metrics(scores[rows, task], truth[rows, task])["spearman"]
                        for rows in (known & (source == each) for each in large)
                        for task in range(truth.shape[1])
                    ]
                )
            )
    write_json(results.path, results.content)


def note_warm_ups(results: Results, arguments: argparse.Namespace) -> None:
    """Add to the target's cells what its warm-up took, which every proxy of it needs and no row's cost counts."""
    for name, cell in results.content["cells"].items():
        method, kind, seed = name.split("/")
        record = folder_of(arguments, method, int(seed)) / "run.json"
        if (method, kind) == ("target", "scores") and "warmup_flops" not in cell and record.is_file():
            cell["warmup_flops"] = read_json(record)["stages"]["warmup"]["flops"]
    write_json(results.path, results.content)


def parse() -> argparse.Namespace:
    """The arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(SHARED / "models/target-17m"))
    parser.add_argument("--sibling", default=str(SHARED / "models/sibling-7m"))
    parser.add_argument("--pool", nargs="+", default=[str(SHARED / "data/pool.jsonl")])
    parser.add_argument("--targets", type=Path, default=SHARED / "data/targets", help="folder of TASK.val/test.jsonl")
    parser.add_argument("--tasks", nargs="+", default=["gsm8k", "code", "bbh", "summarization"])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--fraction", type=float, default=0.05, help="of the pool that is selected")
    parser.add_argument("--estimator", choices=("tracin", "kfac"), default="tracin")
    parser.add_argument("--normalize", choices=("none", "cosine"), default="cosine")
    parser.add_argument("--warmup-epochs", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=4, help="of the fine-tuning")
    parser.add_argument("--learning-rate", type=float, default=3e-4, help="of warm-up and fine-tuning")
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--batch-tokens", type=int, default=4096)
    parser.add_argument("--keep-models", action="store_true", help="keep each fine-tuned model, in --work")
    parser.add_argument("--scores-only", action="store_true", help="no fine-tuning: fidelity and cost")
    parser.add_argument("--work", type=Path, help="run folders (default: runs/paper-ESTIMATOR-SETTINGS)")
    parser.add_argument("--output", type=Path, help="results (default: benchmarks/results/paper-ESTIMATOR.json)")
    parser.add_argument("--fresh", action="store_true", help="forget earlier results")
    arguments = parser.parse_args()
    name = f"paper-{arguments.estimator}"
    # Scores of other settings are in another folder.
    scoring = (arguments.model, arguments.pool, arguments.tasks, arguments.normalize)
    training = (arguments.warmup_epochs, arguments.learning_rate, arguments.max_length, arguments.batch_tokens)
    arguments.work = arguments.work or Path("runs") / f"{name}-{key_of([scoring, training])[:6]}"
    arguments.output = arguments.output or Path(__file__).parents[1] / f"results/{name}.json"
    return arguments


def recipe_of(arguments: argparse.Namespace, method: str, seed: int) -> dict[str, Any]:
    """The run of one row."""
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
            # What low-rank proxies kept by default when the table was made; influence functions keep more now.
            "query_norm": ESTIMATORS["tracin"].query_norm if method.startswith(("ipsvd", "svd")) else None,
        },
        "audit": False,
        "batch_tokens": arguments.batch_tokens,
        "seed": seed,
        "output": str(folder_of(arguments, method, seed)),
    }


def warmed_sibling(arguments: argparse.Namespace, seed: int) -> str:
    """The sibling after the warm-up that the target has: on the same rows, with the same settings."""
    folder = folder_of(arguments, "sibling warm-up", seed)
    listing = folder / "checkpoints.json"
    if not listing.is_file():
        recipe = parse_recipe(recipe_of(arguments, "target", seed), "main_table.py")
        assert recipe.warmup
        pool, session = Pool(arguments.pool), Session.of_recipe(recipe, Reporter(quiet=True))
        total = pool.scan().rows
        rows = draw_rows("warmup", seed, total, max(1, round(total * recipe.warmup.fraction)))
        warm_up(session, arguments.sibling, pool.take(rows), folder, recipe.warmup)
    return str(folder / read_json(listing)[-1]["path"])


def folder_of(arguments: argparse.Namespace, method: str, seed: int) -> Path:
    """Of a row's run."""
    return arguments.work / f"seed-{seed}" / method.replace(",", "").replace(" ", "-")


def scored(arguments: argparse.Namespace, method: str, seed: int) -> dict[str, Any]:
    """Score the pool: what it cost, and how it agrees with the target's scores, which are of whole gradients."""
    folder, target = (folder_of(arguments, name, seed) for name in (method, "target"))
    if method != "target" and not (target / "scores.parquet").is_file():
        run(recipe_of(arguments, "target", seed))  # the results are of another machine, whose run folders are not here
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
        if done["cost"]["construction_flops"]:
            # Of scoring on the target with validation gradients made low-rank, and norms, as a proxy's are.
            record["target_flops"] = done["cost"]["target_score_flops"]
    truth, scores = scores_in(target), scores_in(folder)
    count = round(arguments.fraction * len(scores))
    # As text, so that they take a line each. Kept, so that fine-tuning can go on without the run folders.
    record["selected"] = {
        task: " ".join(map(str, top(scores[:, number], count).tolist())) for number, task in enumerate(arguments.tasks)
    }
    known = np.isfinite(scores).all(1) & np.isfinite(truth).all(1)
    record["fidelity"] = {
        task: fidelity_metrics(scores[known, number], truth[known, number])
        for number, task in enumerate(arguments.tasks)
    }
    # The part of the target's own best rows that is found when the best candidates are scored again on the target.
    record["recall"] = {
        str(share): {
            task: float(np.isin(best(truth[:, n], arguments.fraction), best(scores[:, n], share)).mean())
            for n, task in enumerate(arguments.tasks)
        }
        for share in CANDIDATES
    }
    return record


def best(scores: np.ndarray, share: float) -> np.ndarray:
    """The best share of scores [N], as row numbers."""
    return top(scores, math.ceil(share * len(scores)))


def tested(
    arguments: argparse.Namespace, method: str, tasks: list[str], seed: int, chosen: str | None
) -> dict[str, Any]:
    """Fine-tune the target on a row's selection, and test it; by task."""
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
        assert chosen is not None
        rows = [int(row) for row in chosen.split()]
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
    """Test losses by task with their standard errors over seeds, exact matches, and costs; what is known so far."""
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
    """What each row's selection cost beside the target's, and that with the target's warm-up on both sides."""
    warm_up = cells.get("target/scores/0", {}).get("warmup_flops")
    for method in arguments.methods:
        cell = cells.get(f"{method}/scores/0", {})
        if warm_up is None or "target_flops" not in cell:
            continue
        spent, on_target = sum(cell["flops"].values()), cell["target_flops"]
        print(f"{method}: {spent / on_target:.2f}, with the warm-up {(spent + warm_up) / (on_target + warm_up):.2f}")


def relative_flops(cells: dict[str, Any], method: str) -> float:
    """What a row's selection cost, making its proxy counted, over scoring the pool on the target."""
    of_target = [cell["target_flops"] for name, cell in cells.items() if "/scores/" in name and "target_flops" in cell]
    if not of_target or f"{method}/scores/0" not in cells:
        return 0.0 if method in WITHOUT_SCORES else float("nan")
    cell = cells[f"{method}/scores/0"]
    # Rows without low-rank gradients of the target's shapes are charged against the target at its cheapest.
    return sum(cell["flops"].values()) / cell.get("target_flops", min(of_target))


def mean_losses(cells: dict[str, Any], method: str, tasks: list[str]) -> list[float]:
    """The mean test loss over the tasks, of each seed that has them all."""
    by_seed = [[cells.get(f"{method}/{task}/{seed}") for task in tasks] for seed in range(10)]
    return [float(np.mean([cell["after"] for cell in each if cell])) for each in by_seed if all(each)]


def standard_error(values: list[float]) -> float:
    """Of a mean over seeds; NaN of one seed."""
    return float(np.std(values, ddof=1) / len(values) ** 0.5) if len(values) > 1 else float("nan")


if __name__ == "__main__":
    main()
