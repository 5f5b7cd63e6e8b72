import pytest
import torch
from transformers import AutoModelForCausalLM

from iprox.errors import InputError
from iprox.kronecker.moments import MomentSettings, collect_moments, layer_groups
from iprox.models.checkpoint import proxy_config
from iprox.models.layers import compressible_layers, dense_weight, low_rank_layers, weight_shape
from iprox.proxy.compress import adopt, derive_proxy, extract_layers
from iprox.proxy.export import to_dense
from iprox.proxy.factorizations import layer_spectrum
from iprox.proxy.factorize import FactorSettings, with_factors
from iprox.proxy.size import Size


def logits(model, batch):
    with torch.no_grad():
        return model(input_ids=batch.input_ids).logits


def assert_same_weights(model, other):
    """Bit for bit. Logits may differ in the last bit: kernels depend on how memory is aligned."""
    state, expected = model.state_dict(), other.state_dict()
    assert state.keys() == expected.keys()
    for name, tensor in state.items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("family", ["qwen3", "qwen2", "llama"])
def test_at_full_rank_the_proxy_is_the_target(tiny, family):
    model, batch = tiny.model(family), tiny.batch([9, 7])
    layers = compressible_layers(model)
    moments, _ = collect_moments(model, layers, [batch])
    spectra = {
        name: layer_spectrum("ipsvd", dense_weight(layer), moments[name], 1e-2, torch.Generator())
        for name, layer in layers.items()
    }
    proxy = with_factors(model, spectra, {name: min(layer.weight.shape) for name, layer in layers.items()})
    assert len(low_rank_layers(proxy)) == len(layers)
    torch.testing.assert_close(logits(proxy, batch), logits(model, batch), rtol=0, atol=1e-5)


def linear_parameters(model) -> int:
    kept = sum(layer.up.weight.numel() + layer.down.weight.numel() for layer in low_rank_layers(model).values())
    return kept + sum(layer.weight.numel() for layer in compressible_layers(model).values())


WIDE = {"hidden_size": 128, "intermediate_size": 192, "head_dim": 32, "vocab_size": 96}


@pytest.mark.parametrize("ranks", ["global", "uniform"])
@pytest.mark.parametrize("method", ["ipsvd", "svd", "svd-llm", "asvd", "fwsvd", "random"])
def test_a_proxy_has_the_sparsity_asked_for(tiny, method, ranks):
    model = tiny.model(**WIDE)
    proxy, report = derive_proxy(model, [tiny.batch([9, 7])], Size(0.6), FactorSettings(method, ranks))
    assert report.achieved_sparsity == pytest.approx(1 - linear_parameters(proxy) / linear_parameters(model))
    assert 0.6 <= report.achieved_sparsity < 0.61
    assert proxy_config(proxy).ranks == {
        name: entry.rank for name, entry in report.layers.items() if entry.rank is not None
    }
    assert proxy_config(proxy).method == method


@pytest.mark.parametrize("ranks", ["global", "uniform"])
def test_a_proxy_has_the_flops_asked_for(tiny, ranks):
    model = tiny.model(**WIDE)
    proxy, report = derive_proxy(model, [tiny.batch([9, 7])], Size(flops=0.5), FactorSettings(ranks=ranks))
    head = model.lm_head.weight.numel()
    share = (linear_parameters(proxy) + head) / (linear_parameters(model) + head)
    assert report.relative_flops == pytest.approx(share)
    assert 0.495 < share <= 0.5
    assert report.size == {"flops": 0.5}


@pytest.mark.parametrize("given", [{}, {"sparsity": 0.5, "flops": 0.5}])
def test_exactly_one_size_is_given(given):
    with pytest.raises(InputError, match="exactly one"):
        Size(**given)


@pytest.mark.parametrize(
    ("given", "known"), [({"flops": 0.1}, "the smallest is"), ({"sparsity": 0.99}, "the largest is")]
)
def test_a_size_out_of_reach_says_what_is_in_reach(tiny, given, known):
    with pytest.raises(InputError, match=known):
        derive_proxy(tiny.model(), [tiny.batch([6])], Size(**given))


def test_moments_in_groups_and_spectra_on_disk_give_the_same_proxy(tiny):
    model, batches = tiny.model("qwen2"), [tiny.batch([9, 7]), tiny.batch([5, 8], seed=1)]
    whole, report = derive_proxy(model, iter(batches), Size(0.5))
    small = FactorSettings(memory=4 * 2 * 48**2)  # one layer's moments at a time, no spectrum in memory
    numbers = {
        name: sum(map(small.moments.numbers, weight_shape(layer))) for name, layer in compressible_layers(model).items()
    }
    groups = layer_groups(numbers, small.memory)
    assert len(groups) > 7
    parts, again = derive_proxy(model, iter(batches), Size(0.5), small)
    assert report.passes == 1
    assert again.passes == len(groups)
    assert again.probe_tokens == report.probe_tokens == 29
    assert again.layers == report.layers  # with the ridges
    for name, tensor in whole.state_dict().items():
        torch.testing.assert_close(parts.state_dict()[name], tensor)


def test_sketched_moments_with_all_directions_give_the_same_proxy(tiny):
    model, batches = tiny.model(), [tiny.batch([9, 7])]
    exact, _ = derive_proxy(model, batches, Size(0.5))
    settings = FactorSettings(moments=MomentSettings(exact_width=1, directions=64))
    sketched, _ = derive_proxy(model, batches, Size(0.5), settings)
    for name, layer in low_rank_layers(exact).items():
        torch.testing.assert_close(low_rank_layers(sketched)[name].weight, layer.weight, rtol=1e-4, atol=1e-5)


def test_a_few_directions_do_better_than_none(tiny):
    """A sketch is worth having: closer to the exact proxy than plain SVD is."""
    model, batches = tiny.model(), [tiny.batch([12, 9, 7, 11])]
    exact, _ = derive_proxy(model, batches, Size(0.5), FactorSettings(ranks="uniform"))
    plain, _ = derive_proxy(model, [], Size(0.5), FactorSettings("svd", "uniform"))
    moments = MomentSettings(exact_width=1, directions=8)
    sketched, _ = derive_proxy(model, batches, Size(0.5), FactorSettings(ranks="uniform", moments=moments))

    def distance(proxy):
        pairs = zip(low_rank_layers(proxy).values(), low_rank_layers(exact).values(), strict=True)
        return sum((layer.weight - wanted.weight).square().sum().item() for layer, wanted in pairs)

    assert distance(sketched) < 0.5 * distance(plain)


@pytest.mark.parametrize("family", ["qwen3", "llama", "gpt-neox"])
def test_layer_extraction_keeps_the_first_layers(tiny, tmp_path, family):
    model, batch = tiny.model(family, num_hidden_layers=4), tiny.batch([9, 7])
    proxy, report = extract_layers(model, Size(0.5))
    assert proxy.config.num_hidden_layers == 2
    assert report.achieved_sparsity == pytest.approx(0.5)
    assert proxy_config(proxy).method == "layers"
    assert model.config.num_hidden_layers == 4
    state = model.state_dict()
    for name, tensor in proxy.state_dict().items():
        assert torch.equal(tensor, state[name])
    proxy.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    torch.testing.assert_close(logits(loaded, batch), logits(proxy, batch))
    with pytest.raises(InputError, match="less than one decoder layer"):
        extract_layers(model, Size(0.9))


def test_an_off_the_shelf_model_is_taken_as_it_is(tiny, tmp_path):
    model, other, batch = tiny.model(), tiny.model("llama", num_hidden_layers=1), tiny.batch([9, 7])
    proxy, report = adopt(model, other)
    torch.testing.assert_close(logits(proxy, batch), logits(other, batch))
    assert report.achieved_sparsity == pytest.approx(1 - linear_parameters(other) / linear_parameters(model))
    assert proxy_config(other) is None
    proxy.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    assert proxy_config(loaded).method == "off-the-shelf"
    with pytest.raises(InputError, match="vocabulary of 512"):
        adopt(model, tiny.model(vocab_size=512))


def test_the_target_is_left_as_it_was_and_nothing_is_shared(tiny):
    model, batch = tiny.model(), tiny.batch([9, 7])
    before = logits(model, batch)
    proxy, _ = derive_proxy(model, [batch], Size(0.5))
    with torch.no_grad():
        for parameter in proxy.parameters():
            parameter.zero_()
    assert torch.equal(logits(model, batch), before)
    assert proxy_config(model) is None


@pytest.mark.parametrize("family", ["qwen3", "qwen2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_proxy_loads_with_transformers(tiny, tmp_path, family, dtype):
    model, batch = tiny.model(family, dtype), tiny.batch([9, 7])
    proxy, _ = derive_proxy(model, [batch], Size(0.5))
    proxy.save_pretrained(tmp_path / "proxy")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "proxy", dtype=dtype)
    assert {n: x.rank for n, x in low_rank_layers(loaded).items()} == {
        n: x.rank for n, x in low_rank_layers(proxy).items()
    }
    assert_same_weights(loaded, proxy)
    torch.testing.assert_close(logits(loaded, batch), logits(proxy, batch))
    config, written = proxy_config(loaded), proxy_config(proxy)
    assert config.to_dict() == written.to_dict()
    loaded.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=dtype)
    assert_same_weights(again, proxy)


def test_multiplied_out_it_is_the_same_function(tiny, tmp_path):
    batch = tiny.batch([9, 7])
    proxy, _ = derive_proxy(tiny.model("qwen2"), [batch], Size(0.5))
    dense = to_dense(proxy)
    assert not low_rank_layers(dense)
    torch.testing.assert_close(logits(dense, batch), logits(proxy, batch))
    dense.save_pretrained(tmp_path)
    assert "quantization_config" not in (tmp_path / "config.json").read_text()
    with pytest.raises(InputError, match="not a proxy"):
        to_dense(dense)


def test_ipsvd_keeps_more_of_the_weighted_norm_than_plain_svd_does(tiny):
    model, batch = tiny.model(), tiny.batch([12, 9, 11, 8])
    _, report = derive_proxy(model, [batch], Size(0.5), FactorSettings(ranks="uniform", ridge=1e-2))
    moments, _ = collect_moments(model, compressible_layers(model), [batch])
    plain, _ = derive_proxy(model, [], Size(0.5), FactorSettings("svd", "uniform"))
    for name, layer in low_rank_layers(plain).items():
        W = model.get_submodule(name).weight.detach()
        C_h, C_d = moments[name].inputs.matrix, moments[name].gradients.matrix
        lost = (C_d @ (W - layer.weight) @ C_h * (W - layer.weight)).sum() / (C_d @ W @ C_h * W).sum()
        assert report.layers[name].tail < lost * 1.05  # the tail is of the ridged norm


@pytest.mark.parametrize("sparsity", [0.0, 1.0, -0.5, 1.5, 0.999])
def test_a_sparsity_out_of_reach_is_refused(tiny, sparsity):
    with pytest.raises(InputError, match="sparsity"):
        derive_proxy(tiny.model(), [tiny.batch([6])], Size(sparsity))


def test_a_proxy_of_a_proxy_is_refused(tiny):
    proxy, _ = derive_proxy(tiny.model(), [tiny.batch([6])], Size(0.5))
    with pytest.raises(InputError, match="already"):
        derive_proxy(proxy, [tiny.batch([6])], Size(0.5))
