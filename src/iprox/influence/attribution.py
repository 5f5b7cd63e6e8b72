"""Which tokens of a candidate its score comes from.

A score is a sum over tokens, I(z; V) = Σ_t Σ_ℓ δ_tᵀ Ḡ_ℓ h_t, so its terms say how much of it passes through each
token's position: exactly, and for the cost of scoring once more. A prompt's tokens have terms too, as the answer
depends on them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from iprox.data import ChatEncoder, Example, iter_batches
from iprox.data.tokens import token_pieces
from iprox.influence.estimators import BatchScorer
from iprox.influence.scores import TASK_PREFIX


def attribute_examples(
    scorer: BatchScorer, examples: Sequence[Example], encoder: ChatEncoder, pad_id: int, batch_tokens: int
) -> pa.Table:
    """The scores of some examples, token by token.

    Args:
        scorer: of candidates, by gradients.
        examples: few, as the table is as long as their text.
        encoder: makes tokens and labels.
        pad_id: token id of the padding.
        batch_tokens: largest rows × longest row of a batch.

    Returns:
        One row an example, in order: `id`, `tokens` (list of strings), `supervised` (list of bool), and a list of
        float64 a task, `influence/<task>`, that sums to its score. An example without a supervised token has nulls.

    Raises:
        TypeError: a model with experts, whose layers do not see every token.
    """
    encoded = encoder.encode(examples)
    terms: list[np.ndarray | None] = [None] * len(examples)
    edges = np.cumsum(scorer.widths)[:-1]
    for batch in iter_batches(encoded, batch_tokens, pad_id):
        columns_of_tasks = np.split(scorer.by_token(batch.to(scorer.device)).double().cpu().numpy(), edges, axis=-1)
        parts = zip(columns_of_tasks, scorer.weights, strict=True)  # of validation examples, or one per task
        values = np.stack([part @ weights for part, weights in parts], axis=-1)
        for row, index in enumerate(batch.indices):
            terms[index] = values[row, : int(batch.lengths[row])]
    columns: dict[str, pa.Array] = {
        "id": pa.array([example.id for example in examples], pa.string()),
        "tokens": pa.array(
            [token_pieces(encoder.tokenizer, row.input_ids.tolist()) for row in encoded], pa.list_(pa.string())
        ),
        "supervised": pa.array([(row.labels != -100).tolist() for row in encoded], pa.list_(pa.bool_())),
    }
    for column, task in enumerate(scorer.tasks):
        values = [None if term is None else term[:, column].tolist() for term in terms]
        columns[TASK_PREFIX + task] = pa.array(values, pa.list_(pa.float64()))
    return pa.table(columns)
