"""Scorers without gradients: what influence has to beat, one batch of candidates at a time.

All of them say "higher is chosen first", as influence does. `random`, `length` and `perplexity` look at a candidate
alone, so every task has the same column; `rds` and `bm25` compare it with a task's validation examples, by the mean
over them. Only `perplexity` and `rds` run a model, forward only.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from iprox.data import Batch, Encoded
from iprox.models.loss import LossFn, causal_lm_losses
from iprox.models.observe import frozen
from iprox.models.precision import accumulation_dtype

# BM25's saturation of term counts and strength of length normalization (Robertson and Zaragoza 2009, section 3.4).
K1, B = 1.5, 0.75


@dataclass(frozen=True, slots=True)
class RowScorer:
    """Scores batches of candidates, a row by itself; the same to look at as `BatchScorer`.

    Attributes:
        tasks: what is scored.
        rows: batch -> scores [B] or [B, columns]; one column serves all tasks.
        model: what is run, if anything.
        columns: of each task; None: one.
    """

    tasks: list[str]
    rows: Callable[[Any], Tensor]
    model: nn.Module | None = None
    columns: list[int] | None = None
    contraction_flops: float = 0.0
    example_flops: float = 0.0

    @property
    def widths(self) -> list[int]:
        """Columns of each task."""
        return self.columns or [1] * len(self.tasks)

    @property
    def weights(self) -> list[np.ndarray]:
        """By task, what its columns sum to its own score with: their mean."""
        return [np.full(width, 1 / width) for width in self.widths]

    def norm_flops(self, lengths: Sequence[int]) -> float:
        """There are no gradients to take norms of."""
        return 0.0

    @property
    def kept(self) -> dict[str, float]:
        """There are no validation gradients to cut."""
        return dict.fromkeys(self.tasks, 1.0)

    @property
    def device(self) -> torch.device:
        """Where batches are to be."""
        return torch.device("cpu") if self.model is None else next(self.model.parameters()).device

    def __call__(self, batch: Any) -> tuple[Tensor, None]:
        """Scores [B, columns], in float32 or better; and no losses."""
        scores = self.rows(batch)
        return (scores[:, None].expand(-1, len(self.tasks)) if scores.ndim == 1 else scores), None


def random_scores(batch: Batch, seed: int) -> Tensor:
    """A number from [0, 1) an example [B], drawn by a hash of the seed and its tokens.

    So it depends neither on the batch nor on the order of the pool; rows of the same tokens draw the same number.
    """
    drawn = []
    for tokens, length in zip(batch.input_ids, batch.lengths.tolist(), strict=True):
        key = np.ascontiguousarray(tokens[:length].cpu().numpy()).tobytes()
        digest = hashlib.blake2b(key, digest_size=8, key=str(seed).encode()).digest()
        drawn.append((int.from_bytes(digest, "big") >> 11) / 2**53)  # the 53 bits of a double
    return torch.tensor(drawn, dtype=torch.float64)


def length_scores(batch: Batch) -> Tensor:
    """Supervised tokens of each example [B]: long answers first, a strong baseline (Zhao et al., arXiv:2402.04833)."""
    return (batch.labels[:, 1:] != -100).sum(1).double()


def perplexity_scores(model: nn.Module, batch: Any, loss_fn: LossFn = causal_lm_losses) -> Tensor:
    """exp of each example's mean loss in nats [B]: what the model finds hardest first."""
    with frozen(model), torch.no_grad():
        return loss_fn(model, batch).double().exp()


def pooled_states(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Each example's last hidden states, averaged with weights that rise with the position, to unit length [B, d].

    State t of T weighs t / (1 + ... + T): of a causal model the later states have seen more. This is the
    representation of RDS+ (Ivison et al., arXiv:2503.01807, section 3; weights of SGPT, arXiv:2202.08904, eq. 3).
    """
    with frozen(model), torch.no_grad():
        states = model.base_model(input_ids=batch.input_ids, use_cache=False).last_hidden_state
    dtype = accumulation_dtype(states)
    positions = torch.arange(1, states.shape[1] + 1, device=states.device, dtype=dtype)
    weights = positions * (positions <= batch.lengths[:, None])
    pooled = torch.einsum("bt,btd->bd", weights, states.to(dtype))  # a positive factor goes with the length
    return nn.functional.normalize(pooled, dim=1)


def rds_scorer(
    model: PreTrainedModel, validation: Mapping[str, Iterable[Batch]], *, by_example: bool = False
) -> RowScorer:
    """Mean cosine of a candidate's pooled hidden states with those of each task's validation examples.

    `by_example`: not their mean but each, a column an example.
    """
    queries = []
    for batches in validation.values():
        states, order = [], []
        for batch in batches:
            states.append(pooled_states(model, batch))
            order += batch.indices
        of_task = torch.cat(states)[np.argsort(order)]
        queries.append(of_task if by_example else of_task.mean(0, keepdim=True))
    rows = torch.cat(queries)
    widths = [len(of_task) for of_task in queries]
    return RowScorer(list(validation), lambda batch: pooled_states(model, batch) @ rows.mT, model, widths)


@dataclass(frozen=True, slots=True)
class Corpus:
    """What BM25 needs to know of the whole pool; its size does not grow with the pool's.

    Attributes:
        documents: examples.
        frequencies: examples that hold each token id, int64 [largest id + 1].
        mean_length: tokens an example.
    """

    documents: int
    frequencies: np.ndarray
    mean_length: float

    @classmethod
    def of(cls, encoded: Iterable[Encoded]) -> Corpus:
        """Count a stream of examples."""
        documents, tokens = 0, 0
        frequencies = np.zeros(0, dtype=np.int64)
        for example in encoded:
            documents += 1
            tokens += len(example.input_ids)
            present = np.unique(example.input_ids)
            if len(present) and present[-1] >= len(frequencies):
                frequencies = np.pad(frequencies, (0, int(present[-1]) + 1 - len(frequencies)))
            frequencies[present] += 1
        return cls(documents, frequencies, tokens / max(1, documents))

    def rarity(self, size: int) -> np.ndarray:
        """Inverse document frequency of the first `size` token ids, ln(1 + (N − n + ½) / (n + ½)), float64."""
        counts = np.zeros(size)
        known = min(size, len(self.frequencies))
        counts[:known] = self.frequencies[:known]
        return np.log1p((self.documents - counts + 0.5) / (counts + 0.5))


def bm25_scorer(corpus: Corpus, validation: Mapping[str, Sequence[Encoded]], *, by_example: bool = False) -> RowScorer:
    """BM25 of a candidate as the document and each validation example as a query; terms are the tokenizer's tokens.

    Σ_t q(t) · idf(t) · f(t)·(k₁ + 1) / (f(t) + k₁ (1 − b + b·|D| / mean length)), f(t) and q(t) how often t is in the
    candidate and, on average, in a validation example. It is linear in q, so the mean over queries costs one query.

    `by_example`: not their mean but each, a column an example.
    """
    size = max(int(example.input_ids.max()) for examples in validation.values() for example in examples) + 1
    # As for every other scorer, examples without a supervised token do not count.
    used = [[example for example in examples if example.supervised] for examples in validation.values()]
    widths = [len(examples) if by_example else 1 for examples in used]
    queries = np.zeros((size, sum(widths)))
    starts = np.cumsum([0, *widths])
    for start, examples in zip(starts, used, strict=False):
        for number, example in enumerate(examples):
            terms = np.bincount(example.input_ids, minlength=size)
            queries[:, start + (number if by_example else 0)] += terms if by_example else terms / len(examples)
    queries *= corpus.rarity(size)[:, None]

    def rows(batch: Batch) -> Tensor:
        scores = np.zeros((len(batch.lengths), queries.shape[1]))
        for row, (tokens, length) in enumerate(zip(batch.input_ids, batch.lengths.tolist(), strict=True)):
            terms, counts = np.unique(tokens[:length].cpu().numpy(), return_counts=True)
            known = terms < size  # a token that no query holds adds nothing
            terms, counts = terms[known], counts[known]
            saturated = counts * (K1 + 1) / (counts + K1 * (1 - B + B * length / corpus.mean_length))
            scores[row] = saturated @ queries[terms]
        return torch.from_numpy(scores)

    return RowScorer(list(validation), rows, columns=widths)
