"""Check the arguments of the Python functions, and list settings among them."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Collection, Mapping
from typing import Any, TypeVar

from pydantic import BaseModel
from torch import nn

from iprox.errors import InputError
from iprox.models.adapters import refuse_adapter
from iprox.models.layers import unread_convolutions
from iprox.models.precision import warn_of_rounded_frequencies, warn_of_slow_products
from iprox.models.quantized import multiply_in_own_dtype
from iprox.recipe import validated

AnySection = TypeVar("AnySection", bound=BaseModel)
AnyFunction = TypeVar("AnyFunction", bound=Callable[..., Any])


def check_model(name: str, model: Any) -> None:
    """Refuse what is no loaded model, or one whose layers are not its own.

    The layers of a quantized model are set to multiply in the dtype of its embeddings.

    Raises:
        InputError: it is something else, or carries a PEFT adapter.
    """
    if not isinstance(model, nn.Module):
        what = f"the path {model!r}" if isinstance(model, str) else f"a {type(model).__name__}"
        raise InputError(f"{name}: expected a loaded model, not {what}; iprox.load(path) loads one")
    refuse_adapter(model)
    multiply_in_own_dtype(model)
    if left := unread_convolutions(model):
        warnings.warn(
            f"{name}: {left[0]} ({len(left)} in all) is neither compressed nor scored: iprox does not read "
            "convolutions with groups, transposed ones and ones with weight normalization",
            stacklevel=3,
        )
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
        raise InputError("validation: no task is given; influence needs the validation loss of one or more tasks")


def takes(section: type[BaseModel], *names: str) -> Callable[[AnyFunction], AnyFunction]:
    """Return a decorator that lists settings in the signature and the docstring of a function with `**settings`.

    Args:
        section: The section that the settings are of.
        names: Which of its keys the function takes.
    """

    def decorate(function: AnyFunction) -> AnyFunction:
        fields = section.model_fields
        signature = inspect.signature(function)
        kept = [each for each in signature.parameters.values() if each.kind is not inspect.Parameter.VAR_KEYWORD]
        listed = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=fields[name].get_default())
            for name in names
        ]
        function.__signature__ = signature.replace(parameters=[*kept, *listed])  # pyright: ignore
        lines = "\n".join(f"    {name}: {fields[name].description}." for name in names)
        head, found, rest = inspect.cleandoc(function.__doc__ or "").partition("    **settings:")
        assert found
        function.__doc__ = f"{head}{lines}\n{rest.partition(chr(10))[2]}"
        return function

    return decorate


def chosen(
    section: type[AnySection], function: Callable[..., Any], settings: Mapping[str, Any], names: Collection[str]
) -> AnySection:
    """Return the section that keyword arguments describe.

    Args:
        section: Its type.
        function: The function that was called, for messages.
        settings: The keyword arguments.
        names: Those that it takes.

    Raises:
        InputError: One is unknown or has a bad value.
    """
    unknown = [name for name in settings if name not in names]
    if unknown:
        raise InputError(f"{function.__name__}: no setting {unknown[0]!r}; known here: {', '.join(names)}")
    return validated(section, settings, function.__name__)
