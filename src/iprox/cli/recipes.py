"""The recipe of a command, read and checked before anything heavy is imported, so that a refusal comes at once."""

from __future__ import annotations

from iprox.cli.parser import Request
from iprox.quickstart import quickstart_recipe
from iprox.recipe import load_recipe
from iprox.settings import Recipe


def checked(request: Request) -> Recipe:
    """Return the recipe of `run`, `plan` or `quickstart`.

    Raises:
        InputError: It is not valid.
    """
    if request.command.name == "quickstart":
        return quickstart_recipe(request.inputs["output"], request.overrides)
    return load_recipe(request.inputs["recipe"], request.overrides)
