"""Read, check, resolve and write recipes."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from iprox.errors import InputError, cut, one_line, shown
from iprox.files import absolute, check_path, expanded
from iprox.settings import Recipe, Settings

# Largest number of problems in one message.
MOST_PROBLEMS = 20

# Largest number of nested levels, and of values after expanding aliases: a few hundred bytes of nested aliases can
# expand to gigabytes. A recipe has five levels, and about as many values as files.
DEEPEST, MOST = 50, 100_000

_MERGE = "tag:yaml.org,2002:merge"


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read and validate a recipe file.

    Args:
        path: YAML file.
        overrides: `section.key=value` strings; values are YAML.

    Raises:
        InputError: the file is missing or not YAML, a key is unknown (the nearest known one is named), or a value is
            bad.
    """
    file = Path(path)
    check_path(file)
    if not file.is_file():
        raise InputError(f"{file}: no such recipe file")
    try:
        raw = read_yaml(file.read_text(encoding="utf-8"))
    except ValueError as error:  # UnicodeDecodeError is one
        raise InputError(f"{file}: not valid YAML: {error}") from error
    if not isinstance(raw, dict):
        raise InputError(f"{file}: a recipe is a mapping of sections (model, data, ...), not {type(raw).__name__}")
    set_overrides(raw, overrides)
    return parse_recipe(raw, str(file))


def parse_recipe(raw: Mapping[str, Any], name: str = "recipe") -> Recipe:
    """Validate a recipe given as plain data."""
    return validated(Recipe, raw, name)


def parse_settings(raw: dict[str, Any], overrides: Sequence[str], options: Mapping[str, str]) -> Settings:
    """Validate the settings of a command.

    Args:
        raw: settings given as options, as nested plain data.
        overrides: `KEY=VALUE` strings of `--set`.
        options: option name by key, for messages.
    """
    set_overrides(raw, overrides)
    return validated(Settings, raw, "", options)


AnySection = TypeVar("AnySection", bound=BaseModel)


def validated(
    section: type[AnySection], raw: Mapping[str, Any], name: str, options: Mapping[str, str] = MappingProxyType({})
) -> AnySection:
    """Return a section made from plain data.

    Args:
        section: class of the section.
        raw: the data.
        name: name that starts messages; "" for none.
        options: names by key, for messages, where they differ from the key.

    Raises:
        InputError: a key is unknown or a value is bad; one line names all of them.
    """
    try:
        return section.model_validate(raw)
    except ValidationError as error:
        # For `Section | False` pydantic reports both branches; the one about False says nothing.
        problems = [problem for problem in error.errors() if not _is_false_branch(problem)]
        clauses = [_explain(problem, section, options) for problem in problems[:MOST_PROBLEMS]]
        left = len(problems) - len(clauses)
        said = "; ".join(clauses) + (f"; and {left:,} more" if left else "")
        raise InputError(f"{name}: {said}" if name else said) from error


def absolute_pattern(pattern: str) -> str:
    """Return a local path or glob pattern as absolute; hub addresses are unchanged."""
    return pattern if "://" in pattern else str(Path.cwd() / expanded(pattern))


def _absolute_if_there(text: str) -> str:
    """Return the path of an existing file or folder as absolute; other text (a hub id, a template) is unchanged."""
    path = expanded(text) if text.startswith("~") else Path(text)
    # Unlike Path.exists, this is false for text that is too long to be a path.
    return str(path.resolve()) if os.path.exists(path) else text


def _absolute_tasks(tasks: dict[str, str | list[str]]) -> dict[str, str | list[str]]:
    return {
        task: absolute_pattern(files) if isinstance(files, str) else [absolute_pattern(file) for file in files]
        for task, files in tasks.items()
    }


def set_overrides(raw: dict[str, Any], overrides: Sequence[str]) -> None:
    """Set the keys named by `KEY=VALUE` strings."""
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise InputError(f"--set {cut(text)}: write it as section.key=value, e.g. --set proxy.sparsity=0.5")
        try:
            override(raw, key, read_yaml(value))
        except ValueError as error:
            raise InputError(f"--set {cut(text)}: the value is not valid YAML ({error})") from error


def override(raw: dict[str, Any], key: str, value: Any) -> None:
    """Set one `section.key` in nested plain data."""
    *parents, last = key.split(".")
    section = raw
    for parent in parents:
        if not isinstance(section.get(parent), dict):
            section[parent] = {}
        section = section[parent]
    section[last] = value


def _explain(problem: Any, whole: type[BaseModel], options: Mapping[str, str]) -> str:
    """Return one clause that explains one of pydantic's problems."""
    path = [str(part) for part in problem["loc"] if not _is_union_tag(str(part))]
    if path and (path[-1] == "[key]" or problem["type"] == "invalid_key"):
        section = ".".join(path[:-2] if path[-1] == "[key]" else path[:-1])
        place = f"{section}: " if section else ""
        return f"{place}a key must be text, and YAML reads {_as_yaml_reads(problem['input'], problem['loc'])}"
    where = options.get(".".join(path), cut(".".join(path)))
    if problem["type"] == "extra_forbidden":
        known = _known_keys(whole, path[:-1])
        near = difflib.get_close_matches(path[-1], known, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]!r}?" if near else f"; known here: {', '.join(known)}"
        return f"unknown key {where!r}{hint}"
    if problem["type"] == "missing":
        return f"the key {where!r} is missing"
    if problem["type"] == "model_type":
        return f"{where}: give a section of keys (or false where allowed), not {shown(problem['input'])}"
    message = problem["msg"].removeprefix("Value error, ")
    if not path:
        return message  # about the whole recipe: it names the keys itself
    if isinstance(problem["input"], dict | BaseModel):
        return f"{where}: {message}"  # about a whole section
    said = f"{where}: {message[0].lower()}{message[1:]} (given: {shown(problem['input'])})"
    if problem["type"] == "string_type" and isinstance(problem["input"], bool):
        return f'{said}; quote text that YAML reads as true or false (yes, no, on, off): "no"'
    return said


def _as_yaml_reads(key: Any, loc: tuple[Any, ...]) -> str:
    """Return how YAML reads a key that should be text, and how to write it instead."""
    if loc[-1] != "[key]":  # pydantic reports the value of such a key
        key = loc[-1]
    if isinstance(key, bool):
        words = "yes, on and true" if key else "no, off and false"
        return f'{words} as {str(key).lower()}: quote it, e.g. "{"yes" if key else "no"}"'
    if key is None:
        return 'an empty key, ~ and null as nothing: quote it, e.g. "null"'
    return f'{key} as {"a number" if isinstance(key, int | float) else f"a {type(key).__name__}"}: quote it, "{key}"'


def _is_false_branch(problem: Any) -> bool:
    return bool(problem["loc"]) and str(problem["loc"][-1]).startswith("literal[")


def _is_union_tag(part: str) -> bool:
    # For `Section | False` pydantic adds the branch that it tried to the path, with the name of its validator.
    return part.endswith(("Section", "Section]")) or part.startswith(("literal[", "constrained-", "dict["))


def _known_keys(whole: type[BaseModel], path: list[str]) -> list[str]:
    section: Any = whole
    for part in path:
        annotation = section.model_fields[part].annotation
        options = getattr(annotation, "__args__", (annotation,))
        section = next(option for option in options if isinstance(option, type) and issubclass(option, BaseModel))
    return list(section.model_fields)


def resolved(recipe: Recipe) -> Recipe:
    """Return the recipe with all local paths absolute, so that it runs from any directory."""
    copy = recipe.model_copy(deep=True)
    copy.model = _absolute_if_there(copy.model)
    if copy.proxy and copy.proxy.model:
        copy.proxy.model = _absolute_if_there(copy.proxy.model)
    if copy.data.chat_template:
        copy.data.chat_template = _absolute_if_there(copy.data.chat_template)
    copy.data.pool = [absolute_pattern(pattern) for pattern in copy.data.pool]
    copy.data.validation = _absolute_tasks(copy.data.validation)
    if copy.finetune:
        copy.finetune.test = _absolute_tasks(copy.finetune.test)
    copy.output = str(absolute(copy.output))
    return copy


def to_yaml(recipe: Recipe) -> str:
    """Return the recipe as YAML."""
    return yaml.safe_dump(recipe.model_dump(mode="json", exclude_none=True), sort_keys=False, allow_unicode=True)


def read_yaml(text: str) -> Any:
    """Return the value of a YAML document.

    Raises:
        ValueError: it is not YAML, repeats a key, has merge keys, or expands beyond the limits (`DEEPEST`, `MOST`); the
            message is one line.
    """
    try:
        _check_depth(text)
        loader = _EachKeyOnce(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            _check_size(node)
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        raise ValueError(cut(" ".join(str(error).split()), 400)) from error
    except (RecursionError, OverflowError, TypeError, KeyError, IndexError) as error:  # e.g. of a base-60 number
        raise ValueError(one_line(error)) from error


class _EachKeyOnce(yaml.SafeLoader):
    """Loader that refuses repeated keys, of which YAML loaders silently keep the last, and merge keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Construct a mapping."""
        seen = set()
        for key_node, _ in node.value:
            if key_node.tag == _MERGE:
                raise self._refusal("merge keys (<<) are not supported; write out the keys", key_node)
            key = self.construct_object(key_node, deep=True)
            try:
                twice = key in seen
                seen.add(key)
            except TypeError:
                raise self._refusal(f"found unhashable key {shown(key)}", key_node) from None
            if twice:
                raise self._refusal(f"the key {shown(key)} is given twice", key_node)
        return super().construct_mapping(node, deep)

    @staticmethod
    def _refusal(words: str, node: yaml.Node) -> yaml.constructor.ConstructorError:
        return yaml.constructor.ConstructorError(None, None, words, node.start_mark)


def _check_depth(text: str) -> None:
    """Refuse a document with more than `DEEPEST` nested levels."""
    depth = 0
    for event in yaml.parse(text, yaml.SafeLoader):
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
            if depth > DEEPEST:
                raise ValueError(f"nested more than {DEEPEST} levels deep (line {event.start_mark.line + 1})")
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1


def _check_size(root: yaml.Node) -> None:
    """Refuse a document whose aliases expand to more than `MOST` values, or that contains itself."""
    sizes: dict[int, int | None] = {}

    def size(node: yaml.Node) -> int:
        if id(node) in sizes:
            known = sizes[id(node)]
            if known is None:
                raise ValueError(f"an alias refers to a value that contains it (line {node.start_mark.line + 1})")
            return known
        sizes[id(node)] = None
        total = 1
        if isinstance(node, yaml.SequenceNode):
            total += sum(map(size, node.value))
        elif isinstance(node, yaml.MappingNode):
            total += sum(size(key) + size(value) for key, value in node.value)
        sizes[id(node)] = total
        if total > MOST:
            raise ValueError(f"its aliases expand to more than {MOST:,} values (line {node.start_mark.line + 1})")
        return total

    size(root)
