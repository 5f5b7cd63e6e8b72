import os
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from iprox.errors import InputError
from iprox.models.checkpoint import proxy_config
from iprox.models.loading import (
    checkpoint_fingerprint,
    load_config,
    load_model,
    load_tokenizer,
    model_fingerprint,
    skeleton,
    stored_dtype,
)
from iprox.models.precision import (
    cast_parameters,
    resolve_device,
    resolve_dtype,
    warn_of_rounded_frequencies,
    warn_of_slow_products,
)
from iprox.proxy.compress import derive_proxy
from iprox.proxy.size import Size


@pytest.fixture
def folder(tiny, tmp_path):
    tiny.model(dtype=torch.bfloat16).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_a_model_loads_in_the_dtype_asked_for(folder):
    for dtype in (torch.float32, torch.bfloat16):
        model = load_model(folder, dtype=dtype)
        assert {parameter.dtype for parameter in model.parameters()} == {dtype}
        assert not model.training
    assert stored_dtype(folder) == torch.bfloat16


def test_the_fingerprint_is_of_the_weights_whatever_their_dtype(folder, tiny):
    one, two = load_model(folder, dtype=torch.float32), load_model(folder, dtype=torch.bfloat16)
    assert model_fingerprint(one) == model_fingerprint(two)
    with torch.no_grad():
        two.model.layers[0].mlp.up_proj.weight[0, 0] += 1
    assert model_fingerprint(one) != model_fingerprint(two)
    assert model_fingerprint(one) != model_fingerprint(tiny.model(seed=1))


def test_the_checkpoint_fingerprint_is_of_the_files(folder):
    before = checkpoint_fingerprint(folder)
    assert before == checkpoint_fingerprint(folder)
    (folder / "config.json").write_text((folder / "config.json").read_text() + "\n")
    assert before != checkpoint_fingerprint(folder)


def test_a_skeleton_has_every_parameter_and_no_weights(folder, tiny):
    shapes = {name: parameter.shape for name, parameter in skeleton(folder).named_parameters()}
    assert shapes == {name: parameter.shape for name, parameter in tiny.model().named_parameters()}
    assert all(parameter.is_meta for parameter in skeleton(folder).parameters())


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "config.json").unlink(), "no config.json"),
        (lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"), "pickled weights only"),
        (lambda folder: (folder / "model.safetensors").unlink(), "no \\*.safetensors"),
        (lambda folder: (folder / "config.json").write_text("{}"), "cannot be loaded|no model config"),
    ],
)
def test_a_broken_folder_is_refused(folder, spoil, message):
    spoil(folder)
    with pytest.raises(InputError, match=message):
        load_model(folder)


def test_weights_that_are_not_finite_are_named(tiny, tmp_path):
    model = tiny.model()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[2, 3] = float("nan")
    model.save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"model\.layers\.1\.mlp\.down_proj\.weight"):
        load_model(tmp_path)


def test_what_is_not_there_is_said_to_be_missing(tmp_path):
    with pytest.raises(InputError, match="no such model folder"):
        load_model(tmp_path / "nothing")
    with pytest.raises(InputError, match="no tokenizer"):
        load_tokenizer(tmp_path)
    with pytest.raises(InputError, match="no such model folder"):
        load_config("./nothing/here/at/all")


def test_casting_leaves_buffers_alone(tiny):
    model = tiny.model()
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    cast_parameters(model, torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert buffers
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, buffers[name])


def test_a_dtype_that_is_asked_for_is_taken():
    assert resolve_dtype("float32", torch.device("cpu")) == torch.float32
    assert resolve_dtype("bfloat16", torch.device("cpu")) == torch.bfloat16
    assert resolve_dtype("auto", torch.device("cpu")) in (torch.float32, torch.bfloat16)


@pytest.mark.parametrize("native", [False, True])
def test_bfloat16_on_a_cpu_that_emulates_it_is_warned_of(tiny, monkeypatch, recwarn, native):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: native)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: native)
    warn_of_slow_products(tiny.model(dtype=torch.float32))
    assert not recwarn.list
    warn_of_slow_products(tiny.model(dtype=torch.bfloat16))
    assert ["no instructions" in str(warning.message) for warning in recwarn.list] == ([] if native else [True])


def test_rounded_rotary_frequencies_are_warned_of(tiny, recwarn):
    model = tiny.model("qwen3", torch.float32)
    warn_of_rounded_frequencies(model)
    cast_parameters(model, torch.bfloat16)
    warn_of_rounded_frequencies(model)
    assert not recwarn
    model.bfloat16()
    with pytest.warns(UserWarning, match="inv_freq is bfloat16"):
        warn_of_rounded_frequencies(model)


def test_a_device_without_float64_is_refused():
    assert resolve_device("auto").type in ("cpu", "cuda")
    with pytest.raises(InputError, match="float64"):
        resolve_device("mps")


def test_the_skeleton_of_a_proxy_is_one(tmp_path, tiny):
    proxy, _ = derive_proxy(tiny.model("qwen3", torch.float32), [tiny.batch([9, 7])], Size(0.5))
    proxy.save_pretrained(tmp_path)
    found = skeleton(tmp_path)
    assert proxy_config(found) is not None  # so that what is said of scores on it is what was done


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda w: {f"base.{name}": weight for name, weight in w.items()}, r"no weights for .*; it has base\."),
        (
            lambda w: {name: weight for name, weight in w.items() if "layers.0.mlp.up_proj" not in name},
            r"no weights for model\.layers\.0\.mlp\.up_proj\.weight \(1 tensors in all\)",
        ),
        (
            lambda w: {name: weight[:-1].clone() if "0.mlp.up_proj" in name else weight for name, weight in w.items()},
            r"model\.layers\.0\.mlp\.up_proj\.weight has another shape",
        ),
    ],
    ids=["renamed", "missing", "shape"],
)
def test_a_checkpoint_that_would_leave_weights_at_random_values_is_refused(folder, change, said):
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})
    with pytest.raises(InputError, match=said):
        load_model(folder)


def test_half_a_file_of_weights_is_refused(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(InputError, match="cannot be loaded as a causal language model"):
        load_model(folder)


def test_a_hub_model_is_known_by_its_commit(folder, tmp_path):
    """From the Hub's cache, in a process of its own, as the libraries read where it is when they are imported."""
    cached = tmp_path / "home/hub/models--me--model"
    for commit in ("0" * 40, "1" * 40):
        shutil.copytree(folder, cached / "snapshots" / commit)
    (cached / "refs").mkdir()
    code = """
import sys
from pathlib import Path
from iprox.models.loading import checkpoint_fingerprint, load_model
for commit in ("0" * 40, "1" * 40, "0" * 40):
    Path(sys.argv[1]).write_text(commit)
    load_model("me/model")
    print(checkpoint_fingerprint("me/model"))
"""
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, cached / "refs/main"], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    first, other, again = done.stdout.split()
    assert first == again != other


@pytest.mark.parametrize(
    ("kind", "normalizer", "said"),
    [
        (models.WordPiece({"x": 0}, unk_token="[UNK]"), None, "WordPiece error: Missing"),
        (
            models.WordLevel({"a": 0}, unk_token="a"),
            normalizers.Replace(Regex("."), "a " * 1000),
            "more than 100 tokens",
        ),
    ],
)
def test_a_tokenizer_that_cannot_encode_is_refused(tmp_path, kind, normalizer, said):
    core = Tokenizer(kind)
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    if normalizer is not None:
        core.normalizer = normalizer
    PreTrainedTokenizerFast(tokenizer_object=core).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=said):
        load_tokenizer(tmp_path)
