"""The section `influence`, and which estimators need what."""

from __future__ import annotations

from typing import Literal, get_args

from pydantic import Field, model_validator

from iprox.recipe.section import Section

# Examples of the pool that an influence function measures curvature on, unless told.
CURVATURE_EXAMPLES = 256

# Numbers an example: the 8,192 that LESS takes. Sixteen kilobytes; a million examples are 16 GB.
DIMENSION = 8192

# Estimators that divide by curvature, which they measure on a sample of the pool.
CURVED = ("influence-function", "datainf")

# Scorers without gradients, and those among them that need tokens only.
GradientFree = Literal["random", "length", "perplexity", "rds", "bm25"]
GRADIENT_FREE = get_args(GradientFree)
MODEL_FREE = ("random", "length", "bm25")
# Those that look at a candidate alone, so that all tasks and validation examples have the same score.
ALIKE = ("random", "length", "perplexity")

# Estimators without scores by validation example: DataInf divides the mean gradient of a task by the curvature.
WITHOUT_EXAMPLES = ("datainf", *ALIKE)

# Settings of influence that say what a gradient is, and so how faithful a proxy's are.
OF_GRADIENTS = (
    *("estimator", "curvature", "curvature_examples", "damping"),
    *("gradient", "query", "query_norm", "normalize", "norm_sketch"),
)


class InfluenceSection(Section):
    """What is scored, and at which of the warm-up's checkpoints.

    `query` says where validation gradients are taken when candidates are scored on a proxy: on its `target` (a few
    examples, so next to no cost) or on the `proxy` too. `query_norm` is the share of their norm that is kept when they
    are made low-rank; 1 keeps them whole. Left out it is 0.9 on a proxy, by influence functions 0.98, and 1 on a model
    itself. Audits and `refine` ask the target with whole ones. `norm_sketch` is the number of random signs a layer that
    the cosine's norms are estimated from on a proxy; 0 is exact, left out it is 32.
    `compile` says whether the model runs compiled; `auto` does that for pools large enough to repay the time it takes.
    An influence function measures curvature on `curvature_examples` of the pool; `damping` is a share of its mean
    eigenvalue. A task's score is the `mean` over its validation examples or the `max` (`over_examples`); `per_example`
    keeps the scores by example too, so that examples can take turns to choose; left out, wherever there are any.
    `adam` is TracIn of the steps that the warm-up's Adam would take; the warm-up then keeps the optimizer's state.
    The estimators `random`, `length`, `perplexity`, `rds` and `bm25` take no gradients, and so
    none of these settings.
    """

    estimator: Literal["tracin", "adam", "influence-function", "datainf", GradientFree] = "influence-function"
    curvature: Literal["ek-fac", "k-fac"] = "ek-fac"
    curvature_examples: int = Field(CURVATURE_EXAMPLES, ge=1)
    damping: float = Field(0.1, gt=0)
    gradient: Literal["factors", "weight"] = "weight"
    query: Literal["target", "proxy"] = "target"
    query_norm: float | None = Field(None, gt=0, le=1)
    normalize: Literal["none", "cosine"] = "cosine"
    norm_sketch: int | None = Field(None, ge=0)
    over_examples: Literal["mean", "max"] = "mean"
    per_example: bool | None = None
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

    @property
    def by_example(self) -> bool:
        """Whether scores by validation example are kept."""
        return self.estimator not in WITHOUT_EXAMPLES if self.per_example is None else self.per_example

    @property
    def exact(self) -> InfluenceSection:
        """The same with whole mean validation gradients: how a target is asked for what a proxy is judged by."""
        return self.of_tasks.model_copy(update={"query_norm": 1.0})

    @property
    def of_tasks(self) -> InfluenceSection:
        """The same without scores by validation example, which cost a little more."""
        return self.model_copy(update={"per_example": False})

    @model_validator(mode="after")
    def _without_gradients(self) -> InfluenceSection:
        if self.gradient_free and self.normalize != "none":
            if "normalize" in self.model_fields_set:
                raise ValueError(f"normalize is of gradients, which {self.estimator} has none of; leave it out")
            object.__setattr__(self, "normalize", "none")
        if self.gradient_free and self.checkpoints == "all":
            raise ValueError(f"checkpoints: all sums gradients, which {self.estimator} has none of; leave it at last")
        return self

    @model_validator(mode="after")
    def _norms(self) -> InfluenceSection:
        if self.norm_sketch and self.normalize == "none":
            raise ValueError("norm_sketch is of the norms of a cosine: set normalize to cosine, or leave it out")
        if self.norm_sketch and self.estimator == "adam":
            raise ValueError("adam forms whole gradients, so a norm_sketch saves it nothing: leave it out")
        return self

    @model_validator(mode="after")
    def _by_example(self) -> InfluenceSection:
        if (self.over_examples == "max" or self.per_example) and self.estimator in WITHOUT_EXAMPLES:
            raise ValueError(
                f"over_examples: max and per_example: {self.estimator} has no scores by validation example"
            )
        return self

    @model_validator(mode="after")
    def _inverse_of_weights(self) -> InfluenceSection:
        if (
            self.estimator == "adam"
            and (self.query_norm or 1) < 1
            and not (self.over_examples == "max" or self.by_example)
        ):
            raise ValueError("adam forms whole gradients, so a query_norm saves it nothing: leave it out")
        if self.estimator == "adam" and self.gradient == "factors":
            raise ValueError("adam takes the optimizer's moments of the target's weights: leave gradient at weight")
        if self.estimator in CURVED and self.gradient == "factors" and self.query == "target":
            raise ValueError(
                f"{self.estimator} with `gradient: factors` needs `query: proxy`; or leave gradient at weight"
            )
        return self
