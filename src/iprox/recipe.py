"""The recipe: everything a run depends on, validated whole before any work starts (design 5)."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from iprox.errors import InputError

# In the order they are done.
STAGES = ("data", "warmup", "compress", "align", "audit", "score", "refine", "select", "finetune", "report")


# How large a proxy may be, in the order they are documented.
SIZES = ("sparsity", "parameters", "flops", "fidelity")

# Examples of the pool that an influence function measures curvature on, unless told.
CURVATURE_EXAMPLES = 512


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_assignment=True)


class DataSection(_Section):
    """The pool, the validation set of each task, and how they are read.

    `num_proc` processes tokenise ahead of scoring: none on a CPU and up to four on an accelerator, unless said.
    """

    pool: list[str] = Field(min_length=1)
    validation: dict[str, str | list[str]] = Field(min_length=1)
    max_length: int = Field(2048, ge=8)
    chat_template: str | None = None
    on_bad_row: Literal["stop", "skip"] = "stop"
    num_proc: int | None = Field(None, ge=0)

    @field_validator("pool", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value


class WarmupSection(_Section):
    """Brief SFT of the target on a random share of the pool before anything is scored."""

    fraction: float = Field(0.05, gt=0, le=1)
    epochs: int = Field(4, ge=1)
    learning_rate: float = Field(2e-5, gt=0)
    batch_size: int = Field(16, ge=1)


class ProbeSection(_Section):
    """What second moments are measured on: a share of the pool, at least 64 examples.

    `labels` are those of the data, or `sampled` from the model (true Fisher); `tokens` all, or only those at which a
    supervised token is predicted.
    """

    fraction: float = Field(0.001, gt=0, le=1)
    labels: Literal["data", "sampled"] = "data"
    tokens: Literal["all", "supervised"] = "all"


class AlignSection(_Section):
    """Tuning of the factors until the proxy's gradients match the target's; at least 64 examples.

    Without a `gradient_weight` there are no second derivatives: the logits are matched, by KL, and with a
    `hidden_weight` the hidden states. `distance` and `layer_weights` are of the gradients
    (`iprox.proxy.align_loss.Objective`). The factors kept are those of the best fidelity on `held_out` examples of the
    pool, measured before the first step and `evaluations` times after it; 0 of them keeps the last factors.
    """

    fraction: float = Field(0.01, gt=0, le=1)
    epochs: int = Field(5, ge=1)
    batch_size: int = Field(8, ge=1)
    accumulate: int = Field(1, ge=1)
    learning_rate: float = Field(1e-4, gt=0)
    gradient_weight: float = Field(1.0, ge=0)
    kl_weight: float = Field(0.1, ge=0)
    hidden_weight: float = Field(0.0, ge=0)
    temperature: float = Field(2.0, gt=0)
    distance: Literal["cosine", "frobenius"] = "cosine"
    layer_weights: dict[str, Annotated[float, Field(ge=0)]] = {}
    held_out: int = Field(128, ge=0)
    evaluations: int = Field(4, ge=1)
    patience: int = Field(2, ge=1)

    @model_validator(mode="after")
    def _something_to_match(self) -> AlignSection:
        if not (self.gradient_weight or self.kl_weight or self.hidden_weight):
            raise ValueError(
                "gradient_weight, kl_weight and hidden_weight are all 0, so there is nothing to align by; "
                "or align: false"
            )
        if 0 < self.held_out < 16:
            raise ValueError("held_out: fewer than 16 examples say too little; give 0 to keep the last factors")
        return self


class ProxySection(_Section):
    """How the proxy is made, and how large it may be: `sparsity`, `parameters` or `flops`.

    Or how faithful it has to be: `fidelity` takes the smallest proxy whose Spearman correlation with the target, on
    `held_out` examples of the pool, is at least that with confidence.
    """

    method: Literal["ipsvd", "svd", "svd-llm", "asvd", "fwsvd", "random", "layers", "off-the-shelf"] = "ipsvd"
    sparsity: float | None = Field(None, gt=0, lt=1)
    parameters: int | None = Field(None, ge=1)
    flops: float | None = Field(None, gt=0, lt=1)
    fidelity: float | None = Field(None, gt=0, lt=1)
    held_out: int = Field(256, ge=16)
    model: str | None = None
    ranks: Literal["global", "uniform"] = "global"
    ridge: Literal["auto"] | Annotated[float, Field(gt=0)] = "auto"
    probe: ProbeSection = ProbeSection()  # pyright: ignore[reportCallIssue]
    align: AlignSection | Literal[False] = AlignSection()  # pyright: ignore[reportCallIssue]

    @model_validator(mode="after")
    def _one_size(self) -> ProxySection:
        given = [name for name in SIZES if getattr(self, name) is not None]
        if self.method == "off-the-shelf":
            if self.model is None or given:
                raise ValueError("the method off-the-shelf takes `model`, and no size: its size is what it is")
            return self
        if self.model is not None:
            raise ValueError("`model` goes with the method off-the-shelf only")
        if self.fidelity is not None and self.method == "layers":
            raise ValueError("fidelity goes with methods that factorise layers: give the method layers a size")
        if len(given) > 1:
            raise ValueError(f"give exactly one of {', '.join(SIZES)}, not {' and '.join(given)}")
        if not given:
            object.__setattr__(self, "sparsity", 0.7)
        return self

    @property
    def factorised(self) -> bool:
        """Whether the proxy has low-rank factors, which is what alignment tunes."""
        return self.method not in ("layers", "off-the-shelf")


# Estimators that divide by curvature, which they measure on a sample of the pool.
CURVED = ("influence-function", "datainf")

# Settings of influence that say what a gradient is, and so how faithful a proxy's are.
OF_GRADIENTS = (
    *("estimator", "curvature", "curvature_examples", "damping"),
    *("gradient", "query", "query_norm", "normalise"),
)

# Scorers without gradients, and those among them that need tokens only.
GradientFree = Literal["random", "length", "perplexity", "rds", "bm25"]
GRADIENT_FREE = get_args(GradientFree)
MODEL_FREE = ("random", "length", "bm25")
# Those that look at a candidate alone, so that all tasks and validation examples have the same score.
ALIKE = ("random", "length", "perplexity")


class InfluenceSection(_Section):
    """What is scored, and at which of the warm-up's checkpoints.

    `query` says where validation gradients are taken when candidates are scored on a proxy: on its `target` (a few
    examples, so next to no cost) or on the `proxy` too. `query_norm` is the share of their norm that is kept when they
    are made low-rank; 1 keeps them whole. Left out it is 0.95 on a proxy and 1 on a model itself. `compile` says
    whether the model runs compiled; `auto` does that for pools large enough to repay the time it takes. An influence
    function measures curvature on `curvature_examples` of the pool; `damping` is a share of its mean eigenvalue.
    A task's score is the `mean` over its validation examples or the `max` (`over_examples`); `per_example` keeps the
    scores by example too. `aggregate` says how `influence` is made of several tasks.
    `adam` is TracIn of the steps that the warm-up's Adam would take; the warm-up then keeps the optimizer's state.
    The estimators `random`, `length`, `perplexity`, `rds` and `bm25` take no gradients, and so
    none of these settings.
    """

    estimator: Literal["tracin", "adam", "influence-function", "datainf", GradientFree] = "tracin"
    curvature: Literal["ek-fac", "k-fac"] = "ek-fac"
    curvature_examples: int = Field(CURVATURE_EXAMPLES, ge=1)
    damping: float = Field(0.1, gt=0)
    gradient: Literal["factors", "weight"] = "weight"
    query: Literal["target", "proxy"] = "target"
    query_norm: float | None = Field(None, gt=0, le=1)
    normalise: Literal["none", "cosine"] = "none"
    aggregate: Literal["standardised", "mean", "max"] = "standardised"
    over_examples: Literal["mean", "max"] = "mean"
    per_example: bool = False
    checkpoints: Literal["last", "all"] = "last"
    compile: Literal["auto"] | bool = "auto"

    @property
    def gradient_free(self) -> bool:
        """Whether the estimator takes no gradients."""
        return self.estimator in GRADIENT_FREE

    @property
    def runs_model(self) -> bool:
        """Whether the estimator needs more of a model than its tokenizer."""
        return self.estimator not in MODEL_FREE

    @model_validator(mode="after")
    def _without_gradients(self) -> InfluenceSection:
        if self.gradient_free and self.normalise != "none":
            raise ValueError(f"normalise is of gradients, which {self.estimator} has none of; leave it at none")
        if self.gradient_free and self.checkpoints == "all":
            raise ValueError(f"checkpoints: all sums gradients, which {self.estimator} has none of; leave it at last")
        return self

    @model_validator(mode="after")
    def _by_example(self) -> InfluenceSection:
        if (self.over_examples == "max" or self.per_example) and self.estimator in (*CURVED, *ALIKE):
            raise ValueError(
                f"over_examples: max and per_example go with tracin, adam, rds and bm25; {self.estimator} has no "
                "scores by validation example"
            )
        return self

    @model_validator(mode="after")
    def _inverse_of_weights(self) -> InfluenceSection:
        if self.estimator == "adam" and self.gradient == "factors":
            raise ValueError("adam takes the optimizer's moments of the target's weights: leave gradient at weight")
        if self.estimator in CURVED and self.gradient == "factors" and self.query == "target":
            raise ValueError(
                f"{self.estimator} with `gradient: factors` needs `query: proxy`; or leave gradient at weight"
            )
        return self


def curvature_passes(settings: InfluenceSection) -> int:
    """How often the curvature sample is read: EK-FAC and DataInf take a second reading."""
    return 1 if (settings.estimator, settings.curvature) == ("influence-function", "k-fac") else 2


# Of a whole, from nothing to all.
Share = Annotated[float, Field(ge=0, le=1)]


class SelectSection(_Section):
    """What is chosen, by which strategy, and what it must keep to (`iprox.selection.SelectionSettings`).

    `features` is an index of the pool's gradients (`iprox index`), which the strategy `diverse` compares.
    """

    fraction: float | None = Field(None, gt=0, le=1)
    count: int | None = Field(None, ge=1)
    tokens: int | None = Field(None, ge=1)
    strategy: Literal["top", "round-robin", "balanced", "diverse", "sample"] = "top"
    threshold: float | None = None
    temperature: float = Field(1.0, gt=0)
    source_floor: dict[str, Share] = {}
    source_cap: Share | dict[str, Share] | None = None
    deduplicate: float | None = Field(None, gt=0, le=1)
    control_length: bool = False
    features: str | None = None

    @model_validator(mode="after")
    def _one_size(self) -> SelectSection:
        given = [name for name in ("fraction", "count", "tokens") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"give exactly one of fraction, count and tokens, not {' and '.join(given)}")
        if (self.strategy == "diverse") != (self.features is not None):
            raise ValueError("the strategy diverse takes `features`, an index of the pool; no other strategy does")
        if not given and self.threshold is None:
            # Past the validate_assignment machinery, which would run this validator again.
            object.__setattr__(self, "fraction", 0.05)
        return self


class AuditSection(_Section):
    """Scores of a random sample on the target itself, to compare the proxy's with."""

    sample: int = Field(500, ge=10)


class RefineSection(_Section):
    """What is made of the proxy's scores with the target's of some rows; both rest on the audit.

    `correct` takes out what the proxy gets wrong by source and by length, for tasks where that raises the held-out
    fidelity. With a `recall` the target scores as many of the proxy's best rows again as it takes to find that part
    of its own best ones, and the selection is among these.
    """

    correct: bool = True
    recall: float | None = Field(None, gt=0, lt=1)


class FinetuneSection(_Section):
    """SFT of the original target on the selection, evaluated on `test` before and after."""

    epochs: int = Field(4, ge=1)
    learning_rate: float = Field(2e-5, gt=0)
    batch_size: int = Field(16, ge=1)
    test: dict[str, str | list[str]] = {}


class RaySection(_Section):
    """How many Ray actors score, each with a copy of the model."""

    workers: int = Field(ge=1)


class EngineSection(_Section):
    """Where scoring runs, if not in this process."""

    ray: RaySection


class Recipe(_Section):
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
    engine: Literal["local"] | EngineSection = "local"
    tracking: Literal["none", "tensorboard", "wandb", "mlflow"] = "none"
    output: str
    seed: int = 0
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
    def _refined_by_an_audit(self) -> Recipe:
        if self.refine and not (self.proxy and self.audit):
            raise ValueError("refine compares a proxy with its target on the audit's sample: it needs proxy and audit")
        if self.refine and self.refine.recall and self.select.strategy == "diverse":
            raise ValueError("refine.recall goes with strategies that choose by scores, not with diverse")
        return self

    @model_validator(mode="after")
    def _adam_of_a_warm_up(self) -> Recipe:
        if self.influence.estimator == "adam" and not self.warmup:
            raise ValueError("influence.estimator adam takes the optimizer's state of the warm-up, which is off")
        if self.influence.estimator == "adam" and self.proxy and not self.proxy.factorised:
            raise ValueError("influence.estimator adam needs a proxy whose layers are the target's; use another method")
        return self

    def resolved(self) -> Recipe:
        """The same recipe with every local path absolute, so that it runs from anywhere."""
        copy = self.model_copy(deep=True)
        if Path(copy.model).exists():
            copy.model = str(Path(copy.model).resolve())
        if copy.proxy and copy.proxy.model and Path(copy.proxy.model).exists():
            copy.proxy.model = str(Path(copy.proxy.model).resolve())
        template = copy.data.chat_template
        if template and len(template) < 4096 and Path(template).is_file():
            copy.data.chat_template = str(Path(template).resolve())
        if copy.select.features:
            copy.select.features = str(Path(copy.select.features).resolve())
        copy.data.pool = [absolute_pattern(pattern) for pattern in copy.data.pool]
        copy.data.validation = _absolute_tasks(copy.data.validation)
        if copy.finetune:
            copy.finetune.test = _absolute_tasks(copy.finetune.test)
        copy.output = str(Path(copy.output).resolve())
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
    if not file.is_file():
        raise InputError(f"{file}: no such recipe file")
    try:
        raw = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: not valid YAML: {' '.join(str(error).split())}") from error
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
        raise InputError(f"{name}: " + "; ".join(_explain(problem) for problem in problems)) from error


Section = TypeVar("Section", bound=BaseModel)


def validate_section(section: type[Section], **values: Any) -> Section:
    """One section of a recipe from the options of a command.

    Raises:
        InputError: a bad value; the option is named.
    """
    try:
        return section(**values)
    except ValidationError as error:
        clauses = []
        for problem in error.errors():
            option = "--" + ".".join(str(part) for part in problem["loc"]).replace("_", "-") if problem["loc"] else ""
            clauses.append(
                f"{option} {problem['input']!r}: {problem['msg'].removeprefix('Value error, ').lower()}".strip()
            )
        raise InputError("; ".join(clauses)) from error


def absolute_pattern(pattern: str) -> str:
    """A local path or glob made absolute; hub addresses stay."""
    return pattern if "://" in pattern else str(Path.cwd() / Path(pattern).expanduser())


def _absolute_tasks(tasks: dict[str, str | list[str]]) -> dict[str, str | list[str]]:
    return {
        task: absolute_pattern(files) if isinstance(files, str) else [absolute_pattern(file) for file in files]
        for task, files in tasks.items()
    }


def _override(raw: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise InputError(f"--set {override}: write it as section.key=value, e.g. --set proxy.sparsity=0.5")
    *parents, last = key.split(".")
    section = raw
    for parent in parents:
        if not isinstance(section.get(parent), dict):
            section[parent] = {}
        section = section[parent]
    try:
        section[last] = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise InputError(f"--set {override}: the value is not valid YAML") from error


def _explain(problem: Any) -> str:
    """One clause for one of pydantic's problems."""
    path = [str(part) for part in problem["loc"] if not _is_union_tag(str(part))]
    where = ".".join(path)
    if problem["type"] == "extra_forbidden":
        known = _known_keys(path[:-1])
        near = difflib.get_close_matches(path[-1], known, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]!r}?" if near else f"; known here: {', '.join(known)}"
        return f"unknown key {where!r}{hint}"
    if problem["type"] == "missing":
        return f"the key {where!r} is missing"
    if problem["type"] == "model_type":
        return f"{where}: give a section of keys (or false where the recipe allows it), not {problem['input']!r}"
    message = problem["msg"].removeprefix("Value error, ")
    if not path:
        return message  # of the recipe as a whole: it names the keys itself
    return f"{where}: {message[0].lower()}{message[1:]} (given: {problem['input']!r})"


def _is_false_branch(problem: Any) -> bool:
    return bool(problem["loc"]) and str(problem["loc"][-1]).startswith("literal[")


def _is_union_tag(part: str) -> bool:
    # For `Section | False` pydantic puts the branch it tried into the path, with its validator's name if it has one.
    return part.endswith(("Section", "Section]")) or part.startswith("literal[")


def _known_keys(path: list[str]) -> list[str]:
    section: Any = Recipe
    for part in path:
        annotation = section.model_fields[part].annotation
        options = getattr(annotation, "__args__", (annotation,))
        section = next(option for option in options if isinstance(option, type) and issubclass(option, BaseModel))
    return list(section.model_fields)
