"""What do cheap ways of scoring cost in seconds, and how much of the target's own selection do they find?

A sample of the pool is scored on the target and on each proxy, by the same engine in one process. The seconds of
curvature, of validation gradients and of making the proxy are fixed; those of candidates grow with the pool. From both
follows the cost of a pool of any size as a fraction of scoring it on the target. `found at 10%` is the share of the
target's own selection (5 % of the rows) that is selected if the proxy's best 10 % are scored again on the target, which
costs 0.1 more; at 5 % nothing is scored again.

    python benchmarks/cost.py                                                        # target-17m
    python benchmarks/cost.py --model ../models/smollm2-135m-instruct --examples 400  # benchmarks/models.py makes it
    python benchmarks/cost.py --estimator tracin                                     # cosines with the mean gradient

By default rows are scored as iprox scores them by default: EK-FAC cosines with each validation example, which take
turns. TracIn's are cosines with the mean validation gradient, of which the highest are selected.

Seconds are of all threads of this process (CPU time), which other work on the machine disturbs least; set
OMP_NUM_THREADS=1 for the time that one core takes. Finished cells are kept. What is found is found for each task by its
own scores, and averaged over tasks.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from transformers import PreTrainedModel

import iprox
from common import RESULTS, Results, agreement, as_rows, examples_of, parser, read_results, settings_of, write_block
from iprox.data import Pool
from iprox.data.sampling import draw_rows
from iprox.influence.estimators.ekfac import KroneckerInfluence
from iprox.influence.job import Checkpoint, Job
from iprox.kronecker.kept import is_kept, keep_curvature
from iprox.models.layers import influence_layers
from iprox.records import key_of, read_json, write_json
from iprox.scores import example_matrix, score_matrix
from iprox.selection.strategies import Turns, blended, top
from iprox.session import Session
from iprox.settings import InfluenceSection

T = TypeVar("T")

# name -> settings of `iprox.compress`
WAYS: dict[str, dict[str, Any]] = {
    **{f"depth {share:g}": {"method": "target", "depth": share} for share in (0.5, 0.33, 0.25, 0.17, 0.1)},
    **{f"ipsvd {share:g}": {"sparsity": share} for share in (0.3, 0.5, 0.7)},
    "ipsvd 0.5, depth 0.33": {"sparsity": 0.5, "depth": 0.33},
}
POOLS = (2_000, 100_000, 1_000_000)
# Fractions of the pool that are scored again on the target.
AGAIN = (0.05, 0.1, 0.15, 0.2, 0.3)
TOP = 0.05


@dataclass(frozen=True)
class Scored:
    """Scores of a sample, [N, tasks] and by validation example, and the seconds of validation gradients and rows."""

    scores: np.ndarray
    examples: list[np.ndarray]
    fixed: float
    rows: float

    def best(self, share: float, task: int, among: np.ndarray | None = None) -> np.ndarray:
        """Return the rows that a task selects: this share of all rows, from all or from some of them."""
        count = round(share * len(self.scores))
        rows = np.arange(len(self.scores)) if among is None else np.sort(among)
        if not self.examples:
            return rows[top(self.scores[rows, task], count)]
        # As `refine` does: only these rows have scores, so only they give the spread.
        columns, mean = self.examples[task][rows], self.scores[rows][:, [task]]
        width = columns.shape[1]
        chosen = Turns(blended(lambda: iter([columns]), mean, [width]), [1.0] * width, np.ones(len(rows), bool))
        return rows[chosen(count)]

    def save(self, file: Path) -> None:
        """Write everything to a file."""
        file.parent.mkdir(parents=True, exist_ok=True)
        np.savez(file, self.scores, *self.examples, seconds=[self.fixed, self.rows])

    @classmethod
    def read(cls, file: Path) -> Scored:
        """Read what `save` wrote."""
        with np.load(file) as known:
            scores, *examples = (known[name] for name in known.files if name != "seconds")
            return cls(scores, examples, *known["seconds"].tolist())


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
        by_example = arguments.estimator != "tracin"
        self.settings = InfluenceSection(estimator=arguments.estimator, normalize="cosine", per_example=by_example)
        self.truth: Scored | None = None
        # What takes long is kept here: the curvature, and the target's scores.
        self.work = arguments.work / f"{Path(arguments.model).name}-{arguments.seed}"
        self.folder, self.curvature = self.work / "curvature", 0.0
        self.key = key_of([self.settings.estimator, [row.id for row in self.sample], self.session.batch_tokens])[:8]
        if self.settings.traits.curvature:
            self.curvature = self.measured_curvature()

    def measured_curvature(self) -> float:
        """Return the seconds that the curvature took, which is measured unless it is kept."""
        seconds = self.work / "curvature.json"
        if not is_kept(self.folder):
            job, layers = self.job(Checkpoint(self.target, curvature=self.folder)), influence_layers(self.target)
            estimator = job.estimator
            assert isinstance(estimator, KroneckerInfluence)
            taken, _ = timed(
                lambda: job.made(lambda inputs: keep_curvature(estimator.measured(inputs, layers), self.folder))
            )
            write_json(seconds, taken)
            print(f"curvature: {taken:.0f} s", flush=True)
        return read_json(seconds)

    def job(self, checkpoint: Checkpoint) -> Job:
        """Return the job of scoring at a checkpoint."""
        return Job.of(
            *(self.settings, [checkpoint], self.validation, self.encoder, self.pool),
            batch_tokens=self.session.batch_tokens,
        )

    def scored(self, model: PreTrainedModel, target: PreTrainedModel | None = None) -> Scored:
        """Score the sample. The first batch warms up what CPU libraries generate for new shapes, untimed."""
        fixed, worker = timed(self.job(Checkpoint(model, 1.0, target, curvature=self.folder)).worker)
        worker(self.sample[:32])
        rows, (table, _) = timed(lambda: worker(self.sample))
        examples = [example_matrix(table, task) for task in self.validation] if self.settings.by_example else []
        print(f"validation gradients {fixed:.0f} s, {len(self.sample)} rows {rows:.0f} s", flush=True)
        return Scored(score_matrix(table), examples, fixed, rows)

    def of_target(self) -> Scored:
        """Scores of the target itself."""
        if self.truth is None:
            file = self.work / f"target-{self.key}.npz"
            if not file.is_file():
                self.scored(self.target).save(file)
            self.truth = Scored.read(file)
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
        found.save(self.work / f"{way}-{self.key}.npz")
        return {
            **agreement(found.scores, truth.scores, list(self.validation)),
            "recall": {f"{share:g}": self.recall(found, share) for share in AGAIN},
            "seconds": {"curvature": self.curvature, "making": making, "fixed": found.fixed, "rows": found.rows},
            "of_target": {"fixed": truth.fixed, "rows": truth.rows},
            "cost": {str(size): self.cost(found, making, size) for size in POOLS},
        }

    def recall(self, proxy: Scored, share: float) -> float:
        """Return the share of the target's own selection that is selected after rescoring, averaged over tasks."""
        truth, found = self.of_target(), []
        for task in range(len(self.validation)):
            own, candidates = truth.best(TOP, task), proxy.best(share, task)
            chosen = truth.best(TOP, task, candidates) if share > TOP else candidates
            found.append(len(np.intersect1d(own, chosen)) / len(own))
        return float(np.mean(found))

    def cost(self, found: Scored, making: float, size: int) -> float:
        """Return the seconds for a pool of some size as a fraction of the target's."""
        truth, scale = self.of_target(), size / len(self.sample)
        shared = self.curvature  # of the target, in both
        return (shared + making + found.fixed + scale * found.rows) / (shared + truth.fixed + scale * truth.rows)


def timed(action: Callable[[], T]) -> tuple[float, T]:
    """Return the CPU seconds that a call takes, and its result."""
    started = time.process_time()
    result = action()
    return time.process_time() - started, result


def options_of(description: str | None, estimator: str) -> argparse.ArgumentParser:
    """Return the options of a benchmark of `Bench`, with its default estimator."""
    options = parser(
        *(description, "model pool targets tasks examples batch-tokens seed work output fresh"),
        tasks=["gsm8k", "science", "code"],
        batch_tokens=1024,
        work=Path("runs/cost"),
        output=None,
    )
    options.add_argument("--probe", type=int, default=64, help="rows that second moments are measured on")
    options.add_argument("--validation-rows", type=int, default=32, help="of each task")
    options.add_argument("--estimator", choices=("ekfac", "tracin"), default=estimator, help="(%(default)s)")
    return options


def main() -> None:
    """Measure what is missing and print the table."""
    options = options_of(__doc__, "ekfac")
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
    shares = "  ".join(f"{share:>4.0%}" for share in AGAIN)
    print(f"{'':<22} Spearman  found at {shares}   cost of {POOLS[0]:,}, {POOLS[1]:,}, {POOLS[2]:,} rows")
    for way in arguments.ways:
        print(line(way, results.cells[f"{way}/{arguments.seed}"]))


def write_page() -> None:
    """Replace what stands between `<!-- cost -->` and `<!-- /cost -->` by a table for each results file."""
    parts = []
    for path in sorted(RESULTS.glob("cost-*.jsonl")):
        known = read_results(path)
        how = known["settings"]
        heads = ["scored on", "Spearman", *(f"found at {share:.0%}" for share in AGAIN)]
        rows = [[*heads, *(f"cost, {size:,} rows" for size in POOLS)], ["---"] * (len(heads) + len(POOLS))]
        for name, cell in known["cells"].items():
            recall = [cell["recall"].get(f"{share:g}") for share in AGAIN]
            numbers = [cell["spearman"], *recall, *cell["cost"].values()]
            shown = ["–" if number is None else f"{number:.2f}" for number in numbers]
            rows.append([name.rpartition("/")[0], *shown])
        title = f"## {Path(how['model']).name}, {how['estimator']}"
        said = f"{how['examples']} rows, {how['validation_rows']} validation rows of {', '.join(how['tasks'])}."
        parts.append("\n\n".join([title, said, "\n".join(f"| {' | '.join(row)} |" for row in rows)]))
    write_block("cost", "\n\n".join(parts))


def line(way: str, cell: dict[str, Any]) -> str:
    """Return one way's row of the table."""
    recall = "  ".join(f"{value:.2f}" for value in cell["recall"].values())
    cost = "  ".join(f"{value:.2f}" for value in cell["cost"].values())
    return f"{way:<22} {cell['spearman']:.3f}              {recall}   {cost}"


if __name__ == "__main__":
    main()
