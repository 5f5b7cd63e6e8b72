"""Terms of a score against autograd: gates that open the query's direction at one position at a time."""

import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from jobs import job_of

from iprox.data import Encoded, Pool
from iprox.influence.attribution import attribute, attribution_table
from iprox.influence.low_rank import low_rank_queries
from iprox.influence.scorer import BatchScorer
from iprox.influence.validation_gradients import mean_gradient
from iprox.models.compiled import compiled
from iprox.models.experts import experts_split
from iprox.models.layers import influence_layers
from iprox.models.loss import causal_lm_losses


def by_gates(model, gradient, batch):
    """d/dε_t of the loss where every layer gives W h + b + ε_t (Ḡ h + ḡ): Σ_ℓ δ_tᵀ (Ḡ h_t + ḡ)."""
    gates = torch.zeros(batch.input_ids.shape, dtype=torch.float64, requires_grad=True)

    def hook(part):
        return lambda module, inputs, output: output + gates[..., None] * F.linear(inputs[0], part.weight, part.bias)

    handles = [layer.register_forward_hook(hook(gradient[name])) for name, layer in influence_layers(model).items()]
    causal_lm_losses(model, batch).sum().backward()
    for handle in handles:
        handle.remove()
    return gates.grad


@pytest.mark.parametrize("family", ["qwen3", "qwen2", "gpt2"])  # no biases; some; all, with transposed weights
@pytest.mark.parametrize("keep", [1.0, 0.999])
def test_terms_are_those_of_autograd_and_sum_to_the_score(tiny, family, keep):
    model = tiny.model(family)
    batch = tiny.batch([9, 4, 7], seed=2, padding=3)
    queries = {"a": mean_gradient(model, [tiny.batch([8, 5], seed=1)])}
    queries["b"] = mean_gradient(model, [tiny.batch([6], seed=5)])
    cut = queries if keep == 1 else low_rank_queries(queries, keep)
    scorer = BatchScorer(model, cut)
    terms = scorer(batch, by_token=True)[0]
    torch.testing.assert_close(terms.sum(1), scorer(batch)[0], rtol=1e-9, atol=1e-12)
    for row, length in enumerate(batch.lengths.tolist()):
        assert not terms[row, length:].any()
    if keep == 1:
        for column, task in enumerate(queries):
            torch.testing.assert_close(terms[..., column], by_gates(model, queries[task], batch), rtol=1e-8, atol=1e-12)


def test_terms_of_a_cosine_sum_to_it(tiny):
    model = tiny.model("qwen3")
    batch = tiny.batch([9, 4], seed=2)
    scorer = BatchScorer(model, {"a": mean_gradient(model, [tiny.batch([8])])}, normalize="cosine")
    torch.testing.assert_close(scorer(batch, by_token=True)[0].sum(1), scorer(batch)[0], rtol=1e-9, atol=1e-12)


def test_experts_are_refused_by_name(tiny):
    model = tiny.model("qwen3-moe")
    with experts_split(model):
        scorer = BatchScorer(model, {"a": mean_gradient(model, [tiny.batch([8, 5], seed=1)])})
        with pytest.raises(TypeError, match=r"experts.*every token"):
            scorer(tiny.batch([9, 4], seed=2), by_token=True)[0]


class Words:
    """Encodes a text of numbers as those tokens; the first is no answer."""

    tokenizer = types.SimpleNamespace(decode=lambda ids, **_: "".join(f"<{id}>" for id in ids))

    def encode(self, examples):
        rows = [np.array(example.text.split(), dtype=np.int32) for example in examples]
        return [Encoded(row, np.where(row == 50, -100, row), truncated=False) for row in rows]


def test_the_table_holds_the_tokens_and_their_terms(tiny):
    model = tiny.model("qwen3")
    examples = list(Pool([{"text": "3 50 7"}, {"text": "50 50"}, {"text": "9 8 7 6 5"}]))
    validation = {"a": Words().encode(Pool([{"text": "4 5 6"}]))}
    job = job_of([model, model], validation, rates=[0.5, 0.25], encoder=Words())
    done = []
    table = attribution_table(job, examples, attribute(job, examples, done.append)[0])
    assert sum(done) == 6
    scores = job.score(examples)[0]["influence/a"].to_pylist()
    for terms, score in zip(table["influence/a"].to_pylist(), scores, strict=True):
        assert score is None if terms is None else sum(terms) == pytest.approx(score, rel=1e-9)
    assert table.column_names == ["id", "tokens", "supervised", "influence/a"]
    assert table["id"].to_pylist() == [example.id for example in examples]
    assert table["tokens"].to_pylist()[0] == ["<3>", "<50>", "<7>"]
    assert table["supervised"].to_pylist()[0] == [True, False, True]
    terms = table["influence/a"].to_pylist()
    assert [len(terms[0]), terms[1], len(terms[2])] == [3, None, 5]


def test_a_compiled_model_gives_the_same_terms(tiny):
    model = tiny.model("qwen3", dtype=torch.float32)
    batch = tiny.batch([9, 4, 7], seed=2, padding=3)
    scorer = BatchScorer(model, {"a": mean_gradient(model, [tiny.batch([8, 5], seed=1)])})
    expected = scorer(batch, by_token=True)[0]
    with compiled(model):
        torch.testing.assert_close(scorer(batch, by_token=True)[0], expected, rtol=1e-3, atol=1e-5)
