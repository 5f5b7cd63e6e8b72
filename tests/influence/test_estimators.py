"""Scores against autograd, one example at a time, in float64."""

import pytest
import torch

from iprox.influence.gradients import NormShape, norm_flops
from iprox.influence.projection import signs
from iprox.influence.scorer import BatchScorer
from iprox.influence.validation_gradients import mean_gradient
from iprox.models.experts import expert_layers, experts_split
from iprox.models.layers import influence_layers, weight_shape
from iprox.models.loss import causal_lm_losses
from iprox.proxy.compress import derive_proxy
from iprox.proxy.size import Size

# What no family of tests/models/test_families.py has.
CASES = {
    "untied, plain heads": {"tie_word_embeddings": False, "num_key_value_heads": 4},
    "biases everywhere": {"attention_bias": True, "mlp_bias": True},
}


@pytest.mark.parametrize("case", CASES)
def test_scores_equal_autograd_dot_products(tiny, case):
    model = tiny.model("llama", **CASES[case])
    pool, validation = tiny.batch([9, 3, 7, 12], padding=5), tiny.batch([8, 5], seed=1)
    layers = influence_layers(model)
    query = torch.stack([tiny.autograd_gradient(model, row, layers) for row in tiny.rows(validation)]).mean(0)
    rows = torch.stack([tiny.autograd_gradient(model, row, layers) for row in tiny.rows(pool)])
    gradient = mean_gradient(model, [validation])
    scores, losses = BatchScorer(model, {"task": gradient})(pool)
    torch.testing.assert_close(scores[:, 0], rows @ query, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(losses, causal_lm_losses(model, pool).detach())
    cosine, _ = BatchScorer(model, {"task": gradient}, normalize="cosine")(pool)
    expected = torch.nn.functional.cosine_similarity(rows, query[None])
    torch.testing.assert_close(cosine[:, 0], expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("case", CASES)
def test_sketched_cosines_equal_those_of_the_sketch_of_each_gradient(tiny, case):
    model = tiny.model("llama", **CASES[case])
    pool = tiny.batch([9, 3, 7, 12], padding=3)
    gradient = mean_gradient(model, [tiny.batch([8, 5], seed=1)])
    scorer = BatchScorer(model, {"task": gradient}, normalize="cosine", norm_sketch=5)
    expected, sketched = [], 0
    for row in tiny.rows(pool):
        score, norm, query = (torch.zeros((), dtype=torch.float64) for _ in range(3))
        for name, layer in influence_layers(model).items():
            own = torch.autograd.grad(causal_lm_losses(model, row).sum(), list(layer.parameters()))
            m, n = own[0].shape
            S = signs(f"norm/{name}", max(layer.weight.shape), 5).double()
            pays = 5 * (m + n) < m * n
            sketched += pays
            norm += ((own[0].mT if m > n else own[0]) @ S).square().sum() / 5 if pays else own[0].square().sum()
            score += (own[0] * gradient[name].weight).sum()
            query += gradient[name].squared_norm()
            if len(own) > 1:
                norm += own[1].square().sum()
                score += own[1] @ gradient[name].bias
        expected.append(score / (norm * query).sqrt())
    assert sketched
    torch.testing.assert_close(scorer(pool)[0][:, 0], torch.stack(expected), rtol=1e-9, atol=1e-9)
    exact = BatchScorer(model, {"task": gradient}, normalize="cosine")
    assert scorer.norm_flops([9, 3]) != exact.norm_flops([9, 3])
    assert not torch.equal(exact(pool)[0], scorer(pool)[0])


def test_norms_of_experts_are_not_sketched(tiny):
    with experts_split(model := tiny.model("qwen3-moe")):
        layers = influence_layers(model)
        experts = expert_layers(model)
        assert experts == {name for name in layers if ".experts." in name}
        assert 0 < len(experts) < len(layers)
        gradient = mean_gradient(model, [tiny.batch([8, 5])])
        scorer = BatchScorer(model, {"task": gradient}, normalize="cosine", norm_sketch=2)
        shapes = {name: weight_shape(layer) for name, layer in layers.items()}
    # The model is whole again; what the scorer was made for stays.
    exact = norm_flops([NormShape(*shapes[name]) for name in experts], [4.5, 20])  # two experts of four see a token
    others = norm_flops([NormShape(*shape, 2) for name, shape in shapes.items() if name not in experts], [9, 40])
    assert scorer.norm_flops([9, 40]) == exact + others


@pytest.mark.parametrize("options", [{}, {"normalize": "cosine"}, {"normalize": "cosine", "norm_sketch": 5}])
def test_scores_do_not_depend_on_the_batch(tiny, options):
    model, pool = tiny.model(), tiny.batch([9, 3, 7, 12], padding=4)
    gradient = mean_gradient(model, [tiny.batch([8, 5], seed=1)])
    scorer = BatchScorer(model, {"task": gradient}, **options)
    together, _ = scorer(pool)
    apart = torch.cat([scorer(row)[0] for row in tiny.rows(pool)])
    torch.testing.assert_close(together, apart, rtol=1e-10, atol=1e-12)


def test_several_tasks_are_scored_as_each_alone(tiny):
    model, pool = tiny.model("qwen2"), tiny.batch([9, 3, 7])
    queries = {name: mean_gradient(model, [tiny.batch([8, 5], seed=seed)]) for name, seed in (("a", 1), ("b", 2))}
    both, _ = BatchScorer(model, queries)(pool)
    for column, (name, query) in enumerate(queries.items()):
        alone, _ = BatchScorer(model, {name: query})(pool)
        torch.testing.assert_close(both[:, column], alone[:, 0])


def test_weight_gradients_of_a_proxy_are_those_of_the_dense_model_it_stands_for(tiny):
    """The same scores as the exported dense checkpoint, without ever forming its layers."""
    from iprox.proxy.export import to_dense

    pool, validation = tiny.batch([9, 3, 7], padding=2), tiny.batch([8, 5], seed=1)
    proxy, _ = derive_proxy(tiny.model("qwen2"), [pool], Size(0.5))
    dense = to_dense(proxy)
    gradient = mean_gradient(proxy, [validation])
    scores, _ = BatchScorer(proxy, {"task": gradient}, normalize="cosine")(pool)
    reference = mean_gradient(dense, [validation])
    expected, _ = BatchScorer(dense, {"task": reference}, normalize="cosine")(pool)
    torch.testing.assert_close(scores, expected, rtol=1e-9, atol=1e-9)


def test_a_small_sgd_step_changes_the_validation_loss_by_minus_the_influence(tiny):
    """The first-order claim itself; the error must shrink with the square of the step."""
    model = tiny.model("gpt-neox")
    pool, validation = tiny.batch([9]), tiny.batch([8, 5], seed=1)
    gradient = mean_gradient(model, [validation])
    influence = BatchScorer(model, {"task": gradient})(pool)[0].item()
    layers = influence_layers(model)
    parameters = [p for layer in layers.values() for p in (layer.weight, layer.bias)]
    gradients = torch.autograd.grad(causal_lm_losses(model, pool).sum(), parameters)
    before = causal_lm_losses(model, validation).mean().item()
    errors = []
    for rate in (1e-3, 1e-4):
        with torch.no_grad():
            for parameter, part in zip(parameters, gradients, strict=True):
                parameter -= rate * part
            change = causal_lm_losses(model, validation).mean().item() - before
            for parameter, part in zip(parameters, gradients, strict=True):
                parameter += rate * part
        errors.append(abs(change + rate * influence))
    assert errors[0] < 0.2 * 1e-3 * abs(influence)
    assert errors[1] == pytest.approx(errors[0] / 100, rel=0.1)


def test_the_model_is_left_as_it_was(tiny):
    model = tiny.model().train()
    model.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    gradient = mean_gradient(model, [tiny.batch([8, 5])])
    BatchScorer(model, {"task": gradient})(tiny.batch([6]))
    assert model.training
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert [name for name, flag in flags.items() if not flag] == ["model.layers.0.mlp.up_proj.weight"]
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_no_example_is_refused(tiny):
    with pytest.raises(ValueError, match="no example"):
        mean_gradient(tiny.model(), [])


def test_a_gradient_that_is_not_finite_names_its_layer(tiny):
    model = tiny.model()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("inf")
    with pytest.raises(FloatingPointError, match=r"model\.layers"):
        mean_gradient(model, [tiny.batch([6])])
