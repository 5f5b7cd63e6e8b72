"""Norms refitted in closed form: the best scalar of each, whatever the norm multiplies by."""

import copy

import pytest
import torch

from iprox.models.layers import compressible_layers
from iprox.models.loss import causal_lm_losses
from iprox.proxy.compress import derive_proxy
from iprox.proxy.factorize import FactorSettings
from iprox.proxy.norms import norm_layers, refit_norms, scale_norm
from iprox.proxy.size import Size


def outputs(model, batch):
    """What every norm gives on the real tokens of a batch, by name."""
    kept = {}
    handles = [
        norm.register_forward_hook(lambda module, inputs, output, name=name: kept.update({name: output.detach()}))
        for name, norm in norm_layers(model).items()
    ]
    model(input_ids=batch.input_ids)
    for handle in handles:
        handle.remove()
    real = torch.arange(batch.input_ids.shape[1])[None] < batch.lengths[:, None]
    heads_first = {name: output.ndim == 4 and output.shape[1] != real.shape[1] for name, output in kept.items()}
    return {name: (x.transpose(1, 2) if heads_first[name] else x)[real] for name, x in kept.items()}


def miss(model, target, batch):
    """Σ‖x - y‖² of every norm."""
    theirs = outputs(target, batch)
    return {name: (x - theirs[name]).square().sum().item() for name, x in outputs(model, batch).items()}


@pytest.mark.parametrize("family", ["qwen3", "gemma3", "gpt-neox", "gpt2", "olmo2"])
def test_scaling_a_norm_scales_its_outputs(tiny, family):
    model, batch = tiny.model(family), tiny.batch([9, 5])
    with torch.no_grad():
        for norm in norm_layers(model).values():
            norm.weight.add_(0.1 * torch.randn_like(norm.weight))
    (name, norm), *_ = norm_layers(model).items()
    before = outputs(model, batch)[name]
    scale_norm(norm, 0.7)
    torch.testing.assert_close(outputs(model, batch)[name], 0.7 * before)


def test_a_norm_scaled_wrongly_is_put_right(tiny):
    target, batch = tiny.model(), tiny.batch([9, 5, 12], padding=3)
    model = copy.deepcopy(target)
    final = norm_layers(model)["model.norm"]
    scale_norm(final, 1.6)
    scales = refit_norms(model, target, [batch], causal_lm_losses)
    assert scales["model.norm"] == pytest.approx(1 / 1.6)
    assert all(scale == pytest.approx(1) for name, scale in scales.items() if name != "model.norm")
    torch.testing.assert_close(final.weight, target.model.norm.weight)


def test_no_other_scalar_comes_closer(tiny):
    target, batch = tiny.model(), tiny.batch([9, 5, 12], padding=3)
    proxy, _ = derive_proxy(target, [batch], Size(0.5), FactorSettings(refit_norms=False))
    refit_norms(proxy, target, [batch], causal_lm_losses, sweeps=8)
    best = miss(proxy, target, batch)
    for name in norm_layers(proxy):
        for factor in (0.97, 1.03):
            other = copy.deepcopy(proxy)
            scale_norm(norm_layers(other)[name], factor)
            assert miss(other, target, batch)[name] > best[name]


@pytest.mark.parametrize("family", ["qwen3", "gemma3"])
def test_padding_and_the_cut_into_batches_change_nothing(tiny, family):
    target = tiny.model(family)
    proxy, _ = derive_proxy(target, [tiny.batch([9, 5, 12])], Size(0.5), FactorSettings(refit_norms=False))
    together, apart = tiny.batch([9, 5, 12], padding=6), tiny.rows(tiny.batch([9, 5, 12]))
    scales = [refit_norms(copy.deepcopy(proxy), target, each, causal_lm_losses) for each in ([together], apart)]
    assert scales[0] == pytest.approx(scales[1], rel=1e-9)


def test_an_ipsvd_proxy_is_refitted_and_a_baseline_is_not(tiny):
    model, batch = tiny.model(), tiny.batch([9, 7, 12])
    before = copy.deepcopy(model.state_dict())
    proxy, report = derive_proxy(model, [batch], Size(0.6))
    assert set(report.norm_scales) == set(norm_layers(model))
    assert any(abs(scale - 1) > 0.01 for scale in report.norm_scales.values())
    assert len(compressible_layers(model)) == 14
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    plain, left = derive_proxy(model, [batch], Size(0.6), FactorSettings("svd-llm"))
    assert left.norm_scales == {}
    assert torch.equal(plain.model.norm.weight, model.model.norm.weight)
    assert not torch.equal(proxy.model.norm.weight, model.model.norm.weight)


def test_outputs_that_are_not_finite_are_named(tiny):
    target, batch = tiny.model(), tiny.batch([9, 5])
    model = copy.deepcopy(target)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.fill_(float("inf"))
    with pytest.raises(FloatingPointError, match="norm"):
        refit_norms(model, target, [batch], causal_lm_losses)


def test_norms_over_a_batch_or_a_group_are_left_alone():
    model = torch.nn.Sequential(torch.nn.BatchNorm1d(4), torch.nn.GroupNorm(2, 4), torch.nn.LayerNorm(4))
    assert list(norm_layers(model)) == ["2"]


def test_dropout_is_off_meanwhile_and_the_mode_is_kept(tiny):
    target, batch = tiny.model("gpt2", resid_pdrop=0.5).train(), tiny.batch([9, 5, 12])
    scales = refit_norms(copy.deepcopy(target), target, [batch], causal_lm_losses)
    assert list(scales.values()) == pytest.approx([1] * len(scales))
    assert target.training
