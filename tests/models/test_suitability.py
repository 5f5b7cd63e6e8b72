"""Which models are refused before their weights are read, and by which word."""

import json
import os
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    BertGenerationConfig,
    BertGenerationDecoder,
    BertLMHeadModel,
    DistilBertConfig,
    DistilBertForMaskedLM,
    ElectraConfig,
    ElectraForCausalLM,
    Qwen3Config,
    RobertaConfig,
    RobertaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    XLNetConfig,
    XLNetLMHeadModel,
)

from iprox.errors import InputError
from iprox.models import quantized
from iprox.models.loading import _refuse_looking_ahead, checkpoint_fingerprint, load_config, load_model, skeleton
from iprox.models.suitability import check_sizes, follows_order, run_attention_here
from iprox.session import Session

SMALL = {
    "vocab_size": 64,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 40,
}


@pytest.fixture
def folder(tiny, tmp_path):
    tiny.model(dtype=torch.float32).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def describe(folder, **changes):
    """Change a config as by hand."""
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    return folder


def refusal(folder):
    """What is said of a folder, which every reader of its config is to say."""
    with pytest.raises(InputError) as error:
        load_config(folder)
    for read in (skeleton, load_model):
        with pytest.raises(InputError) as other:
            read(folder)
        assert str(other.value) == str(error.value)
    assert len(str(error.value).splitlines()) == 1
    return str(error.value)


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda: BertForMaskedLM(BertConfig(**SMALL)), "BertForMaskedLM is a masked language model"),
        (lambda: BertLMHeadModel(BertConfig(**SMALL)), "BertLMHeadModel is a masked language model"),
        (lambda: RobertaForCausalLM(RobertaConfig(**SMALL)), "RobertaForCausalLM is a masked language model"),
        (lambda: ElectraForCausalLM(ElectraConfig(**SMALL)), "ElectraForCausalLM is a masked language model"),
        (lambda: BertGenerationDecoder(BertGenerationConfig(**SMALL)), "BertGenerationDecoder is a masked"),
        (
            lambda: XLNetLMHeadModel(XLNetConfig(vocab_size=64, d_model=16, n_layer=1, n_head=2, d_inner=24)),
            "XLNetLMHeadModel is a masked language model",
        ),
        (lambda: DistilBertForMaskedLM(DistilBertConfig(vocab_size=64, dim=16, n_layers=1, n_heads=2)), "DistilBert"),
        (
            lambda: T5ForConditionalGeneration(T5Config(vocab_size=64, d_model=16, d_ff=24, num_layers=1, num_heads=2)),
            "T5ForConditionalGeneration is an encoder-decoder",
        ),
        (
            lambda: BartForConditionalGeneration(
                BartConfig(vocab_size=64, d_model=16, encoder_layers=1, decoder_layers=1)
            ),
            "BartForConditionalGeneration is an encoder-decoder",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_no_causal_language_model_is_refused_by_its_architecture(make, word, tmp_path):
    make().save_pretrained(tmp_path)
    said = refusal(tmp_path)
    assert word in said
    assert "causal language model" in said


@pytest.mark.parametrize("kind", [(BertLMHeadModel, BertConfig), (RobertaForCausalLM, RobertaConfig)])
def test_an_encoder_trained_as_a_decoder_is_causal(kind, tmp_path):
    model, config = kind
    model(config(**SMALL, is_decoder=True)).save_pretrained(tmp_path)
    assert load_model(tmp_path).config.is_decoder


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"architectures": ["Qwen3ForSequenceClassification"]}, "another task"),
        ({"is_causal": False}, "bidirectional"),
        ({"use_bidirectional_attention": True}, "bidirectional"),
        ({"model_type": "bert"}, "masked"),
    ],
)
def test_a_config_of_another_kind_of_model_is_refused(folder, changes, word):
    assert word in refusal(describe(folder, **changes))


def test_a_model_that_sees_later_tokens_is_found_by_trying(tiny):
    assert follows_order(tiny.model(), 64)
    encoder = BertForMaskedLM(BertConfig(**SMALL, initializer_range=0.5)).eval()
    assert not follows_order(encoder, 64)
    with pytest.raises(InputError, match="BertForMaskedLM sees the tokens after"):
        _refuse_looking_ahead(encoder, "somewhere")


@pytest.mark.parametrize(
    ("quantization", "words"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, ("bitsandbytes", "pip install bitsandbytes")),
        ({"load_in_8bit": True}, ("bitsandbytes", "pip install bitsandbytes")),
        ({"quant_method": "gptq", "bits": 4}, ("gptq", "pip install optimum gptqmodel")),
        ({"quant_method": "awq", "bits": 4}, ("awq", "pip install gptqmodel")),
        ({"quant_method": "hqq"}, ("hqq", "pip install hqq")),
        ({"quant_method": "compressed-tensors"}, ("compressed-tensors", "pip install compressed-tensors")),
        ({"quant_method": "of-nobody"}, ("of-nobody", "16 or 32 bits")),
        ("four bits", ("four bits", "keys and values")),
    ],
)
def test_quantized_weights_are_refused_with_their_package(folder, quantization, words, monkeypatch):
    monkeypatch.setattr(quantized, "_installed", lambda module: False)
    said = refusal(describe(folder, quantization_config=quantization))
    for word in words:
        assert word in said


@pytest.mark.parametrize("key", ["_attn_implementation", "attn_implementation"])
@pytest.mark.parametrize("attention", ["flash_attention_2", "flash_attention_3", "kernels-community/flash-attn2"])
def test_attention_that_is_not_here_is_replaced_and_that_is_recorded(folder, tiny, key, attention):
    before = load_model(folder)
    describe(folder, **{key: attention})
    skeleton(folder)
    session = Session.create("cpu", "float32")
    with session.metered():
        model = session.model(folder)
    assert model.config._attn_implementation == "sdpa"
    (said,) = session.reporter.take_warnings()
    assert attention in said
    assert "sdpa is used" in said
    batch = tiny.batch([9, 7])
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=batch.input_ids).logits, before(input_ids=batch.input_ids).logits)


def test_attention_that_runs_is_left_alone():
    config = Qwen3Config(attn_implementation="eager")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run_attention_here(config, torch.float32, torch.device("cpu"), "model")
    assert config._attn_implementation == "eager"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_size", -32),
        ("hidden_size", 0),
        ("hidden_size", 2**50),
        ("num_hidden_layers", 10**9),
        ("num_hidden_layers", "two"),
        ("num_attention_heads", -1),
        ("num_key_value_heads", 1.5),
        ("intermediate_size", True),
        ("vocab_size", [[]]),
    ],
)
def test_sizes_that_no_model_has_are_named(folder, key, value):
    if key == "vocab_size":
        with pytest.raises(InputError):
            load_config(describe(folder, vocab_size=value))
        return
    assert f"{key} in its config is {value!r}" in refusal(describe(folder, **{key: value}))


def test_sizes_of_parts_are_looked_at_too():
    with pytest.raises(InputError, match="num_hidden_layers"):
        check_sizes({"text_config": {"num_hidden_layers": 10**9}}, "model")
    check_sizes({"num_experts": 0, "num_key_value_heads": None, "intermediate_size": [8, 16]}, "model")


@pytest.mark.parametrize(
    "changes",
    [
        {"num_hidden_layers": 5000, "layer_types": None},
        {"hidden_size": 2**30},
        {"num_attention_heads": 0},
        {"head_dim": 10**5},
        {"intermediate_size": 10**9},
        {"hidden_act": "nonsense"},
        {"rope_parameters": "nonsense"},
        {"layer_types": ["nonsense", "nonsense"]},
        {"dtype": "float7"},
        {"model_type": 7},
        {"pad_token_id": 10**9},
    ],
)
def test_a_config_that_does_not_fit_is_no_fault_of_ours(folder, changes):
    describe(folder, **changes)
    with pytest.raises(InputError) as error:
        load_model(folder)
    assert str(error.value).startswith(str(folder))
    assert len(str(error.value).splitlines()) == 1


def sharded(folder, **files):
    """Give a folder an index that maps each tensor to one of some files, in turn."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").rename(folder / "part-1.safetensors")
    names = list(files.values()) or ["part-1.safetensors"]
    mapping = {name: names[number % len(names)] for number, name in enumerate(weights)}
    index = {"metadata": {}, "weight_map": mapping}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return weights


@pytest.mark.parametrize(
    "other", ["pickle.bin", "../outside.safetensors", "sub/part.safetensors", "/etc/x.safetensors"]
)
def test_an_index_names_safetensors_of_the_folder_only(folder, other):
    weights = sharded(folder, one="part-1.safetensors", two=other)
    for place in (folder.parent / "outside.safetensors", folder / "sub/part.safetensors"):
        place.parent.mkdir(exist_ok=True)
        save_file(weights, place)
    torch.save(weights, folder / "pickle.bin")
    said = refusal(folder)
    assert other in said
    assert "model's own folder" in said
    with pytest.raises(InputError, match="own folder"):
        checkpoint_fingerprint(folder)


def test_what_an_index_names_is_in_the_fingerprint(folder):
    weights = sharded(folder)
    before = checkpoint_fingerprint(folder)
    load_model(folder)
    weights["model.norm.weight"] = weights["model.norm.weight"] + 1
    save_file(weights, folder / "part-1.safetensors", metadata={"format": "pt"})
    assert checkpoint_fingerprint(folder) != before


@pytest.mark.parametrize("index", ["[]", "{", '{"weight_map": 3}', '{"weight_map": {"a": 3}}', '{"weight_map": {}}'])
def test_an_index_that_is_none_is_refused(folder, index):
    sharded(folder)
    (folder / "model.safetensors.index.json").write_text(index)
    assert "index.json" in refusal(folder)


@pytest.mark.parametrize("name", ["pickle.bin", "../outside.safetensors", 3, "../x.safetensors.index.json"])
def test_a_config_names_no_other_weights_either(folder, name):
    (folder / "pickle.bin").write_bytes(b"")
    assert "own folder" in refusal(describe(folder, transformers_weights=name))


def test_a_folder_that_is_not_there_is_said_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for read in (load_config, checkpoint_fingerprint, load_model, skeleton):
        with pytest.raises(InputError, match=r"^some/folder: no such folder here, and on the hub: "):
            read("some/folder")


def test_paths_that_cannot_be_are_refused(tmp_path):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for path in (tmp_path / "loop", "a" * 5000, tmp_path / ("b" * 300), "a\0b"):
        for read in (load_config, load_model, checkpoint_fingerprint, skeleton):
            with pytest.raises(InputError):
                read(path)


def test_a_model_type_that_transformers_does_not_know(tmp_path, folder):
    assert AutoConfig.from_pretrained(folder).model_type == "qwen3"
    assert "from-next-year" in refusal(describe(folder, model_type="from-next-year"))


LAYER = "model.layers.0.mlp.down_proj.weight"


def rewritten(folder, change):
    """Change the tensors of a folder as by hand."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("kind", [torch.int8, torch.bool, torch.int64, torch.complex64])
def test_integers_in_place_of_weights_are_refused(folder, kind):
    rewritten(folder, lambda tensors: tensors.update({LAYER: tensors[LAYER].to(kind)}))
    with pytest.raises(InputError, match="but its config does not quantize it"):
        load_model(folder)


def test_more_layers_than_the_config_has_are_refused(folder):
    rewritten(folder, lambda tensors: tensors.update({LAYER.replace(".0.", ".99."): tensors[LAYER].clone()}))
    with pytest.raises(InputError, match=r"has weights for model\.layers\.99\..* its config has no layer"):
        load_model(folder)


@pytest.mark.parametrize("name", ["more", LAYER.replace("weight", "bias")])
def test_tensors_that_are_not_read_are_warned_of(folder, name):
    rewritten(folder, lambda tensors: tensors.update({name: torch.ones(3)}))
    with pytest.warns(UserWarning, match=f"has 1 tensors that a model of its config does not have.*first: {name}"):
        load_model(folder)


@pytest.mark.parametrize("name", ["tokenizer.json", "model-2.safetensors", "chat_template.jinja"])
def test_pipes_in_a_model_folder_are_refused_rather_than_waited_for(folder, name):
    os.mkfifo(folder / name)
    assert f"{name}: is a pipe, not a regular file" in refusal(folder)
