"""Adam's directions against a real step of torch's AdamW, one example at a time, in float64."""

import copy

import pytest
import torch
from jobs import scorer_of_batches

from iprox.errors import InputError
from iprox.influence.estimators.less import LessScorer
from iprox.influence.validation_gradients import example_gradients, mean_gradient
from iprox.models.experts import experts_split
from iprox.models.layers import influence_layers
from iprox.models.loss import causal_lm_losses
from iprox.models.optimizer_state import AdamState, Moments, load_adam_state, save_adam_state
from iprox.proxy.compress import derive_proxy
from iprox.proxy.export import to_dense
from iprox.proxy.size import Size


def warmed_optimizer(model, tiny, steps=3):
    """AdamW after a few steps that leave the weights where they were, as each would else see another model."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1)
    for seed in range(steps):
        optimizer.zero_grad()
        causal_lm_losses(model, tiny.batch([9, 6, 4], seed=10 + seed)).mean().backward()
        optimizer.step()
    optimizer.zero_grad()
    return optimizer


def steps_by_hand(model, optimizer, batch, tiny):
    """Where AdamW moves every watched parameter with each example alone, for a rate of 1, as flat vectors."""
    layers = influence_layers(model)
    parameters = [p for layer in layers.values() for p in (layer.weight, layer.bias) if p is not None]
    flat = []
    for row in tiny.rows(batch):
        single = torch.optim.AdamW(model.parameters(), lr=1.0, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.0)
        single.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # it would share the moments
        single.param_groups[0].update(lr=1.0, weight_decay=0.0)
        before = [p.detach().clone() for p in model.parameters()]
        watched = [p.detach().clone() for p in parameters]
        causal_lm_losses(model, row).sum().backward()
        single.step()
        single.zero_grad()
        flat.append(torch.cat([(old - new.detach()).flatten() for old, new in zip(watched, parameters, strict=True)]))
        with torch.no_grad():
            for parameter, value in zip(model.parameters(), before, strict=True):
                parameter.copy_(value)
    return torch.stack(flat)


def gradient_by_hand(model, row):
    layers = influence_layers(model)
    parameters = [p for layer in layers.values() for p in (layer.weight, layer.bias) if p is not None]
    return torch.cat([g.flatten() for g in torch.autograd.grad(causal_lm_losses(model, row).sum(), parameters)])


def state_of(model, optimizer) -> AdamState:
    """The optimizer's moments in float64, as no file keeps them."""
    kinds = {"weight": {}, "bias": {}}
    for name, layer in influence_layers(model).items():
        for kind in kinds:
            parameter = getattr(layer, kind)
            if parameter is not None:
                state = optimizer.state[parameter]
                pair = [state["exp_avg"], state["exp_avg_sq"]]
                if kind == "weight" and type(layer).__name__ == "Conv1D":
                    pair = [value.mT for value in pair]
                kinds[kind][name] = Moments(*pair)
    return AdamState(kinds["weight"], kinds["bias"], 3, (0.8, 0.95), 1e-6)


@pytest.mark.parametrize("family", ["qwen3", "qwen2", "gpt2"])
def test_scores_are_steps_of_adamw_on_the_validation_gradient(tiny, family):
    model, pool, validation = tiny.model(family), tiny.batch([9, 3, 7], padding=2), tiny.batch([8, 5], seed=1)
    optimizer = warmed_optimizer(model, tiny)
    steps = steps_by_hand(model, optimizer, pool, tiny)
    each = torch.stack([gradient_by_hand(model, row) for row in tiny.rows(validation)])
    state = state_of(model, optimizer)
    mean = {"t": mean_gradient(model, [validation])}
    scores, losses = LessScorer(model, mean, state)(pool)
    torch.testing.assert_close(scores[:, 0], steps @ each.mean(0), rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(losses, causal_lm_losses(model, pool).detach())
    cosine, _ = LessScorer(model, mean, state, normalize="cosine")(pool)
    expected = torch.nn.functional.cosine_similarity(steps, each.mean(0)[None])
    torch.testing.assert_close(cosine[:, 0], expected, rtol=1e-8, atol=1e-9)
    by_example, _ = LessScorer(model, {"t": example_gradients(model, [validation])}, state)(pool)
    torch.testing.assert_close(by_example, steps @ each.mT, rtol=1e-8, atol=1e-9)


def test_on_a_proxy_the_step_is_that_of_the_dense_weights(tiny):
    model, pool = tiny.model("qwen2"), tiny.batch([9, 3, 7])
    state = state_of(model, warmed_optimizer(model, tiny))
    proxy, _ = derive_proxy(model, [tiny.batch([12, 9], seed=2)], Size(sparsity=0.5))
    query = mean_gradient(model, [tiny.batch([8, 5], seed=1)])
    scores, _ = LessScorer(proxy, {"t": query}, state, normalize="cosine")(pool)
    dense, _ = LessScorer(to_dense(proxy), {"t": query}, state, normalize="cosine")(pool)
    torch.testing.assert_close(scores, dense, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("family", ["qwen2", "gpt2"])
def test_the_state_is_what_was_saved(tiny, tmp_path, family):
    model = tiny.model(family)
    optimizer = warmed_optimizer(model, tiny)
    save_adam_state(model, optimizer, tmp_path)
    kept, loaded = state_of(model, optimizer), load_adam_state(tmp_path)
    assert (loaded.step, loaded.betas, loaded.eps) == (3, (0.8, 0.95), 1e-6)
    for kind in ("weights", "biases"):
        assert getattr(kept, kind).keys() == getattr(loaded, kind).keys()
        for name, moments in getattr(kept, kind).items():
            torch.testing.assert_close(getattr(loaded, kind)[name].mean, moments.mean.float())
            torch.testing.assert_close(getattr(loaded, kind)[name].square, moments.square.float())


def test_experts_trained_fused_are_scored_apart(tiny, tmp_path):
    """The moments of an expert are its part of the stacked tensor's."""
    model, pool = tiny.model("qwen3-moe"), tiny.batch([9, 3, 7])
    optimizer = warmed_optimizer(model, tiny)
    save_adam_state(model, optimizer, tmp_path)
    experts = model.get_submodule("model.layers.1.mlp.experts")
    with experts_split(model):
        state = load_adam_state(tmp_path)
        kept = state.weights["model.layers.1.mlp.experts.gate_up.2"].square
        torch.testing.assert_close(kept, optimizer.state[experts.gate_up_proj]["exp_avg_sq"][2].float())
        query = mean_gradient(model, [tiny.batch([8, 5], seed=1)])
        assert LessScorer(model, {"t": query}, state)(pool)[0].abs().min() > 0


def test_a_missing_or_broken_state_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"optimizer\.safetensors.*--optimizer-state"):
        load_adam_state(tmp_path)
    (tmp_path / "optimizer.safetensors").write_bytes(b"nothing of the kind")
    with pytest.raises(InputError, match=r"optimizer\.safetensors.*not an optimizer state"):
        load_adam_state(tmp_path)


def test_the_state_of_another_model_is_refused(tiny):
    model, other = tiny.model(), tiny.model(intermediate_size=24)
    state = state_of(other, warmed_optimizer(other, tiny))
    with pytest.raises(InputError, match=r"no moments for model\.layers\.0\.mlp"):
        LessScorer(model, {"t": mean_gradient(model, [tiny.batch([5])])}, state)


def test_what_less_needs_is_said(tiny):
    model, batch = tiny.model(), tiny.batch([5])
    with pytest.raises(InputError, match="needs the state"):
        scorer_of_batches(model, {"t": [batch]}, estimator="less")
    with pytest.raises(ValueError, match="query_norm saves nothing"):
        scorer_of_batches(model, {"t": [batch]}, estimator="less", query_norm=0.9)
    state = state_of(model, warmed_optimizer(model, tiny))
    with pytest.raises(TypeError, match="not a sum over its tokens"):
        scorer_of_batches(model, {"t": [batch]}, estimator="less", optimizer=state)(batch, by_token=True)
