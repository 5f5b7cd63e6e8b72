"""Baselines without gradients, to compare influence with.

All of them say "higher is chosen first", as influence does. `random`, `length` and `perplexity` look at a candidate
alone, so every task has the same column; `rds` and `bm25` compare it with a task's validation examples, by the mean
over them or one by one. Only `perplexity` and `rds` run a model, forward only.
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

from iprox.data import Batch, ChatEncoder, Encoded, Pool
from iprox.engine.stream import WINDOW, windows_of
from iprox.influence.estimators.base import Estimator, Inputs, QueryTokens
from iprox.influence.scorer import Scorer
from iprox.models import flops
from iprox.models.loss import LossFn, causal_lm_losses
from iprox.models.observe import frozen
from iprox.models.precision import accumulation_dtype

# BM25's saturation of term counts and strength of length normalization (Robertson and Zaragoza 2009, section 3.4).
K1, B = 1.5, 0.75


class RowScorer(Scorer):
    """Scores batches of candidates, each row by itself.

    Args:
        tasks: names of the tasks.
        rows: batch -> scores [B], the same for all tasks, or [B, columns].
        widths: columns of each task; None: one.
        by_example: whether the columns are validation examples.
        model: what is run, if anything.
    """

    def __init__(
        self,
        tasks: Sequence[str],
        rows: Callable[[Any], Tensor],
        widths: Sequence[int] | None = None,
        *,
        by_example: bool = False,
        model: nn.Module | None = None,
    ) -> None:
        super().__init__(tasks, widths or [1] * len(tasks), by_example=by_example, model=model)
        self.rows = rows

    def __call__(self, batch: Any) -> tuple[Tensor, None]:
        """Return scores [B, columns], in float32 or better; and no losses."""
        scores = self.rows(batch)
        return (scores[:, None].expand(-1, len(self.tasks)) if scores.ndim == 1 else scores), None


class Random(Estimator):
    """A random order, drawn by the seed."""

    def scorer(self, inputs: Inputs) -> RowScorer:
        """Return what draws."""
        return RowScorer(list(inputs.validation), lambda batch: random_scores(batch, inputs.seed))


class Length(Estimator):
    """Supervised tokens: long answers first, a strong baseline (Zhao et al., arXiv:2402.04833)."""

    def scorer(self, inputs: Inputs) -> RowScorer:
        """Return what counts."""
        return RowScorer(list(inputs.validation), length_scores)


class Perplexity(Estimator):
    """The perplexity of the answer: what the model finds hardest first."""

    def scorer(self, inputs: Inputs) -> RowScorer:
        """Return what runs the model forward."""
        model = inputs.scored
        tasks = list(inputs.validation)
        return RowScorer(tasks, lambda batch: perplexity_scores(model, batch, inputs.loss_fn), model=model)

    def candidate_flops(
        self, model: nn.Module, tokens: int, supervised: int, contraction: float, graded: int | None = None
    ) -> float:
        """Return the FLOPs of a forward pass."""
        return flops.forward_pass_flops(model, tokens, supervised)


class Rds(Estimator):
    """RDS+: cosines of pooled hidden states (Ivison et al., arXiv:2503.01807)."""

    def scorer(self, inputs: Inputs) -> RowScorer:
        """Return what compares hidden states with those of each task's validation examples, or with their mean."""
        model: Any = inputs.scored
        queries = []
        for batches in inputs.validation.values():
            states, order = [], []
            for batch in batches:
                states.append(pooled_states(model, batch))
                order += batch.indices
            of_task = torch.cat(states)[np.argsort(order)]
            queries.append(of_task if inputs.settings.by_example else of_task.mean(0, keepdim=True))
        rows, widths = torch.cat(queries), [len(of_task) for of_task in queries]
        return RowScorer(
            list(inputs.validation),
            lambda batch: pooled_states(model, batch) @ rows.mT,
            widths,
            by_example=inputs.settings.by_example,
            model=model,
        )

    def query_flops(self, model: nn.Module, read: QueryTokens) -> float:
        """Return the FLOPs of a forward pass without the head."""
        return flops.forward_pass_flops(model, read.tokens, 0)

    def candidate_flops(
        self, model: nn.Module, tokens: int, supervised: int, contraction: float, graded: int | None = None
    ) -> float:
        """Return the FLOPs of a forward pass without the head."""
        return flops.forward_pass_flops(model, tokens, 0)


class Bm25(Estimator):
    """BM25 of a candidate as the document and each validation example as a query; terms are the tokenizer's tokens.

    Σ_t q(t) · idf(t) · f(t)·(k₁ + 1) / (f(t) + k₁ (1 − b + b·|D| / mean length)), f(t) and q(t) how often t is in the
    candidate and, on average, in a validation example. It is linear in q, so the mean over queries costs one query.
    """

    def scorer(self, inputs: Inputs) -> RowScorer:
        """Return what looks up terms."""
        assert inputs.corpus is not None
        read = {task: _terms(batches) for task, batches in inputs.validation.items()}
        return bm25_scorer(inputs.corpus, read, by_example=inputs.settings.by_example)


def _terms(batches: Iterable[Batch]) -> list[np.ndarray]:
    """Return the tokens of each example of a set, in order."""
    found = {
        index: tokens[:length].cpu().numpy()
        for batch in batches
        for index, tokens, length in zip(batch.indices, batch.input_ids, batch.lengths.tolist(), strict=True)
    }
    return [found[index] for index in sorted(found)]


def random_scores(batch: Batch, seed: int) -> Tensor:
    """Return a number from [0, 1) for each example [B], drawn by a hash of the seed and its tokens.

    So it depends neither on the batch nor on the order of the pool; rows of the same tokens draw the same number.
    """
    drawn = []
    for tokens, length in zip(batch.input_ids, batch.lengths.tolist(), strict=True):
        key = np.ascontiguousarray(tokens[:length].cpu().numpy()).tobytes()
        digest = hashlib.blake2b(key, digest_size=8, key=str(seed).encode()).digest()
        drawn.append((int.from_bytes(digest, "big") >> 11) / 2**53)  # the 53 bits of a double
    return torch.tensor(drawn, dtype=torch.float64)


def length_scores(batch: Batch) -> Tensor:
    """Return the supervised tokens of each example [B]."""
    return (batch.labels[:, 1:] != -100).sum(1).double()


def perplexity_scores(model: nn.Module, batch: Any, loss_fn: LossFn = causal_lm_losses) -> Tensor:
    """Return exp of each example's mean loss in nats [B]."""
    with frozen(model), torch.no_grad():
        return loss_fn(model, batch).double().exp()


def pooled_states(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Return each example's last hidden states, averaged by position and scaled to unit length [B, d].

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
    def of_pool(cls, pool: Pool, encoder: ChatEncoder, progress: Callable[[int], None] | None = None) -> Corpus:
        """Count the terms of a whole pool, read as a stream."""

        def encoded() -> Iterable[Encoded]:
            for window in windows_of(pool, WINDOW):
                yield from encoder.encode(window)
                if progress is not None:
                    progress(len(window))

        return cls.of(encoded())

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


def bm25_scorer(corpus: Corpus, validation: Mapping[str, Sequence[np.ndarray]], *, by_example: bool) -> RowScorer:
    """Return what scores candidates by BM25 (see `Bm25`).

    Args:
        corpus: term counts of the pool.
        validation: tokens of each task's validation examples.
        by_example: keep the scores by validation example.
    """
    size = max(int(tokens.max()) for examples in validation.values() for tokens in examples) + 1
    widths = [len(examples) if by_example else 1 for examples in validation.values()]
    queries = np.zeros((size, sum(widths)))
    starts = np.cumsum([0, *widths])
    for start, examples in zip(starts, validation.values(), strict=False):
        for number, tokens in enumerate(examples):
            terms = np.bincount(tokens, minlength=size)
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

    return RowScorer(list(validation), rows, widths, by_example=by_example)
