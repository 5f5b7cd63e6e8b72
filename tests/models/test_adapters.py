"""PEFT adapters are merged into their base model, and that is said."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model

import iprox
from iprox.errors import InputError
from iprox.models.adapters import adapter_base
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
