"""The command `iprox compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.markup import escape

from iprox.audits.comparison import Comparison
from iprox.audits.comparison import compare as compare_scores
from iprox.cli import summary
from iprox.cli.parser import Request
from iprox.errors import InputError
from iprox.files import expanded
from iprox.records import read_json
from iprox.report import formats
from iprox.scores import read_scores

# Stages that count as the cost of scores: making the proxy, and scoring. For scores of `iprox refine`, also that.
COUNTED = ("curvature", "compress", "align", "index", "query", "score")


def compare(request: Request) -> dict[str, Any]:
    """Print how alike several scores rank a pool, and return the comparison as plain data."""
    paths = _named(request.inputs["scores"])
    found = compare_scores({name: read_scores(path) for name, path in paths.items()}, share=request.inputs["share"])
    flops = {name: _flops(path) for name, path in paths.items()}
    if not request.json:
        _print(found, flops)
    return {**found.as_dict(), "flops": flops}


def _named(given: list[str]) -> dict[str, Path]:
    """Return paths by name. A path without a name is named after its folder, or after itself if that is not unique."""
    pairs = []
    for each in given:
        name, equals, path = each.partition("=")
        whole = not equals or not name or "/" in name or expanded(each).exists()  # a path may contain an equals sign
        pairs.append(("", expanded(each)) if whole else (name, expanded(path)))
    folders = [path.parent.name if path.suffix == ".parquet" else path.name for _, path in pairs]
    named = [
        name or (folder if folder and folders.count(folder) == 1 else str(path))
        for (name, path), folder in zip(pairs, folders, strict=True)
    ]
    for name in named:
        if named.count(name) > 1:
            raise InputError(f"two scores are called {name}; give them different names: NAME={name}")
    return {name: path for name, (_, path) in zip(named, pairs, strict=True)}


def _flops(path: Path) -> float | None:
    """Return the FLOPs that the scores cost, from the `run.json` next to them; None if it is missing or unreadable."""
    try:
        stages = read_json((path if path.is_dir() else path.parent) / "run.json")["stages"]
        counted = COUNTED if "score" in stages else (*COUNTED, "refine")
        spent = [float(stages[name]["flops"]) for name in counted if name in stages]
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return sum(spent) if spent else None


def _print(found: Comparison, flops: dict[str, float | None]) -> None:
    priced = any(spent is not None for spent in flops.values())
    table = summary.table_of("", *map(escape, found.head()), *(["FLOPs"] if priced else []))
    for name, cells in {found.names[0]: [""] * len(found.head()), **found.lines()}.items():
        spent = flops[name]
        cost = [formats.flops(spent) if spent is not None else ""] if priced else []
        table.add_row(escape(name), *cells, *cost)
    summary.console.print(found.describe(), markup=False, soft_wrap=True)
    summary.console.print(table)
