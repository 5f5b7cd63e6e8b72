"""Every setting of iprox, written once: name, type, default, rule, and what it means.

The recipe is these sections as YAML; the options of the commands, the arguments of the Python functions and the table
in docs/recipe.md are made from them. Imports nothing heavy, so that a mistake is refused at once.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator


class Section(BaseModel):
    """A section. Unknown keys are refused; values are checked when it is made and whenever one is set."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True, allow_inf_nan=False)


# The share of a ranking that counts as its top where overlaps are named.
NAMED_SHARE = 0.05

# How large a proxy may be, in the order they are documented.
SIZES = ("sparsity", "parameters", "flops", "fidelity")
# The best peak of Adam falls with the width of a model (Yang et al., arXiv:2203.03466): this over the hidden size is
# 2.4e-5 at 4,096 and 1.7e-4 at 576. Adapters start at zero and have few numbers to move: ten times that.
RATE_TIMES_WIDTH, LORA_RATE = 0.1, 10
# A warm-up on 5 % of the pool, but on enough rows to learn the format, and not on more than that takes.
WARMUP_FRACTION, FEWEST_WARMUP, MOST_WARMUP = 0.05, 500, 10_000


class DataSection(Section):
    """The pool, the validation set of each task, and how they are read.

    `columns` says which columns of theirs are read as which that iprox knows: `{output: response}`; one that is null
    (kept as empty text) is left unread.
    `num_proc` processes tokenize ahead of scoring: none on a CPU and up to four on an accelerator, unless said.
    """

    pool: list[str] = Field(min_length=1)
    validation: dict[str, str | list[str]] = Field(min_length=1)
    max_length: int = Field(2048, ge=8)
    chat_template: str | None = None
    on_bad_row: Literal["stop", "skip"] = "stop"
    columns: dict[str, str] = Field(default_factory=dict)
    num_proc: int | None = Field(None, ge=0)

    @field_validator("pool", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @field_validator("columns", mode="before")
    @classmethod
    def _null_is_unread(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {known: "" if own is None else own for known, own in value.items()}


class LoraSection(Section):
    """Low-rank adapters on every linear layer but the head, trained instead of the weights (arXiv:2106.09685).

    They are scaled by alpha/rank; `alpha` left out is twice the rank.
    """

    rank: int = Field(16, ge=1)
    alpha: float | None = Field(None, gt=0)
    dropout: float = Field(0.05, ge=0, lt=1)

    @property
    def scale(self) -> float:
        """`alpha`, or what it is when left out."""
        return 2.0 * self.rank if self.alpha is None else self.alpha


class TrainingSection(Section):
    """SFT, of all weights or of adapters.

    An optimizer step is of `accumulate` batches of `batch_size` examples. `learning_rate` left out is 0.1 over the
    model's hidden size (2.4e-5 at 4,096), with adapters ten times that. `compile` says whether it runs compiled, on a
    CPU; `auto` does that for trainings long enough to repay it.
    """

    epochs: int = Field(4, ge=1)
    learning_rate: float | None = Field(None, gt=0)
    batch_size: int = Field(16, ge=1)
    accumulate: int = Field(1, ge=1)
    lora: LoraSection | Literal[False] = False
    compile: Literal["auto"] | bool = "auto"

    def peak(self, hidden_size: int) -> float:
        """Return `learning_rate`, or what it is for a model of some hidden size when left out."""
        if self.learning_rate is not None:
            return self.learning_rate
        return RATE_TIMES_WIDTH / hidden_size * (LORA_RATE if self.lora else 1)


class WarmupSection(TrainingSection):
    """Brief SFT of the target on a random share of the pool before anything is scored.

    `fraction` left out is 5 % of the pool, but at least 500 and at most 10,000 examples.
    """

    epochs: int = Field(2, ge=1)
    fraction: float | None = Field(None, gt=0, le=1)

    def examples(self, total: int) -> int:
        """Return the number of examples to train on, of a pool of some size."""
        if self.fraction is not None:
            return max(1, round(total * self.fraction))
        return min(total, max(FEWEST_WARMUP, min(MOST_WARMUP, round(total * WARMUP_FRACTION))))


class ProbeSection(Section):
    """What second moments are measured on: a share of the pool, at least 64 examples.

    `labels` are those of the data, or `sampled` from the model (true Fisher); `tokens` all, or only those at which a
    supervised token is predicted.
    """

    fraction: float = Field(0.001, gt=0, le=1)
    labels: Literal["data", "sampled"] = "data"
    tokens: Literal["all", "supervised"] = "all"


class AlignSection(Section):
    """Tuning of the factors until the proxy's gradients match the target's; at least 64 examples.

    Without a `gradient_weight` there are no second derivatives: the logits are matched, by KL, and with a
    `hidden_weight` the hidden states (`iprox.proxy.align_loss.Objective`). The factors kept are those of the best
    fidelity on `held_out` examples of the pool, measured before the first step and four times after it; 0 of them keeps
    the last factors.
    """

    fraction: float = Field(0.01, gt=0, le=1)
    epochs: int = Field(5, ge=1)
    batch_size: int = Field(8, ge=1)
    accumulate: int = Field(1, ge=1)
    learning_rate: float = Field(1e-4, gt=0)
    gradient_weight: float = Field(1.0, ge=0)
    kl_weight: float = Field(0.1, ge=0)
    hidden_weight: float = Field(0.0, ge=0)
    held_out: int = Field(128, ge=0)

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


class ProxySection(Section):
    """How the proxy is made, and how large it may be: `sparsity`, `parameters` or `flops`.

    Or how faithful it has to be: `fidelity` takes the smallest proxy whose Spearman correlation with the target, on
    `held_out` examples of the pool, is at least that with confidence.

    With `influence.checkpoints: all` there is a proxy for each.
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
        if not self.factorized:
            if self.align and "align" in self.model_fields_set:
                raise ValueError(f"align tunes low-rank factors, which the method {self.method} has none of")
            object.__setattr__(self, "align", False)
        if self.method == "off-the-shelf":
            if self.model is None or given:
                raise ValueError("the method off-the-shelf takes `model`, and no size: its size is what it is")
            return self
        if self.model is not None:
            raise ValueError("`model` goes with the method off-the-shelf only")
        if self.fidelity is not None and self.method == "layers":
            raise ValueError("fidelity goes with methods that factorize layers: give the method layers a size")
        if len(given) > 1:
            raise ValueError(f"give exactly one of {', '.join(SIZES)}, not {' and '.join(given)}")
        if not given:
            object.__setattr__(self, "sparsity", 0.7)
        return self

    @property
    def factorized(self) -> bool:
        """Whether the proxy has low-rank factors, which is what alignment tunes."""
        return self.method not in ("layers", "off-the-shelf")


# Numbers per example: the 8,192 that LESS takes. Sixteen kilobytes; a million examples are 16 GB.
DIMENSION = 8192

# Share of the norm of each validation example's gradient that scores by validation example keep unless asked otherwise.
EXAMPLES_NORM = 0.9

EstimatorName = Literal["ekfac", "kfac", "datainf", "tracin", "less", "random", "length", "perplexity", "rds", "bm25"]


@dataclass(frozen=True, slots=True)
class Traits:
    """What an estimator needs and what it gives. `iprox.influence.estimators` has the class of each.

    Attributes:
        gradients: whether it takes gradients; the others are baselines (`iprox.influence.baselines`).
        model: whether it runs the model.
        curvature: whether it measures curvature on a sample of the pool.
        optimizer: whether it reads the state of the warm-up's optimizer.
        corpus: whether it counts the terms of the whole pool.
        by_task: whether it looks at the validation examples; otherwise all tasks have the same scores.
        by_example: whether it can score every validation example by itself.
        seeded: whether its scores depend on the seed.
        query_norm: share of the validation gradients' norm that is kept on a proxy unless asked otherwise
            (`benchmarks/queries.py`): what is lost is small next to what the proxy loses. Gradients divided by a
            curvature are less low-rank.
    """

    gradients: bool = True
    model: bool = True
    curvature: bool = False
    optimizer: bool = False
    corpus: bool = False
    by_task: bool = True
    by_example: bool = True
    seeded: bool = False
    query_norm: float = 0.9

    @property
    def by_token(self) -> bool:
        """Whether a score is a sum over the candidate's tokens."""
        return self.gradients and not self.optimizer


ESTIMATORS: dict[str, Traits] = {
    "ekfac": Traits(curvature=True, seeded=True, query_norm=0.98),
    "kfac": Traits(curvature=True, seeded=True, query_norm=0.98),
    "datainf": Traits(curvature=True, seeded=True, by_example=False, query_norm=0.98),
    "tracin": Traits(),
    "less": Traits(optimizer=True),
    "random": Traits(gradients=False, model=False, by_task=False, by_example=False, seeded=True),
    "length": Traits(gradients=False, model=False, by_task=False, by_example=False),
    "perplexity": Traits(gradients=False, by_task=False, by_example=False),
    "rds": Traits(gradients=False),
    "bm25": Traits(gradients=False, model=False, corpus=True),
}

# Settings of influence that say what a gradient is, and so how faithful a proxy's are.
OF_GRADIENTS = ("estimator", "curvature_examples", "damping", "query", "query_norm", "normalize")


class InfluenceSection(Section):
    """What is scored, and at which of the warm-up's checkpoints.

    The estimators: `ekfac` (default), `kfac` and `datainf` are influence functions, which divide validation gradients
    by the curvature of the loss; they measure it on `curvature_examples` of the pool, and `damping` is a share of its
    mean eigenvalue. `tracin` takes gradients as they are; `less` scores the steps that the warm-up's Adam would take,
    for which the warm-up keeps the optimizer's state. The baselines `random`, `length`, `perplexity`, `rds` (hidden
    states) and `bm25` (words) take no gradients.
    `query` says where validation gradients are taken when candidates are scored on a proxy: on its `target` (a few
    examples, so next to no cost) or on the `proxy` too. `query_norm` is the share of their norm that is kept when they
    are made low-rank; 1 keeps them whole. Left out it is 0.9 by validation example; otherwise 0.9 on a proxy, 0.98 with
    influence functions, and 1 on a model itself. Audits and `refine` score the target with whole ones. `per_example`
    keeps the scores by validation example too, so that examples can take turns to choose; left out, wherever there are
    any. `compile` says whether the model runs compiled; `auto` does that for pools large enough to repay the time it
    takes.
    """

    estimator: EstimatorName = "ekfac"
    curvature_examples: int = Field(256, ge=1)
    damping: float = Field(0.1, gt=0)
    query: Literal["target", "proxy"] = "target"
    query_norm: float | None = Field(None, gt=0, le=1)
    normalize: Literal["none", "cosine"] = "cosine"
    per_example: bool | None = None
    checkpoints: Literal["last", "all"] = "last"
    compile: Literal["auto"] | bool = "auto"

    @field_validator("estimator", mode="before")
    @classmethod
    def _nearest_name(cls, value: Any) -> Any:
        if not isinstance(value, str) or value in ESTIMATORS:
            return value
        near = difflib.get_close_matches(value, ESTIMATORS, n=1, cutoff=0.65)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(ESTIMATORS)}"
        raise ValueError(f"there is no such estimator; {hint}")

    @property
    def traits(self) -> Traits:
        """What the estimator needs and what it gives."""
        return ESTIMATORS[self.estimator]

    @property
    def by_example(self) -> bool:
        """Whether scores by validation example are kept."""
        return self.traits.by_example if self.per_example is None else self.per_example

    @property
    def exact(self) -> InfluenceSection:
        """The same with whole mean validation gradients: how a target is scored when a proxy is compared with it."""
        return self.of_tasks.model_copy(update={"query_norm": 1.0})

    @property
    def of_tasks(self) -> InfluenceSection:
        """The same without scores by validation example, which cost a little more."""
        return self.model_copy(update={"per_example": False})

    def kept_norm(self, *, on_proxy: bool) -> float:
        """Return the share of the validation gradients' norm to keep when candidates are scored on a proxy or not."""
        if self.query_norm is not None:
            return self.query_norm
        if self.by_example and not self.traits.optimizer:
            return EXAMPLES_NORM
        return self.traits.query_norm if on_proxy else 1.0

    @model_validator(mode="after")
    def _without_gradients(self) -> InfluenceSection:
        if self.traits.gradients:
            return self
        if self.normalize != "none":
            if "normalize" in self.model_fields_set:
                raise ValueError(f"normalize applies to gradients, and {self.estimator} takes none; leave it out")
            object.__setattr__(self, "normalize", "none")
        if self.checkpoints == "all":
            raise ValueError(f"checkpoints: all sums gradients, and {self.estimator} takes none; leave it at last")
        return self

    @model_validator(mode="after")
    def _by_example(self) -> InfluenceSection:
        if self.per_example and not self.traits.by_example:
            raise ValueError(f"per_example: {self.estimator} has no scores by validation example")
        if self.traits.optimizer and (self.query_norm or 1) < 1 and not self.by_example:
            raise ValueError(f"{self.estimator} forms whole gradients, so a query_norm saves nothing: leave it out")
        return self


# Of a whole, from nothing to all.
Share = Annotated[float, Field(ge=0, le=1)]


class SelectSection(Section):
    """What is chosen, by which strategy, and what it must keep to (`iprox.selection.SelectionSettings`).

    `task` is one of `data.validation`, whose scores alone count; `weights` say how much each counts, 1 where it is not
    named.
    """

    fraction: float | None = Field(None, gt=0, le=1)
    count: int | None = Field(None, ge=1)
    tokens: int | None = Field(None, ge=1)
    strategy: Literal["top", "round-robin"] = "round-robin"
    task: str | None = None
    weights: dict[str, Annotated[float, Field(ge=0, allow_inf_nan=False)]] = Field(default_factory=dict)
    threshold: float | None = None
    source_floor: dict[str, Share] = Field(default_factory=dict)
    source_cap: Share | dict[str, Share] | None = None
    deduplicate: float | None = Field(None, gt=0, le=1)

    @model_validator(mode="after")
    def _one_size(self) -> SelectSection:
        given = [name for name in ("fraction", "count", "tokens") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"give exactly one of fraction, count and tokens, not {' and '.join(given)}")
        if self.weights and self.task is not None:
            raise ValueError(f"weights are of several tasks, and task says to choose by {self.task}: leave one out")
        if not given and self.threshold is None:
            # Past the validate_assignment machinery, which would run this validator again.
            object.__setattr__(self, "fraction", 0.05)
        return self


class RetrainingSection(Section):
    """How the target is trained on parts of the audited rows, from where the scores were taken."""

    epochs: int = Field(1, ge=1)
    learning_rate: float | None = Field(None, gt=0)
    batch_size: int = Field(16, ge=1)

    def peak(self, hidden_size: int) -> float:
        """Return `learning_rate`, or what it is for a model of some hidden size when left out."""
        return RATE_TIMES_WIDTH / hidden_size if self.learning_rate is None else self.learning_rate


class LdsSection(RetrainingSection):
    """Retraining on random subsets of the audited rows, to see whether the scores foretell what comes of it.

    As many trainings as `subsets`, each on a `fraction` of the rows.
    """

    subsets: int = Field(50, ge=10)
    fraction: float = Field(0.5, gt=0, lt=1)


class RemovalSection(RetrainingSection):
    """Retraining without the top rows of each ranking and without random ones, to see what the rankings are worth.

    Each of the `repeats` has an order of training and random rows of its own; a `fraction` of the rows is left out.
    """

    fraction: float = Field(0.05, gt=0, le=0.5)
    repeats: int = Field(3, ge=2)


class AuditSection(Section):
    """Scores of a random sample on the target itself, to compare the proxy's with."""

    sample: int = Field(500, ge=10)
    lds: LdsSection | Literal[False] = False
    removal: RemovalSection | Literal[False] = False


class RefineSection(Section):
    """The proxy's best rows, scored again on the target; the selection is made among these, by the target's scores.

    `candidates` is their share of the pool: the best by the scores that `select` goes by, of every task where tasks
    take turns.
    """

    candidates: float = Field(0.2, gt=0, lt=1)


class FinetuneSection(TrainingSection):
    """SFT of the original target on the selection, evaluated on `test` before and after."""

    test: dict[str, str | list[str]] = Field(default_factory=dict)


class ReportSection(Section):
    """The page. `attributed` rows of those it shows are scored again, token by token, to be shaded; 0 shades none."""

    attributed: int = Field(120, ge=0)


class RaySection(Section):
    """How many Ray actors score, each with a copy of the model."""

    workers: int = Field(ge=1)


class EngineSection(Section):
    """Where scoring runs, if not in this process."""

    ray: RaySection


# In the order they are done.
STAGES = ("data", "warmup", "compress", "align", "audit", "score", "refine", "select", "finetune", "report")


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
        if self.proxy and not self.influence.traits.model:
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
    def _optimizer_of_a_warm_up(self) -> Recipe:
        if not self.influence.traits.optimizer:
            return self
        name = f"influence.estimator {self.influence.estimator}"
        if not self.warmup:
            raise ValueError(f"{name} reads the optimizer's state of the warm-up, which is off")
        if self.warmup.lora:
            raise ValueError(f"{name} reads Adam's moments of the weights, and warmup.lora trains none")
        if self.proxy and not self.proxy.factorized:
            raise ValueError(f"{name} needs a proxy whose layers are the target's; use another method")
        return self

    @property
    def trains_adapters(self) -> bool:
        """Whether some training is of adapters."""
        return any(training and training.lora is not False for training in (self.warmup, self.finetune))
