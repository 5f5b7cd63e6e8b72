"""Does memory grow with the pool? Peak memory of whole commands on synthetic pools of growing length.

A pool of N short rows is written to a file; `iprox score`, `iprox index` and `iprox query` run on it, each in a process
of its own, with a small random model, so that the model and its activations are next to nothing. What grows by design:
eight bytes a row while ids are checked for duplicates, and the counts of the windows.

    python benchmarks/streaming.py                        # 100 thousand and 1 million rows: a while on one core
    python benchmarks/streaming.py --rows 10000 40000     # quicker
"""

from __future__ import annotations

import argparse
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

from iprox.run.folder import environment, write_json

WORDS = ("the", "of", "to", "and", "in", "is", "was", "he", "for", "it", "with", "as", "his", "on", "be", "at", "by")


def write_pool(path: Path, rows: int) -> None:
    """Rows of a few words, every one with an id of its own."""
    draw = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        for number in range(rows):
            text = " ".join(draw.choices(WORDS, k=draw.randint(3, 9)))
            file.write(json.dumps({"id": f"synthetic-{number}", "source": f"s{number % 7}", "text": text}) + "\n")


def make_model(folder: Path) -> None:
    """One small layer, with the bundled tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(str(files("iprox.quickstart") / "model"))
    set_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": len(tokenizer)}
    AutoModelForCausalLM.from_config(Qwen3Config(**shape, **heads, tie_word_embeddings=True)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def measured(*arguments: str) -> tuple[float, int]:
    """Run an iprox command. Returns its seconds and its peak resident memory in bytes."""
    started = time.perf_counter()
    child = subprocess.Popen([sys.executable, "-m", "iprox.cli", *arguments, "--quiet"], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise SystemExit(f"iprox {arguments[0]} failed")
    return time.perf_counter() - started, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--dimension", type=int, default=64, help="of the index: small, so that disks hold it")
    parser.add_argument("--output", help="JSON file")
    arguments = parser.parse_args()

    results = []
    print("command       rows    seconds     rows/s   peak MB")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model, validation = str(folder / "model"), folder / "validation.jsonl"
        make_model(folder / "model")
        write_pool(validation, 16)
        for rows in arguments.rows:
            pool = folder / f"pool-{rows}.jsonl"
            write_pool(pool, rows)
            read = ["--model", model, "--pool", str(pool)]
            task = ["--validation", f"task={validation}"]
            commands = {
                "score": [*read, *task, "--output", str(folder / f"scores-{rows}")],
                "index": [*read, "--dimension", str(arguments.dimension), "--output", str(folder / f"index-{rows}")],
                "query": ["--index", str(folder / f"index-{rows}"), *task, "--output", str(folder / f"query-{rows}")],
            }
            for command, options in commands.items():
                seconds, peak = measured(command, *options)
                print(
                    f"{command:<8} {rows:>9,} {seconds:>10.1f} {rows / seconds:>10,.0f} {peak / 1e6:>9,.0f}", flush=True
                )
                results.append({"command": command, "rows": rows, "seconds": seconds, "peak_bytes": peak})
    if arguments.output:
        write_json(Path(arguments.output), {**environment(), "dimension": arguments.dimension, "measured": results})


if __name__ == "__main__":
    main()
