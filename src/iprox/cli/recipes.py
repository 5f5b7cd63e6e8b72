"""The recipe of a command, read and checked before anything heavy is imported, so that a refusal comes at once."""

from __future__ import annotations

import json
from argparse import Namespace

from iprox.errors import InputError
from iprox.quickstart import quickstart_recipe
from iprox.recipe import load_recipe
from iprox.settings import STAGES

# The recipe keys that the options of every command stand for.
COMMON_OPTIONS = {
    "seed": "seed",
    "dtype": "dtype",
    "device": "device",
    "batch_tokens": "batch_tokens",
    "max_length": "data.max_length",
}


def check_recipe(arguments: Namespace) -> None:
    """Put the checked recipe of `run`, `plan` and `quickstart` in `arguments.checked`; other commands have none.

    Raises:
        InputError: the recipe is not valid, or there is no such stage to stop after.
    """
    if arguments.command == "quickstart":
        arguments.checked = quickstart_recipe(arguments.output, _common_overrides(arguments))
    if arguments.command == "run" and arguments.stop_after not in (None, *STAGES):
        raise InputError(f"--stop-after {arguments.stop_after}: no such stage; stages: {', '.join(STAGES)}")
    if arguments.command in ("run", "plan"):
        arguments.checked = load_recipe(arguments.recipe, [*arguments.overrides, *_common_overrides(arguments)])


def _common_overrides(arguments: Namespace) -> list[str]:
    """`--seed 3` as `seed=3`, for the options that were given."""
    given = {key: getattr(arguments, option, None) for option, key in COMMON_OPTIONS.items()}
    return [f"{key}={json.dumps(value)}" for key, value in given.items() if value is not None]
