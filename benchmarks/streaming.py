"""Peak memory of commands on synthetic pools of growing length.

A pool of N short rows is written to a file; `iprox score`, `iprox index` and `iprox query` run on it in separate
processes, with a random model so small that its memory does not matter. Only two things grow with the pool: eight bytes
per row to check ids for duplicates, and the counts of the windows.

    python benchmarks/streaming.py                        # 100 thousand and 1 million rows
    python benchmarks/streaming.py --rows 10000 40000     # quicker
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from importlib.resources import files
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config, set_seed

from common import RESULTS, Results, parser, settings_of

WORDS = ("the", "of", "to", "and", "in", "is", "was", "he", "for", "it", "with", "as", "his", "on", "be", "at", "by")


def write_pool(path: Path, rows: int) -> None:
    """Write rows of a few words, each with an id."""
    draw = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        for number in range(rows):
            text = " ".join(draw.choices(WORDS, k=draw.randint(3, 9)))
            file.write(json.dumps({"id": f"synthetic-{number}", "source": f"s{number % 7}", "text": text}) + "\n")


def make_model(folder: Path) -> None:
    """Save a model of one small layer, with the bundled tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(str(files("iprox.quickstart") / "model"))
    set_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": len(tokenizer)}
    AutoModelForCausalLM.from_config(Qwen3Config(**shape, **heads, tie_word_embeddings=True)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def measured(*arguments: str) -> dict[str, float]:
    """Run an iprox command, and return its seconds and its peak resident memory in bytes."""
    started = time.perf_counter()
    child = subprocess.Popen([sys.executable, "-m", "iprox.cli", *arguments, "--quiet"], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise SystemExit(f"iprox {arguments[0]} failed")
    peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return {"seconds": time.perf_counter() - started, "peak_bytes": peak}


def main() -> None:
    """Measure and print."""
    made = parser(__doc__, "output fresh", output=RESULTS / "streaming.jsonl")
    made.add_argument("--rows", type=int, nargs="+", default=[100_000, 1_000_000])
    made.add_argument("--dimension", type=int, default=64, help="dimension of the index, small to save disk space")
    arguments = made.parse_args()
    results = Results(arguments.output, settings_of(arguments, "rows"), fresh=arguments.fresh)
    print("command       rows    seconds     rows/s   peak MB")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model, validation = str(folder / "model"), folder / "validation.jsonl"
        make_model(folder / "model")
        write_pool(validation, 16)
        for rows in arguments.rows:
            pool, index = folder / f"pool-{rows}.jsonl", str(folder / f"index-{rows}")
            write_pool(pool, rows)
            read, task = ["--model", model, "--pool", str(pool)], ["--validation", f"task={validation}"]
            commands = {
                "score": [*read, *task, "--output", str(folder / f"scores-{rows}")],
                "index": [*read, "--dimension", str(arguments.dimension), "--output", index],
                "query": ["--index", index, *task, "--output", str(folder / f"query-{rows}")],
            }
            # A query needs the index, so the three are measured together.
            if any(f"{command}/{rows}/0" not in results.cells for command in commands):
                for command, options in commands.items():
                    found = measured(command, *options)
                    results(f"{command}/{rows}", lambda found=found: found)
            for command in commands:
                found = results.cells[f"{command}/{rows}/0"]
                rate, peak = rows / found["seconds"], found["peak_bytes"] / 1e6
                print(f"{command:<8} {rows:>9,} {found['seconds']:>10.1f} {rate:>10,.0f} {peak:>9,.0f}", flush=True)


if __name__ == "__main__":
    main()
