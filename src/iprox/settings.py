"""Every setting of iprox, written once: name, type, default, rule, and meaning.

A recipe is these sections as YAML. The options of the commands, the checks of the Python functions and the table in
docs/recipe.md are generated from them. Imports nothing heavy, so that mistakes are refused at once.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from pydantic.fields import FieldInfo

# In order.
STAGES = (
    "data",
    "warmup",
    "curvature",
    "compress",
    "align",
    "audit",
    "score",
    "refine",
    "select",
    "finetune",
    "report",
)

# Default fraction of a ranking that counts as its top.
NAMED_SHARE = 0.05

# Adam's best learning rate falls with the width of the model (Yang et al., arXiv:2203.03466): 0.1 / hidden size is
# 2.4e-5 at 4,096 and 1.7e-4 at 576. Adapters start at zero and have few parameters, so they take ten times that.
RATE_TIMES_WIDTH, LORA_RATE = 0.1, 10
# The warm-up takes 5 % of the pool, but enough rows to learn the format, and not more than needed.
WARMUP_FRACTION, FEWEST_WARMUP, MOST_WARMUP = 0.05, 500, 10_000


class Section(BaseModel):
    """A section of settings. Unknown keys are refused; values are checked on creation and on assignment."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True, allow_inf_nan=False)


def setting(default: Any, meaning: str, left_out: str | None = None, **rules: Any) -> Any:
    """Return a field of a section.

    Args:
        default: default value; `...` if the key is required.
        meaning: one line for the help of commands and for the documentation.
        left_out: description of the default, if its value does not say it.
        **rules: bounds, as for `pydantic.Field`.
    """
    return Field(default, description=meaning, json_schema_extra={"left_out": left_out} if left_out else None, **rules)


Share = Annotated[float, Field(ge=0, le=1)]
Files = str | list[str]


class ReadingSection(Section):
    """Which examples are read, and how."""

    pool: list[str] = setting([], "candidates: files, globs, folders, hf://datasets/... or s3://...")
    validation: dict[str, Files] = setting({}, "file or files per task: TASK=FILE ...")
    max_length: int = setting(
        2048,
        "most tokens per example, up to the model's own limit; a longer example keeps its answer, and its prompt is "
        "cut from the left",
        ge=8,
    )
    chat_template: str | None = setting(None, "chatml, or a Jinja file", "the tokenizer's own")
    on_bad_row: Literal["stop", "skip"] = setting(
        "stop",
        "skip leaves bad rows out, and reports them; rows that the chat template refuses then have no score",
    )
    columns: dict[str, str] = setting(
        {},
        "your column names by iprox's names: {output: response, source: category}; {source: null} ignores a column",
    )
    num_proc: int | None = setting(
        None, "processes that tokenize ahead of scoring", "0 on a CPU, up to 4 on an accelerator", ge=0
    )

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


class DataSection(ReadingSection):
    """What a whole run reads; the pool and the validation sets are required."""

    pool: list[str] = setting(..., "candidates: files, globs, folders, hf://datasets/... or s3://...", min_length=1)
    validation: dict[str, Files] = setting(..., "file or files per task", min_length=1)


_RATE = "0.1 / hidden size (2.4e-5 for a model 4,096 wide); with lora ten times that"


# Default batch size of trainings, and that of retraining in an audit.
BATCH_SIZE = 16


class TrainingSection(Section):
    """Supervised fine-tuning of all weights or of adapters."""

    epochs: int = setting(4, "passes over the examples", ge=1)
    learning_rate: float | None = setting(None, "peak learning rate, with cosine decay", _RATE, gt=0)
    batch_size: int = setting(BATCH_SIZE, "examples per batch", ge=1)
    accumulate: int = setting(
        1, "batches per optimizer step: 4 batches of 4 train like one of 16, with less memory", ge=1
    )
    lora: Annotated[int, Field(ge=1, strict=True)] | Literal[False] = setting(
        False,
        "rank of LoRA adapters (arXiv:2106.09685) to train instead of all weights, e.g. 16, or false; needs "
        "pip install 'iprox[lora]'",
    )

    @field_validator("lora", mode="before")
    @classmethod
    def _rank(cls, value: Any) -> Any:
        if value is not False and value == 0:  # which would pass for false
            raise ValueError("give a rank of 1 or more, or false")
        return value

    def peak(self, hidden_size: int) -> float:
        """Return `learning_rate`, or its default for a hidden size."""
        if self.learning_rate is not None:
            return self.learning_rate
        return RATE_TIMES_WIDTH / hidden_size * (LORA_RATE if self.lora else 1)


class WarmupSection(TrainingSection):
    """Brief fine-tuning of the target on a random sample of the pool, before anything is scored."""

    fraction: float | None = setting(
        None, "random fraction of the pool to train on", "5 % of the pool, but 500 to 10,000 examples", gt=0, le=1
    )
    epochs: int = setting(2, "passes over the examples; a checkpoint is kept after each", ge=1)

    def examples(self, total: int) -> int:
        """Return the number of examples to train on, for a pool of `total` rows."""
        if self.fraction is not None:
            return max(1, round(total * self.fraction))
        return min(total, max(FEWEST_WARMUP, min(MOST_WARMUP, round(total * WARMUP_FRACTION))))


class AlignSection(Section):
    """Tuning of the proxy's factors until its logits, and gradients if asked, match the target's."""

    fraction: float = setting(0.01, "fraction of the pool to align on, at least 64 examples", gt=0, le=1)
    epochs: int = setting(5, "passes over these examples", ge=1)
    batch_size: int = setting(8, "examples per batch; fewer if together they exceed 1,024 tokens", ge=1)
    learning_rate: float = setting(1e-4, "peak learning rate, for a factor of average scale", gt=0)
    gradient_weight: float = setting(
        0.0, "weight of the gradients' distance; 1 as in the paper, which takes more than twice as long", ge=0
    )
    kl_weight: float = setting(0.1, "weight of the KL divergence of the logits (temperature 2)", ge=0)
    hidden_weight: float = setting(0.0, "weight of the hidden states' relative squared distance", ge=0)
    held_out: int = setting(
        128,
        "examples of the pool that fidelity is measured on, before the first step and four times after it; the best "
        "factors are kept, and alignment stops after two evaluations without gain; 0 keeps the last factors",
        ge=0,
    )

    @model_validator(mode="after")
    def _something_to_match(self) -> AlignSection:
        if not (self.gradient_weight or self.kl_weight or self.hidden_weight):
            raise ValueError(
                "gradient_weight, kl_weight and hidden_weight are all 0, so there is nothing to match; "
                "set one, or align: false"
            )
        if 0 < self.held_out < 16:
            raise ValueError("held_out: fewer than 16 examples are too few; give 0 to keep the last factors")
        return self


# The settings that fix the size of a proxy; exactly one is given.
SIZES = ("sparsity", "flops", "fidelity")


ProxyMethod = Literal["ipsvd", "target", "svd", "svd-llm", "asvd", "fwsvd", "random", "layers", "off-the-shelf"]


# Tokens of a batch by default. On a CPU the activations of smaller batches stay in its caches: with 1,024 tokens rather
# than 4,096, SmolLM2-135M scores 1.26 times as fast, in 2.2 GB rather than 4.9 (docs/results/speed.md#memory).
ON_CPU, ON_ACCELERATOR = 1024, 4096
# Depth of a proxy with the target's weights, and what the target scores again as a multiple of what is selected: on
# SmolLM2-135M they find 0.95 of the target's own selection for 0.42 of the time, a depth of 0.33 and twice the rows
# 0.93 for 0.57. Where it scores nothing again, a depth of 0.33 finds 0.77, 0.1 finds 0.60 (docs/results/cost.md).
DEPTH, AGAIN, DEPTH_ALONE = 0.1, 3, 0.33


Tracking = Literal["none", "tensorboard", "trackio", "wandb", "mlflow"]


class ProxySection(Section):
    """How the proxy is made, and its size."""

    method: ProxyMethod | None = setting(
        None,
        "target keeps all weights, and depth lowers its cost; ipsvd makes layers low-rank; the others are baselines",
        "ipsvd if sparsity, flops, ranks, probe or align is given, else target",
    )
    depth: float | None = setting(
        None,
        "fraction of the decoder layers, from the top, whose gradients are compared; the backward pass stops there",
        f"with target {DEPTH}, or {DEPTH_ALONE} in a run without refine; else 1",
        gt=0,
        le=1,
    )
    sparsity: float | None = setting(
        None,
        "fraction of the linear parameters to remove; give one of sparsity, flops and fidelity",
        "0.7 if the method needs a size and none is given",
        gt=0,
        lt=1,
    )
    flops: float | None = setting(
        None, "FLOPs per token (linear layers and head), as a fraction of the target's", gt=0, lt=1
    )
    fidelity: float | None = setting(
        None,
        "use the smallest depth (or low-rank proxy) whose Spearman correlation with the target's scores is at least "
        "this, at the lower bound of a 95 % interval",
        gt=0,
        lt=1,
    )
    held_out: int = setting(256, "with fidelity: examples of the pool to measure it on", ge=16)
    model: str | None = setting(None, "hub id or folder of the proxy, for the method off-the-shelf, which has no size")
    ranks: Literal["global", "uniform"] = setting("global", "how ranks are distributed over layers")
    probe: float = setting(
        0.001, "fraction of the pool that second moments are measured on, at least 64 examples", gt=0, le=1
    )
    align: AlignSection | Literal[False] = setting(AlignSection(), "how the proxy is aligned, or false")

    @model_validator(mode="after")
    def _one_size(self) -> ProxySection:
        given = [name for name in SIZES if getattr(self, name) is not None]
        if self.method is None:
            sized = self.sparsity is not None or self.flops is not None
            aligned = "align" in self.model_fields_set and self.align
            factors = sized or aligned or self.model_fields_set & {"ranks", "probe"}
            self._default(method="ipsvd" if factors else "target")
        self._default(depth=DEPTH if self.method == "target" else 1.0)
        if not self.factorized:
            if self.align and "align" in self.model_fields_set:
                raise ValueError(f"align tunes low-rank factors, but the method {self.method} has none")
            object.__setattr__(self, "align", False)
        if self.method == "target":
            if given not in ([], ["fidelity"]):
                raise ValueError(f"the method target keeps all parameters, so leave {given[0]} out, or the method")
            if given and "depth" in self.model_fields_set:
                raise ValueError("fidelity chooses the depth of the method target, so give only one of them")
            if self.depth == 1:
                raise ValueError("the method target needs a depth below 1 to cost less")
            return self
        if self.method == "off-the-shelf":
            if self.model is None or given:
                raise ValueError("the method off-the-shelf takes `model`, and no size")
            return self
        if self.model is not None:
            raise ValueError("`model` is only for the method off-the-shelf")
        if self.fidelity is not None and self.method == "layers":
            raise ValueError("fidelity is only for methods that factorize layers; give the method layers a size")
        if len(given) > 1:
            raise ValueError(f"give exactly one of {', '.join(SIZES)}, not {' and '.join(given)}")
        if not given:
            self._default(sparsity=0.7)
        return self

    def _default(self, **values: object) -> None:
        """Set what was left out. Bypasses validate_assignment, which would run the validator again."""
        for name, value in values.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)

    @property
    def factorized(self) -> bool:
        """Whether the proxy has low-rank factors, which alignment tunes."""
        return self.method not in ("layers", "off-the-shelf", "target")

    @property
    def given_depth(self) -> float:
        """The depth, which is never None after validation."""
        assert self.depth is not None
        return self.depth

    @property
    def comparable(self) -> bool:
        """Whether the proxy's layers stand for the target's, so that validation gradients can be the target's."""
        return self.method not in ("layers", "off-the-shelf")


# Numbers per example in an index, as in LESS: 16 kB per example, 16 GB per million.
DIMENSION = 8192

# Default fraction of the norm of each validation example's gradient that is kept for scores by validation example.
EXAMPLES_NORM = 0.9

EstimatorName = Literal["ekfac", "kfac", "tracin", "less", "random", "length", "perplexity", "rds", "bm25"]


@dataclass(frozen=True, slots=True)
class Traits:
    """What an estimator needs and provides. `iprox.influence.estimators` has the class of each.

    Attributes:
        gradients: whether it uses gradients; the others are baselines (`iprox.influence.baselines`).
        model: whether it runs the model.
        curvature: whether it measures curvature on a sample of the pool.
        optimizer: whether it reads the optimizer state of the warm-up.
        corpus: whether it counts the terms of the whole pool.
        by_task: whether it depends on the validation examples; otherwise all tasks have the same scores.
        by_example: whether it can score each validation example separately.
        seeded: whether its scores depend on the seed.
        query_norm: default fraction of the validation gradients' norm that is kept on a proxy
            (`benchmarks/queries.py`). The loss is small compared with the error of the proxy. Gradients divided by a
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
    "tracin": Traits(),
    "less": Traits(optimizer=True),
    "random": Traits(gradients=False, model=False, by_task=False, by_example=False, seeded=True),
    "length": Traits(gradients=False, model=False, by_task=False, by_example=False),
    "perplexity": Traits(gradients=False, by_task=False, by_example=False),
    "rds": Traits(gradients=False),
    "bm25": Traits(gradients=False, model=False, corpus=True),
}

# Settings of influence that the fidelity of a proxy depends on.
OF_GRADIENTS = ("estimator", "curvature_examples", "damping", "query", "query_norm", "normalize")


class InfluenceSection(Section):
    """How candidates are scored, and at which checkpoints of the warm-up.

    Audits and `refine` score the target with whole validation gradients, whatever `query_norm` is.
    """

    estimator: EstimatorName = setting(
        "ekfac",
        "ekfac and kfac divide by the curvature of the loss; tracin does not; less scores the steps that the "
        "warm-up's optimizer would take; random, length, perplexity, rds and bm25 are baselines without gradients",
    )
    curvature_examples: int = setting(256, "examples of the pool to measure curvature on", ge=1)
    damping: float = setting(0.1, "damping of the curvature, as a fraction of the mean eigenvalue of each layer", gt=0)
    query: Literal["target", "proxy"] = setting(
        "target", "model that validation gradients are taken on when candidates are scored on a proxy"
    )
    query_norm: float | None = setting(
        None,
        "fraction of the validation gradients' norm that their low-rank form keeps; 1 is exact",
        "0.9 with per_example; else 0.9 on a proxy (0.98 with curvature) and 1 on a model itself",
        gt=0,
        le=1,
    )
    normalize: Literal["none", "cosine"] = setting(
        "cosine", "cosine, or none: raw scores, which favor answers of one or two tokens"
    )
    per_example: bool | None = setting(
        None,
        "also keep scores per validation example, so that examples rather than tasks take turns in round-robin",
        "true if the estimator has them",
    )
    checkpoints: Literal["last", "all"] = setting("last", "checkpoints of the warm-up to sum scores over")

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
        """What the estimator needs and provides."""
        return ESTIMATORS[self.estimator]

    @property
    def score(self) -> str:
        """The kind of score, in a few words, for reports: `ekfac cosine`."""
        return self.estimator if self.normalize == "none" else f"{self.estimator} {self.normalize}"

    @property
    def by_example(self) -> bool:
        """Whether scores by validation example are kept."""
        return self.traits.by_example if self.per_example is None else self.per_example

    @property
    def exact(self) -> InfluenceSection:
        """The same settings with whole mean validation gradients, for the target's scores in a comparison."""
        return self.of_tasks.model_copy(update={"query_norm": 1.0})

    @property
    def of_tasks(self) -> InfluenceSection:
        """The same settings without scores by validation example, which cost a little more."""
        return self.model_copy(update={"per_example": False})

    def kept_norm(self, *, on_proxy: bool) -> float:
        """Return the fraction of the validation gradients' norm to keep when scoring on a proxy, or not on one."""
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
                raise ValueError(f"normalize applies to gradients, and {self.estimator} uses none; leave it out")
            object.__setattr__(self, "normalize", "none")
        if self.checkpoints == "all":
            raise ValueError(f"checkpoints: all is for gradients, and {self.estimator} uses none; leave it at last")
        return self

    @model_validator(mode="after")
    def _by_example(self) -> InfluenceSection:
        if self.per_example and not self.traits.by_example:
            raise ValueError(f"per_example: {self.estimator} has no scores by validation example")
        if self.traits.optimizer and (self.query_norm or 1) < 1 and not self.by_example:
            raise ValueError(f"{self.estimator} forms whole gradients, so query_norm saves nothing; leave it out")
        return self


Strategy = Literal["top", "round-robin"]


def rows_in_share(share: float, total: int) -> int:
    """Return the number of rows in a fraction of all rows, at least one."""
    return max(1, round(share * total))


class SelectSection(Section):
    """How many rows are selected, how they are ranked, and which constraints apply."""

    fraction: float | None = setting(None, "fraction of the pool to select", "0.05", gt=0, le=1)
    count: int | None = setting(None, "number of rows to select, instead of a fraction", ge=1)
    tokens: int | None = setting(None, "number of tokens of all selected rows, instead of a fraction", ge=1)
    strategy: Strategy = setting(
        "round-robin",
        "round-robin: validation examples take turns, each choosing by its own scores and the mean's; top: the rows "
        "with the highest influence on all of them together",
    )
    task: str | None = setting(None, "select by the scores of this task alone", "all tasks")
    weights: dict[str, Annotated[float, Field(ge=0, allow_inf_nan=False)]] = setting(
        {}, "weights of the tasks, 1 for those not named: {math: 2, code: 0.5}"
    )
    threshold: float | None = setting(None, "lowest score to select; without a size, all rows above it are selected")
    source_floor: dict[str, Share] = setting({}, "smallest fraction of the selection per source: {code: 0.1}")
    source_cap: Share | dict[str, Share] | None = setting(
        None, "largest fraction of the selection, for any source (0.3) or per source"
    )
    deduplicate: float | None = setting(
        None, "word similarity (MinHash), e.g. 0.8, above which the worse of two rows is left out", gt=0, le=1
    )

    @model_validator(mode="after")
    def _one_size(self) -> SelectSection:
        given = [name for name in ("fraction", "count", "tokens") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"give exactly one of fraction, count and tokens, not {' and '.join(given)}")
        if self.weights and self.task is not None:
            raise ValueError(f"weights are for several tasks, but task selects by {self.task} alone; leave one out")
        if not given and self.threshold is None:
            object.__setattr__(self, "fraction", 0.05)
        if self.by_source and self.fraction is None and self.count is None:
            raise ValueError("source_floor and source_cap are fractions of a number of rows; give fraction or count")
        if sum(self.source_floor.values()) > 1:
            raise ValueError(f"the values of source_floor add up to {sum(self.source_floor.values()):g}, more than 1")
        return self

    @property
    def by_source(self) -> bool:
        """Whether any source has a floor or a cap."""
        return bool(self.source_floor or self.source_cap is not None)

    def rows_of(self, total: int) -> int | None:
        """Return the number of rows to select from a pool of `total` rows; None if another limit decides."""
        return self.count if self.fraction is None else rows_in_share(self.fraction, total)

    @property
    def few(self) -> bool:
        """Whether the selection is a number or a small fraction of rows, and no limit may pass over some of them."""
        limits = self.threshold is not None or self.source_floor or self.source_cap is not None or self.deduplicate
        return not limits and (self.count is not None or (self.fraction or 1.0) < 1 / AGAIN)

    def caps(self) -> dict[str | None, float]:
        """Return the largest fraction of each source; the key None stands for sources that are not named."""
        if self.source_cap is None:
            return {}
        return {**self.source_cap} if isinstance(self.source_cap, dict) else {None: self.source_cap}


class AuditSection(Section):
    """Scoring of a random sample on proxy and target, to compare them, and retraining on parts of it."""

    sample: int = setting(500, "examples scored on both proxy and target", ge=10)
    lds: int = setting(
        0,
        "retrain on this many random halves of the sample, and correlate predicted with actual losses (linear "
        "datamodeling score); 0 for none",
        ge=0,
    )
    removal: int = setting(
        0,
        "retrain this many times without the top 5 % of the sample and without random rows, and compare the "
        "validation losses; 0 for none",
        ge=0,
    )
    learning_rate: float | None = setting(None, "peak learning rate of each retraining", "0.1 / hidden size", gt=0)

    @model_validator(mode="after")
    def _enough(self) -> AuditSection:
        if 0 < self.lds < FEWEST_SUBSETS:
            raise ValueError(f"lds: fewer than {FEWEST_SUBSETS} subsets are too few; 0 leaves it out")
        if self.removal == 1:
            raise ValueError("removal: one repeat has no standard error; give 2 or more, or 0 to leave it out")
        return self

    def peak(self, hidden_size: int) -> float:
        """Return `learning_rate`, or its default for a hidden size."""
        return RATE_TIMES_WIDTH / hidden_size if self.learning_rate is None else self.learning_rate


# Smallest number of subsets for a linear datamodeling score, and the fraction of the rows in each.
FEWEST_SUBSETS, SUBSET_FRACTION = 10, 0.5
# Fraction of the audited rows that the removal test removes.
REMOVED_FRACTION = 0.05


class RefineSection(Section):
    """Scoring of the proxy's best rows again on the target; the selection is then made among these."""

    candidates: float | None = setting(
        None,
        "fraction of the pool that the target scores again: the rows that select ranks highest",
        f"{AGAIN} times what is selected; 0.15 in iprox refine",
        gt=0,
        lt=1,
    )

    def share(self, asked: int | None, rows: int) -> float:
        """Return the fraction of the pool to score again, where `asked` of its rows are to be selected."""
        if self.candidates is not None:
            return self.candidates
        assert asked is not None  # refused before (`iprox.stages.refinement.check_candidates`)
        return min(1.0, AGAIN * asked / rows)


class EvaluateSection(Section):
    """Benchmarks of lm-evaluation-harness, on the model before and after fine-tuning."""

    lm_eval: list[str] = setting(
        ..., "names of tasks or groups of lm-evaluation-harness; needs pip install 'iprox[eval]'", min_length=1
    )
    include: str | None = setting(None, "folder with tasks of your own (YAML)")
    limit: int | None = setting(None, "examples per task", "all", ge=1)
    chat_template: bool = setting(False, "whether prompts are chat turns; published results are often without")


class FinetuneSection(TrainingSection):
    """Fine-tuning of the original target on the selection."""

    test: dict[str, Files] = setting({}, "test file or files per task, for losses and exact matches before and after")
    evaluate: EvaluateSection | Literal[False] = setting(False, "benchmarks before and after fine-tuning, or false")


class DpoSection(Section):
    """The loss of preference pairs."""

    reference: str | None = setting(
        None, "hub id or folder of the reference model", "the model that scores, as at the start of DPO"
    )
    beta: float = setting(0.1, "weight of the reference; without a `reference` it scales all scores alike", gt=0)


class Settings(Section):
    """The settings of a command; each command reads some of the sections."""

    model: str | None = setting(None, "hub id or folder of a causal language model")
    output: str | None = setting(None, "folder for the results, made if missing")
    loss: Literal["sft", "dpo"] = setting(
        "sft",
        "sft: the loss of answer tokens; dpo: the loss of direct preference optimization, for preference pairs "
        "(chosen, rejected); nothing is trained",
    )
    dpo: DpoSection = setting(DpoSection(), "settings of loss: dpo")
    data: ReadingSection = setting(ReadingSection(), "which examples are read, and how")
    warmup: WarmupSection | Literal[False] = setting(WarmupSection(), "brief fine-tuning before scoring, or false")
    proxy: ProxySection | Literal[False] = setting(
        ProxySection(), "the proxy that candidates are scored on, or false to score on the target"
    )
    influence: InfluenceSection = setting(InfluenceSection(), "how candidates are scored")
    audit: AuditSection | Literal[False] = setting(AuditSection(), "measuring the proxy's fidelity, or false")
    refine: RefineSection | Literal[False] = setting(
        False,
        "scoring the best rows again on the target, or false",
        f"{{}} with a proxy, if select gives a count or a fraction below 1/{AGAIN} and no limits",
    )
    select: SelectSection = setting(SelectSection(), "how rows are selected")
    finetune: FinetuneSection | Literal[False] = setting(False, "fine-tuning on the selection; {} for defaults")
    seed: int = setting(0, "seed of all random draws and orders", ge=0, lt=2**32)
    dtype: Literal["auto", "float32", "bfloat16"] = setting(
        "auto", "dtype of matrix products; auto is bfloat16 if the device supports it natively"
    )
    device: str = setting("auto", "cpu or cuda; cuda:1 only if nothing is trained")
    batch_tokens: Annotated[int, Field(ge=1)] | Literal["auto"] = setting(
        "auto", f"most tokens per batch, with padding; auto is {ON_CPU} on a CPU, {ON_ACCELERATOR} elsewhere"
    )
    compile: Literal["auto"] | bool = setting(
        "auto", "compile models with torch.compile; auto does so where it saves time"
    )
    processes: Literal["auto"] | Annotated[int, Field(ge=1)] = setting(
        "auto", "processes that train and align together on this machine; auto is one per GPU"
    )
    ray_workers: int = setting(0, "Ray actors that score, each with its own model; 0 scores in this process", ge=0)
    tracking: Tracking = setting("none", "tracker to log training curves and results to")
    trust_remote_code: bool = setting(False, "allow models to run their own code")

    @model_validator(mode="after")
    def _of_pairs(self) -> Settings:
        if self.loss == "sft":
            if "dpo" in self.model_fields_set and self.dpo.reference is not None:
                raise ValueError("dpo.reference is for loss: dpo; set it, or leave the reference out")
            return self
        if not self.influence.traits.gradients or self.influence.traits.optimizer:
            raise ValueError(
                f"loss: dpo needs gradients, and influence.estimator {self.influence.estimator} does not fit"
            )
        trained = {
            "warmup": self.warmup if "warmup" in self.model_fields_set else False,
            "finetune": self.finetune,
            "audit.lds": self.audit and self.audit.lds,
            "audit.removal": self.audit and self.audit.removal,
        }
        for name, value in trained.items():
            if value:
                raise ValueError(
                    f"loss: dpo scores pairs and trains nothing, so leave {name} out (train the selection with TRL's "
                    "DPOTrainer)"
                )
        object.__setattr__(self, "warmup", False)
        return self


class Recipe(Settings):
    """The settings of a whole run. Paths are relative to the working directory."""

    model: str = setting(..., "hub id or folder of a causal language model")
    data: DataSection = setting(..., "which examples are read, and how")
    output: str = setting(..., "run folder, made if missing")

    @model_validator(mode="after")
    def _no_idle_proxy(self) -> Recipe:
        if self.proxy and not self.influence.traits.model:
            raise ValueError(f"influence.estimator {self.influence.estimator} runs no model; set proxy: false")
        return self

    @model_validator(mode="after")
    def _refined_from_a_proxy(self) -> Recipe:
        if self.refine and not self.proxy:
            if self.refine.candidates is not None:
                raise ValueError(
                    "refine scores a proxy's best rows again on the target, but proxy is off; leave it out"
                )
            object.__setattr__(self, "refine", False)  # the default, as a resolved recipe has it
        pays = self.proxy and self.influence.traits.gradients and self.select.few
        if "refine" not in self.model_fields_set and pays:
            object.__setattr__(self, "refine", RefineSection())
        chosen = self.proxy and {"depth", "fidelity"} & self.proxy.model_fields_set
        if self.proxy and self.proxy.method == "target" and not self.refine and not chosen:
            object.__setattr__(self, "proxy", self.proxy.model_copy(update={"depth": DEPTH_ALONE}))
        return self

    @model_validator(mode="after")
    def _selected_by_a_task(self) -> Recipe:
        tasks, named = self.data.validation, {"task": [self.select.task], "weights": self.select.weights}
        for key, names in named.items():
            unknown = next((name for name in names if name is not None and name not in tasks), None)
            if unknown is not None:
                raise ValueError(f"select.{key} {unknown!r} is none of data.validation: {', '.join(tasks)}")
        if self.select.weights and not any(self.select.weights.get(task, 1) for task in tasks):
            raise ValueError("select.weights are all 0, so there is nothing to select by")
        return self

    @model_validator(mode="after")
    def _workers_of_their_own(self) -> Recipe:
        if self.ray_workers and ":" in self.device:
            raise ValueError(
                f"ray_workers: each worker uses its own GPU; set device to cuda, not {self.device}, and choose "
                "GPUs with CUDA_VISIBLE_DEVICES"
            )
        if self.ray_workers and self.data.num_proc:
            raise ValueError("data.num_proc is for scoring in this process, and ray_workers for others; leave one out")
        return self

    @model_validator(mode="after")
    def _batches_that_processes_share(self) -> Recipe:
        trained = {"warmup": self.warmup, "proxy.align": self.proxy and self.proxy.align, "finetune": self.finetune}
        for name, section in trained.items():
            if section and self.processes != "auto" and section.batch_size % self.processes:
                raise ValueError(
                    f"{name}.batch_size {section.batch_size} is that of all {self.processes} processes together; "
                    f"make it a multiple of {self.processes}"
                )
        return self

    @model_validator(mode="after")
    def _optimizer_of_a_warm_up(self) -> Recipe:
        if not self.influence.traits.optimizer:
            return self
        name = f"influence.estimator {self.influence.estimator}"
        if not self.warmup:
            raise ValueError(f"{name} needs the optimizer state of the warm-up, which is off")
        if self.warmup.lora:
            raise ValueError(f"{name} needs Adam's moments of the weights, which warmup.lora does not train")
        if self.proxy and not self.proxy.factorized:
            raise ValueError(f"{name} needs a proxy with the target's layers; use another method")
        return self

    @property
    def trains_adapters(self) -> bool:
        """Whether any training uses adapters."""
        return any(training and training.lora is not False for training in (self.warmup, self.finetune))


def fields_of(section: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Yield every setting with its full key, e.g. `proxy.align.epochs`; a section comes before its settings."""
    for name, field in section.model_fields.items():
        yield prefix + name, field
        for part in (field.annotation, *get_args(field.annotation)):
            if isinstance(part, type) and issubclass(part, BaseModel):
                yield from fields_of(part, f"{prefix}{name}.")
