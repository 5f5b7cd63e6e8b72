"""The recipe: everything a run depends on, validated whole before any work starts."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator

from iprox.errors import InputError, cut, shown
from iprox.files import absolute, check_path, expanded
from iprox.recipe.influence import InfluenceSection
from iprox.recipe.reading import read_yaml
from iprox.recipe.section import Section
from iprox.recipe.sections import (
    AuditSection,
    DataSection,
    EngineSection,
    FinetuneSection,
    ProxySection,
    RefineSection,
    ReportSection,
    SelectSection,
    WarmupSection,
)

# In the order they are done.
STAGES = ("data", "warmup", "compress", "align", "audit", "score", "refine", "select", "finetune", "report")


# Faults of a recipe that one message tells of.
MOST_TOLD = 20


class Recipe(Section):
    """A whole run. Paths are relative to the working directory, as on the command line."""

    model: str
    data: DataSection
    warmup: WarmupSection | Literal[False] = WarmupSection()  # pyright: ignore[reportCallIssue]
    proxy: ProxySection | Literal[False] = ProxySection()  # pyright: ignore[reportCallIssue]
    influence: InfluenceSection = InfluenceSection()  # pyright: ignore[reportCallIssue]
    select: SelectSection = SelectSection()  # pyright: ignore[reportCallIssue]
    audit: AuditSection | Literal[False] = AuditSection()  # pyright: ignore[reportCallIssue]
    refine: RefineSection | Literal[False] = False
    finetune: FinetuneSection | Literal[False] = False
    report: ReportSection = ReportSection()  # pyright: ignore[reportCallIssue]
    engine: Literal["local"] | EngineSection = "local"
    tracking: Literal["none", "tensorboard", "wandb", "mlflow"] = "none"
    output: str
    seed: int = Field(0, ge=0, lt=2**32)
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    device: str = "auto"
    batch_tokens: int = Field(4096, ge=1)
    trust_remote_code: bool = False

    @model_validator(mode="after")
    def _no_idle_proxy(self) -> Recipe:
        if self.proxy and not self.influence.runs_model:
            raise ValueError(f"influence.estimator {self.influence.estimator} runs no model; set proxy: false")
        return self

    @model_validator(mode="after")
    def _refined_from_a_proxy(self) -> Recipe:
        if self.refine and not self.proxy:
            raise ValueError("refine has the target score a proxy's best rows again, and proxy is off: leave it out")
        return self

    @model_validator(mode="after")
    def _selected_by_a_task(self) -> Recipe:
        tasks, named = self.data.validation, {"task": [self.select.task], "weights": self.select.weights}
        for key, names in named.items():
            unknown = next((name for name in names if name is not None and name not in tasks), None)
            if unknown is not None:
                raise ValueError(f"select.{key} {unknown!r} is none of data.validation: {', '.join(tasks)}")
        if self.select.weights and not any(self.select.weights.get(task, 1) for task in tasks):
            raise ValueError("select.weights are all 0, so there is nothing to choose by")
        return self

    @model_validator(mode="after")
    def _workers_of_their_own(self) -> Recipe:
        if self.engine != "local" and ":" in self.device:
            raise ValueError(
                f"engine ray gives each worker a GPU of its own: set device to cuda, not {self.device}, and choose "
                "GPUs with CUDA_VISIBLE_DEVICES"
            )
        if self.engine != "local" and self.data.num_proc:
            raise ValueError("data.num_proc tokenizes ahead in this process, and engine ray's workers for themselves")
        return self

    @model_validator(mode="after")
    def _sketch_of_a_proxy(self) -> Recipe:
        if self.influence.norm_sketch and not self.proxy:
            raise ValueError("influence.norm_sketch is for a proxy, and proxy is off: a model's own norms are exact")
        return self

    @model_validator(mode="after")
    def _adam_of_a_warm_up(self) -> Recipe:
        if self.influence.estimator == "adam" and not self.warmup:
            raise ValueError("influence.estimator adam takes the optimizer's state of the warm-up, which is off")
        if self.influence.estimator == "adam" and self.warmup and self.warmup.lora:
            raise ValueError(
                "influence.estimator adam takes Adam's moments of the weights, and warmup.lora trains none"
            )
        if self.influence.estimator == "adam" and self.proxy and not self.proxy.factorized:
            raise ValueError("influence.estimator adam needs a proxy whose layers are the target's; use another method")
        return self

    @property
    def trains_adapters(self) -> bool:
        """Whether some training is of adapters."""
        return any(training and training.lora is not False for training in (self.warmup, self.finetune))

    def resolved(self) -> Recipe:
        """The same recipe with every local path absolute, so that it runs from anywhere."""
        copy = self.model_copy(deep=True)
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

    def to_yaml(self) -> str:
        """The recipe as a file that gives the same run again."""
        return yaml.safe_dump(self.model_dump(mode="json", exclude_none=True), sort_keys=False, allow_unicode=True)


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read and validate a recipe file.

    Args:
        path: a YAML file.
        overrides: `section.key=value` strings, values in YAML.

    Raises:
        InputError: no such file, not YAML, an unknown key (the nearest known one is named), or a bad value.
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
    for override in overrides:
        _override(raw, override)
    return parse_recipe(raw, str(file))


def parse_recipe(raw: dict[str, Any], name: str = "recipe") -> Recipe:
    """Validate a recipe given as plain data.

    Raises:
        InputError: an unknown key or a bad value; one line that names them all.
    """
    try:
        return Recipe.model_validate(raw)
    except ValidationError as error:
        # For `Section | False` pydantic reports both branches; that the value is not False says nothing.
        problems = [problem for problem in error.errors() if not _is_false_branch(problem)]
        told = [_explain(problem) for problem in problems[:MOST_TOLD]]
        left = len(problems) - len(told)
        raise InputError(f"{name}: " + "; ".join(told) + (f"; and {left:,} more" if left else "")) from error


AnySection = TypeVar("AnySection", bound=BaseModel)


def validate_section(
    section: type[AnySection], options: Mapping[str, str] = MappingProxyType({}), /, **values: Any
) -> AnySection:
    """One section of a recipe from the options of a command.

    Args:
        section: its type.
        options: by key, the options that are not named after their key.
        values: by key.

    Raises:
        InputError: a bad value; the option is named.
    """
    try:
        return section(**values)
    except ValidationError as error:
        clauses = []
        for problem in error.errors():
            said = problem["msg"].removeprefix("Value error, ")
            if problem["loc"]:
                key = ".".join(str(part) for part in problem["loc"])
                option = options.get(key, "--" + key.replace("_", "-"))
                said = f"{option} {shown(problem['input'])}: {said.lower()}"
            clauses.append(said)  # of the section as a whole: it names the keys itself
        raise InputError("; ".join(clauses)) from error


def absolute_pattern(pattern: str) -> str:
    """A local path or glob made absolute; hub addresses stay."""
    return pattern if "://" in pattern else str(Path.cwd() / expanded(pattern))


def _absolute_if_there(text: str) -> str:
    """A path made absolute; what names no file or folder (a hub id, a template's source) stays."""
    path = expanded(text) if text.startswith("~") else Path(text)
    # Unlike Path.exists, false for text that is too long to be a path.
    return str(path.resolve()) if os.path.exists(path) else text


def _absolute_tasks(tasks: dict[str, str | list[str]]) -> dict[str, str | list[str]]:
    return {
        task: absolute_pattern(files) if isinstance(files, str) else [absolute_pattern(file) for file in files]
        for task, files in tasks.items()
    }


def _override(raw: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise InputError(f"--set {cut(override)}: write it as section.key=value, e.g. --set proxy.sparsity=0.5")
    *parents, last = key.split(".")
    section = raw
    for parent in parents:
        if not isinstance(section.get(parent), dict):
            section[parent] = {}
        section = section[parent]
    try:
        section[last] = read_yaml(value)
    except ValueError as error:
        raise InputError(f"--set {cut(override)}: the value is not valid YAML ({error})") from error


def _explain(problem: Any) -> str:
    """One clause for one of pydantic's problems."""
    path = [str(part) for part in problem["loc"] if not _is_union_tag(str(part))]
    if path and (path[-1] == "[key]" or problem["type"] == "invalid_key"):
        section = ".".join(path[:-2] if path[-1] == "[key]" else path[:-1])
        place = f"{section}: " if section else ""
        return f"{place}a key must be text, and YAML reads {_as_yaml_reads(problem['input'], problem['loc'])}"
    where = cut(".".join(path))
    if problem["type"] == "extra_forbidden":
        known = _known_keys(path[:-1])
        near = difflib.get_close_matches(path[-1], known, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]!r}?" if near else f"; known here: {', '.join(known)}"
        return f"unknown key {where!r}{hint}"
    if problem["type"] == "missing":
        return f"the key {where!r} is missing"
    if problem["type"] == "model_type":
        return f"{where}: give a section of keys (or false where the recipe allows it), not {shown(problem['input'])}"
    message = problem["msg"].removeprefix("Value error, ")
    if not path:
        return message  # of the recipe as a whole: it names the keys itself
    if isinstance(problem["input"], dict | BaseModel):
        return f"{where}: {message}"  # of a section as a whole
    said = f"{where}: {message[0].lower()}{message[1:]} (given: {shown(problem['input'])})"
    if problem["type"] == "string_type" and isinstance(problem["input"], bool):
        return f'{said}; text that YAML reads so (yes, no, on, off) is quoted: "no"'
    return said


def _as_yaml_reads(key: Any, loc: tuple[Any, ...]) -> str:
    """What a key was read as that was to be text, and how it is written."""
    if loc[-1] != "[key]":  # pydantic gives the value of such a key, not the key
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
    # For `Section | False` pydantic puts the branch it tried into the path, with its validator's name if it has one.
    return part.endswith(("Section", "Section]")) or part.startswith(("literal[", "constrained-", "dict["))


def _known_keys(path: list[str]) -> list[str]:
    section: Any = Recipe
    for part in path:
        annotation = section.model_fields[part].annotation
        options = getattr(annotation, "__args__", (annotation,))
        section = next(option for option in options if isinstance(option, type) and issubclass(option, BaseModel))
    return list(section.model_fields)
