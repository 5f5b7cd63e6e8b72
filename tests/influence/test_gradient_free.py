"""Scorers without gradients, against their formulas written out."""

import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jobs import job_of, scorer_of

from iprox.data import Encoded, Pool, iter_batches
from iprox.engine.shards import score_to_file
from iprox.influence import baselines
from iprox.influence.baselines import Corpus
from iprox.scores import read_scores, score_matrix
from iprox.settings import InfluenceSection


def encoded(rows):
    return [Encoded(np.array(row, np.int32), np.array(row, np.int32), truncated=False) for row in rows]


def scored(scorer, rows, batch_tokens=40):
    scores = np.zeros((len(rows), len(scorer.tasks)))
    for batch in iter_batches(rows, batch_tokens):
        scores[batch.indices] = scorer(batch)[0].double().numpy()
    return scores


def test_random_numbers_are_uniform_and_depend_on_the_row_and_the_seed_alone():
    rows = encoded(np.random.default_rng(0).integers(1, 60, (2000, 5)))
    rows += encoded([[1, 2], [1, 2, 3, 4, 5, 6, 7]])
    scorer = scorer_of(None, {"a": rows[:1], "b": rows[:1]}, estimator="random")
    scores = scored(scorer, rows)
    np.testing.assert_array_equal(scores, scored(scorer, rows, batch_tokens=1))
    np.testing.assert_array_equal(scores[:, 0], scores[:, 1])
    deciles = np.histogram(scores[:, 0], bins=10, range=(0, 1))[0]
    assert deciles.sum() == len(rows)
    assert abs(deciles - 200).max() < 50
    other = scorer_of(None, {"a": rows[:1]}, estimator="random", seed=1)
    assert abs(np.corrcoef(scored(other, rows)[:, 0], scores[:, 0])[0, 1]) < 0.1


def test_length_counts_tokens_that_are_predicted():
    rows = [Encoded(np.arange(6, dtype=np.int32), np.array([0, -100, 2, 3, -100, 5], np.int32), False)]
    scorer = scorer_of(None, {"a": rows}, estimator="length")
    assert scored(scorer, rows).tolist() == [[3.0]]


def test_perplexity_is_that_of_the_supervised_tokens(tiny):
    model = tiny.model("qwen3")
    batch = tiny.batch([9, 4, 7], seed=2, padding=3)
    perplexity = baselines.perplexity_scores(model, batch)
    for row in range(3):
        length = int(batch.lengths[row])
        with torch.no_grad():
            logits = model(input_ids=batch.input_ids[row : row + 1, :length]).logits[0, :-1]
        expected = torch.nn.functional.cross_entropy(logits, batch.labels[row, 1:length], ignore_index=-100).exp()
        torch.testing.assert_close(perplexity[row], expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize("family", ["qwen3", "gpt2", "gpt-neox"])
def test_pooled_states_weigh_later_positions_more_whatever_the_padding(tiny, family):
    model = tiny.model(family)
    batch = tiny.batch([9, 4, 7], seed=2, padding=5)
    pooled = baselines.pooled_states(model, batch)
    for row in range(3):
        length = int(batch.lengths[row])
        with torch.no_grad():
            states = model(input_ids=batch.input_ids[row : row + 1, :length], output_hidden_states=True)
        weights = torch.arange(1.0, length + 1, dtype=torch.float64)
        expected = (weights[:, None] / weights.sum() * states.hidden_states[-1][0]).sum(0)
        torch.testing.assert_close(pooled[row], expected / expected.norm(), rtol=1e-6, atol=1e-7)


def test_rds_is_the_mean_cosine_with_validation_examples(tiny):
    model = tiny.model("qwen3")
    rows = encoded([[3, 1, 4, 1, 5], [9, 2, 6], [5, 3, 5, 8, 9, 7]])
    validation = {"one": rows[:1], "two": encoded([[2, 7, 1, 8], [2, 8, 1]])}
    scores = scored(scorer_of(model, validation, estimator="rds"), rows)

    def state(row):
        return baselines.pooled_states(model, next(iter_batches([row], 100)))[0]

    for column, examples in enumerate(validation.values()):
        for number, row in enumerate(rows):
            cosines = [float(state(row) @ state(example)) for example in examples]
            assert scores[number, column] == pytest.approx(np.mean(cosines), abs=1e-6)
    assert scores[0, 0] == pytest.approx(1, abs=1e-6)


def bm25_by_hand(document, query, documents):
    k1, b = 1.5, 0.75
    mean = sum(map(len, documents)) / len(documents)
    counts = Counter(document)
    total = 0.0
    for term in query:  # every occurrence of a term in the query counts
        holding = sum(term in other for other in documents)
        rarity = math.log(1 + (len(documents) - holding + 0.5) / (holding + 0.5))
        total += rarity * counts[term] * (k1 + 1) / (counts[term] + k1 * (1 - b + b * len(document) / mean))
    return total


tokens = st.lists(st.integers(1, 30), min_size=2, max_size=12)


@settings(deadline=None)
@given(st.lists(tokens, min_size=1, max_size=8), st.lists(tokens, min_size=1, max_size=3))
def test_bm25_is_its_formula(documents, queries):
    rows = encoded(documents)
    scorer = scorer_of(None, {"task": encoded(queries)}, estimator="bm25", corpus=Corpus.of(iter(rows)))
    expected = [np.mean([bm25_by_hand(document, query, documents) for query in queries]) for document in documents]
    np.testing.assert_allclose(scored(scorer, rows)[:, 0], expected, rtol=1e-12)


def test_cosine_of_no_gradient_is_refused():
    with pytest.raises(ValueError, match="perplexity uses none"):
        InfluenceSection(estimator="perplexity", normalize="cosine")


class Numbers:
    """Encodes a text of numbers as those tokens, all supervised."""

    def encode(self, examples):
        return encoded([[int(number) for number in example.text.split()] for example in examples])


@pytest.mark.parametrize("estimator", ["random", "length", "bm25"])
def test_no_model_is_loaded_where_none_is_run(tmp_path, estimator):
    pool = Pool([{"text": f"{i} {i + 1} 7"} for i in range(1, 9)])
    validation = {"task": encoded([[3, 4, 5]])}

    def load(path):
        raise AssertionError(f"{path} was loaded")

    corpus = Corpus.of(Numbers().encode(list(pool)))
    job = job_of("model", validation, estimator=estimator, corpus=corpus, encoder=Numbers(), batch_tokens=16, load=load)
    path = tmp_path / "s.parquet"
    stats = score_to_file(job.workers, job.learning_rates, pool, path, identity={}, window=3, ranks=False)
    assert stats.rows == 8
    scores = score_matrix(read_scores(path))
    scorer = scorer_of(None, validation, estimator=estimator, corpus=corpus)
    np.testing.assert_array_equal(scores, scored(scorer, Numbers().encode(list(pool))))
