"""What do cheap ways of scoring cost in seconds, and how much of the target's own selection do they find?

A sample of the pool is scored on the target and on each proxy, by the same engine in one process. The seconds of
validation gradients (with curvature, where the estimator needs it) and of making the proxy are fixed; those of
candidates grow with the pool. From both follows the cost of a pool of any size as a fraction of scoring it on the
target, and the recall of the target's own top 5 % if the best rows are then scored again on the target:
`recall@10%` costs 0.1 more.

    python benchmarks/cost.py                                                        # target-17m
    python benchmarks/cost.py --model ../models/smollm2-135m-instruct --examples 400  # benchmarks/models.py makes it

Seconds are of all threads of this process (CPU time), which other work on the machine disturbs least; set
OMP_NUM_THREADS=1 for the time that one core takes. Finished cells are kept. Recall is of each task's own scores,
averaged over tasks.
"""

from __future__ import annotations

import argparse
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from transformers import PreTrainedModel

import iprox
from common import RESULTS, Results, agreement, as_rows, examples_of, parser, read_results, settings_of
from iprox.data import Pool
from iprox.data.sampling import draw_rows
from iprox.influence.job import Checkpoint, Job
from iprox.scores import score_matrix
from iprox.session import Session
from iprox.settings import InfluenceSection

T = TypeVar("T")

# name -> settings of `iprox.compress`
WAYS: dict[str, dict[str, Any]] = {
    "depth 0.67": {"method": "target", "depth": 0.67, "gradients": "all"},
    "depth 0.5": {"method": "target", "depth": 0.5, "gradients": "all"},
    "depth 0.33": {"method": "target", "depth": 0.33, "gradients": "all"},
    "answers": {"method": "target", "depth": 1.0, "gradients": "answers"},
    "answers, depth 0.67": {"method": "target", "depth": 0.67, "gradients": "answers"},
    "answers, depth 0.5": {"method": "target", "depth": 0.5, "gradients": "answers"},
    "answers, depth 0.33": {"method": "target", "depth": 0.33, "gradients": "answers"},
    "ipsvd 0.3": {"sparsity": 0.3},
    "ipsvd 0.5": {"sparsity": 0.5},
    "ipsvd 0.7": {"sparsity": 0.7},
    "ipsvd 0.3, answers": {"sparsity": 0.3, "gradients": "answers"},
    "ipsvd 0.5, answers": {"sparsity": 0.5, "gradients": "answers"},
}
POOLS = (2_000, 100_000, 1_000_000)
# Fractions of the pool that are scored again on the target.
AGAIN = (0.05, 0.1, 0.2)
TOP = 0.05


@dataclass(frozen=True)
class Scored:
    """Scores [N, tasks] of a sample, and the seconds that validation gradients and candidates took."""

    scores: np.ndarray
    fixed: float
    rows: float


class Bench:
    """One target, a sample of the pool, and tasks."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.session = Session.create(max_length=512, batch_tokens=arguments.batch_tokens)
        self.target = self.session.model(arguments.model)
        self.encoder = self.session.encoder(arguments.model)
        self.pool = Pool(arguments.pool)
        total = self.pool.scan().rows
        drawn = draw_rows("cost", arguments.seed, total, arguments.examples + arguments.probe)
        self.sample = self.pool.take(drawn[: arguments.examples])
        self.probe = as_rows(self.pool.take(drawn[arguments.examples :]))
        self.validation = {
            task: self.encoder.encode(rows[: arguments.validation_rows])
            for task, rows in examples_of(arguments).items()
        }
        self.settings = InfluenceSection(estimator=arguments.estimator, normalize="cosine", per_example=False)
        self.truth: Scored | None = None

    def scored(self, model: PreTrainedModel, target: PreTrainedModel | None = None) -> Scored:
        """Score the sample. The first batch warms up what CPU libraries generate for new shapes, untimed."""
        job = Job.of(
            *(self.settings, [Checkpoint(model, 1.0, target)], self.validation, self.encoder, self.pool),
            batch_tokens=self.session.batch_tokens,
        )
        fixed, worker = timed(job.worker)
        worker(self.sample[:32])
        rows, (table, _) = timed(lambda: worker(self.sample))
        return Scored(score_matrix(table), fixed, rows)

    def of_target(self) -> Scored:
        """Scores of the target itself."""
        if self.truth is None:
            self.truth = self.scored(self.target)
        return self.truth

    def cell(self, way: str) -> dict[str, Any]:
        """Measure one way."""
        truth = self.of_target()
        making, proxy = timed(
            lambda: iprox.compress(
                self.target, self.probe, tokenizer=self.encoder.tokenizer, max_length=512, progress=False, **WAYS[way]
            )
        )
        found = self.scored(proxy, self.target)
        recall = {f"{share:g}": self.recall(found.scores, share) for share in AGAIN}
        return {
            **agreement(found.scores, truth.scores, list(self.validation)),
            "recall": recall,
            "seconds": {"making": making, "fixed": found.fixed, "rows": found.rows},
            "of_target": {"fixed": truth.fixed, "rows": truth.rows},
            "cost": {str(size): self.cost(found, making, size) for size in POOLS},
        }

    def recall(self, scores: np.ndarray, share: float) -> float:
        """Return the fraction of the target's top 5 % that is among the best `share`, averaged over tasks."""
        truth = self.of_target().scores
        top, best = round(TOP * len(truth)), round(share * len(truth))
        found = [
            len(np.intersect1d(np.argsort(-own)[:top], np.argsort(-other)[:best])) / top
            for own, other in zip(truth.T, scores.T, strict=True)
        ]
        return float(np.mean(found))

    def cost(self, found: Scored, making: float, size: int) -> float:
        """Return the seconds for a pool of some size as a fraction of the target's."""
        truth, scale = self.of_target(), size / len(self.sample)
        return (making + found.fixed + scale * found.rows) / (truth.fixed + scale * truth.rows)


def timed(action: Callable[[], T]) -> tuple[float, T]:
    """Return the CPU seconds that a call takes, and its result."""
    started = time.process_time()
    result = action()
    return time.process_time() - started, result


def main() -> None:
    """Measure what is missing and print the table."""
    options = parser(
        *(__doc__, "model pool targets tasks examples batch-tokens seed output fresh"),
        tasks=["gsm8k", "science", "code"],
        output=None,
    )
    options.add_argument("--probe", type=int, default=64, help="rows that second moments are measured on")
    options.add_argument("--validation-rows", type=int, default=32, help="of each task")
    options.add_argument("--estimator", default="tracin", help="tracin, or ekfac (%(default)s)")
    options.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    options.add_argument("--page", action="store_true", help="compute nothing; write docs/results/cost.md")
    arguments = options.parse_args()
    if arguments.page:
        write_page()
        return
    output = arguments.output or RESULTS / f"cost-{Path(arguments.model).name}-{arguments.estimator}.jsonl"
    results = Results(output, settings_of(arguments, "ways", "page"), fresh=arguments.fresh)
    bench: Bench | None = None
    for way in arguments.ways:
        if f"{way}/{arguments.seed}" not in results.cells:
            bench = bench or Bench(arguments)
            found = results(way, lambda way=way, bench=bench: bench.cell(way), arguments.seed)
            print(line(way, found), flush=True)
    print(f"{'':<22} Spearman  recall@ 5%   10%   20%   cost of {POOLS[0]:,}, {POOLS[1]:,}, {POOLS[2]:,} rows")
    for way in arguments.ways:
        print(line(way, results.cells[f"{way}/{arguments.seed}"]))


def write_page() -> None:
    """Replace what stands between `<!-- cost -->` and `<!-- /cost -->` by a table for each results file."""
    parts = []
    for path in sorted(RESULTS.glob("cost-*.jsonl")):
        known = read_results(path)
        how = known["settings"]
        heads = ["scored on", "Spearman", *(f"recall at {share:.0%}" for share in AGAIN)]
        rows = [[*heads, *(f"cost, {size:,} rows" for size in POOLS)], ["---"] * (len(heads) + len(POOLS))]
        for name, cell in known["cells"].items():
            numbers = [cell["spearman"], *cell["recall"].values(), *cell["cost"].values()]
            rows.append([name.rpartition("/")[0], *(f"{number:.2f}" for number in numbers)])
        title = f"## {Path(how['model']).name}, {how['estimator']}"
        said = f"{how['examples']} rows, {how['validation_rows']} validation rows of {', '.join(how['tasks'])}."
        parts.append("\n\n".join([title, said, "\n".join(f"| {' | '.join(row)} |" for row in rows)]))
    page = RESULTS.parents[1] / "docs/results/cost.md"
    block = re.compile(r"(<!-- cost -->\n).*?(<!-- /cost -->)", re.DOTALL)
    text = page.read_text(encoding="utf-8")
    page.write_text(
        block.sub(lambda found: f"{found[1]}" + "\n\n".join(parts) + f"\n{found[2]}", text), encoding="utf-8"
    )


def line(way: str, cell: dict[str, Any]) -> str:
    """Return one way's row of the table."""
    recall = "  ".join(f"{value:.2f}" for value in cell["recall"].values())
    cost = "  ".join(f"{value:.2f}" for value in cell["cost"].values())
    return f"{way:<22} {cell['spearman']:.3f}        {recall}   {cost}"


if __name__ == "__main__":
    main()
