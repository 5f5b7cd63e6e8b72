"""How fast is scoring, and how much memory does it take, with batches of how many tokens?

Rows of the pool are scored by TracIn's cosine on the model itself, in a process per cell. CPU seconds are those of all
rows after a first batch; the peak is that of the process. The default of `batch_tokens` on a CPU is chosen from this.

    python benchmarks/batches.py                                             # target-17m
    python benchmarks/batches.py --model ../models/smollm2-135m-instruct     # benchmarks/models.py makes it
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

from common import RESULTS, Results, parser, settings_of
from iprox.data import Pool
from iprox.influence.job import Checkpoint, Job
from iprox.session import Session
from iprox.settings import InfluenceSection


def measured(arguments: argparse.Namespace, dtype: str, size: int) -> dict[str, float]:
    """Return CPU seconds, tokens per second and the peak in bytes of scoring in this process."""
    session = Session.create(dtype=dtype, max_length=512, batch_tokens=size)
    model, encoder, pool = session.model(arguments.model), session.encoder(arguments.model), Pool(arguments.pool)
    every = pool.scan().rows // arguments.examples
    rows = pool.take(range(0, every * arguments.examples, every))
    validation = {"task": encoder.encode(Pool([arguments.validation]).take(range(8)))}
    how = InfluenceSection(estimator="tracin", normalize="cosine", per_example=False)
    worker = Job.of(how, [Checkpoint(model)], validation, encoder, pool, batch_tokens=size).worker()
    worker(rows[:16])
    started = time.process_time()
    _, stats = worker(rows)
    seconds = time.process_time() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"cpu_seconds": seconds, "tokens_per_second": stats.tokens / seconds, "peak_bytes": peak}


def main() -> None:
    """Measure what is missing and print the table."""
    options = parser(__doc__, "model pool validation examples seed output fresh", examples=48, output=None)
    options.add_argument("--sizes", type=int, nargs="+", default=[4096, 1024, 512], help="batch_tokens")
    options.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    options.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    arguments = options.parse_args()
    if arguments.one:
        print(json.dumps(measured(arguments, arguments.one[0], int(arguments.one[1]))))
        return
    output = arguments.output or RESULTS / f"batches-{Path(arguments.model).name}.jsonl"
    results = Results(output, settings_of(arguments, "sizes", "dtypes", "one"), fresh=arguments.fresh)
    for dtype in arguments.dtypes:
        for size in arguments.sizes:
            run = [sys.executable, __file__, *sys.argv[1:], "--one", dtype, str(size)]

            def apart(run: list[str] = run) -> dict[str, float]:
                return json.loads(subprocess.run(run, stdout=subprocess.PIPE, check=True).stdout.splitlines()[-1])

            found = results(f"{dtype}, {size}", apart, arguments.seed)
            print(
                f"{dtype:<9} batch_tokens {size:>5}: {found['cpu_seconds']:>6.1f} s of CPU, "
                f"{found['tokens_per_second']:>7,.0f} tokens/s, {found['peak_bytes'] / 1e9:.2f} GB",
                flush=True,
            )


if __name__ == "__main__":
    main()
