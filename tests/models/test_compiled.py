"""Compiled decoder layers: the same scores as uncompiled ones, in float64."""

import shutil

import pytest
import torch
from torch import nn

from iprox.engine.stream import compile_model
from iprox.influence.scorer import BatchScorer
from iprox.influence.validation_gradients import mean_gradient
from iprox.models.checkpoint import limit_depth
from iprox.models.compiled import compile_layers, compiled, why_not_compiled, wire_of
from iprox.models.experts import split_experts
from iprox.models.layers import compressible_layers, low_rank_layers
from iprox.proxy.compress import derive_proxy, keep_weights
from iprox.proxy.size import Size

COMPILE = nn.Module.compile


@pytest.fixture
def backend(monkeypatch):
    """Choose what `torch.compile` runs; `aot_eager` traces all but generates no code, so it needs no C++ compiler."""

    def choose(name):
        torch._dynamo.reset()
        monkeypatch.setattr(nn.Module, "compile", lambda self, **options: COMPILE(self, backend=name, **options))

    return choose


def all_scores(tiny, scorer):
    batches = [tiny.batch([9, 3, 7, 12], padding=2), tiny.batch([6], seed=2), tiny.batch([5, 4], seed=3)]
    return torch.cat([scorer(batch)[0] for batch in batches])


def check(tiny, model, **options):
    gradient = mean_gradient(model, [tiny.batch([8, 5], seed=1)])
    scorer = BatchScorer(model, {"task": gradient}, **options)
    expected = all_scores(tiny, scorer)
    with compiled(model):
        scores = all_scores(tiny, scorer)
    torch.testing.assert_close(scores, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(all_scores(tiny, scorer), expected, rtol=0, atol=0)


# qwen3's norms go through float32, and fused they round otherwise; gpt-neox and gpt2 stay in float64.
@pytest.mark.parametrize(("family", "normalize"), [("gpt-neox", "none"), ("gpt2", "cosine")])
def test_scores_are_the_same(tiny, backend, family, normalize):
    backend("aot_eager")
    check(tiny, tiny.model(family), normalize=normalize)


def test_scores_of_fewer_gradients_are_the_same(tiny, backend):
    backend("aot_eager")
    proxy, _ = keep_weights(tiny.model("gpt-neox"))
    limit_depth(proxy, 0.5)
    check(tiny, proxy)


@pytest.mark.parametrize("name", ["aot_eager", "inductor"])
def test_scores_of_a_proxy_are_the_same(tiny, backend, name):
    if name == "inductor" and not shutil.which("g++"):
        pytest.skip("no C++ compiler (g++) for torch.compile")
    backend(name)
    proxy, _ = derive_proxy(tiny.model("gpt-neox"), [tiny.batch([9, 7, 12], seed=3)], Size(0.4))
    check(tiny, proxy)


def test_layers_of_any_rank_share_one_piece_of_code(tiny, backend):
    model = tiny.model("gpt-neox", num_hidden_layers=4)
    proxy, _ = derive_proxy(model, [tiny.batch([9, 7, 12], seed=3)], Size(0.4))
    assert len({layer.rank for layer in low_rank_layers(proxy).values()}) > 2
    assert len(low_rank_layers(proxy)) < 16  # some stayed dense
    torch._dynamo.reset()
    pieces = []

    def count(graph, inputs):
        pieces.append(graph)
        return graph.forward

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.Module, "compile", lambda self, **options: COMPILE(self, backend=count, **options))
        scorer = BatchScorer(proxy, {"task": mean_gradient(proxy, [tiny.batch([8, 5], seed=1)])})
        with compiled(proxy):
            scorer(tiny.batch([9, 3, 7]))
            scorer(tiny.batch([12, 11]))
    assert len(pieces) <= 2  # the first layer's input is a leaf of the graph, the others' are not


def test_nothing_is_left_behind(tiny, backend):
    backend("aot_eager")
    model = tiny.model()
    layers = compressible_layers(model)
    with compiled(model):
        assert all(wire_of(layer) is not None for layer in layers.values())
    assert compressible_layers(model) == layers
    assert all(wire_of(layer) is None for layer in layers.values())
    assert not model.get_input_embeddings()._forward_hooks


def test_what_cannot_be_compiled_says_why_and_is_scored_as_it_was(tiny, monkeypatch):
    model, batch = tiny.model(), tiny.batch([9, 3])
    scorer = BatchScorer(model, {"task": mean_gradient(model, [batch])})
    expected = scorer(batch)[0]

    def no_compiler(graph, inputs):
        raise RuntimeError("no C++ compiler on this machine")

    torch._dynamo.reset()
    monkeypatch.setattr(nn.Module, "compile", lambda self, **options: COMPILE(self, backend=no_compiler, **options))
    assert "no C++ compiler on this machine" in compile_model(scorer.model, scorer, batch)
    torch.testing.assert_close(scorer(batch)[0], expected, rtol=0, atol=0)


def test_experts_and_foreign_models_are_not_compiled(tiny):
    experts = tiny.model("qwen3-moe")
    split_experts(experts)
    assert "experts" in str(why_not_compiled(experts))
    assert why_not_compiled(nn.Linear(2, 2)) == "it is not a transformers model"
    assert why_not_compiled(tiny.model()) is None
    scorer = BatchScorer(experts, {"task": mean_gradient(experts, [tiny.batch([9, 3])])})
    assert "experts" in compile_model(scorer.model, scorer, tiny.batch([9, 3]))


def test_a_model_that_goes_away_takes_its_wires_along(tiny):
    import gc

    from iprox.models import compiled as module

    model = tiny.model()
    before = len(module._wires)
    compile_layers(model)
    assert len(module._wires) > before
    del model
    gc.collect()
    assert len(module._wires) == before
