"""Proxies that compare the gradients of the upper layers only."""

import functools

import pytest
import torch
from jobs import scorer_of_batches
from transformers import AutoModelForCausalLM

import iprox
from iprox.errors import InputError
from iprox.models import flops
from iprox.models.checkpoint import limit_depth
from iprox.models.layers import influence_layers
from iprox.proxy.compress import derive_proxy, keep_weights
from iprox.proxy.size import Size


def limited(model, depth):
    proxy, report = keep_weights(model)
    limit_depth(proxy, depth)
    return proxy, report


def upper(model, count):
    total = model.config.num_hidden_layers
    return {
        name: layer
        for name, layer in influence_layers(model).items()
        if any(f"layers.{number}." in name for number in range(total - count, total))
    }


def test_weights_are_the_targets_own_and_the_target_stays_as_it_was(tiny):
    model = tiny.model(num_hidden_layers=3)
    proxy, report = limited(model, 0.5)
    assert all(a is b for a, b in zip(model.parameters(), proxy.parameters(), strict=True))
    assert getattr(model.config, "quantization_config", None) is None
    assert (report.method, report.achieved_sparsity, report.relative_flops) == ("target", 0.0, 1.0)


@pytest.mark.parametrize("factors", [False, True])
def test_a_proxy_of_a_model_whose_forward_pass_was_wrapped_runs_itself(tiny, factors):
    """Trainers leave such wrappers, which know the model that they were made for."""
    model, batch = tiny.model(), tiny.batch([9, 4])
    run = model.forward
    model.forward = functools.wraps(run)(lambda *arguments, **named: run(*arguments, **named))
    proxy = derive_proxy(model, [batch], Size(0.3))[0] if factors else limited(model, 0.5)[0]
    ran = []
    proxy.lm_head.register_forward_hook(lambda *_: ran.append("proxy"))
    model.lm_head.register_forward_hook(lambda *_: ran.append("model"))
    proxy(input_ids=batch.input_ids)
    assert ran == ["proxy"]


@pytest.mark.parametrize(("depth", "count"), [(0.01, 1), (0.34, 1), (0.5, 2), (0.67, 2), (0.99, 3)])
def test_a_depth_keeps_the_upper_layers_and_at_least_one(tiny, depth, count):
    model = tiny.model(num_hidden_layers=3)
    proxy, _ = limited(model, depth)
    assert list(influence_layers(proxy)) == list(upper(model, count))


@pytest.mark.parametrize("normalize", ["none", "cosine"])
def test_scores_are_those_of_autograd_on_the_upper_layers(tiny, normalize):
    model, batch, validation = tiny.model(num_hidden_layers=3), tiny.batch([9, 4, 7]), [tiny.batch([8, 5], seed=1)]
    proxy, _ = limited(model, 0.67)
    scorer = scorer_of_batches(proxy, {"task": validation}, target=model, normalize=normalize, query_norm=1)
    layers = upper(model, 2)
    mean = sum(tiny.autograd_gradient(model, row, layers) for row in tiny.rows(validation[0])) / 2
    for row, score in zip(tiny.rows(batch), scorer(batch)[0], strict=True):
        gradient = tiny.autograd_gradient(model, row, layers)
        expected = gradient @ mean
        if normalize == "cosine":
            expected = expected / gradient.norm() / mean.norm()
        torch.testing.assert_close(score[0], expected, rtol=1e-9, atol=1e-12)


def test_the_backward_pass_stops_below_the_upper_layers(tiny):
    model = tiny.model(num_hidden_layers=3)
    proxy, _ = limited(model, 0.34)
    scorer = scorer_of_batches(proxy, {"task": [tiny.batch([8])]}, target=model)
    seen = []
    for number, block in enumerate(proxy.model.layers):
        block.register_forward_hook(lambda _m, _i, output, number=number: seen.append((number, output.requires_grad)))
    scorer(tiny.batch([9, 4]))
    assert seen[-3:] == [(0, False), (1, False), (2, True)]  # after one token, on which the head is tried


@pytest.mark.parametrize("factors", [False, True])
def test_a_saved_proxy_is_read_with_its_limits(tiny, tmp_path, factors):
    model, batch = tiny.model(dtype=torch.float32, num_hidden_layers=3), tiny.batch([13, 6, 9], padding=2)
    proxy = derive_proxy(model, [tiny.batch([9, 7, 12])], Size(0.3))[0] if factors else keep_weights(model)[0]
    limit_depth(proxy, 0.67)
    proxy.save_pretrained(tmp_path)
    read = AutoModelForCausalLM.from_pretrained(tmp_path)
    both = [scorer_of_batches(each, {"task": [batch]}, target=model)(batch)[0] for each in (proxy, read)]
    torch.testing.assert_close(*both, rtol=0, atol=0)
    assert set(influence_layers(read)) == set(upper(model, 2))


def test_another_module_needs_a_size():
    with pytest.raises(InputError, match="sparsity"):
        iprox.compress(torch.nn.Sequential(torch.nn.Linear(4, 3)), progress=False)


def test_flops_are_of_what_is_passed(tiny):
    model = tiny.model(num_hidden_layers=4)
    proxy, _ = limited(model, 0.5)
    forward, head = flops.forward_flops(model), flops.head_flops(model)
    assert flops.scoring_flops(proxy, 100, 20, 7.0) == 150 * forward + 40 * head + 7
    assert flops.scoring_flops(model, 100, 20, 7.0) == 200 * forward + 40 * head + 7
