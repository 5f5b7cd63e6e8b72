"""How much memory do compress, align and score take, and how long, at several batch sizes?

Each command runs in a process of its own on rows of the pool. The bound is that of the project: three times the model
in float32, and 1 GB more. CPU seconds (all threads of the command) depend less on other work than wall time.

    python benchmarks/memory.py                                                        # target-17m
    python benchmarks/memory.py --model ../models/smollm2-135m-instruct                # benchmarks/models.py makes it
    python benchmarks/memory.py --model ../models/gemma3-270m --batches 1024 --rows 64
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from itertools import islice
from pathlib import Path
from typing import Any

from common import RESULTS, SHARED, Results, parser, settings_of
from iprox.models import flops
from iprox.models.loading import skeleton


def measured(arguments: list[str]) -> dict[str, float]:
    """Return the peak memory in bytes, and the CPU seconds, of an iprox command."""
    child = subprocess.Popen(
        [sys.executable, "-m", "iprox.cli", *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    assert child.stderr is not None
    said = child.stderr.read().decode()
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise SystemExit(f"iprox {' '.join(arguments)}:\n{said}")
    return {"peak_bytes": usage.ru_maxrss * 1024, "cpu_seconds": usage.ru_utime + usage.ru_stime}


def main() -> None:
    """Measure what is missing and print the table."""
    options = parser(__doc__, "model validation seed output fresh", output=None)
    options.add_argument("--pool", type=Path, default=SHARED / "data/pool.jsonl")
    options.add_argument("--rows", type=int, default=128, help="rows of the pool that each command reads (%(default)s)")
    options.add_argument("--batches", type=int, nargs="+", default=[512, 1024, 2048, 4096], help="batch_tokens")
    arguments = options.parse_args()
    output = arguments.output or RESULTS / f"memory-{Path(arguments.model).name}.jsonl"
    results = Results(output, settings_of(arguments, "batches"), fresh=arguments.fresh)
    weights = 4 * flops.parameters(skeleton(arguments.model))
    print(f"model {weights / 1e9:.2f} GB in float32; bound {3 * weights / 1e9 + 1:.2f} GB")
    with tempfile.TemporaryDirectory() as folder:
        pool, validation = Path(folder) / "pool.jsonl", Path(folder) / "validation.jsonl"
        for path, source, count in ((pool, arguments.pool, arguments.rows), (validation, arguments.validation, 16)):
            with open(source, encoding="utf-8") as lines:
                path.write_text("".join(islice(lines, count)), encoding="utf-8")
        for batch in arguments.batches:
            commands = commands_of(arguments.model, pool, validation, Path(folder) / str(batch), batch)
            for name, command in commands.items():
                cell: dict[str, Any] = results(
                    f"{name}, {batch}", lambda command=command: measured(command), arguments.seed
                )
                print(
                    f"{name:<16} batch_tokens {batch:>5}: {cell['peak_bytes'] / 1e9:>5.2f} GB, "
                    f"{cell['cpu_seconds']:>6.1f} s of CPU",
                    flush=True,
                )


def commands_of(model: str, pool: Path, validation: Path, folder: Path, batch: int) -> dict[str, list[str]]:
    """Return the arguments of each command."""
    recipe = ["--pool", str(pool), "--quiet", "--set", "data.max_length=512", "dtype=float32", f"batch_tokens={batch}"]
    proxy, task = str(folder / "proxy"), ["--validation", f"task={validation}"]
    few = [*recipe, "influence.curvature_examples=16"]
    return {
        "compress": ["compress", "--model", model, "--output", proxy, "--sparsity", "0.5", *recipe],
        "align": [
            *("align", "--model", model, "--proxy", proxy, "--output", str(folder / "aligned"), "--epochs", "1"),
            *(*recipe, "proxy.align.held_out=0"),
        ],
        "score": ["score", "--model", model, "--output", str(folder / "scores"), *task, *few],
        "score a proxy": ["score", "--model", proxy, "--output", str(folder / "cheap"), *task, *few],
    }


if __name__ == "__main__":
    main()
