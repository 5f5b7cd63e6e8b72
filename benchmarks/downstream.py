"""Does the selection help? Test loss of the target fine-tuned on the proxy-selected share against a random share.

One proxy pipeline (warm-up, compress, align, score) scores the whole pool for all tasks at once; then, for every seed,
the original target is fine-tuned on a random share and on each task's top share, in the same way, and evaluated on
each task's test set. Cells are cached in the work folder, so a stopped benchmark goes on where it was.

    python benchmarks/downstream.py                       # shared model and data, 3 seeds
    python benchmarks/downstream.py --rows 4000           # quicker

With `--strategy round-robin` each validation example is a task of its own and the examples take turns in choosing;
`--scores` then takes scores with a column for each of them (`TASK.NN`).

Scores are cosine-normalised by default: without that, examples with few supervised tokens, whose gradients are large,
crowd out the others (`--normalise none` shows it).
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa

from iprox.data import Pool
from iprox.influence.scores import TASK_PREFIX, read_scores
from iprox.pipeline import run_recipe
from iprox.progress import Reporter
from iprox.recipe import FinetuneSection, parse_recipe
from iprox.run_folder import environment, key_of, write_json
from iprox.selection.strategies import round_robin, top
from iprox.session import Session, draw_rows
from iprox.stages.training import finetune

SHARED = Path(__file__).resolve().parents[2] / "shared"


def main() -> None:
    """Run the benchmark and print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(SHARED / "models/target-17m"))
    parser.add_argument("--pool", nargs="+", default=[str(SHARED / "data/pool.jsonl")])
    parser.add_argument("--targets", type=Path, default=SHARED / "data/targets", help="folder of TASK.val/test.jsonl")
    parser.add_argument("--tasks", nargs="+", default=["gsm8k", "code", "science", "summarization"])
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--fraction", type=float, default=0.05)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--normalise", choices=("none", "cosine"), default="cosine")
    parser.add_argument("--query-norm", type=float, help="share of the validation gradients' norm that scoring keeps")
    parser.add_argument("--strategy", choices=("top", "round-robin"), default="top")
    parser.add_argument("--rows", type=int, help="use only this many random rows of the pool, to be quicker")
    parser.add_argument("--scores", type=Path, help="scores.parquet of an earlier run, instead of scoring anew")
    parser.add_argument("--work", type=Path, default=Path("runs/downstream"))
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results/downstream.json")
    parser.add_argument("--fresh", action="store_true")
    arguments = parser.parse_args()
    if arguments.fresh:
        shutil.rmtree(arguments.work, ignore_errors=True)

    if arguments.rows:
        whole, part = Pool(arguments.pool), arguments.work / "pool.jsonl"
        whole.write_rows(draw_rows("part", 0, whole.scan().rows, arguments.rows), part)
        arguments.pool = [str(part)]
    tests = {task: str(arguments.targets / f"{task}.test.jsonl") for task in arguments.tasks}
    reporter = Reporter()
    pool = Pool(arguments.pool)
    total = pool.scan().rows
    count = round(arguments.fraction * total)
    settings = FinetuneSection(epochs=arguments.epochs, learning_rate=arguments.learning_rate)

    def losses(name: str, rows: list[int], seed: int, tasks: list[str]) -> dict[str, float]:
        """Test loss of some tasks after fine-tuning on these rows; cached."""
        made_of = key_of([arguments.model, arguments.pool, settings.model_dump(), rows])[:8]
        cell = arguments.work / f"cells/{name}-{seed}-{made_of}.json"
        if cell.is_file():
            return json.loads(cell.read_text())
        session = Session.create(max_length=512, seed=seed, reporter=reporter)
        folder = cell.with_suffix("")
        reporter.say(f"fine-tuning on {name}, seed {seed}")
        sets = {task: Pool(tests[task]) for task in tasks}
        record = finetune(session, arguments.model, pool.take(rows), folder, settings, sets)
        shutil.rmtree(folder)
        after = {task: entry["after"] for task, entry in record["test"].items()}
        write_json(cell, after)
        return after

    # The random shares need no scores, so they come first.
    drawn = [
        losses("random", draw_rows("random", seed, total, count), seed, arguments.tasks)
        for seed in range(arguments.seeds)
    ]
    scores = read_scores(arguments.scores or make_scores(arguments, reporter))
    table: dict[str, dict[str, list[float]]] = {task: {"selected": [], "random": []} for task in arguments.tasks}
    for seed, task in itertools.product(range(arguments.seeds), arguments.tasks):
        rows = chosen(scores, task, arguments.strategy, count)
        name = task if arguments.strategy == "top" else f"{task}-{arguments.strategy}"
        table[task]["selected"].append(losses(name, rows, seed, [task])[task])
        table[task]["random"].append(drawn[seed][task])

    write_json(
        arguments.output,
        {
            **environment(),
            "settings": {k: str(v) if isinstance(v, Path) else v for k, v in vars(arguments).items()},
            "test_loss": table,
        },
    )
    print(f"{'task':<15}{'selected':>18}{'random':>18}{'difference':>12}  lower in")
    for task, entry in table.items():
        selected, plain = np.array(entry["selected"]), np.array(entry["random"])
        wins = int((selected < plain).sum())
        print(
            f"{task:<15}{selected.mean():>9.4f} ± {selected.std(ddof=min(1, len(selected) - 1)):.4f}"
            f"{plain.mean():>9.4f} ± {plain.std(ddof=min(1, len(plain) - 1)):.4f}"
            f"{(selected - plain).mean():>12.4f}  {wins} of {len(selected)} seeds"
        )


def chosen(scores: pa.Table, task: str, strategy: str, count: int) -> list[int]:
    """The rows that a strategy chooses for one task."""
    if strategy == "top":
        return top(scores[TASK_PREFIX + task].to_numpy(zero_copy_only=False), count).tolist()
    columns = [name for name in scores.column_names if name.startswith(f"{TASK_PREFIX}{task}.")]
    return round_robin([scores[name] for name in columns], count).tolist()


def validation_sets(arguments: argparse.Namespace) -> dict[str, str]:
    """The validation file of each task or, to take turns, of each example."""
    whole = {task: arguments.targets / f"{task}.val.jsonl" for task in arguments.tasks}
    if arguments.strategy == "top":
        return {task: str(path) for task, path in whole.items()}
    sets = {}
    for task, path in whole.items():
        pool = Pool([str(path)])
        for row in range(pool.scan().rows):
            name = f"{task}.{row:02d}"
            sets[name] = str(arguments.work / f"validation/{name}.jsonl")
            pool.write_rows([row], Path(sets[name]))
    return sets


def make_scores(arguments: argparse.Namespace, reporter: Reporter) -> Path:
    """Run the pipeline up to the scores; goes on where it stopped."""
    recipe = parse_recipe(
        {
            "model": arguments.model,
            "data": {
                "pool": arguments.pool,
                "validation": validation_sets(arguments),
                "max_length": 512,
            },
            "warmup": {"fraction": 0.05, "epochs": 2, "learning_rate": arguments.learning_rate},
            "proxy": {"sparsity": arguments.sparsity, "probe": {"fraction": 0.01}, "align": {"fraction": 0.01}},
            "influence": {"normalise": arguments.normalise, "query_norm": arguments.query_norm},
            "audit": False,
            "output": str(arguments.work / ("run" if arguments.strategy == "top" else f"run-{arguments.strategy}")),
        }
    )
    run = run_recipe(recipe, reporter=reporter, stop_after="score", command="benchmarks/downstream.py")
    return run.folder.scores


if __name__ == "__main__":
    main()
