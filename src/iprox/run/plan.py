"""What a recipe would cost, before anything runs: tokens, FLOPs, memory and time of each stage.

FLOPs are counted by the functions that the stages count theirs by, of models without weights. Only what is known once a
stage has run is estimated: the ranks of validation gradients, the sparsity that a fidelity takes, how rows overlap.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch.nn import Module
from transformers import PreTrainedModel

from iprox.audits.held_out import Watching, watched_by
from iprox.audits.removal import removed_count, trainings_without
from iprox.files import check_output
from iprox.influence.attribution import why_not_attributed
from iprox.influence.estimators.base import QueryTokens
from iprox.influence.estimators.ekfac import KroneckerInfluence
from iprox.influence.estimators.registry import estimator_of
from iprox.influence.gradients import norm_flops
from iprox.influence.scorer import NORM_SKETCH, norm_shapes
from iprox.influence.validation_gradients import MEMORY as GRADIENTS
from iprox.kronecker.moments import MEMORY
from iprox.metering import memory_now
from iprox.models import flops
from iprox.models.loading import hidden_size, skeleton
from iprox.models.quantized import bytes_per_weight
from iprox.proxy import align
from iprox.proxy.search import most_tries
from iprox.run import steps
from iprox.run.folder import RunFolder
from iprox.run.runner import Run
from iprox.run.whole import check_recipe, judging
from iprox.session import Session, encode_validation, pool_of, refuse_shared_files, share, tasks_of, tokens_of
from iprox.settings import REMOVED_FRACTION, SUBSET_FRACTION, InfluenceSection, Recipe
from iprox.stages.alignment import ALIGN_TOKENS, keeps_signals
from iprox.stages.compression import proxy_skeleton
from iprox.stages.refinement import check_candidates

# Share of the machine's GEMM rate that a stage reaches; attention, norms, padding and Python take the rest.
EFFICIENCY = 0.25
# What a stage reaches instead at a hidden size d, where that is more: d over the first number, but no more than the
# second. From `benchmarks/planning.py` on one core, at hidden sizes of 128, 384 and 576.
BY_WIDTH = {"curvature": (1000, 0.38), **dict.fromkeys(("audit", "score", "attribute"), (800, 0.7))}
# Numbers kept per token for a backward pass, as a multiple of the inputs and outputs of linear layers.
ACTIVATIONS = 1.4
# Bytes that libraries take which are imported after planning, such as trainers, and what the CPU's kernels keep.
LIBRARIES = 400 << 20
# About how many rows are tokenized to know the mean length.
SAMPLE = 512
# What low-rank validation gradients that keep 0.9 of the norm cost next to whole ones, and an influence function's, by
# validation example (0.47 on a 17 M-parameter model, `benchmarks/bases.py`): estimates, as ranks are known only later.
LOW_RANK_QUERY, CURVED_QUERY = 0.02, 0.47


def plan_recipe(recipe: Recipe, session: Session, rate: float) -> dict[str, Any]:
    """Plan a recipe.

    The pool is read once (counted and checked); a sample of it is tokenized to know the mean length.

    Args:
        recipe: resolved.
        session: for the tokenizer and dtype.
        rate: FLOP/s of the machine's matrix products.

    Returns:
        `rows`, `tokens_per_row`, `supervised_per_row`, `gemm_rate`, `parameters` of target and proxy, `stages`: by
        name `tokens`, `flops`, `seconds`, `memory_bytes`; and `total_seconds`, `relative_score_cost`: making and
        scoring the proxy over scoring the target.

    Raises:
        InputError: bad input, or something that the run would refuse before its first stage.
    """
    RunFolder(check_output(recipe.output)).earlier()
    target = check_recipe(recipe, session)
    pool, validation = pool_of(recipe.data.pool, recipe), tasks_of(recipe.data.validation, recipe)
    tests = tasks_of(recipe.finetune.test, recipe) if recipe.finetune else {}
    refuse_shared_files(pool, judging(validation, tests))
    total = session.read(pool).rows
    if recipe.refine:
        check_candidates(recipe.refine, recipe.select, total)
    encoder = session.encoder(recipe.model)
    validated = encode_validation(encoder, validation)
    sample = encoder.encode(pool.take(range(0, total, max(1, total // SAMPLE))))
    tokens, supervised = (count / len(sample) for count in tokens_of(sample))
    curved = min(recipe.influence.curvature_examples, total) if recipe.influence.traits.curvature else 0
    if isinstance(estimator_of(recipe.influence), KroneckerInfluence) and steps.on_target(recipe):
        curved = 0  # measured once, in a stage of its own
    read = replace(
        QueryTokens.of(validated),
        curvature_tokens=round(curved * tokens),
        curvature_supervised=round(curved * supervised),
    )
    proxy = recipe.proxy and proxy_skeleton(target, recipe.proxy, trust_remote_code=recipe.trust_remote_code)
    costs = Costs(recipe, target, proxy or target, total, tokens, supervised, read, session)
    factorized = bool(recipe.proxy and recipe.proxy.factorized)
    held = memory_now(session.device)[0] + libraries(session)
    stages = {
        name: {
            "tokens": rows * tokens,
            "flops": spent,
            "seconds": spent / (rate * efficiency(name, hidden_size(target.config), factorized=factorized)),
            "memory_bytes": held + memory,
        }
        for name, rows, spent, memory in costs.stages()
    }
    _warn_of_memory(costs, session)
    spent = sum(stages[name]["flops"] for name in ("curvature", "compress", "align", "score") if name in stages)
    on_target = costs.scoring(target, total, recipe.influence.of_tasks, as_on=costs.scored)
    on_target += stages.get("curvature", {"flops": 0.0})["flops"]
    return {
        "rows": total,
        "tokens_per_row": tokens,
        "supervised_per_row": supervised,
        "gemm_rate": rate,
        "parameters": {"target": flops.parameters(target), "proxy": flops.parameters(costs.scored)},
        "stages": stages,
        "total_seconds": sum(stage["seconds"] for stage in stages.values()),
        "relative_score_cost": spent / on_target if on_target else 1.0,
    }


def efficiency(stage: str, width: int, *, factorized: bool) -> float:
    """Return the share of the GEMM rate that a stage reaches.

    Args:
        stage: name of the stage.
        width: hidden size of the target.
        factorized: whether rows are scored on a low-rank proxy, whose products are small.
    """
    thin = factorized and stage in ("score", "attribute")
    per, most = (1, 0.0) if thin else BY_WIDTH.get(stage, (1, 0.0))
    return max(EFFICIENCY, min(most, width / per))


def warn_of_memory(run: Run) -> None:
    """Warn of a run whose memory will not do, from its settings and the model's shapes alone."""
    recipe, session = run.settings, run.session
    assert isinstance(recipe, Recipe)
    target = skeleton(recipe.model, trust_remote_code=recipe.trust_remote_code)
    proxy = recipe.proxy and proxy_skeleton(target, recipe.proxy, trust_remote_code=recipe.trust_remote_code)
    read = QueryTokens(len(recipe.data.validation), 1, 1)
    # The numbers of rows and tokens do not change what is held at once.
    costs = Costs(recipe, target, proxy or target, 1 << 20, 1.0, 1.0, read, session)
    _warn_of_memory(costs, session)


def _warn_of_memory(costs: Costs, session: Session) -> None:
    """Warn of the stage that holds most if that is more than there is."""
    held, most = memory_now(session.device)
    held += libraries(session)
    name, needed = max(((name, held + memory) for name, _, _, memory in costs.stages()), key=lambda each: each[1])
    if needed > most:
        session.reporter.warn(
            f"{name} needs about {needed / 1e9:,.1f} GB of memory, and {session.device} has {most / 1e9:,.1f} GB; "
            f"set batch_tokens lower (now {session.batch_tokens}), use a larger machine, or train with lora"
        )


def libraries(session: Session) -> int:
    """Return the bytes that a run takes on its device beside tensors, and that planning does not take yet."""
    return LIBRARIES if session.device.type == "cpu" else 0


@dataclass(frozen=True, slots=True)
class Costs:
    """What the stages of a recipe cost.

    Attributes:
        recipe: what is planned.
        target: the target, without weights.
        scored: its proxy, without weights; or the target, where there is none.
        total: rows of the pool.
        tokens: mean tokens of a row.
        supervised: supervised tokens among them.
        read: what is read of the validation sets, and of the pool for curvature, at each checkpoint.
        session: for the dtype of products and the size of batches.
    """

    recipe: Recipe
    target: PreTrainedModel
    scored: PreTrainedModel
    total: int
    tokens: float
    supervised: float
    read: QueryTokens
    session: Session

    def stages(self) -> Iterator[tuple[str, float, float, float]]:
        """Yield of each stage, in order, its name, the rows it reads, its FLOPs, and the most bytes that it holds."""
        recipe, target, scored, total = self.recipe, self.target, self.scored, self.total
        proxy, audited, how = recipe.proxy, recipe.proxy and recipe.audit, recipe.influence.of_tasks
        warmed, tuned, times = recipe.warmup, recipe.finetune, self.checkpoints
        weights, activations = self.weights(target), self.activations()
        if warmed:
            yield "warmup", *self.training(warmed.epochs * warmed.examples(total), warmed.lora)
        estimator = estimator_of(how)
        if isinstance(estimator, KroneckerInfluence) and steps.on_target(recipe):
            rows, readings = min(how.curvature_examples, total), 2 if estimator.corrected else 1
            curved, supervised = self.tokens_in(rows)
            read = QueryTokens(0, 0, 0, curved, supervised)
            spent = estimator.curvature_flops(target, read)
            held = min(MEMORY, 4 * sum(2 * (m**2 + n**2) + m * n for m, n, _ in flops.layers_of(target)))
            yield "curvature", times * readings * rows, times * spent, weights + activations + held
        if proxy:
            rows = times * share(total, proxy.probe) if proxy.factorized else 0
            spent = flops.compression_flops(target, *self.tokens_in(rows)) if proxy.factorized else 0.0
            spent += self.watching(proxy.held_out, most_tries()) if proxy.fidelity is not None else 0.0
            yield "compress", rows, spent, weights + 16 * flops.linear_parameters(target) + activations
        if proxy and proxy.factorized and (settings := proxy.align):
            examples = share(total, settings.fraction)
            rows, batches = times * settings.epochs * examples, math.ceil(examples / settings.batch_size)
            kept = keeps_signals(scored, settings, batches, self.tokens_in(examples)[1])
            asked, gradients = 1 / settings.epochs if kept else 1.0, settings.gradient_weight > 0
            spent = flops.alignment_flops(target, scored, *self.tokens_in(rows), gradients=gradients, asked=asked)
            spent += self.watching(settings.held_out, 1 + align.EVALUATIONS) if settings.held_out else 0.0
            # The factors, their gradients and Adam's two in float32; second derivatives keep four times as much.
            batch = (4 if gradients else 1) * self.activations(min(ALIGN_TOKENS, self.session.batch_tokens), width=4)
            yield "align", rows, spent, 2 * weights + 20 * flops.linear_parameters(scored) + batch
        if audited:
            rows = min(audited.sample, total)
            spent = self.scoring(scored, rows, how) + self.scoring(target, rows, how.exact)
            yield "audit", 2 * rows * times, spent, 2 * weights + activations
            if audited.lds:
                yield "lds", *self.training(audited.lds * SUBSET_FRACTION * rows)
            if audited.removal:
                left = trainings_without(self.read.tasks) * (rows - removed_count(rows, REMOVED_FRACTION))
                yield "removal", *self.training(audited.removal * (rows + left))
        held = weights * bool(proxy) + self.weights(scored) + self.queries + activations
        yield "score", total * times, self.scoring(scored, total, how), held
        if recipe.refine and (again := recipe.refine.share(recipe.select.rows_of(total), total)) < 1:
            rows = again * total
            yield "refine", rows * times, self.scoring(target, rows, how.exact), held
        if why_not_attributed(recipe.influence, target, pairs=self.recipe.loss == "dpo") is None:
            rows = min(steps.ATTRIBUTED, total)
            yield "attribute", rows * times, self.scoring(scored, rows, how), held
        if tuned:
            rows = recipe.select.rows_of(total) or round((recipe.select.tokens or 0) / self.tokens)
            yield "finetune", *self.training(tuned.epochs * rows, tuned.lora)

    def scoring(self, model: Module, rows: float, how: InfluenceSection, as_on: Module | None = None) -> float:
        """Return the FLOPs of scoring rows at all checkpoints, the contraction as on another model if that is given."""
        proxy, estimator, (tokens, supervised) = self.recipe.proxy, estimator_of(how), self.tokens_in(rows)
        contraction = tokens * self.contraction(as_on or model, how)
        spent = estimator.candidate_flops(model, tokens, supervised, contraction)
        proxied = proxy and proxy.comparable and how.query == "target" and how.traits.gradients
        return self.checkpoints * (spent + estimator.query_flops(self.target if proxied else model, self.read))

    def watching(self, held_out: int, proxies: int) -> float:
        """Return the FLOPs of scoring held-out rows on the target and some proxies at each checkpoint."""
        how, (tokens, supervised) = watched_by(self.recipe.influence), self.tokens_in(min(held_out, self.total))
        sides = {"target": (self.target, how.exact), "proxy": (self.scored, how)}
        contraction = {side: tokens * self.contraction(*each) for side, each in sides.items()}
        watching = Watching(estimator_of(how), self.read, tokens, supervised, contraction, how.query == "target")
        return self.checkpoints * watching.flops(self.target, [self.scored] * proxies)

    def contraction(self, model: Module, how: InfluenceSection) -> float:
        """Return the FLOPs of contracting a token with validation gradients, and of norms in rows of mean length."""
        if not how.traits.gradients:
            return 0.0
        one, on_proxy = flops.contraction_flops(model), model is not self.target
        if how.traits.optimizer:  # a gradient per candidate is formed whole, whatever the number of tasks
            return one
        cut = CURVED_QUERY if how.traits.curvature else LOW_RANK_QUERY
        spent = self.read.tasks * one * (1 if how.kept_norm(on_proxy=on_proxy) == 1 else cut)
        if how.normalize == "cosine":
            spent += norm_flops(norm_shapes(model, NORM_SKETCH if on_proxy else 0), [self.tokens]) / self.tokens
        return spent

    def training(self, rows: float, lora: int = 0) -> tuple[float, float, float]:
        """Return rows, FLOPs and bytes: weights, gradients and Adam's two in float32, of adapters if there are any."""
        rank, weights, trained = None, 0, flops.parameters(self.target)
        if lora:
            rank, weights, trained = lora, trained, flops.lora_parameters(self.target, lora)
        spent = flops.training_flops(self.target, *self.tokens_in(rows), rank)
        return rows, spent, self.width * weights + 16 * trained + 2 * self.activations()

    def tokens_in(self, rows: float) -> tuple[int, int]:
        """Return the tokens of that many rows, and the supervised ones among them."""
        return round(rows * self.tokens), round(rows * self.supervised)

    @property
    def checkpoints(self) -> int:
        """At how many the pool is scored."""
        return self.recipe.warmup.epochs if self.recipe.warmup and self.recipe.influence.checkpoints == "all" else 1

    @property
    def width(self) -> int:
        """Bytes of a number of the dtype that products are in."""
        return self.session.dtype.itemsize

    def weights(self, model: PreTrainedModel) -> float:
        """Return the bytes of a model's weights."""
        kept = flops.linear_parameters(model)
        return self.width * (flops.parameters(model) - kept) + kept * bytes_per_weight(model.config, self.width)

    def activations(self, tokens: int | None = None, width: int | None = None) -> float:
        """Return the bytes that a batch keeps for its backward pass.

        Each linear layer's inputs and outputs, and 0.4 times as much for norms and attention: the peaks of
        `benchmarks/batches.py` differ by 1.4 (m + n) numbers per token and layer on SmolLM2-135M.
        """
        numbers = ACTIVATIONS * sum(m + n for m, n, _ in flops.layers_of(self.target))
        return numbers * (tokens or self.session.batch_tokens) * (width or self.width)

    @property
    def queries(self) -> float:
        """Bytes of validation gradients: of one task's examples while they are made, and of all tasks afterwards."""
        per_task = CURVED_QUERY if self.recipe.influence.by_example else 1.0
        made = self.width * self.read.tasks * per_task * flops.linear_parameters(self.scored)
        if not self.recipe.influence.by_example:
            return made
        tokens = self.read.tokens / max(1, self.read.tasks)
        whole = 4 * tokens * sum(m + n for m, n, _ in flops.layers_of(self.scored))
        return made + min(GRADIENTS, whole) * self.width / 4
