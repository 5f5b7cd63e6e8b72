import pytest
import torch
from transformers import AutoModelForCausalLM

from iprox.errors import InputError
from iprox.models.checkpoint import proxy_config
from iprox.models.layers import compressible_layers, low_rank_layers
from iprox.proxy.compress import RIDGE, derive_proxy, layer_spectra, with_factors
from iprox.proxy.export import to_dense
from iprox.proxy.moments import collect_moments


def logits(model, batch):
    with torch.no_grad():
        return model(input_ids=batch.input_ids).logits


@pytest.mark.parametrize("family", ["qwen3", "qwen2", "llama"])
def test_at_full_rank_the_proxy_is_the_target(tiny, family):
    model, batch = tiny.model(family), tiny.batch([9, 7])
    layers = compressible_layers(model)
    moments, _ = collect_moments(model, [batch])
    spectra = layer_spectra(layers, moments, RIDGE)
    proxy = with_factors(model, layers, spectra, {name: min(layer.weight.shape) for name, layer in layers.items()})
    assert len(low_rank_layers(proxy)) == len(layers)
    torch.testing.assert_close(logits(proxy, batch), logits(model, batch), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("method", "ranks"), [("ipsvd", "global"), ("ipsvd", "uniform"), ("svd", "global")])
def test_a_proxy_has_the_size_asked_for(tiny, method, ranks):
    model = tiny.model(hidden_size=64, intermediate_size=96, head_dim=16)
    dense = sum(layer.weight.numel() for layer in compressible_layers(model).values())
    proxy, report = derive_proxy(model, [tiny.batch([9, 7])], sparsity=0.6, method=method, ranks=ranks)
    kept = sum(layer.A.weight.numel() + layer.B.weight.numel() for layer in low_rank_layers(proxy).values())
    kept += sum(layer.weight.numel() for layer in compressible_layers(proxy).values())
    assert report.achieved_sparsity == pytest.approx(1 - kept / dense)
    assert 0.6 <= report.achieved_sparsity < 0.63
    assert proxy_config(proxy).ranks == {
        name: entry.rank for name, entry in report.layers.items() if entry.rank is not None
    }


def test_the_target_is_left_as_it_was_and_nothing_is_shared(tiny):
    model, batch = tiny.model(), tiny.batch([9, 7])
    before = logits(model, batch)
    proxy, _ = derive_proxy(model, [batch], sparsity=0.5)
    with torch.no_grad():
        for parameter in proxy.parameters():
            parameter.zero_()
    assert torch.equal(logits(model, batch), before)
    assert proxy_config(model) is None


@pytest.mark.parametrize("family", ["qwen3", "qwen2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_proxy_loads_with_transformers(tiny, tmp_path, family, dtype):
    model, batch = tiny.model(family, dtype), tiny.batch([9, 7])
    proxy, _ = derive_proxy(model, [batch], sparsity=0.5)
    proxy.save_pretrained(tmp_path / "proxy")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "proxy", dtype=dtype)
    assert {n: x.rank for n, x in low_rank_layers(loaded).items()} == {
        n: x.rank for n, x in low_rank_layers(proxy).items()
    }
    assert torch.equal(logits(loaded, batch), logits(proxy, batch))
    config, written = proxy_config(loaded), proxy_config(proxy)
    assert config.to_dict() == written.to_dict()
    loaded.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=dtype)
    assert torch.equal(logits(again, batch), logits(proxy, batch))


def test_multiplied_out_it_is_the_same_function(tiny, tmp_path):
    batch = tiny.batch([9, 7])
    proxy, _ = derive_proxy(tiny.model("qwen2"), [batch], sparsity=0.5)
    dense = to_dense(proxy)
    assert not low_rank_layers(dense)
    torch.testing.assert_close(logits(dense, batch), logits(proxy, batch))
    dense.save_pretrained(tmp_path)
    assert "quantization_config" not in (tmp_path / "config.json").read_text()
    with pytest.raises(InputError, match="no proxy"):
        to_dense(dense)


def test_ipsvd_keeps_more_of_the_weighted_norm_than_plain_svd_does(tiny):
    model, batch = tiny.model(), tiny.batch([12, 9, 11, 8])
    _, report = derive_proxy(model, [batch], sparsity=0.5, ranks="uniform")
    moments, _ = collect_moments(model, [batch])
    plain, _ = derive_proxy(model, [], sparsity=0.5, method="svd", ranks="uniform")
    for name, layer in low_rank_layers(plain).items():
        W = model.get_submodule(name).weight.detach()
        C_h, C_d = moments[name].inputs, moments[name].gradients
        lost = (C_d @ (W - layer.weight) @ C_h * (W - layer.weight)).sum() / (C_d @ W @ C_h * W).sum()
        assert report.layers[name].tail < lost * 1.05  # the tail is of the ridged norm


@pytest.mark.parametrize("sparsity", [0.0, 1.0, -0.5, 1.5, 0.999])
def test_a_sparsity_out_of_reach_is_refused(tiny, sparsity):
    with pytest.raises(InputError, match="sparsity"):
        derive_proxy(tiny.model(), [tiny.batch([6])], sparsity=sparsity)


def test_a_proxy_of_a_proxy_is_refused(tiny):
    proxy, _ = derive_proxy(tiny.model(), [tiny.batch([6])], sparsity=0.5)
    with pytest.raises(InputError, match="already"):
        derive_proxy(proxy, [tiny.batch([6])], sparsity=0.5)
