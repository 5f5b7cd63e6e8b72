"""Every family: compress, save, load, full-rank equality, scores against autograd, in float64."""

import importlib
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, GptOssConfig
from transformers.pytorch_utils import Conv1D

from iprox.errors import InputError
from iprox.influence.scorer import BatchScorer
from iprox.influence.validation_gradients import mean_gradient
from iprox.kronecker.moments import MomentSettings, collect_moments
from iprox.models.checkpoint import proxy_config
from iprox.models.experts import SplitExperts, expert_layers, experts_split, split_experts
from iprox.models.flops import forward_flops, linear_parameters
from iprox.models.layers import (
    LowRankLinear,
    compressible_layers,
    dense_weight,
    influence_layers,
    layer_bias,
    low_rank_layers,
)
from iprox.models.loading import load_model
from iprox.models.loss import causal_lm_losses
from iprox.models.observe import frozen, watched_backward
from iprox.models.precision import cast_parameters
from iprox.proxy.compress import derive_proxy
from iprox.proxy.export import to_dense
from iprox.proxy.factorize import with_factors
from iprox.proxy.ipsvd import weighted_svd
from iprox.proxy.size import Size

# Layers of a block that iprox compresses: what a family must not silently lose.
LAYERS = {
    "qwen2": 7, "qwen3": 7, "llama": 7, "gemma3": 7, "mistral": 7, "phi3": 4, "gpt2": 4, "gpt-neox": 4, "olmo2": 7,
    "smollm3": 7, "qwen3-moe": 4 + 2 * 4, "qwen2-moe": 4 + 2 * 4 + 4, "phimoe": 4 + 2 * 4, "opt": 6, "olmo": 7,
    # One dense layer and one of experts: (5 + 3 + 5 + 2 * 4 + 3) / 2.
    "deepseek-v2": 12, "deepseek-v3": 12, "glm4-moe-lite": 12,
}  # fmt: skip


def logits(model, batch):
    with torch.no_grad():
        return model(input_ids=batch.input_ids).logits


def split(model):
    split_experts(model)
    return model


@pytest.fixture(scope="module", params=LAYERS)
def family(request, tiny):
    """(name, target, probe batch): the target with its experts split, as `load_model` gives it."""
    return request.param, split(tiny.model(request.param)), tiny.batch([9, 7, 12], seed=3, padding=2)


def test_every_layer_of_a_block_is_found(family):
    name, model, _ = family
    assert len(compressible_layers(model)) == 2 * LAYERS[name]


def test_at_full_rank_the_proxy_is_the_target(family, tmp_path):
    _, model, batch = family
    layers = compressible_layers(model)
    spectra = {name: weighted_svd(dense_weight(layer).detach(), None, None) for name, layer in layers.items()}
    full = {name: min(dense_weight(layer).shape) for name, layer in layers.items()}
    proxy = with_factors(model, spectra, full)
    assert len(low_rank_layers(proxy)) == len(layers)
    torch.testing.assert_close(logits(proxy, batch), logits(model, batch), rtol=0, atol=1e-5)


def test_a_proxy_survives_saving_and_loading(family, tmp_path):
    _, model, batch = family
    proxy, report = derive_proxy(model, [batch], Size(0.4))
    assert report.achieved_sparsity == pytest.approx(1 - linear_parameters(proxy) / linear_parameters(model))
    assert 0.4 <= report.achieved_sparsity < 0.46
    proxy.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    assert proxy_config(loaded).ranks == {n: x.rank for n, x in low_rank_layers(proxy).items()}
    # Gemma's embedding scale is a float32 buffer, rounded once more on loading.
    torch.testing.assert_close(logits(loaded, batch), logits(proxy, batch), rtol=1e-5, atol=1e-5)


def test_an_export_loads_without_its_factors(family, tmp_path):
    _, model, batch = family
    proxy, _ = derive_proxy(model, [batch], Size(0.4))
    dense = to_dense(proxy)
    assert not any(isinstance(module, SplitExperts) for module in dense.modules())
    dense.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    assert type(loaded) is type(model)
    assert not low_rank_layers(loaded)
    for name, layer in compressible_layers(loaded).items():
        assert type(layer) is type(model.get_submodule(name))
    loaded.set_experts_implementation("eager")  # the others have no float64 kernel
    torch.testing.assert_close(logits(loaded, batch), logits(proxy, batch), rtol=1e-5, atol=1e-5)


def autograd_gradients(model, batch, layers):
    """∇_W of every layer [m, n] and its bias, flat, from autograd; zero where the example did not reach it.

    A low-rank layer's is that of a matrix of zeros that is added to the product of its factors.
    """
    parameters, handles = [], []
    for layer in layers.values():
        weight = layer.weight
        if isinstance(layer, LowRankLinear):
            weight = torch.zeros_like(weight)
            added = lambda _module, inputs, output, added=weight: output + inputs[0] @ added.mT  # noqa: E731
            handles.append(layer.register_forward_hook(added))
        parameters += [p.requires_grad_(True) for p in (weight, layer.bias) if p is not None]
    losses = causal_lm_losses(model, batch)
    for handle in handles:
        handle.remove()
    gradients = torch.autograd.grad(losses.sum(), parameters, allow_unused=True)
    filled = [torch.zeros_like(p) if g is None else g for g, p in zip(gradients, parameters, strict=True)]
    return torch.cat([gradient.flatten() for gradient in filled])


@pytest.mark.parametrize("kind", ["target", "proxy"])
def test_scores_equal_autograd_dot_products(family, tiny, kind):
    name, model, batch = family
    # The router and the rotation of DeepSeek and its like compute in float32 whatever the model's dtype is.
    single = any(each in str(name) for each in ("deepseek", "glm4-moe-lite"))
    close = {"rtol": 1e-6, "atol": 1e-6} if single else {"rtol": 1e-9, "atol": 1e-9}
    if kind == "proxy":
        model, _ = derive_proxy(model, [batch], Size(0.4))
    pool, validation = tiny.batch([9, 3, 7, 12], padding=3), tiny.batch([8, 5], seed=1)
    layers = influence_layers(model)
    rows = torch.stack([autograd_gradients(model, row, layers) for row in tiny.rows(pool)])
    query = torch.stack([autograd_gradients(model, row, layers) for row in tiny.rows(validation)]).mean(0)
    gradient = mean_gradient(model, [validation])
    scores, _ = BatchScorer(model, {"task": gradient})(pool)
    torch.testing.assert_close(scores[:, 0], rows @ query, **close)
    cosine, _ = BatchScorer(model, {"task": gradient}, normalize="cosine")(pool)
    expected = torch.nn.functional.cosine_similarity(rows, query[None])
    torch.testing.assert_close(cosine[:, 0], expected, **close)


def test_candidates_on_a_proxy_are_contracted_with_the_targets_gradient(family, tiny):
    """Σ_ℓ ⟨Ĝ_ℓ(z), Ḡ_ℓ⟩ by autograd on the multiplied-out proxy."""
    _, model, batch = family
    proxy, _ = derive_proxy(model, [batch], Size(0.4))
    pool, validation = tiny.batch([9, 3, 7]), tiny.batch([8, 5], seed=1)
    own = mean_gradient(model, [validation])
    scores, _ = BatchScorer(proxy, {"task": own})(pool)
    dense = split(to_dense(proxy))
    layers = compressible_layers(dense)
    expected = []
    for row in tiny.rows(pool):
        weights = [layer.weight.requires_grad_(True) for layer in layers.values()]
        biases = [layer_bias(layer) for layer in layers.values() if layer_bias(layer) is not None]
        for bias in biases:
            bias.requires_grad_(True)
        loss = causal_lm_losses(dense, row).sum()
        gradients = torch.autograd.grad(loss, weights, allow_unused=True, retain_graph=True)
        total = torch.zeros((), dtype=torch.float64)
        for (name, layer), gradient in zip(layers.items(), gradients, strict=True):
            if gradient is None:
                continue
            G = gradient.mT if isinstance(layer, Conv1D) else gradient
            total = total + (G * own[name].weight).sum()
            bias = layer_bias(layer)
            if bias is not None:
                total = total + torch.autograd.grad(loss, bias, retain_graph=True)[0] @ own[name].bias
        expected.append(total.detach())
    torch.testing.assert_close(scores[:, 0], torch.stack(expected), rtol=1e-6, atol=1e-9)


def moe(tiny, **changes):
    return tiny.model("qwen3-moe", **changes)


def test_splitting_experts_changes_nothing_and_is_undone(tiny):
    model, batch = moe(tiny), tiny.batch([9, 7])
    before, names = logits(model, batch), list(model.state_dict())
    with experts_split(model):
        assert sum(isinstance(module, SplitExperts) for module in model.modules()) == 2
        torch.testing.assert_close(logits(model, batch), before)
    assert list(model.state_dict()) == names
    assert torch.equal(logits(model, batch), before)
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("name", ["DeepseekV4Experts", "Step3p7Experts", "Lfm2MoeExperts", "MixtralExperts"])
def test_split_experts_gate_as_their_class_does(name):
    """Some clamp what they gate, at a limit that most tokens pass here."""
    package = {"DeepseekV4Experts": "deepseek_v4", "Step3p7Experts": "step3p7", "Lfm2MoeExperts": "lfm2_moe"}
    module = importlib.import_module(f"transformers.models.{(p := package.get(name, 'mixtral'))}.modeling_{p}")
    config = SimpleNamespace(
        hidden_size=16, intermediate_size=24, moe_intermediate_size=24, num_experts=4, num_local_experts=4,
        n_routed_experts=4, moe_num_experts=4, hidden_act="silu", swiglu_limit=0.5, _experts_implementation="eager",
    )  # fmt: skip
    limit = {"swiglu_limit": 0.5} if name == "Step3p7Experts" else {}
    fused = getattr(module, name)(config, **limit)
    torch.manual_seed(0)
    for parameter in fused.parameters():
        torch.nn.init.normal_(parameter)
    hidden, chosen, weights = torch.randn(6, 16), torch.randint(0, 4, (6, 2)), torch.rand(6, 2)
    block = torch.nn.ModuleDict({"experts": fused})
    with torch.no_grad():
        whole = fused(hidden, chosen, weights)
        with experts_split(block):
            assert isinstance(block["experts"], SplitExperts)
            torch.testing.assert_close(block["experts"](hidden, chosen, weights), whole)
            assert len(list(block.parameters())) == 8  # none of the fused block's own


def test_experts_in_a_layout_that_is_not_known_are_refused():
    config = GptOssConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=8, num_local_experts=4, num_experts_per_tok=2, vocab_size=64, pad_token_id=0, eos_token_id=2,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(InputError, match=r"model.layers.0.mlp.experts: iprox cannot tell the linear layers"):
        split_experts(model)
    assert not any(isinstance(module, SplitExperts) for module in model.modules())


def test_a_model_stays_whole_if_another_cannot_be_split(tiny):
    model, refused = tiny.model("qwen3-moe"), nn.Module()
    refused.gate_up_proj = nn.Parameter(torch.zeros(2, 3, 4))
    refused.down_proj = nn.Parameter(torch.zeros(2, 5, 6))
    with pytest.raises(InputError, match="cannot tell"), experts_split(model, nn.ModuleList([refused])):
        pass
    assert not any(isinstance(module, SplitExperts) for module in model.modules())


def test_norms_of_low_rank_experts_are_of_experts(tiny):
    model = split(tiny.model("qwen3-moe"))
    proxy, _ = derive_proxy(model, [tiny.batch([9, 7, 12], seed=3)], Size(0.4))
    named = {name for name in influence_layers(proxy) if "experts" in name}
    assert named
    assert named <= expert_layers(proxy)


def test_an_experts_moments_leave_padding_out(tiny):
    model = split(moe(tiny))
    layers = compressible_layers(model)
    batch = tiny.batch([9, 4, 6])
    plain, _ = collect_moments(model, layers, [batch])
    alone, _ = collect_moments(model, layers, tiny.rows(batch))
    for name in layers:
        torch.testing.assert_close(plain[name].inputs.matrix, alone[name].inputs.matrix)
        torch.testing.assert_close(plain[name].gradients.matrix, alone[name].gradients.matrix)
        assert plain[name].inputs.block_squares == pytest.approx(alone[name].inputs.block_squares)


def test_an_expert_that_nothing_reached_is_said_and_kept_sound(tiny):
    model = split(moe(tiny, num_experts=32))
    probe = [tiny.batch([3])]  # three tokens of two experts each
    proxy, report = derive_proxy(model, probe, Size(0.3))
    assert len(report.unreached) >= 2 * (32 - 6)
    assert torch.isfinite(logits(proxy, tiny.batch([40]))).all()
    gradient = mean_gradient(model, probe)
    assert set(gradient) == set(influence_layers(model))


def test_a_token_uses_only_its_own_experts(tiny):
    model = split(moe(tiny))
    expert = 3 * 32 * 24 * 2  # gate, up and down of one, times 2 layers
    dense = linear_parameters(model) - 4 * expert
    assert forward_flops(model) == 2 * (dense + 2 * expert)
    _, report = derive_proxy(model, [tiny.batch([30, 30])], Size(flops=0.6))
    assert report.relative_flops <= 0.6


def test_a_model_loads_split_or_fused(tiny, tmp_path):
    model, batch = moe(tiny, dtype=torch.float32), tiny.batch([9, 7])
    model.save_pretrained(tmp_path)
    apart, whole = load_model(tmp_path), load_model(tmp_path, fused=True)
    assert len(compressible_layers(apart)) == 2 * LAYERS["qwen3-moe"]
    assert len(compressible_layers(whole)) == 2 * 4
    torch.testing.assert_close(logits(apart, batch), logits(whole, batch))


def test_packed_weights_are_refused(tiny):
    """What bitsandbytes does: a subclass of nn.Linear whose weight is packed integers."""
    model = tiny.model()
    layer = model.get_submodule("model.layers.1.mlp.up_proj")
    layer.weight = torch.nn.Parameter(torch.zeros(64, 1, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(InputError, match=r"model\.layers\.1\.mlp\.up_proj: its weights are quantized"):
        compressible_layers(model)


def test_buffers_keep_their_precision(tiny):
    """Rotary frequencies in bfloat16 are wrong by radians a few hundred tokens on."""
    model = tiny.model("gemma3", dtype=torch.float32)
    cast_parameters(model, torch.bfloat16)
    assert all(buffer.dtype == torch.float32 for buffer in model.buffers() if buffer.is_floating_point())


def test_an_experts_weighted_error_is_that_of_all_tokens(tiny):
    """tr(C_δ E C_h Eᵀ) estimates the mean of (δᵀEh)² over all tokens, also where an expert sees few of them."""
    model, batch = split(moe(tiny)), tiny.batch([40] * 6)
    name = "model.layers.0.mlp.experts.gate_up.1"
    layers = {name: compressible_layers(model)[name]}
    moments, read = collect_moments(model, layers, [batch], MomentSettings(balanced=False))
    tokens = read.tokens
    kept = []
    with frozen(model):
        watched_backward(model, layers, lambda: causal_lm_losses(model, batch), lambda _, h, d: kept.append((h, d)))
    h, delta = (x.reshape(-1, x.shape[-1]) for x in kept[0])
    reached = int((h != 0).any(-1).sum())
    assert 0 < reached < tokens == 240
    C_h, C_d = moments[name].inputs.matrix, moments[name].gradients.matrix
    torch.testing.assert_close(C_h, h.mT @ h / reached)
    torch.testing.assert_close(C_d, delta.mT @ delta / tokens)
    E = torch.randn(layers[name].weight.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    true = ((delta @ E) * h).sum(-1).square().sum() / tokens
    assert 0.2 < (((C_d @ E @ C_h) * E).sum() / true).item() < 5  # K-FAC's independence is an approximation
