"""What each stage of a plan reads, computes and holds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from iprox.audits.removal import removed_count, trainings_without
from iprox.influence.attribution import why_not_attributed
from iprox.models import flops
from iprox.planning.costs import Costs
from iprox.proxy.align import EVALUATIONS
from iprox.proxy.align_signals import AUTO_BYTES
from iprox.proxy.search import most_tries
from iprox.run.steps import ATTRIBUTED
from iprox.session import share
from iprox.settings import REMOVED_FRACTION, SUBSET_FRACTION, AlignSection, TrainingSection


class Work(NamedTuple):
    """Of one stage: rows read, FLOPs, and the most bytes held."""

    rows: float
    flops: float
    memory: float


def warm_up(costs: Costs) -> Work | None:
    """Fine-tuning on a share of the pool."""
    settings = costs.recipe.warmup
    if not settings:
        return None
    return _training(costs, settings, settings.examples(costs.rows.total))


def _training(costs: Costs, settings: TrainingSection, examples: int) -> Work:
    """Epochs over some examples, of all weights or of adapters."""
    rows, rank = settings.epochs * examples, settings.lora.rank if settings.lora else None
    spent = flops.training_flops(costs.model, *costs.rows.read(rows), rank)
    return Work(rows, spent, costs.training_memory(rank))


def compress(costs: Costs) -> Work | None:
    """Moments and SVDs, and the search for a size that is faithful enough."""
    settings = costs.recipe.proxy
    if not settings:
        return None
    rows = costs.checkpoints * share(costs.rows.total, settings.probe.fraction)
    spent = flops.compression_flops(costs.model, *costs.rows.read(rows))
    if settings.fidelity is not None:
        spent += costs.checkpoints * costs.watching(settings.held_out, most_tries())
    return Work(rows, spent, costs.bytes_per_number * costs.parameters + 16 * costs.linear + costs.activations)


def align(costs: Costs) -> Work | None:
    """Steps of the factors, and fidelity watched."""
    proxy = costs.recipe.proxy
    settings = proxy and proxy.factorized and proxy.align
    if not settings:
        return None
    examples = share(costs.rows.total, settings.fraction)
    rows = costs.checkpoints * settings.epochs * examples
    # As `flops.alignment_flops` counts, before there is a proxy.
    passes, heads = (3 + 8 * costs.kept, 8) if settings.gradient_weight else (1 + 3 * costs.kept, 4)
    spent = rows * (costs.rows.tokens * passes * costs.forward + costs.rows.supervised * heads * costs.head)
    if _keeps_signals(settings, examples, costs.linear):
        # What the target says is kept from the first epoch on.
        asked = 3 if settings.gradient_weight else 1
        spent -= rows * (1 - 1 / settings.epochs) * costs.rows.tokens * asked * costs.forward
    if settings.held_out:
        spent += costs.checkpoints * costs.watching(settings.held_out, 1 + EVALUATIONS)
    memory = 2 * costs.bytes_per_number * costs.parameters + 20 * costs.kept * costs.linear + 4 * costs.activations
    return Work(rows, spent, memory)


def _keeps_signals(settings: AlignSection, examples: int, linear: float) -> bool:
    """Whether what the target says of each batch is not too large to keep."""
    return not settings.hidden_weight and 4 * examples / settings.batch_size * linear <= AUTO_BYTES


def audit(costs: Costs) -> Work | None:
    """A sample scored on proxy and target."""
    settings = costs.recipe.audit
    if not (costs.recipe.proxy and settings):
        return None
    rows = min(settings.sample, costs.rows.total) * costs.checkpoints
    spent = rows * (costs.per_row + costs.target_pool / (costs.rows.total * costs.checkpoints))
    spent += 2 * costs.checkpoints * costs.queries
    return Work(2 * rows, spent, 2 * costs.bytes_per_number * costs.parameters + costs.activations)


def lds(costs: Costs) -> Work | None:
    """Trainings on parts of the audited rows."""
    audited = costs.recipe.audit
    if not (costs.recipe.proxy and audited and audited.lds):
        return None
    rows = audited.lds * audited.epochs * SUBSET_FRACTION * min(audited.sample, costs.rows.total)
    return Work(rows, flops.training_flops(costs.model, *costs.rows.read(rows)), costs.training_memory())


def removal(costs: Costs) -> Work | None:
    """Trainings on all audited rows, and without some for each ranking, as many as there are at most."""
    audited = costs.recipe.audit
    if not (costs.recipe.proxy and audited and audited.removal):
        return None
    whole = min(audited.sample, costs.rows.total)
    left = whole - removed_count(whole, REMOVED_FRACTION)
    rows = audited.removal * audited.epochs * (whole + trainings_without(costs.queried.tasks) * left)
    return Work(rows, flops.training_flops(costs.model, *costs.rows.read(rows)), costs.training_memory())


def score(costs: Costs) -> Work:
    """The whole pool at every checkpoint."""
    rows = costs.rows.total * costs.checkpoints
    return Work(rows, rows * costs.per_row + costs.checkpoints * costs.queries, _scoring_memory(costs))


def _scoring_memory(costs: Costs) -> float:
    """Weights, every task's gradient, and a batch."""
    numbers = costs.parameters - (1 - costs.kept) * costs.linear + costs.queried.tasks * costs.kept * costs.linear
    return costs.bytes_per_number * numbers + costs.activations


def refine(costs: Costs) -> Work | None:
    """The best rows again on the target."""
    settings = costs.recipe.refine
    if not settings:
        return None
    part = settings.candidates
    spent = part * costs.target_pool + costs.checkpoints * costs.queries
    return Work(part * costs.rows.total * costs.checkpoints, spent, _scoring_memory(costs))


def attribute(costs: Costs) -> Work | None:
    """The rows that the report shows, token by token."""
    if why_not_attributed(costs.influence, costs.model) is not None:
        return None
    rows = min(ATTRIBUTED, costs.rows.total) * costs.checkpoints
    return Work(rows, rows * costs.per_row + costs.checkpoints * costs.queries, _scoring_memory(costs))


def finetune(costs: Costs) -> Work | None:
    """Training on the selection."""
    settings, selected = costs.recipe.finetune, costs.recipe.select
    if not settings:
        return None
    size = selected.count or round((selected.fraction or 0) * costs.rows.total)
    if selected.tokens:
        size = round(selected.tokens / costs.rows.tokens)
    return _training(costs, settings, size)


# In the order they are done.
PLANS: Mapping[str, Callable[[Costs], Work | None]] = {
    "warmup": warm_up,
    "compress": compress,
    "align": align,
    "audit": audit,
    "lds": lds,
    "removal": removal,
    "score": score,
    "refine": refine,
    "attribute": attribute,
    "finetune": finetune,
}
