"""PEFT adapters: merged into their base model, which is said; put on a model to be trained, and saved."""

import json
import shutil
import sys
import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

import iprox
from iprox.errors import InputError
from iprox.models.adapters import adapter_base, save_adapters, with_lora
from iprox.models.flops import lora_parameters, parameters
from iprox.models.layers import compressible_layers
from iprox.models.loading import checkpoint_fingerprint, load_config, load_model, skeleton
from iprox.models.saving import save_model
from iprox.session import Session


@pytest.fixture
def tokenizer():
    core = Tokenizer(models.WordLevel({f"w{i}": i for i in range(64)}, unk_token="w0"))
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="w0", eos_token="w1")


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
    assert parameters(skeleton(folder)) == parameters(skeleton(base))


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
        adapted = with_lora(model, "org/name", rank=3, seed=1)
        torch.testing.assert_close(adapted(input_ids=batch.input_ids).logits, before)
    trained = {name: each for name, each in adapted.named_parameters() if each.requires_grad}
    assert {name.split(".lora_")[0].removeprefix("base_model.model.") for name in trained} == set(layers)
    assert sum(each.numel() for each in trained.values()) == lora_parameters(tiny.model(), 3)
    again = with_lora(tiny.model(dtype=torch.float32), "org/name", rank=3, seed=1)
    assert all(torch.equal(each, trained[name]) for name, each in again.named_parameters() if each.requires_grad)


def test_saved_adapters_name_their_base_and_load_merged_on_an_adapter_too(adapter, tiny, tmp_path):
    base, folder, _ = adapter
    over = tmp_path / "over"
    adapted = moved(with_lora(load_model(folder, fused=True), str(folder), rank=2)).eval()
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


@pytest.mark.parametrize("kind", ["qwen3", "gpt2", "gemma3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_saved_with_its_adapters_multiplied_in_is_whole(tiny, tokenizer, tmp_path, kind, dtype):
    batch = tiny.batch([9, 7])
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # PEFT's, of layers stored the other way round
        adapted = moved(with_lora(tiny.model(kind, dtype=dtype), "org/name", rank=2)).eval()
    save_model(adapted, tokenizer, tmp_path / "whole", torch.float32)
    model = load_model(tmp_path / "whole")
    assert json.loads((tmp_path / "whole/config.json").read_text())["dtype"] == "float32"
    with torch.no_grad():
        expected = adapted.float()(input_ids=batch.input_ids).logits
        torch.testing.assert_close(model(input_ids=batch.input_ids).logits, expected, rtol=1e-4, atol=1e-4)
    # It has not changed what goes on training.
    assert {name for name, each in adapted.named_parameters() if each.requires_grad} >= {
        name for name, _ in adapted.named_parameters() if ".lora_" in name
    }


def half(folder):
    weights = load_file(folder / "adapter_model.safetensors")
    save_file(dict(sorted(weights.items())[: len(weights) // 2]), folder / "adapter_model.safetensors")


def cut(folder):
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-50])


def described(**changes):
    def change(folder):
        file = folder / "adapter_config.json"
        told = {key: value.format(folder) if isinstance(value, str) else value for key, value in changes.items()}
        file.write_text(json.dumps({**json.loads(file.read_text()), **told}))

    return change


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        (half, "adapter: is incomplete: it lacks weights of some of the layers that it adapts"),
        (cut, "adapter: does not fit its base model"),
        (lambda folder: (folder / "adapter_config.json").write_text("[1"), "config.json: is not a JSON object"),
        (
            lambda folder: (folder / "adapter_config.json").write_text("[1]"),
            "config.json: is not a JSON object",
        ),
        (described(base_model_name_or_path="{}"), "names itself as base_model_name_or_path"),
        (
            described(target_modules=["q_proj"]),
            "safetensors: has weights for .*, which its adapter_config",
        ),
        (described(layers_to_transform=[0]), "which its adapter_config.json does not adapt"),
        (described(base_model_name_or_path="/moved/base"), "adapter: adapts /moved/base, which is missing; correct"),
    ],
)
def test_a_broken_adapter_is_refused(adapter, broken, said):
    _, folder, _ = adapter
    broken(folder)
    with pytest.raises(InputError, match=said):
        load_model(folder)


def test_fused_experts_and_a_missing_peft_are_refused(tiny, monkeypatch):
    with pytest.raises(InputError, match="org/moe: has fused experts, which LoRA would not adapt"):
        with_lora(tiny.model("qwen3-moe"), "org/moe", rank=2)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(InputError, match="pip install 'iprox\\[lora\\]'"):
        with_lora(tiny.model(), "org/name", rank=2)


def rewritten(folder, **changes):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.mark.parametrize(
    "kind", ["PROMPT_TUNING", "PREFIX_TUNING", "P_TUNING", "IA3", "LN_TUNING", "XLORA", "of-nobody", 3, None]
)
def test_adapters_that_are_no_products_are_refused_by_their_type(adapter, kind):
    _, folder, _ = adapter
    rewritten(folder, peft_type=kind)
    for read in (load_model, load_config, checkpoint_fingerprint):
        with pytest.raises(InputError, match=f"a PEFT adapter of the type {kind!r}"):
            read(folder)


def test_adapters_that_name_each_other_are_refused(adapter, tmp_path):
    _, folder, _ = adapter
    other, third = tmp_path / "other", tmp_path / "third"
    shutil.copytree(folder, other)
    shutil.copytree(folder, third)
    rewritten(folder, base_model_name_or_path=str(other))
    rewritten(other, base_model_name_or_path=str(third))
    rewritten(third, base_model_name_or_path=str(other))  # a cycle that the first is not in
    for read in (load_model, load_config, checkpoint_fingerprint, adapter_base):
        with pytest.raises(InputError, match="name each other"):
            read(folder)


@pytest.mark.parametrize("base", [3, ["a"], "a\0b", "b" * 300])
def test_a_base_that_is_no_path_is_refused(adapter, base):
    _, folder, _ = adapter
    rewritten(folder, base_model_name_or_path=base)
    with pytest.raises(InputError):
        load_model(folder)


def test_an_adapter_of_other_shapes_is_refused_with_both_sizes(adapter, tiny, tmp_path):
    base, folder, _ = adapter
    resized = load_model(base)
    resized.resize_token_embeddings(70)
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens"])
    get_peft_model(resized, config).save_pretrained(tmp_path / "resized")
    rewritten(tmp_path / "resized", base_model_name_or_path=str(base))
    with pytest.raises(InputError, match=r"\[70, 32\] in the adapter and .*\[64, 32\] in the base model"):
        load_model(tmp_path / "resized")
    wider = tmp_path / "wider"
    tiny.model(dtype=torch.float32, hidden_size=48).save_pretrained(wider)
    rewritten(folder, base_model_name_or_path=str(wider))
    with pytest.raises(InputError, match=r"\[2, 32\] in the adapter and .*\[2, 48\] in the base model"):
        load_model(folder)


def test_the_type_of_an_adapter_is_said_even_if_its_base_is_missing(adapter):
    _, folder, _ = adapter
    rewritten(folder, peft_type="PROMPT_TUNING", base_model_name_or_path="a/folder/that/is/not/here")
    with pytest.raises(InputError, match="PROMPT_TUNING"):
        adapter_base(folder)
