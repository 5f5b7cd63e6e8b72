"""On how many examples must curvature be measured?

The target scores the same rows by EK-FAC cosines, with curvature measured on samples of several sizes. Each is compared
with the scores from another sample, of the largest size: Spearman correlation of the mean scores, and the share of the
5 % of rows that both select, where validation examples take turns. The largest size, on rows of its own, shows how much
two samples differ anyway.

    python benchmarks/curvature.py
    python benchmarks/curvature.py --model ../models/smollm2-135m-instruct --examples 300 --sizes 32 64 128
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from common import RESULTS, Results, agreement, parser, settings_of
from cost import TOP, Scored, timed
from iprox.data import Pool
from iprox.data.sampling import draw_rows
from iprox.influence.job import Checkpoint, Job
from iprox.scores import example_matrix, score_matrix
from iprox.session import Session
from iprox.settings import InfluenceSection


def main() -> None:
    """Measure what is missing and print the table."""
    options = parser(
        *(__doc__, "model pool targets tasks examples batch-tokens seed output fresh"),
        tasks=["gsm8k", "science", "code"],
        examples=400,
        output=None,
    )
    options.add_argument("--validation-rows", type=int, default=16, help="of each task")
    options.add_argument("--sizes", type=int, nargs="+", default=[16, 32, 64, 128, 256], help="examples")
    arguments = options.parse_args()
    output = arguments.output or RESULTS / f"curvature-{Path(arguments.model).name}.jsonl"
    results = Results(output, settings_of(arguments), fresh=arguments.fresh)
    session = Session.create(max_length=512, batch_tokens=arguments.batch_tokens)
    encoder, pool = session.encoder(arguments.model), Pool(arguments.pool)
    drawn = draw_rows("cost", arguments.seed, pool.scan().rows, arguments.examples)
    sample, largest = pool.take(drawn), max(arguments.sizes)
    validation = {
        task: encoder.encode(list(Pool([str(arguments.targets / f"{task}.val.jsonl")]))[: arguments.validation_rows])
        for task in arguments.tasks
    }
    model = session.model(arguments.model)

    def scored(size: int, seed: int) -> Scored:
        how = InfluenceSection(curvature_examples=size)
        job = Job.of(
            *(how, [Checkpoint(model)], validation, encoder, pool), seed=seed, batch_tokens=session.batch_tokens
        )
        fixed, worker = timed(job.worker)
        rows, (table, _) = timed(lambda: worker(sample))
        return Scored(score_matrix(table), [example_matrix(table, task) for task in validation], fixed, rows)

    kept: list[Scored] = []

    def cell(size: int) -> dict[str, Any]:
        if not kept:
            kept.append(scored(largest, arguments.seed + 1))
        found, truth = scored(size, arguments.seed), kept[0]
        selected = [
            len(np.intersect1d(found.best(TOP, task), truth.best(TOP, task))) / round(TOP * len(sample))
            for task in range(len(validation))
        ]
        seconds = {"curvature and validation gradients": found.fixed, "rows": found.rows}
        agreed = agreement(found.scores, truth.scores, list(validation))
        return {**agreed, "selected": float(np.mean(selected)), "seconds": seconds}

    for size in arguments.sizes:
        found = results(str(size), lambda size=size: cell(size), arguments.seed)
        taken = [found["seconds"]["curvature and validation gradients"], found["seconds"]["rows"]]
        print(
            f"{size:>5} examples: Spearman {found['spearman']:.3f}, selected by both {found['selected']:.2f}; "
            f"{taken[0]:.0f} s of CPU, and {taken[1]:.0f} s for {len(sample)} rows",
            flush=True,
        )


if __name__ == "__main__":
    main()
