"""Attribute a candidate's score to its tokens.

A score is a sum over tokens, I(z; V) = Σ_t Σ_ℓ δ_tᵀ Ḡ_ℓ h_t. Its terms give the exact contribution of each token's
position, for the cost of scoring once more. Prompt tokens have terms too, because the answer depends on them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pyarrow as pa
from torch import nn

from iprox.data import Encoded, Example, iter_batches
from iprox.data.tokens import token_pieces
from iprox.engine.stream import fitting
from iprox.influence.job import Job
from iprox.influence.scorer import BatchScorer
from iprox.models.experts import SplitExperts
from iprox.scores import TASK_PREFIX
from iprox.settings import InfluenceSection

# Terms of each example [tokens, tasks]; None for an example without a supervised token.
Terms = list[np.ndarray | None]


def why_not_attributed(settings: InfluenceSection, model: nn.Module, *, pairs: bool = False) -> str | None:
    """Return why scores with these settings on this model are not sums over tokens; None if they are.

    Args:
        settings: how they were scored.
        model: model that they were scored on.
        pairs: whether the rows are preference pairs.
    """
    if pairs:
        return "a preference pair has the tokens of two answers"
    if not settings.traits.gradients:
        return f"{settings.estimator} uses no gradients"
    if not settings.traits.by_token:
        return f"the step that {settings.estimator} scores is not a sum over tokens"
    if any(isinstance(module, SplitExperts) for module in model.modules()):
        return "expert layers do not see every token"
    return None


def attribute(
    job: Job, examples: Sequence[Example], progress: Callable[[int], None] | None = None
) -> tuple[Terms, float]:
    """Return the terms of the examples' scores, summed over checkpoints, and the FLOPs of the contractions.

    Args:
        job: job that scored the examples; `why_not_attributed` must be None for its settings and models.
        examples: a few examples, as there is one term per token.
        progress: called with the number of examples done at a checkpoint.

    Raises:
        TypeError: the model has experts, which do not see every token.
    """
    assert job.encoder is not None
    encoded = job.encoder.encode(examples)
    longest = max((row.longest for row in encoded), default=1)
    total: Terms = [None] * len(examples)
    spent = 0.0
    for number, rate in enumerate(job.learning_rates):
        scorer, batch_tokens = job.scorer(number)
        assert isinstance(scorer, BatchScorer)
        found, _ = fitting(lambda budget, scorer=scorer: terms_of(scorer, encoded, budget), batch_tokens, longest)
        for place, terms in enumerate(found):
            before = total[place]
            if terms is not None:
                total[place] = rate * terms if before is None else before + rate * terms
        spent += scorer.spent_flops([len(row.input_ids) for row in encoded if row.supervised])
        if progress is not None:
            progress(len(examples))
    return total, spent


def terms_of(scorer: BatchScorer, encoded: Sequence[Encoded], batch_tokens: int) -> Terms:
    """Return the terms [tokens, tasks] of each example's scores at one checkpoint.

    Args:
        scorer: gradient-based scorer of the checkpoint.
        encoded: encoded examples.
        batch_tokens: largest batch size, rows × longest row.
    """
    terms: Terms = [None] * len(encoded)
    for batch in iter_batches(encoded, batch_tokens):
        found, _ = scorer(batch.to(scorer.device), by_token=True)
        values = scorer.of_tasks(found.double().cpu().numpy())
        for row, index in enumerate(batch.indices):
            terms[index] = values[row, : int(batch.lengths[row])]
    return terms


def attribution_table(job: Job, examples: Sequence[Example], terms: Terms) -> pa.Table:
    """Return the terms as a table.

    Returns:
        One row per example, in order: `id`, `tokens` (list of strings), `supervised` (list of bool), and per task a
        list of float64, `influence/<task>`, that sums to the score; null if the example has no supervised token.
    """
    assert job.encoder is not None
    encoded, tokenizer = job.encoder.encode(examples), job.encoder.tokenizer
    columns: dict[str, pa.Array] = {
        "id": pa.array([example.id for example in examples], pa.string()),
        "tokens": pa.array([token_pieces(tokenizer, row.input_ids.tolist()) for row in encoded], pa.list_(pa.string())),
        "supervised": pa.array([(row.labels != -100).tolist() for row in encoded], pa.list_(pa.bool_())),
    }
    for number, task in enumerate(job.validation):
        columns[TASK_PREFIX + task] = lists([None if each is None else each[:, number] for each in terms])
    return pa.table(columns)


def lists(rows: Sequence[np.ndarray | None]) -> pa.Array:
    """Return arrays of different lengths as a column of lists."""
    return pa.array([None if row is None else row.tolist() for row in rows], pa.list_(pa.float64()))
