"""The command line parser, generated from the commands and the settings.

It uses cyclopts because it takes lists as the shell expands globs (`--pool *.jsonl`), reports mistakes in one line with
the nearest known name, completes in bash, zsh and fish, and imports in 0.1 s.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from cyclopts import App, Parameter
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from iprox.cli.commands import COMMANDS, Command
from iprox.errors import InputError, cut
from iprox.recipe import override, parse_settings
from iprox.settings import Recipe, Settings, fields_of

_FIELDS = dict(fields_of(Settings))


@dataclass(slots=True)
class Request:
    """A parsed command line.

    Attributes:
        command: the command.
        settings: checked settings, for commands that compute.
        inputs: other arguments by name.
        overrides: `KEY=VALUE` strings of `--set`.
        quiet: whether to hide progress.
        json: whether to print the result as one line of JSON.
        line: the command line, for `run.json`.
        recipe: checked recipe, for commands that take one.
    """

    command: Command
    settings: Settings
    inputs: dict[str, Any] = field(default_factory=dict)
    overrides: list[str] = field(default_factory=list)
    quiet: bool = False
    json: bool = False
    line: str = ""
    recipe: Recipe | None = None

    @property
    def output(self) -> str | None:
        """Output path, for messages."""
        return self.settings.output or self.inputs.get("output") or (self.recipe and self.recipe.output)


def build_app() -> App:
    """Return the application. Calling it with arguments returns a `Request`, or None if it printed help."""
    app = App(
        name="iprox",
        help="Select the training data that helps your task, with influence scored on a cheaper proxy of your own "
        "model.\n\nStart with `iprox quickstart`. Every setting is in docs/recipe.md; `--set KEY=VALUE` sets one.",
        version=version("iprox"),
        help_format="markdown",
        default_parameter=Parameter(negative=()),
    )
    app.register_install_completion_command(add_to_startup=False)
    for place, command in enumerate(COMMANDS):
        examples = "\n".join(f"    {line}" for line in command.example.splitlines())
        app.command(_function(command), name=command.name, sort_key=place, help_epilogue=f"Example:\n\n{examples}")
    return app


def _function(command: Command) -> Callable[..., Request]:
    """Return a function with the signature of a command; cyclopts makes its options and help from it."""
    parameters, keys, named = [], {}, inspect.Parameter.KEYWORD_ONLY
    for each in command.inputs:
        kind = inspect.Parameter.POSITIONAL_ONLY if each.positional else named
        several = get_origin(each.type) is list
        if each.positional and several:
            kind = inspect.Parameter.VAR_POSITIONAL
        parameters.append(_parameter(each.name, kind, each.type, each.meaning, each.default))
    for key in (*command.needs, *command.offers):
        name = command.option(key).replace("-", "_")
        keys[name] = key
        meaning = described(_FIELDS[key], dict(command.meanings).get(key))
        default = ... if key in command.needs else None
        parameters.append(_parameter(name, named, option_type(_FIELDS[key].annotation), meaning, default))
    if command.reads:
        settable = "any setting" if "*" in command.reads else f"a setting of {', '.join(command.reads)}"
        parameters.append(_parameter("set", named, list[str], f"KEY=VALUE ...: {settable}", ()))
    parameters.append(_parameter("quiet", named, bool, "no progress; warnings and errors only", False))
    parameters.append(_parameter("json", named, bool, "one machine-readable line at the end", False))

    def function(*positional: Any, **given: Any) -> Request:
        names = [each.name for each in command.inputs if each.positional]
        if positional and names:
            several = get_origin(command.inputs[0].type) is list
            given |= {names[0]: list(positional)} if several else dict(zip(names, positional, strict=True))
        return _request(command, keys, given)

    order = sorted(parameters, key=lambda each: (each.kind, each.default is not inspect.Parameter.empty))
    function.__signature__ = inspect.Signature(order)  # pyright: ignore[reportFunctionMemberAccess]
    function.__annotations__ = {each.name: each.annotation for each in order}
    function.__doc__ = command.summary
    return function


def _parameter(name: str, kind: Any, of: Any, meaning: str, default: Any) -> inspect.Parameter:
    shown = default not in (None, (), False, ...)
    how = Parameter(
        name=f"--{name.replace('_', '-')}" if kind is inspect.Parameter.KEYWORD_ONLY else None,
        help=meaning,
        consume_multiple=True if get_origin(of) is list else None,
        show_default=shown,
    )
    if kind is inspect.Parameter.VAR_POSITIONAL:
        return inspect.Parameter(name, kind, annotation=Annotated[get_args(of)[0], how])
    value = inspect.Parameter.empty if default is ... else default
    return inspect.Parameter(name, kind, default=value, annotation=Annotated[of | None if default is None else of, how])


def option_type(annotation: Any) -> Any:
    """Return the type of a setting's option: NAME=VALUE pairs for a mapping, a number for a section."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return option_type(get_args(annotation)[0])
    if origin in (list, dict):
        return list[str]
    if origin in (Union, UnionType):
        parts = [part for part in get_args(annotation) if part is not type(None) and part != Literal[False]]
        parts = [int if isinstance(part, type) and issubclass(part, BaseModel) else part for part in parts]
        return option_type(parts[0]) if len(parts) == 1 else str
    return annotation


def described(field: FieldInfo, meaning: str | None = None) -> str:
    """Return the help of a setting with its default; `meaning` replaces the setting's own text."""
    extra = field.json_schema_extra
    left_out = extra.get("left_out") if isinstance(extra, dict) else None
    default = field.get_default(call_default_factory=True)
    shown = left_out or (default if isinstance(default, str | int | float) and default is not False else None)
    said = meaning or str(field.description)
    return f"{said} (default: {shown})" if shown not in (None, "") else said


def _request(command: Command, keys: Mapping[str, str], given: dict[str, Any]) -> Request:
    """Return the checked request of a command.

    Raises:
        InputError: a setting has a bad value, or the command does not read it.
    """
    quiet, json, overrides = given.pop("quiet", False), given.pop("json", False), list(given.pop("set", ()))
    raw: dict[str, Any] = {}
    options = {key: f"--{command.option(key)}" for key in keys.values()}
    inputs = {each.name: each.default for each in command.inputs if each.default is not ...}
    for name, value in given.items():
        if name not in keys:
            inputs[name] = list(value) if isinstance(value, tuple) else value
        elif value not in (None, [], ()):
            key = keys[name]
            override(raw, key, pairs(value, options[key]) if get_origin(_FIELDS[key].annotation) is dict else value)
    request = Request(command, Settings(), inputs, overrides, quiet, json)
    if command.reads and "*" not in command.reads:
        for text in overrides:
            key = text.partition("=")[0]
            if not command.takes(key) and "=" in text:
                raise InputError(
                    f"--set {cut(text)}: iprox {command.name} does not read {cut(key)}; it reads "
                    f"{', '.join(command.reads)}"
                )
        request.settings = parse_settings(raw, overrides, options)
    return request


def pairs(given: list[str], option: str) -> dict[str, Any]:
    """Return `NAME=VALUE` strings as a mapping; a name that is given several times has a list."""
    found: dict[str, list[str]] = {}
    for pair in given:
        name, equals, value = pair.partition("=")
        if not equals or not name or not value:
            raise InputError(f"{option} {pair}: write it as TASK=FILE, e.g. gsm8k=gsm8k.val.jsonl")
        found.setdefault(name, []).append(value)
    return dict(found)
