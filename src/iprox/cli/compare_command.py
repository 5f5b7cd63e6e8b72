"""`iprox compare`: its table, and plain data for `--json`."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

from rich.table import Table

from iprox.audit.comparison import Comparison, compare_all
from iprox.cli import summary
from iprox.errors import InputError
from iprox.files import expanded
from iprox.influence.scores import read_scores
from iprox.report import formats
from iprox.run_folder import read_json

# What scores cost: to make the proxy, and to score. Warm-up and audit are not counted, nor what a run does with its
# scores; of `iprox refine` its own work is.
COUNTED = ("compress", "align", "index", "query", "score")


def compare(arguments: Namespace) -> dict[str, Any]:
    """`iprox compare`."""
    paths = _named(arguments.scores)
    found = compare_all({name: read_scores(path) for name, path in paths.items()}, share=arguments.share)
    flops = {name: _flops(path) for name, path in paths.items()}
    if not arguments.json:
        _print(found, flops)
    return {**found.as_dict(), "flops": flops}


def _named(given: list[str]) -> dict[str, Path]:
    """Paths by name; one without a name is called as its folder is, or by its whole path where two would be alike."""
    pairs = []
    for each in given:
        name, equals, path = each.partition("=")
        # A path may hold an equals sign; a name holds no separator.
        pairs.append((name, expanded(path)) if equals and name and "/" not in name else ("", expanded(each)))
    folders = [path.parent.name if path.suffix == ".parquet" else path.name for _, path in pairs]
    named = [
        name or (folder if folder and folders.count(folder) == 1 else str(path))
        for (name, path), folder in zip(pairs, folders, strict=True)
    ]
    for name in named:
        if named.count(name) > 1:
            raise InputError(f"two scores are called {name}; name them apart: NAME={name}")
    return {name: path for name, (_, path) in zip(named, pairs, strict=True)}


def _flops(path: Path) -> float | None:
    """What the scores cost, as far as the run.json beside them says."""
    record = (path if path.is_dir() else path.parent) / "run.json"
    if not record.is_file():
        return None
    stages = read_json(record).get("stages", {})
    counted = COUNTED if "score" in stages else (*COUNTED, "refine")
    spent = [stages[name]["flops"] for name in counted if name in stages]
    return sum(spent) if spent else None


def _print(found: Comparison, flops: dict[str, float | None]) -> None:
    first = found.names[0]
    head = ["", *found.tasks, *(["mean"] if len(found.tasks) > 1 else []), f"top {found.share:.0%} shared"]
    priced = any(spent is not None for spent in flops.values())
    table = Table(*head, *(["FLOPs"] if priced else []), box=None, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"

    def add(name: str, cells: list[str]) -> None:
        spent = flops[name]
        cost = [formats.flops(spent) if spent is not None else ""] if priced else []
        table.add_row(name, *cells, *cost)

    add(first, [""] * (len(head) - 1))
    for entry in found.against_first():
        values = [*entry["spearman"].values(), *([entry["mean"]] if len(found.tasks) > 1 else [])]
        add(entry["name"], [*(f"{value:.3f}" for value in values), f"{entry['overlap']:.0%}"])
    summary.console.print(f"Spearman with {first} on {found.rows:,} rows", markup=False, soft_wrap=True)
    summary.console.print(table)
