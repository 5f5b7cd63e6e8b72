"""PEFT adapters: merged into their base model, which is said; put on a model to be trained, and saved."""

import json
import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model

import iprox
from iprox.errors import InputError
from iprox.models.adapters import adapter_base, save_adapters, with_lora
from iprox.models.flops import lora_parameters
from iprox.models.layers import compressible_layers
from iprox.models.loading import checkpoint_fingerprint, load_config, load_model
from iprox.session import Session


@pytest.fixture
def adapter(tiny, tmp_path):
    """A saved base model, and a LoRA adapter of it with weights that matter."""
    base, folder = tmp_path / "base", tmp_path / "adapter"
    tiny.model(dtype=torch.float32).save_pretrained(base)
    adapted = get_peft_model(load_model(base), LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    adapted.save_pretrained(folder)
    return base, folder, adapted


def test_an_adapter_folder_loads_merged(adapter, tiny):
    base, folder, adapted = adapter
    assert adapter_base(folder) == str(base)
    assert adapter_base(base) is None
    model, batch = load_model(folder), tiny.batch([9, 7])
    with torch.no_grad():
        logits = model(input_ids=batch.input_ids).logits
        torch.testing.assert_close(logits, adapted(input_ids=batch.input_ids).logits, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(logits, load_model(base)(input_ids=batch.input_ids).logits, atol=1e-2)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert list(compressible_layers(model)) == list(compressible_layers(load_model(base)))
    assert load_config(folder).model_type == "qwen3"
    assert checkpoint_fingerprint(folder) != checkpoint_fingerprint(base)


def test_merging_is_said(adapter):
    _, folder, _ = adapter
    session = Session.create("cpu", "float32")
    session.model(folder)
    (warning,) = session.reporter.take_warnings()
    assert "merged" in warning


def test_an_adapter_that_cannot_be_merged_is_refused(adapter):
    _, folder, adapted = adapter
    with pytest.raises(InputError, match="merge it first"):
        iprox.compress(adapted, [], sparsity=0.5, method="svd")
    described = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**described, "base_model_name_or_path": None}))
    with pytest.raises(InputError, match="base_model_name_or_path"):
        load_model(folder)
    (folder / "adapter_config.json").write_text(json.dumps(described))
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(InputError, match="safetensors only"):
        load_model(folder)


def moved(adapted, seed=1):
    """The same with adapters that matter, as trained ones do."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return adapted


def test_lora_is_on_every_linear_layer_but_the_head_and_changes_nothing_yet(tiny):
    model, batch = tiny.model(dtype=torch.float32), tiny.batch([9, 7])
    layers = compressible_layers(model)
    with torch.no_grad():
        before = model(input_ids=batch.input_ids).logits
        adapted = with_lora(model, "org/name", rank=3, alpha=6.0, seed=1)
        torch.testing.assert_close(adapted(input_ids=batch.input_ids).logits, before)
    trained = {name: each for name, each in adapted.named_parameters() if each.requires_grad}
    assert {name.split(".lora_")[0].removeprefix("base_model.model.") for name in trained} == set(layers)
    assert sum(each.numel() for each in trained.values()) == lora_parameters(tiny.model(), 3)
    again = with_lora(tiny.model(dtype=torch.float32), "org/name", rank=3, alpha=6.0, seed=1)
    assert all(torch.equal(each, trained[name]) for name, each in again.named_parameters() if each.requires_grad)


def test_saved_adapters_name_their_base_and_load_merged_on_an_adapter_too(adapter, tiny, tmp_path):
    base, folder, _ = adapter
    over = tmp_path / "over"
    adapted = moved(with_lora(load_model(folder, fused=True), str(folder), rank=2, alpha=4.0)).eval()
    for _ in range(2):  # the second writes over the first
        save_adapters(adapted, over)
    assert {file.name for file in over.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    described = json.loads((over / "adapter_config.json").read_text())
    assert described["target_modules"] == sorted(described["target_modules"])
    assert adapter_base(over) == str(folder)
    model, batch = load_model(over), tiny.batch([9, 7])
    with torch.no_grad():
        logits = model(input_ids=batch.input_ids).logits
        torch.testing.assert_close(logits, adapted(input_ids=batch.input_ids).logits, rtol=1e-4, atol=1e-4)
    assert load_config(over).model_type == "qwen3"
    assert len({checkpoint_fingerprint(each) for each in (base, folder, over)}) == 3


def test_fused_experts_and_a_missing_peft_are_refused(tiny, monkeypatch):
    with pytest.raises(InputError, match="org/moe: has fused experts, which LoRA would leave as they are"):
        with_lora(tiny.model("qwen3-moe"), "org/moe", rank=2, alpha=4.0)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(InputError, match="pip install 'iprox\\[lora\\]'"):
        with_lora(tiny.model(), "org/name", rank=2, alpha=4.0)
