"""Ablations: what each choice does for fidelity, Spearman and top-5 % overlap with the warmed target's own scores.

    python benchmarks/paper/ablations.py                             # all of them, 1,000 pool rows, seed 0
    python benchmarks/paper/ablations.py --only probe ridge --rows 300

One proxy setting at a time is changed from the base: IPSVD at sparsity 0.7 on 139 random rows (1 % of the pool), global
ranks, raw TracIn at the last checkpoint, not aligned. None of the rows scored is in a probe, in the
warm-up or aligned on. Cells are kept in the results file.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from runs import SHARED, Results, as_rows, in_bfloat16

import iprox
from iprox.audits.fidelity import fidelity_metrics
from iprox.data import Pool
from iprox.data.sampling import draw_rows
from iprox.models.loading import load_tokenizer
from iprox.progress import Reporter
from iprox.run.folder import key_of, read_json
from iprox.scores import score_matrix
from iprox.session import Session
from iprox.settings import WarmupSection
from iprox.stages.training import warm_up

PROBE = 139
Cell = dict[str, Any]


class Ablation:
    """The rows, the warmed target at its checkpoints, and its scores."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments, self.pool = arguments, Pool(arguments.pool)
        self.total, seed = self.pool.scan().rows, arguments.seed
        warm = draw_rows("warmup", seed, self.total, round(0.05 * self.total))
        self.probe_rows = draw_rows("probe", seed, self.total, 5 * PROBE, warm)
        self.align_rows = draw_rows("align", seed, self.total, 5 * PROBE, [*warm, *self.probe_rows])
        used = [*warm, *self.probe_rows, *self.align_rows]
        sample = draw_rows("sample", seed, self.total, arguments.rows, used)
        self.rows, self.used = as_rows(self.pool.take(sample)), [*used, *sample]
        self.validation = {
            task: as_rows(Pool([str(arguments.targets / f"{task}.val.jsonl")])) for task in arguments.tasks
        }
        made_by = key_of([arguments.model, arguments.pool, arguments.learning_rate, seed])
        folder = arguments.work / f"warm-{made_by[:12]}"
        if not (folder / "checkpoints.json").is_file():
            session = Session.create(max_length=512, seed=seed, reporter=Reporter(quiet=True))
            settings = WarmupSection(epochs=4, learning_rate=arguments.learning_rate)
            warm_up(session, arguments.model, self.pool.take(warm), folder, settings)
        self.checkpoints = [
            (folder / entry["path"], entry["learning_rate"]) for entry in read_json(folder / "checkpoints.json")
        ]
        self.tokenizer = load_tokenizer(arguments.model)

    def target(self, number: int = -1, dtype: torch.dtype = torch.bfloat16) -> Any:
        """The target at one of its checkpoints."""
        return iprox.load(self.checkpoints[number][0], dtype=dtype)

    def scores(self, model: Any, **options: Any) -> np.ndarray:
        """Scores [N, tasks] of the rows."""
        common = {"tokenizer": self.tokenizer, "max_length": 512}
        return score_matrix(iprox.score(model, self.rows, self.validation, **common, **options))

    @cached_property
    def truth(self) -> np.ndarray:
        """The target's own, at the last checkpoint."""
        return self.scores(self.target(), query_norm=1.0)

    def proxy(self, number: int = -1, probe: list[int] | None = None, sparsity: float = 0.7, **options: Any) -> Any:
        """A proxy of a checkpoint, in float32."""
        rows = as_rows(self.pool.take(self.probe_rows[:PROBE] if probe is None else probe))
        target = self.target(number, torch.float32)
        common = {"tokenizer": self.tokenizer, "max_length": 512}
        return iprox.compress(target, rows, sparsity=sparsity, **common, **options)

    def fidelity(self, proxy: Any, number: int = -1, **options: Any) -> Cell:
        """Of a proxy's scores with the target's, by task and on average."""
        return compared(
            self.arguments, self.scores(in_bfloat16(proxy), target=self.target(number), **options), self.truth
        )

    @cached_property
    def base(self) -> Cell:
        """What most ablations have among their variants."""
        return self.fidelity(self.proxy())

    def aligned(self, rows: int = PROBE, **options: Any) -> Cell:
        """Of the base proxy, aligned on some rows."""
        proxy = self.proxy()
        data = as_rows(self.pool.take(self.align_rows[:rows]))
        history = iprox.align(
            proxy, self.target(dtype=torch.float32), data, tokenizer=self.tokenizer, max_length=512, **options
        )
        return {**self.fidelity(proxy), "seconds": history.seconds}

    def of_one_source(self) -> list[int]:
        """A probe as large as the base's, all of the pool's commonest source, of rows that nothing else uses."""
        sources = [example.source for example in self.pool.take(range(self.total))]
        common = max(set(sources), key=sources.count)
        others = [row for row in range(self.total) if sources[row] != common]
        return draw_rows("one source", self.arguments.seed, self.total, PROBE, {*others, *self.used})

    def over_checkpoints(self, used: int, on_proxy: bool) -> Cell:
        """Scores at the last `used` checkpoints, on proxies or the target, against the target's at all of them."""
        numbers = range(len(self.checkpoints))

        def at(number: int, on_proxy: bool) -> np.ndarray:
            if not on_proxy:
                return self.scores(self.target(number), query_norm=1.0)
            return self.scores(in_bfloat16(self.proxy(number)), target=self.target(number))

        truth = sum(self.checkpoints[number][1] * at(number, False) for number in numbers)
        found = sum(self.checkpoints[number][1] * at(number, on_proxy) for number in list(numbers)[-used:])
        return compared(self.arguments, np.asarray(found), np.asarray(truth))


def compared(arguments: argparse.Namespace, scores: np.ndarray, truth: np.ndarray) -> Cell:
    """Fidelity by task, and its means."""
    by_task = {
        task: fidelity_metrics(scores[:, number], truth[:, number]) for number, task in enumerate(arguments.tasks)
    }
    return {
        "spearman": float(np.mean([entry["spearman"] for entry in by_task.values()])),
        "overlap": float(np.mean([entry["overlap"]["0.05"] for entry in by_task.values()])),
        "by_task": {task: entry["spearman"] for task, entry in by_task.items()},
    }


def variants(ablation: Ablation) -> dict[str, dict[str, Callable[[], Cell]]]:
    """By ablation, what is compared."""
    make, measure = ablation.proxy, ablation.fidelity
    logits = {"gradient_weight": 0.0, "kl_weight": 1.0}
    return {
        "sparsity": {
            f"{size}": lambda size=size: ablation.base if size == 0.7 else measure(make(sparsity=size))
            for size in (0.3, 0.5, 0.7, 0.85)
        },
        "alignment": {
            "stage 1 only": lambda: ablation.base,
            "KL only": lambda: ablation.aligned(**logits),
            "gradient only": lambda: ablation.aligned(kl_weight=0.0),
            "both": lambda: ablation.aligned(),
            "KL only, 3 × the rate": lambda: ablation.aligned(learning_rate=3e-4, **logits),
            "KL only, 5 × the rows, one epoch": lambda: ablation.aligned(5 * PROBE, epochs=1, **logits),
            "KL only, 5 × the rows": lambda: ablation.aligned(5 * PROBE, **logits),
        },
        "probe": {
            f"1 × {PROBE} rows": lambda: ablation.base,
            **{
                f"{times} × {PROBE} rows": lambda times=times: measure(make(probe=ablation.probe_rows[: times * PROBE]))
                for times in (2, 3, 5)
            },
            "a tenth of that": lambda: measure(make(probe=ablation.probe_rows[: PROBE // 10])),
            "of one source": lambda: measure(make(probe=ablation.of_one_source())),
        },
        "ridge": {
            "auto": lambda: ablation.base,
            **{f"{ridge}": lambda ridge=ridge: measure(make(ridge=ridge)) for ridge in (1e-3, 1e-2, 1e-1, 1.0)},
        },
        "ranks": {"global": lambda: ablation.base, "uniform": lambda: measure(make(ranks="uniform"))},
        "validation gradients": {
            "of the target": lambda: ablation.base,
            "of the proxy": lambda: compared(ablation.arguments, ablation.scores(in_bfloat16(make())), ablation.truth),
        },
        "share of the query's norm": {
            "0.9": lambda: ablation.base,
            **{f"{keep}": lambda keep=keep: measure(make(), query_norm=keep) for keep in (1.0, 0.95, 0.8, 0.7, 0.5)},
        },
        "checkpoints": {
            "target, last of 4": lambda: ablation.over_checkpoints(1, on_proxy=False),
            "proxy, last of 4": lambda: ablation.over_checkpoints(1, on_proxy=True),
            "proxy, last 2 of 4": lambda: ablation.over_checkpoints(2, on_proxy=True),
            "proxies, all 4": lambda: ablation.over_checkpoints(4, on_proxy=True),
        },
    }


def main() -> None:
    """Compute what is missing and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(SHARED / "models/target-17m"))
    parser.add_argument("--pool", nargs="+", default=[str(SHARED / "data/pool.jsonl")])
    parser.add_argument("--targets", type=Path, default=SHARED / "data/targets", help="folder of TASK.val.jsonl")
    parser.add_argument("--tasks", nargs="+", default=["gsm8k", "code", "bbh", "summarization"])
    parser.add_argument("--rows", type=int, default=1000, help="of the pool, scored")
    parser.add_argument("--learning-rate", type=float, default=3e-4, help="of the warm-up, four epochs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", help="some of the ablations")
    parser.add_argument("--work", type=Path, default=Path("runs/paper-ablations"))
    parser.add_argument("--output", type=Path, default=Path(__file__).parents[1] / "results/paper-ablations.json")
    parser.add_argument("--fresh", action="store_true", help="forget earlier results")
    arguments = parser.parse_args()
    kept = ("work", "output", "fresh", "only")
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(arguments).items() if k not in kept}
    results = Results(arguments.output, settings, fresh=arguments.fresh)
    for name, compared_ones in variants(Ablation(arguments)).items():
        if arguments.only and name not in arguments.only:
            continue
        print(name)
        for variant, work in compared_ones.items():
            cell = results(f"{name}/{variant}", work)
            print(f"  {variant:<32}{cell['spearman']:>7.3f}{cell['overlap']:>7.2f}", flush=True)


if __name__ == "__main__":
    main()
