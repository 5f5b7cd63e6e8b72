"""Ablations: the effect of each choice on fidelity (Spearman and top-5 % overlap with the warmed target's scores).

    python benchmarks/paper/ablations.py                             # all of them, 1,000 pool rows, seed 0
    python benchmarks/paper/ablations.py --only probe ranks --rows 300

Each variant changes one setting of the base: IPSVD at sparsity 0.7 with 139 random probe rows (1 % of the pool), global
ranks, not aligned, raw TracIn at the last checkpoint with the target's validation gradients. Probes, warm-up and
alignment use none of the scored rows. Cells are kept in the results file.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

import iprox
from iprox.data import Pool
from iprox.data.sampling import draw_rows
from iprox.models.loading import load_tokenizer
from iprox.scores import score_matrix

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import RESULTS, Results, agreement, as_rows, examples_of, in_bfloat16, parser, settings_of, warmed

PROBE = 139
Cell = dict[str, Any]


class Ablation:
    """The rows, the warmed target at its checkpoints, and its scores."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments, self.pool = arguments, Pool(arguments.pool)
        self.total, seed = self.pool.scan().rows, arguments.seed
        warm = draw_rows("warmup", seed, self.total, round(0.05 * self.total))  # as `warmed` draws them
        self.probe_rows = draw_rows("probe", seed, self.total, 5 * PROBE, warm)
        self.align_rows = draw_rows("align", seed, self.total, 5 * PROBE, [*warm, *self.probe_rows])
        used = [*warm, *self.probe_rows, *self.align_rows]
        sample = draw_rows("sample", seed, self.total, arguments.rows, used)
        self.rows, self.used = as_rows(self.pool.take(sample)), [*used, *sample]
        self.validation = {task: as_rows(examples) for task, examples in examples_of(arguments).items()}
        options = {"seed": seed, "learning_rate": arguments.learning_rate, "epochs": 4}
        self.checkpoints = warmed(arguments.model, self.pool, arguments.work, **options)
        self.tokenizer = load_tokenizer(arguments.model)

    def target(self, number: int = -1, dtype: torch.dtype = torch.bfloat16) -> Any:
        """Return the target at one of its checkpoints."""
        return iprox.load(self.checkpoints[number][0], dtype=dtype)

    def scores(self, model: Any, **options: Any) -> np.ndarray:
        """Return the raw TracIn scores [N, tasks] of the rows."""
        common = {"tokenizer": self.tokenizer, "max_length": 512, "progress": False, "per_example": False}
        common |= {"estimator": "tracin", "normalize": "none"}
        return score_matrix(iprox.score(model, self.rows, self.validation, **common, **options))

    @cached_property
    def truth(self) -> np.ndarray:
        """The target's own, at the last checkpoint."""
        return self.scores(self.target(), query_norm=1.0)

    def proxy(self, number: int = -1, probe: list[int] | None = None, sparsity: float = 0.7, **options: Any) -> Any:
        """Return a proxy of a checkpoint, in float32."""
        rows = as_rows(self.pool.take(self.probe_rows[:PROBE] if probe is None else probe))
        target = self.target(number, torch.float32)
        common = {"tokenizer": self.tokenizer, "max_length": 512, "progress": False}
        return iprox.compress(target, rows, sparsity=sparsity, **common, **options)

    def fidelity(self, proxy: Any, number: int = -1, **options: Any) -> Cell:
        """Return the agreement of a proxy's scores with the target's."""
        scores = self.scores(in_bfloat16(proxy), target=self.target(number), **options)
        return agreement(scores, self.truth, self.arguments.tasks)

    @cached_property
    def base(self) -> Cell:
        """The fidelity of the base, which most ablations compare with."""
        return self.fidelity(self.proxy())

    def aligned(self, rows: int = PROBE, **options: Any) -> Cell:
        """Return the fidelity of the base proxy aligned on some rows."""
        proxy = self.proxy()
        data = as_rows(self.pool.take(self.align_rows[:rows]))
        common = {"tokenizer": self.tokenizer, "max_length": 512, "progress": False}
        history = iprox.align(proxy, self.target(dtype=torch.float32), data, **common, **options)
        return {**self.fidelity(proxy), "seconds": history.seconds}

    def of_one_source(self) -> list[int]:
        """Return a probe as large as the base's, only of the most frequent source, with rows that nothing else uses."""
        sources = [example.source for example in self.pool.take(range(self.total))]
        common = max(set(sources), key=sources.count)
        others = [row for row in range(self.total) if sources[row] != common]
        return draw_rows("one source", self.arguments.seed, self.total, PROBE, {*others, *self.used})

    def over_checkpoints(self, used: int, on_proxy: bool) -> Cell:
        """Compare scores at the last `used` checkpoints, on proxies or the target, with the target's at all of them."""
        numbers = range(len(self.checkpoints))

        def at(number: int, on_proxy: bool) -> np.ndarray:
            if not on_proxy:
                return self.scores(self.target(number), query_norm=1.0)
            return self.scores(in_bfloat16(self.proxy(number)), target=self.target(number))

        truth = sum(self.checkpoints[number][1] * at(number, False) for number in numbers)
        found = sum(self.checkpoints[number][1] * at(number, on_proxy) for number in list(numbers)[-used:])
        return agreement(np.asarray(found), np.asarray(truth), self.arguments.tasks)


def variants(ablation: Ablation) -> dict[str, dict[str, Callable[[], Cell]]]:
    """Return the functions that compute each variant, by ablation."""
    make, measure = ablation.proxy, ablation.fidelity
    logits = {"kl_weight": 1.0}
    return {
        "sparsity": {
            f"{size}": lambda size=size: ablation.base if size == 0.7 else measure(make(sparsity=size))
            for size in (0.3, 0.5, 0.7, 0.85)
        },
        "alignment": {
            "stage 1 only": lambda: ablation.base,
            "KL only": lambda: ablation.aligned(**logits),
            "gradient only": lambda: ablation.aligned(gradient_weight=1.0, kl_weight=0.0),
            "both": lambda: ablation.aligned(gradient_weight=1.0),
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
        "ranks": {"global": lambda: ablation.base, "uniform": lambda: measure(make(ranks="uniform"))},
        "validation gradients": {
            "of the target": lambda: ablation.base,
            "of the proxy": lambda: agreement(
                ablation.scores(in_bfloat16(make())), ablation.truth, ablation.arguments.tasks
            ),
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
    made = parser(
        __doc__,
        "model pool targets tasks learning-rate seed work output fresh",
        tasks=["gsm8k", "code", "bbh", "summarization"],
        work=Path("runs/paper-ablations"),
        output=RESULTS / "paper-ablations.jsonl",
    )
    made.add_argument("--rows", type=int, default=1000, help="pool rows to score")
    made.add_argument("--only", nargs="+", help="some of the ablations")
    arguments = made.parse_args()
    results = Results(arguments.output, settings_of(arguments, "only"), fresh=arguments.fresh)
    for name, compared in variants(Ablation(arguments)).items():
        if arguments.only and name not in arguments.only:
            continue
        print(name)
        for variant, work in compared.items():
            cell = results(f"{name}/{variant}", work, arguments.seed)
            print(f"  {variant:<32}{cell['spearman']:>7.3f}{cell['overlap']:>7.2f}", flush=True)


if __name__ == "__main__":
    main()
