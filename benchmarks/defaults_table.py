"""Write the short table of `benchmarks/defaults.py` into docs/results.md, all rows into docs/results/defaults.md.

    python benchmarks/defaults_table.py

What stands between `<!-- defaults -->` and `<!-- /defaults -->` on each page is replaced.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks/results"
TITLES = {"target-17m": "target-17m", "smollm2": "SmolLM2-135M-Instruct", "gemma": "Gemma 3 270M"}
# Tasks whose answers are a word or two, on which exact matches mean something.
WORDS = ("science", "sentiment", "bbh", "commonsenseqa", "strategyqa")
DEFAULT = "EK-FAC, cosine, blend"
# The rows of docs/results.md, and what they are called there.
FRONT = {
    DEFAULT: "**the default**, on the target",
    f"{DEFAULT}, depth 0.1, refined": "**the default**, on its proxy, refined",
    "EK-FAC, cosine, top": "highest EK-FAC cosine",
    "TracIn, cosine, top": "highest TracIn cosine",
    "RDS+": "RDS+",
    "BM25": "BM25",
    "random": "random rows",
}

Cells = dict[tuple[str, str, int], dict[str, Any]]


def main() -> None:
    """Fill in the block of each page."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    known = {name: read(RESULTS / f"defaults-{name}.jsonl") for name in TITLES}
    known = {name: cells for name, cells in known.items() if any(row == DEFAULT for row, _, _ in cells)}
    fill(ROOT / "docs/results.md", front(known))
    parts = [f(TITLES[name], cells) for f in (summary, by_task) for name, cells in known.items()]
    fill(ROOT / "docs/results/defaults.md", "\n\n".join(parts))


def read(path: Path) -> Cells:
    """Return the cells of a results file."""
    lines = path.read_text().splitlines() if path.is_file() else []
    return {(cell["row"], cell["task"], cell["seed"]): cell for cell in map(json.loads, lines)}


def fill(page: Path, content: str) -> None:
    """Replace the block of a page."""
    text = page.read_text(encoding="utf-8")
    pattern = re.compile(r"(<!-- defaults -->\n).*?(<!-- /defaults -->)", re.DOTALL)
    if not pattern.search(text):
        raise SystemExit(f"{page}: has no block defaults")
    page.write_text(pattern.sub(lambda found: f"{found[1]}{content}\n{found[2]}", text), encoding="utf-8")


def front(known: dict[str, Cells]) -> str:
    """Return the mean test loss of a few rows on each model, and in how many cells they train better than random."""
    body = []
    for row, title in FRONT.items():
        line = [title]
        for cells in known.values():
            (complete, _), (wins, losses) = whole_seeds(cells, row), against_random(cells, row)
            better = f" ({wins} of {wins + losses})" if row != "random" else ""
            line.append(f"{with_error(complete)}{better}" if complete else "–")
        body.append(line)
    heads = [f"{TITLES[name]}, {len(names(cells, 1))} tasks" for name, cells in known.items()]
    return table(["5 % selected by", *heads], body)


def summary(title: str, cells: Cells) -> str:
    """Return one row per configuration: what training on its selections does, over all tasks."""
    rows = []
    for row in names(cells, 0):
        complete, own = whole_seeds(cells, row)
        wins, losses = against_random(cells, row)
        words = [cell["exact_match"] for cell in own if cell["task"] in WORDS]
        share = [cell["own_source"] for cell in own if cell["own_source"] is not None]
        rows.append(
            (
                np.mean(complete) if complete else np.inf,
                [
                    f"**{row}** (default)" if row == DEFAULT else row,
                    with_error(complete),
                    "" if row == "random" else f"{wins} of {wins + losses}",
                    f"{np.mean(words):.1%}" if words else "–",
                    f"{np.mean(share):.0%}" if share and row not in ("random", "own source") else "",
                    str(len(complete)) if complete else f"{len(own)} cells",
                ],
            )
        )
    rows.sort(key=lambda entry: entry[0])
    heads = ["selected by", "mean test loss", "better than random", "exact match, short answers", "own source", "seeds"]
    return f"## {title}: all rows\n\nMean over {len(names(cells, 1))} tasks.\n\n" + table(
        heads, [row for _, row in rows]
    )


def by_task(title: str, cells: Cells) -> str:
    """Return the test loss by task, mean over seeds, and the median number of supervised tokens selected."""
    tasks = names(cells, 1)
    body = []
    for row in names(cells, 0):
        line = [row]
        for task in tasks:
            own = [cell for (r, t, _), cell in cells.items() if (r, t) == (row, task)]
            tokens = np.mean([cell["supervised_median"] for cell in own]) if own else 0
            line.append(f"{with_error([cell['loss'] for cell in own])} ({tokens:.0f})" if own else "–")
        body.append(line)
    revisions = ", ".join(sorted({cell["revision"] for cell in cells.values()}))
    return f"## {title}: by task\n\n{table(['selected by', *tasks], body)}\n\nRevisions: {revisions}."


def names(cells: Cells, place: int) -> list[Any]:
    """Return the rows (0) or tasks (1) of the cells, in the order they were computed."""
    return list(dict.fromkeys(key[place] for key in cells))


def whole_seeds(cells: Cells, row: str) -> tuple[list[float], list[dict[str, Any]]]:
    """Return a row's mean test loss in each seed that has all tasks, and all of its cells."""
    tasks, seeds = names(cells, 1), sorted({seed for _, _, seed in cells})
    means = [mean_loss(cells, row, tasks, seed) for seed in seeds]
    return [mean for mean in means if mean is not None], [cells[key] for key in cells if key[0] == row]


def mean_loss(cells: Cells, row: str, tasks: Iterable[str], seed: int) -> float | None:
    """Return the mean test loss over the tasks in one seed; None if one is missing."""
    losses = [cells[row, task, seed]["loss"] for task in tasks if (row, task, seed) in cells]
    return float(np.mean(losses)) if len(losses) == len(list(tasks)) else None


def against_random(cells: Cells, row: str) -> tuple[int, int]:
    """Return in how many cells a row's selection trains better than random rows, and in how many it does not."""
    better = [
        cell["loss"] < cells["random", task, seed]["loss"]
        for (name, task, seed), cell in cells.items()
        if name == row and ("random", task, seed) in cells
    ]
    return sum(better), len(better) - sum(better)


def with_error(values: list[float]) -> str:
    """Return a mean over seeds, with its standard error if there are several."""
    if not values:
        return "–"
    error = f" ± {np.std(values, ddof=1) / len(values) ** 0.5:.3f}" if len(values) > 1 else ""
    return f"{np.mean(values):.3f}{error}"


def table(heads: list[str], rows: list[list[str]]) -> str:
    """Return a Markdown table."""
    return "\n".join("| " + " | ".join(row) + " |" for row in [heads, ["---"] * len(heads), *rows])


if __name__ == "__main__":
    main()
