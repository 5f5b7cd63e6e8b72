"""Scores by validation example, and how they become one: against the mean gradient and against each by itself."""

import dataclasses

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jobs import job_of, scorer_of, settings_of
from letters import Letters

from iprox.aggregation import TaskSpread
from iprox.data import Pool
from iprox.engine.shards import score_to_file
from iprox.influence.gradients import summed_gradient
from iprox.influence.scorer import BatchScorer
from iprox.influence.validation_gradients import example_gradient, example_gradients, mean_gradient
from iprox.proxy.compress import derive_proxy
from iprox.proxy.size import Size
from iprox.scores import example_matrix, score_matrix


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 9), st.integers(1, 7), st.integers(1, 7), st.booleans(), st.integers(0, 99))
def test_the_gradient_of_an_example_is_its_product_of_tokens(length, m, n, bias, seed):
    generator = torch.Generator().manual_seed(seed)
    h, delta = torch.randn(length, n, generator=generator), torch.randn(length, m, generator=generator)
    h, delta = h.double(), delta.double()
    delta[seed % length] = 0  # a position that the loss does not hang on
    whole = summed_gradient(h[None], delta[None], bias)
    exact = example_gradient(h, delta, bias, 1.0)
    torch.testing.assert_close(exact.left @ exact.right.mT, whole.weight)
    torch.testing.assert_close(exact.squared_norm(), whole.squared_norm())
    cut = example_gradient(h, delta, bias, 0.9)
    torch.testing.assert_close(cut.squared_norm(), whole.squared_norm())
    error = (cut.left @ cut.right.mT - whole.weight).square().sum()
    torch.testing.assert_close(error, cut.lost, rtol=1e-6, atol=1e-10)
    assert cut.lost <= (1 - 0.9**2) * whole.weight.square().sum() + 1e-10


@pytest.mark.parametrize("family", ["qwen2", "gpt2", "qwen3-moe"])
@pytest.mark.parametrize("normalize", ["none", "cosine"])
def test_each_example_is_a_column_as_if_it_were_a_task(tiny, family, normalize):
    from iprox.models.experts import experts_split

    model, pool = tiny.model(family), tiny.batch([9, 3, 7])
    with experts_split(model):
        validation = tiny.batch([4, 8, 5], seed=1)
        backwards = dataclasses.replace(validation, indices=[2, 0, 1])  # as length-sorted batches are
        queries = [mean_gradient(model, [row]) for row in tiny.rows(validation)]
        expected = torch.cat([BatchScorer(model, {"t": q}, normalize=normalize)(pool)[0] for q in queries], dim=1)
        examples = example_gradients(model, [backwards])
        scorer = BatchScorer(model, {"a": examples, "b": examples[:1]}, normalize=normalize)
        assert scorer.widths == [3, 1]
        scores, _ = scorer(pool)
    torch.testing.assert_close(scores[:, :3], expected[:, [1, 2, 0]], rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(scores[:, 3], expected[:, 1], rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("family", ["qwen2", "gpt2"])
def test_the_examples_cosines_make_the_cosine_with_their_mean(tiny, family):
    """Weighed by their norms: asking for scores by example changes no score of a task."""
    model, pool, validation = tiny.model(family), tiny.batch([9, 3, 7]), tiny.batch([4, 8, 5], seed=1)
    expected, _ = BatchScorer(model, {"t": mean_gradient(model, [validation])}, normalize="cosine")(pool)
    scorer = BatchScorer(model, {"t": example_gradients(model, [validation])}, normalize="cosine")
    scores, _ = scorer(pool)
    (weights,) = scorer.weights
    torch.testing.assert_close((scores * torch.tensor(weights)).sum(1, keepdim=True), expected, rtol=1e-8, atol=1e-10)
    assert not torch.allclose(scores.mean(1, keepdim=True), expected, rtol=1e-3)


def test_examples_of_the_target_are_contracted_with_candidates_on_the_proxy(tiny):
    model, pool, validation = tiny.model("qwen2"), tiny.batch([9, 3, 7]), tiny.batch([8, 5], seed=1)
    proxy, _ = derive_proxy(model, [tiny.batch([12, 9], seed=2)], Size(sparsity=0.5))
    whole, _ = BatchScorer(proxy, {"t": mean_gradient(model, [validation])})(pool)
    scores, _ = BatchScorer(proxy, {"t": example_gradients(model, [validation])})(pool)
    torch.testing.assert_close(scores.mean(1, keepdim=True), whole, rtol=1e-8, atol=1e-10)


def test_a_gradient_that_is_not_finite_names_the_layer(tiny):
    model = tiny.model()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = torch.nan
    with pytest.raises(FloatingPointError, match=r"model\.layers.* is not finite"):
        example_gradients(model, [tiny.batch([5, 4])])


@pytest.fixture
def setup(tiny):
    pool = Pool([{"text": text} for text in ("one word", "another", "nothing", "a third one", "four")])
    texts = {"a": ["hello", "nothing", "the whole world"], "b": ["other"]}
    validation = {task: Letters().encode(Pool([{"text": t} for t in each])) for task, each in texts.items()}
    return [tiny.model("qwen2"), tiny.model("qwen2", seed=1)], pool, validation


@pytest.mark.parametrize("keep", [True, False])
def test_checkpoints_are_summed_by_validation_example(setup, tmp_path, keep):
    models, pool, validation = setup
    rates = [0.5, 2.0]
    job = job_of(models, validation, rates=rates, batch_tokens=32, per_example=keep, query_norm=1.0)
    score_to_file(job.workers, job.learning_rates, pool, tmp_path / "s.parquet", identity={}, window=2)
    table = pq.read_table(tmp_path / "s.parquet")
    columns = []
    for example in [row for rows in validation.values() for row in rows if row.supervised]:
        total = 0
        for model, rate in zip(models, rates, strict=True):
            scorer = scorer_of(model, {"t": [example]})
            row = np.full(5, np.nan)
            for batch in iter_pool(pool):
                row[batch.indices] = scorer(batch)[0][:, 0].numpy()
            total = total + rate * row
        columns.append(total)
    matrix = np.stack(columns, axis=1)  # the example without a supervised token has no column
    expected = np.stack([matrix[:, :2].mean(1), matrix[:, 2]], 1)
    np.testing.assert_allclose(score_matrix(table), expected, rtol=1e-8)
    whole = (expected / np.nanstd(expected, axis=0)).mean(1)
    np.testing.assert_allclose(table["influence"].to_numpy(), whole, rtol=1e-8)
    assert ("examples/a" in table.column_names) == keep
    if keep:
        np.testing.assert_allclose(example_matrix(table, "a"), matrix[:, :2], rtol=1e-8)
        np.testing.assert_allclose(example_matrix(table, "b"), matrix[:, 2:], rtol=1e-8)


def iter_pool(pool):
    from iprox.data import iter_batches

    return iter_batches(Letters().encode(list(pool)), 32)


def test_the_mean_of_examples_is_the_score_of_the_task(setup):
    (model, _), pool, validation = setup
    mean = scorer_of(model, validation)
    each = scorer_of(model, validation, per_example=True, query_norm=1.0)
    for batch in iter_pool(pool):
        scores, _ = each(batch)
        together = torch.stack([part.mean(1) for part in scores.split(each.widths, dim=1)], dim=1)
        torch.testing.assert_close(together, mean(batch)[0], rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("estimator", ["rds", "bm25"])
def test_scorers_without_gradients_compare_with_each_example(setup, estimator):
    from iprox.influence.baselines import Corpus

    (model, _), pool, validation = setup
    corpus = Corpus.of(iter(Letters().encode(list(pool))))
    how = {"estimator": estimator, "corpus": corpus}
    each = scorer_of(model, validation, per_example=True, **how)
    mean = scorer_of(model, validation, **how)
    assert each.widths == [2, 1]
    for batch in iter_pool(pool):
        scores = each(batch)[0]
        together = torch.stack([part.mean(1) for part in scores.split(each.widths, dim=1)], dim=1)
        torch.testing.assert_close(together, mean(batch)[0], rtol=1e-8, atol=1e-10)
        for column, example in enumerate([validation["a"][0], validation["a"][2], validation["b"][0]]):
            alone = scorer_of(model, {"t": [example]}, per_example=True, **how)
            torch.testing.assert_close(scores[:, column], alone(batch)[0][:, 0], rtol=1e-8, atol=1e-10)


def test_what_has_no_scores_by_example_says_so():
    with pytest.raises(ValueError, match="random has no scores by validation example"):
        settings_of(estimator="random", normalize="none", per_example=True)


def test_a_task_whose_scores_are_all_alike_does_not_drown_the_others():
    """The mean of three tenths is none of them, so that their spread is rounding and not quite 0."""
    scores = np.column_stack([[0.1] * 3, [1.0, 2.0, 3.0]])
    assert 0 < scores[:, 0].std() < 1e-16
    spread = TaskSpread()
    spread.add(scores)
    np.testing.assert_allclose(spread.deviation(), [1.0, np.std([1, 2, 3])])
