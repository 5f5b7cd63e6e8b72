"""The model, data and recipe bundled for `iprox quickstart`."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import as_file, files
from pathlib import Path

from iprox.recipe import load_recipe
from iprox.settings import Recipe


def quickstart_recipe(output: str, overrides: Sequence[str] = ()) -> Recipe:
    """Return the bundled recipe with the paths of the bundled model and data, and `KEY=VALUE` overrides."""
    with as_file(files(__name__)) as folder:
        recipe = load_recipe(folder / "recipe.yaml", overrides)
        recipe.model = str(folder / recipe.model)
        recipe.data.pool = [str(folder / file) for file in recipe.data.pool]
        recipe.data.validation = {task: str(folder / str(file)) for task, file in recipe.data.validation.items()}
        recipe.output = str(Path(output))
    return recipe
