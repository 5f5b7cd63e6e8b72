"""Gradient-free baselines to compare influence with.

As with influence, a higher score is selected first. `random`, `length` and `perplexity` depend on the candidate
alone, so all tasks get the same scores; `rds` and `bm25` compare it with a task's validation examples, with their mean
or one by one. Only `perplexity` and `rds` run a model, and only forward.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from iprox.data import Batch, ChatEncoder, Encoded, Pool
from iprox.engine.windows import WINDOW, windows_of
from iprox.influence.estimators.base import Estimator, Inputs, QueryTokens
from iprox.influence.scorer import Scorer
from iprox.models import flops
from iprox.models.loss import LossFn, causal_lm_losses
from iprox.models.observe import frozen
from iprox.models.precision import accumulation_dtype

# BM25's saturation of term counts and strength of length normalization (Robertson and Zaragoza 2009, section 3.4).
K1, B = 1.5, 0.75


class RowScorer(Scorer):
    """A scorer that applies a function to each batch.

    Args:
        tasks: names of the tasks.
        rows: function from a batch to scores [B], the same for all tasks, or [B, columns].
        widths: number of columns of each task; one each if None.
        by_example: whether there is one column per validation example.
        model: model that `rows` runs, if any.
    """

    def __init__(
        self,
        tasks: Collection[str],
        rows: Callable[[Any], Tensor],
        widths: Sequence[int] | None = None,
        *,
        by_example: bool = False,
        model: nn.Module | None = None,
    ) -> None:
        super().__init__(tasks, widths or [1] * len(tasks), by_example=by_example, model=model)
        self.rows = rows

    def __call__(self, batch: Any) -> tuple[Tensor, None]:
        """Return scores [B, columns], in float32 or better, and None for the losses."""
        scores = self.rows(batch)
        return (scores[:, None].expand(-1, len(self.tasks)) if scores.ndim == 1 else scores), None


class Random(Estimator):
    """Random scores drawn from the seed."""

    def scorer(self, inputs: Inputs) -> RowScorer:
        """Return the scorer."""
        return RowScorer(inputs.validation, lambda batch: random_scores(batch, inputs.seed))


class Length(Estimator):
    """The number of supervised tokens: long answers first, a strong baseline (Zhao et al., arXiv:2402.04833)."""

    def scorer(self, inputs: Inputs) -> RowScorer:
        """Return the scorer."""
        return RowScorer(inputs.validation, length_scores)


class Perplexity(Estimator):
    """The perplexity of the answer: the answers that surprise the model most come first."""

    def scorer(self, inputs: Inputs) -> RowScorer:
        """Return the scorer."""
        model, loss_fn = inputs.scored, inputs.loss_fn
        return RowScorer(inputs.validation, lambda batch: perplexity_scores(model, batch, loss_fn), model=model)

    def candidate_flops(self, model: nn.Module, tokens: int, supervised: int, contraction: float) -> float:
        """Return the FLOPs of a forward pass."""
        return flops.forward_pass_flops(model, tokens, supervised)


class Rds(Estimator):
    """RDS+: cosines of pooled hidden states (Ivison et al., arXiv:2503.01807)."""

    def scorer(self, inputs: Inputs) -> RowScorer:
        """Return the scorer, with the pooled states of each task's validation examples, or their mean, as queries."""
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
            inputs.validation,
            lambda batch: pooled_states(model, batch) @ rows.mT,
            widths,
            by_example=inputs.settings.by_example,
            model=model,
        )

    def query_flops(self, model: nn.Module, read: QueryTokens) -> float:
        """Return the FLOPs of a forward pass without the head."""
        return flops.forward_pass_flops(model, read.tokens, 0)

    def candidate_flops(self, model: nn.Module, tokens: int, supervised: int, contraction: float) -> float:
        """Return the FLOPs of a forward pass without the head."""
        return flops.forward_pass_flops(model, tokens, 0)


class Bm25(Estimator):
    """BM25 with the candidate as the document and each validation example as a query; terms are tokens.

    Σ_t q(t) · idf(t) · f(t)·(k₁ + 1) / (f(t) + k₁ (1 − b + b·|D| / mean length)), where f(t) and q(t) count t in the
    candidate and, on average, in a validation example. It is linear in q, so the mean over queries costs one query.
    """

    def scorer(self, inputs: Inputs) -> RowScorer:
        """Return the scorer."""
        assert inputs.corpus is not None
        read = {task: _terms(batches) for task, batches in inputs.validation.items()}
        return bm25_scorer(inputs.corpus, read, by_example=inputs.settings.by_example)


def _terms(batches: Iterable[Batch]) -> list[np.ndarray]:
    """Return the tokens of each example, in order."""
    found = {
        index: tokens[:length].cpu().numpy()
        for batch in batches
        for index, tokens, length in zip(batch.indices, batch.input_ids, batch.lengths.tolist(), strict=True)
    }
    return [found[index] for index in sorted(found)]


def random_scores(batch: Batch, seed: int) -> Tensor:
    """Return a number in [0, 1) per example [B], from a hash of the seed and the example's tokens.

    It depends neither on the batch nor on the order of the pool; rows with the same tokens get the same number.
    """
    drawn = []
    for tokens, length in zip(batch.input_ids, batch.lengths.tolist(), strict=True):
        key = np.ascontiguousarray(tokens[:length].cpu().numpy()).tobytes()
        digest = hashlib.blake2b(key, digest_size=8, key=str(seed).encode()).digest()
        drawn.append((int.from_bytes(digest, "big") >> 11) / 2**53)  # the 53 bits of a double
    return torch.tensor(drawn, dtype=torch.float64)


def length_scores(batch: Batch) -> Tensor:
    """Return the number of supervised tokens of each example [B]."""
    return (batch.labels[:, 1:] != -100).sum(1).double()


def perplexity_scores(model: nn.Module, batch: Any, loss_fn: LossFn = causal_lm_losses) -> Tensor:
    """Return exp of each example's mean loss in nats [B]."""
    with frozen(model), torch.no_grad():
        return loss_fn(model, batch).double().exp()


def pooled_states(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Return the position-weighted mean of each example's last hidden states, normalized to unit length [B, d].

    State t of T has weight t / (1 + ... + T), as later states of a causal model have seen more. This is the
    representation of RDS+ (Ivison et al., arXiv:2503.01807, section 3; weights of SGPT, arXiv:2202.08904, eq. 3).
    """
    with frozen(model), torch.no_grad():
        states = model.base_model(input_ids=batch.input_ids, use_cache=False).last_hidden_state
    dtype = accumulation_dtype(states)
    positions = torch.arange(1, states.shape[1] + 1, device=states.device, dtype=dtype)
    weights = positions * (positions <= batch.lengths[:, None])
    pooled = torch.einsum("bt,btd->bd", weights, states.to(dtype))  # normalizing removes the sum of the weights
    return nn.functional.normalize(pooled, dim=1)


@dataclass(frozen=True, slots=True)
class Corpus:
    """Term statistics of the whole pool for BM25; their size does not grow with the pool.

    Attributes:
        documents: number of examples.
        frequencies: number of examples that contain each token id, int64 [largest id + 1].
        mean_length: mean number of tokens per example.
    """

    documents: int
    frequencies: np.ndarray
    mean_length: float

    @classmethod
    def of_pool(cls, pool: Pool, encoder: ChatEncoder, progress: Callable[[int], None] | None = None) -> Corpus:
        """Count the terms of a pool, read as a stream."""

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
        """Return the inverse document frequency of the first `size` token ids, ln(1 + (N − n + ½) / (n + ½))."""
        counts = np.zeros(size)
        known = min(size, len(self.frequencies))
        counts[:known] = self.frequencies[:known]
        return np.log1p((self.documents - counts + 0.5) / (counts + 0.5))


def bm25_scorer(corpus: Corpus, validation: Mapping[str, Sequence[np.ndarray]], *, by_example: bool) -> RowScorer:
    """Return the BM25 scorer (see `Bm25`).

    Args:
        corpus: term statistics of the pool.
        validation: tokens of each task's validation examples.
        by_example: whether to keep one score per validation example.
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
            known = terms < size  # larger ids are in no query
            terms, counts = terms[known], counts[known]
            saturated = counts * (K1 + 1) / (counts + K1 * (1 - B + B * length / corpus.mean_length))
            scores[row] = saturated @ queries[terms]
        return torch.from_numpy(scores)

    return RowScorer(validation, rows, widths, by_example=by_example)
