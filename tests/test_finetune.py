"""Training through TRL: what is trained on, what is kept, and what evaluation says."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from iprox import finetune
from iprox.data import Encoded, iter_batches
from iprox.errors import InputError
from iprox.finetune import evaluate, steps_per_epoch, train
from iprox.models.adapters import with_lora
from iprox.models.loading import load_model
from iprox.models.loss import causal_lm_losses
from iprox.models.saving import save_model

COMPILE = nn.Module.compile


@pytest.fixture(scope="module")
def tokenizer():
    core = Tokenizer(models.WordLevel({f"w{i}": i for i in range(64)}, unk_token="w0"))
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="w0", eos_token="w1")


@pytest.fixture
def encoded():
    """Examples that all follow one rule: the second half repeats the first; only the second half is supervised."""
    rng = np.random.default_rng(0)
    rows = []
    for _ in range(24):
        half = rng.integers(2, 60, 4).astype(np.int32)
        tokens = np.concatenate([half, half])
        labels = tokens.copy()
        labels[:4] = -100
        rows.append(Encoded(tokens, labels, truncated=False))
    return rows


def test_training_lowers_the_loss_and_keeps_every_epoch(tiny, tokenizer, encoded, tmp_path):
    model = tiny.model(dtype=torch.float32)
    before = evaluate(model, encoded, 256)["loss"]
    done = []
    result = train(
        model,
        tokenizer,
        encoded,
        tmp_path,
        epochs=3,
        learning_rate=3e-3,
        batch_size=8,
        store_dtype=torch.bfloat16,
        progress=done.append,
    )
    assert sum(done) == len(result.history) == 9
    assert result.tokens == 3 * 24 * 8
    assert [checkpoint.step for checkpoint in result.checkpoints] == [3, 6, 9]
    after = AutoModelForCausalLM.from_pretrained(tmp_path / result.checkpoints[-1].path, dtype=torch.float32)
    assert evaluate(after, encoded, 256)["loss"] < before - 0.3
    # Safetensors only, stored as asked, and nothing of the trainer's own.
    names = {file.suffix for file in tmp_path.rglob("*") if file.is_file()}
    assert names <= {".json", ".safetensors", ".jinja"}
    assert json.loads((tmp_path / "checkpoint-9" / "config.json").read_text())["dtype"] == "bfloat16"


def test_the_loss_and_its_steps_are_trls(tiny, tokenizer, encoded, tmp_path, monkeypatch):
    """Running the head on supervised tokens only changes the time a step takes, not what it does."""
    histories, weights = [], []
    for number, trainer in enumerate((finetune._SupervisedHeadTrainer, finetune.SFTTrainer)):
        monkeypatch.setattr(finetune, "_SupervisedHeadTrainer", trainer)
        folder = tmp_path / str(number)
        model = tiny.model(dtype=torch.float32)
        result = train(model, tokenizer, encoded, folder, epochs=2, learning_rate=1e-3, batch_size=5, seed=1)
        histories.append([step["loss"] for step in result.history])
        weights.append(load_file(folder / result.checkpoints[-1].path / "model.safetensors"))
    assert histories[0] == pytest.approx(histories[1], rel=1e-5)
    for name, weight in weights[0].items():
        torch.testing.assert_close(weight, weights[1][name], rtol=1e-3, atol=1e-5)


def test_a_checkpoints_learning_rate_is_the_mean_of_its_epoch(tiny, tokenizer, encoded, tmp_path):
    result = train(
        tiny.model(dtype=torch.float32), tokenizer, encoded, tmp_path, epochs=2, learning_rate=1e-3, batch_size=8
    )
    for number, checkpoint in enumerate(result.checkpoints):
        steps = result.history[3 * number : 3 * number + 3]
        assert checkpoint.learning_rate == pytest.approx(np.mean([step["learning_rate"] for step in steps]))
        assert checkpoint.loss == pytest.approx(np.mean([step["loss"] for step in steps]))
    assert result.checkpoints[0].learning_rate > result.checkpoints[1].learning_rate > 0
    assert max(step["learning_rate"] for step in result.history) <= 1e-3


def test_it_trains_on_the_supervised_tokens(tiny, tokenizer, encoded, tmp_path):
    """The first step's loss, before any update, is the mean over the supervised tokens of the batch."""
    model = tiny.model(dtype=torch.float32)
    expected = evaluate(model, encoded, 256)["token_loss"]
    result = train(model, tokenizer, encoded, tmp_path, epochs=1, learning_rate=1e-9, batch_size=24)
    assert result.history[0]["loss"] == pytest.approx(expected, rel=1e-4)


def test_only_the_last_checkpoint_is_kept_if_asked(tiny, tokenizer, encoded, tmp_path):
    model = tiny.model(dtype=torch.float32)
    result = train(model, tokenizer, encoded, tmp_path, epochs=2, learning_rate=1e-3, batch_size=8, every_epoch=False)
    assert [checkpoint.path for checkpoint in result.checkpoints] == ["checkpoint-6"]
    assert [folder.name for folder in tmp_path.iterdir() if folder.is_dir()] == ["checkpoint-6"]


def test_the_same_seed_trains_the_same_weights(tiny, tokenizer, encoded, tmp_path):
    for name in ("one", "two"):
        model = tiny.model(dtype=torch.float32)
        train(model, tokenizer, encoded, tmp_path / name, epochs=1, learning_rate=1e-3, batch_size=8, seed=3)
    one, two = ((tmp_path / name / "checkpoint-3" / "model.safetensors").read_bytes() for name in ("one", "two"))
    assert one == two


@pytest.mark.parametrize("lora", [False, True])
def test_a_compiled_training_takes_the_same_steps(tiny, tokenizer, encoded, tmp_path, monkeypatch, lora):
    """Traced by `aot_eager`, which generates no code; tests/models/test_fast_training.py has the gradients of that."""
    monkeypatch.setattr(nn.Module, "compile", lambda self, **options: COMPILE(self, backend="aot_eager", **options))
    torch._dynamo.reset()
    losses = {}
    for compiled in (False, True):
        model = tiny.model(dtype=torch.float32)
        result = train(
            *(with_lora(model, "org/name", 4) if lora else model, tokenizer, encoded, tmp_path),
            epochs=2,
            learning_rate=1e-3,
            batch_size=8,
            compile_model=compiled,
        )
        assert result.uncompiled == ""
        losses[compiled] = [step["loss"] for step in result.history]
    assert losses[True] == pytest.approx(losses[False], rel=1e-4)


@pytest.mark.parametrize("lora", [False, True])
def test_accumulated_batches_are_one_large_one(tiny, tokenizer, tmp_path, lora):
    """Also of rows of unlike length and supervision, whose number does not divide: tokens count alike, not batches."""
    rng = np.random.default_rng(0)
    rows = []
    for _ in range(22):
        tokens = rng.integers(2, 60, rng.integers(5, 20)).astype(np.int32)
        labels = tokens.copy()
        labels[: rng.integers(1, len(tokens) - 1)] = -100
        rows.append(Encoded(tokens, labels, truncated=False))
    losses = []
    for batch_size, accumulate in ((8, 1), (4, 2), (2, 4)):
        model = tiny.model(dtype=torch.float32)
        result = train(
            *(with_lora(model, "org/name", 4) if lora else model, tokenizer, rows, tmp_path),
            epochs=2,
            learning_rate=1e-2,
            batch_size=batch_size,
            accumulate=accumulate,
        )
        losses.append([step["loss"] for step in result.history])
    assert len(losses[0]) == 6
    for other in losses[1:]:
        assert other == pytest.approx(losses[0], rel=1e-4)


@pytest.mark.parametrize(("batch_size", "accumulate"), [(24, 1), (5, 1), (5, 2), (7, 3), (30, 2)])
def test_the_steps_are_as_many_as_foretold(tiny, tokenizer, encoded, tmp_path, batch_size, accumulate):
    result = train(
        *(tiny.model(dtype=torch.float32), tokenizer, encoded, tmp_path),
        epochs=2,
        learning_rate=1e-3,
        batch_size=batch_size,
        accumulate=accumulate,
    )
    assert len(result.history) == 2 * steps_per_epoch(24, batch_size, accumulate)


@pytest.mark.parametrize("adapters_only", [False, True])
def test_adapters_are_trained_and_saved_alone_or_multiplied_in(tiny, tokenizer, encoded, tmp_path, adapters_only):
    base = tmp_path / "base"
    save_model(tiny.model(dtype=torch.float32), tokenizer, base)
    whole = load_model(base)
    before = evaluate(whole, encoded, 256)["loss"]
    frozen = {name: weight.clone() for name, weight in whole.state_dict().items()}
    adapted = with_lora(whole, str(base), rank=4)
    result = train(
        *(adapted, tokenizer, encoded, tmp_path / "lora"),
        epochs=3,
        learning_rate=2e-2,
        batch_size=8,
        adapters_only=adapters_only,
    )
    assert [checkpoint.step for checkpoint in result.checkpoints] == [3, 6, 9]
    for name, weight in adapted.get_base_model().state_dict().items():
        if ".lora_" not in name:
            assert torch.equal(weight, frozen[name.replace(".base_layer", "")])
    checkpoints = [load_model(tmp_path / "lora" / each.path) for each in result.checkpoints]
    losses = [evaluate(each, encoded, 256)["loss"] for each in checkpoints]
    assert losses[2] < losses[1] < losses[0] < before
    assert losses[2] < before - 0.3
    last = tmp_path / "lora" / result.checkpoints[-1].path
    assert (last / "adapter_config.json").is_file() == adapters_only
    assert (last / "model.safetensors").is_file() != adapters_only
    assert {file.suffix for file in last.iterdir()} <= {".json", ".safetensors", ".jinja"}


def test_evaluation_is_the_mean_of_the_examples_losses(tiny, encoded):
    model = tiny.model(dtype=torch.float32)
    result = evaluate(model, encoded, 40)
    with torch.no_grad():
        losses = [causal_lm_losses(model, batch) for batch in iter_batches(encoded, 10_000)]
    assert result["loss"] == pytest.approx(torch.cat(losses).mean().item(), rel=1e-5)
    assert (result["examples"], result["tokens"]) == (24, 96)


def test_an_exact_match_is_what_greedy_decoding_would_give(tiny):
    model = tiny.model(dtype=torch.float32)
    prompts = torch.arange(1, 25).view(6, 4)
    greedy = model.generate(prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=3, do_sample=False)
    assert greedy.shape == (6, 7)
    for row in (1, 4):  # one early, one late token is another
        greedy[row, 4 + row // 2] = (greedy[row, 4 + row // 2] + 1) % model.config.vocab_size
    ids = greedy.numpy().astype(np.int32)
    labels = np.where(np.arange(7) < 4, -100, ids)
    result = evaluate(model, [Encoded(*row, truncated=False) for row in zip(ids, labels, strict=True)], 16)
    assert result["exact_match"] == pytest.approx(4 / 6)


def test_nothing_supervised_is_refused(tiny, tokenizer, tmp_path):
    empty = [Encoded(np.arange(5, dtype=np.int32), np.full(5, -100, dtype=np.int32), truncated=False)]
    with pytest.raises(InputError, match="to train on"):
        train(tiny.model(dtype=torch.float32), tokenizer, empty, tmp_path, epochs=1, learning_rate=1e-3)
    with pytest.raises(InputError, match="to evaluate on"):
        evaluate(tiny.model(), empty, 64)


def test_a_loss_that_is_not_finite_stops_the_training(tiny, tokenizer, encoded, tmp_path):
    with pytest.raises(FloatingPointError, match="step"):
        train(tiny.model(dtype=torch.float32), tokenizer, encoded, tmp_path, epochs=3, learning_rate=1e20, batch_size=8)


def test_a_saved_folder_appears_only_when_whole(tiny, tokenizer, tmp_path, monkeypatch):
    model = tiny.model()
    save_model(model, tokenizer, tmp_path / "model")
    whole = (tmp_path / "model" / "model.safetensors").read_bytes()

    def fails(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(tokenizer), "save_pretrained", fails)
    with pytest.raises(OSError, match="No space"):
        save_model(tiny.model(seed=1), tokenizer, tmp_path / "model")
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == whole
    with pytest.raises(OSError, match="No space"):
        save_model(model, tokenizer, tmp_path / "other")
    assert not (tmp_path / "other").exists()
