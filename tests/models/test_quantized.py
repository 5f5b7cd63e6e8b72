"""Weights that bitsandbytes quantized: what a quantized model gives is what a dense one with its weights gives."""

import json
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from iprox.errors import InputError
from iprox.models import flops
from iprox.models.checkpoint import limit_depth, proxy_config
from iprox.models.layers import influence_layers, low_rank_layers, replace_module
from iprox.models.loading import load_config, load_model, skeleton
from iprox.models.loss import causal_lm_losses
from iprox.models.observe import frozen, watched_backward
from iprox.models.quantized import bytes_per_weight, dequantized, is_quantized, plain
from iprox.proxy.compress import derive_proxy, keep_weights
from iprox.proxy.size import Size
from tiny_models import make_model

pytest.importorskip("bitsandbytes")
WAYS = {
    4: BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True),
    8: BitsAndBytesConfig(load_in_8bit=True),
}
# Of an 8-bit layer the inputs are rounded, too, to one of 127 steps up to the largest.
ROUNDING = {4: 1e-5, 8: 0.1}
LAYER = "model.layers.1.mlp.down_proj"


@pytest.fixture(scope="module", params=[4, 8])
def bits(request):
    return request.param


@pytest.fixture(scope="module")
def folder(bits, tmp_path_factory):
    """A tiny model, quantized as users do it. Rows are multiples of 64 numbers, the block of a scale."""
    base = tmp_path_factory.mktemp("quantized")
    make_model("qwen2", torch.bfloat16, hidden_size=64, intermediate_size=128).save_pretrained(base / "dense")
    AutoModelForCausalLM.from_pretrained(base / "dense", quantization_config=WAYS[bits]).save_pretrained(base / "few")
    return base / "few"


def as_dense(model):
    """The model with ordinary layers in place of the quantized ones, in place."""
    for name, layer in list(model.named_modules()):
        if is_quantized(layer):
            replace_module(model, name, plain(layer, torch.float32))
    return model


def gradients(model, batch):
    """The gradient of each example's loss at each layer's weight, by the outputs' gradients and the inputs."""
    found = {}
    with frozen(model):
        watched_backward(
            model,
            influence_layers(model),
            lambda: causal_lm_losses(model, batch),
            lambda name, h, delta: found.update({name: torch.einsum("blm,bln->bmn", delta.float(), h.float())}),
        )
    return found


def test_gradients_are_those_of_a_dense_model_with_the_same_weights(folder, bits, tiny):
    batch = tiny.batch([9, 7, 12])
    ours, theirs = gradients(load_model(folder), batch), gradients(as_dense(load_model(folder)), batch)
    assert list(ours) == list(theirs)
    for name, gradient in theirs.items():
        assert (ours[name] - gradient).norm() < ROUNDING[bits] * gradient.norm(), name


def test_weights_are_rounded_ones_of_the_model_before(folder, bits):
    layer = influence_layers(load_model(folder))[LAYER]
    before = influence_layers(load_model(folder.with_name("dense")))[LAYER].weight
    lost = (dequantized(layer) - before).norm() / before.norm()
    assert 0.001 < lost < {4: 0.15, 8: 0.02}[bits]


def test_a_low_rank_proxy_is_that_of_the_dense_model(folder, bits, tiny, tmp_path):
    batches = [tiny.batch([9, 7, 12], seed=seed) for seed in range(3)]
    model = load_model(folder)
    proxy, report = derive_proxy(model, batches, Size(sparsity=0.2))
    expected, _ = derive_proxy(as_dense(load_model(folder)), batches, Size(sparsity=0.2))
    assert not any(map(is_quantized, proxy.modules()))
    assert low_rank_layers(proxy)
    assert any(layer.rank is None for layer in report.layers.values())  # some are left dense
    proxy.save_pretrained(tmp_path / "proxy")
    loaded, batch = load_model(tmp_path / "proxy"), batches[0]
    assert proxy_config(loaded) is not None
    with torch.no_grad():
        ours, theirs = causal_lm_losses(loaded, batch), causal_lm_losses(expected, batch)
    torch.testing.assert_close(ours, theirs, rtol=0.02 if bits == 8 else 1e-3, atol=0)


def test_a_proxy_that_keeps_the_weights_keeps_them_quantized(folder, tmp_path):
    model = load_model(folder)
    proxy, _ = keep_weights(model)
    limit_depth(proxy, 0.5)
    assert proxy_config(model) is None
    proxy.save_pretrained(tmp_path / "proxy")
    loaded = load_model(tmp_path / "proxy")
    description = proxy_config(loaded)
    assert description is not None
    assert description.depth == 0.5
    layers = influence_layers(loaded)
    assert len(layers) == len(influence_layers(model)) / 2
    assert all(map(is_quantized, layers.values()))
    assert torch.equal(dequantized(layers[LAYER]), dequantized(influence_layers(model)[LAYER]))
    assert proxy_config(skeleton(str(tmp_path / "proxy"))) == description


def test_sizes_are_those_of_the_model_before(folder, bits):
    model, before = load_model(folder), load_model(folder.with_name("dense"))
    assert flops.parameters(model) == flops.parameters(before) == flops.parameters(skeleton(str(folder)))
    assert flops.forward_flops(model) == flops.forward_flops(before)
    assert bytes_per_weight(model.config, 2) == {4: 0.56, 8: 1.0}[bits]
    assert bytes_per_weight(before.config, 2) == 2


def test_what_is_not_quantized_has_the_dtype_asked_for(folder):
    for dtype in (torch.float32, torch.bfloat16):
        model = load_model(folder, dtype=dtype)
        embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
        assert isinstance(embeddings, nn.Embedding)
        assert isinstance(head, nn.Linear)
        assert embeddings.weight.dtype == head.weight.dtype == model.dtype == dtype


def test_an_adapter_of_a_quantized_model_is_refused(folder, tmp_path):
    adapted = get_peft_model(make_model("qwen2", hidden_size=64, intermediate_size=128), LoraConfig(r=2))
    adapted.peft_config["default"].base_model_name_or_path = str(folder)
    adapted.save_pretrained(tmp_path / "adapter")
    for read in (load_model, load_config, skeleton):
        with pytest.raises(InputError, match="adapter: adapts a quantized model"):
            read(tmp_path / "adapter")


@pytest.mark.parametrize("part", ["absmax", "nested_absmax", "quant_map", "nested_quant_map"])
@pytest.mark.parametrize("damage", ["removed", "cut", "not finite"])
def test_scales_that_are_damaged_are_refused(folder, bits, tmp_path, part, damage):
    shutil.copytree(folder, tmp_path / "damaged")
    file, name = tmp_path / "damaged/model.safetensors", f"{LAYER}.weight.{part}"
    tensors = load_file(file)
    if name not in tensors:
        pytest.skip("weights of 8 bits have none")
    scales = tensors.pop(name)
    if damage == "cut":
        tensors[name] = scales.repeat(2)
    elif damage == "not finite" and scales.is_floating_point():
        tensors[name] = scales * float("nan")
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(InputError):
        load_model(tmp_path / "damaged")


def test_weights_that_are_not_quantized_are_not_taken_for_quantized(folder, tmp_path):
    shutil.copytree(folder.with_name("dense"), tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "model/config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"q_proj\.weight has no scales, so bitsandbytes did not quantize it"):
        load_model(tmp_path / "model")
