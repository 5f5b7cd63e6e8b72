"""Number of Python frames from the command to the dot product, and of files of iprox that they are in.

    python benchmarks/frames.py                          # `iprox score` on the bundled quickstart
    python benchmarks/frames.py --estimator tracin --set influence.per_example=false

A few rows of the bundled quickstart are scored with the command, and the frames in iprox at the first contraction of a
candidate with the validation gradients are counted. Frames of torch and other packages do not count.
"""

from __future__ import annotations

import argparse
import inspect
import sys
import tempfile
import traceback
from importlib.resources import files
from pathlib import Path
from typing import Any

import iprox
from iprox.cli import main as command
from iprox.influence.query import DenseQuery, LowRankQuery
from iprox.influence.shared_basis import SharedQuery

PACKAGE, BUNDLED = Path(iprox.__file__).parent, files("iprox.quickstart")
ROWS = 8


def main() -> None:
    """Score a few rows, and print the stack of the first contraction."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    given = parser.parse_known_args()[1]  # options of `iprox score`
    stacks: list[list[tuple[str, str]]] = []

    for kind in (DenseQuery, LowRankQuery, SharedQuery):
        real = kind.contract

        def counted(self: Any, *arguments: Any, real: Any = real, **options: Any) -> Any:
            stacks.append([(each.filename, each.name) for each in traceback.extract_stack()[:-1]])
            stacks[-1].append((inspect.getfile(real), real.__qualname__))
            return real(self, *arguments, **options)

        kind.contract = counted  # pyright: ignore[reportAttributeAccessIssue]
    with tempfile.TemporaryDirectory() as folder:
        pool = Path(folder) / "pool.jsonl"
        lines = (BUNDLED / "data/pool.jsonl").read_text(encoding="utf-8").splitlines()[:ROWS]
        pool.write_text("\n".join(lines) + "\n", encoding="utf-8")
        validation = f"spelling={BUNDLED / 'data/spelling.val.jsonl'}"
        arguments = ["--model", str(BUNDLED / "model"), "--pool", str(pool), "--output", f"{folder}/scores", "--quiet"]
        if command(["score", *arguments, "--validation", validation, *given]):
            sys.exit("iprox score failed")
    stack = [(Path(file).relative_to(PACKAGE), name) for file, name in stacks[0] if PACKAGE in Path(file).parents]
    for file, name in stack:
        print(f"{file!s:<28}{name}")
    print(f"{len(stack)} frames in {len({file for file, _ in stack})} files")


if __name__ == "__main__":
    main()
