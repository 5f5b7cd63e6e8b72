"""Pipeline runs that share a warm-up, and a file of results that is its own cache."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch

from iprox.data import Example
from iprox.models.precision import cast_parameters
from iprox.progress import Reporter
from iprox.recipe import parse_recipe
from iprox.run.folder import environment, write_json
from iprox.run.whole import run_recipe
from iprox.scores import score_matrix

SHARED = Path(__file__).resolve().parents[3] / "shared"


class Results:
    """Cells by name in one JSON file, with machine, versions and settings: what is there is not computed again.

    A stopped benchmark goes on where it was, on another machine too; then both machines are named.

    Args:
        path: of the file.
        settings: what the cells hang on.
        fresh: forget what is there.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any], *, fresh: bool = False) -> None:
        self.path, here = path, environment()
        # Where the checkout is does not matter, nor where the package is installed.
        told = json.dumps(dict(settings)).replace(str(SHARED), "../shared")
        settings = json.loads(told.replace(str(resources.files("iprox.quickstart")), "quickstart"))
        self.content: dict[str, Any] = {"machines": [], "settings": settings, "cells": {}}
        if path.is_file() and not fresh:
            self.content = json.loads(path.read_text())
            if self.content["settings"] != settings:
                raise SystemExit(f"{path}: made with other settings; give another --output, or --fresh to forget it")
        self._here = here

    def __call__(self, name: str, work: Callable[[], Any], of: str = "") -> Any:
        """The cell of that name, computed now if it is not there, or is of something else than `of`."""
        known = self.content["cells"].get(name)
        if known is None or (of and known.get("of") != of):
            self.content["cells"][name] = {**work(), "of": of} if of else work()
            if self._here not in self.content["machines"]:
                self.content["machines"].append(self._here)
            write_json(self.path, self.content)
        return self.content["cells"][name]


def run(recipe: dict[str, Any], warmed: Path | None = None, stop_after: str = "score") -> dict[str, Any]:
    """Do a run as far as `stop_after`, or go on with it, and return its `run.json`.

    Args:
        recipe: with its `output`.
        warmed: folder of a run with the same data and warm-up, whose checkpoints are taken.
        stop_after: the last stage.
    """
    folder = Path(recipe["output"])
    if warmed is not None and not folder.exists():
        record = json.loads((warmed / "run.json").read_text())
        record["stages"] = {name: record["stages"][name] for name in ("data", "warmup")}
        shutil.copytree(warmed / "warmup", folder / "warmup")
        write_json(folder / "run.json", record)
    run_recipe(parse_recipe(recipe, "benchmark"), reporter=Reporter(quiet=True), stop_after=stop_after)
    return json.loads((folder / "run.json").read_text())


def in_bfloat16(model: Any) -> Any:
    """The model with its parameters in bfloat16, in place; its rotary frequencies stay as they are."""
    cast_parameters(model, torch.bfloat16)
    return model


def as_rows(examples: Iterable[Example]) -> list[dict[str, Any]]:
    """Examples as the rows that iprox's Python functions take."""
    fields = ("id", "source", "messages", "prompt", "completion", "text")
    known = ({name: getattr(example, name) for name in fields} for example in examples)
    return [{name: value for name, value in row.items() if value is not None} for row in known]


def scores_in(folder: Path) -> np.ndarray:
    """The scores [N, tasks] of a run."""
    return score_matrix(pq.read_table(folder / "scores.parquet"))
