"""What the functions of the Python API refuse at once, with the argument's name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from iprox.errors import InputError
from iprox.models.adapters import refuse_adapter
from iprox.models.precision import warn_of_rounded_frequencies, warn_of_slow_products


def check_model(name: str, model: Any) -> None:
    """Refuse what is no loaded model, or one whose layers are not its own.

    Raises:
        InputError: it is something else, or carries a PEFT adapter.
    """
    if not isinstance(model, nn.Module):
        what = f"the path {model!r}" if isinstance(model, str) else f"a {type(model).__name__}"
        raise InputError(f"{name}: expected a loaded model, not {what}; iprox.load(path) loads one")
    refuse_adapter(model)
    warn_of_rounded_frequencies(model)
    warn_of_slow_products(model)


def check_tasks(validation: Any) -> None:
    """Refuse validation sets that are not given by task.

    Raises:
        InputError: they are not, or there is none.
    """
    if not isinstance(validation, Mapping):
        raise InputError(
            f"validation: expected examples by task, such as {{'gsm8k': rows}}, not a {type(validation).__name__}"
        )
    if not validation:
        raise InputError("validation: no task is given; influence is on the validation loss of one or more")
