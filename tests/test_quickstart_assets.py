"""The bundled quickstart: sizes, data, a trained model, and a generator that gives the same bytes."""

import importlib.util
import json
import math
import os
import subprocess
import sys
from collections import Counter
from importlib import resources
from importlib.metadata import version
from itertools import islice
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

FOLDER = Path(str(resources.files("iprox.quickstart")))
SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "make_quickstart_data.py"
MEBIBYTE = 2**20
MARGIN = 1.0  # nats; the bundled model is 1.49 below


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def generator():
    spec = importlib.util.spec_from_file_location("make_quickstart_data", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up by name
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def recipe():
    return yaml.safe_load((FOLDER / "recipe.yaml").read_text())


@pytest.fixture(scope="module")
def pool(recipe):
    return read(FOLDER / recipe["data"]["pool"][0])


@pytest.fixture(scope="module")
def validation(recipe):
    return {task: read(FOLDER / path) for task, path in recipe["data"]["validation"].items()}


@pytest.fixture(scope="module")
def tokenizer(recipe):
    return AutoTokenizer.from_pretrained(FOLDER / recipe["model"])


@pytest.fixture(scope="module")
def model(recipe):
    return AutoModelForCausalLM.from_pretrained(FOLDER / recipe["model"], dtype="auto").eval()


def encode(tokenizer, rows):
    out = tokenizer.apply_chat_template(
        [row["messages"] for row in rows], return_dict=True, return_assistant_tokens_mask=True
    )
    return list(zip(out["input_ids"], out["assistant_masks"], strict=True))


def test_everything_bundled_is_small():
    weights = FOLDER / "model" / "model.safetensors"
    assert weights.stat().st_size <= 4 * MEBIBYTE
    assert sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()) < 6 * MEBIBYTE
    assert {path.suffix for path in (FOLDER / "model").iterdir()} == {".safetensors", ".json", ".jinja"}


def test_pool_has_many_skills_and_unique_ids(pool, validation):
    assert 1800 <= len(pool) <= 2200
    sources = Counter(row["source"] for row in pool)
    assert len(sources) >= 8
    assert min(sources.values()) >= 50
    rows = [*pool, *(row for task in validation.values() for row in task)]
    assert len({row["id"] for row in rows}) == len(rows)
    for row in rows:
        assert set(row) == {"id", "source", "messages"}
        assert [message["role"] for message in row["messages"]] == ["user", "assistant"]
        assert all(message["content"].strip() for message in row["messages"])


def test_validation_tasks_are_apart_from_the_pool(pool, validation, generator):
    assert {task: len(rows) for task, rows in validation.items()} == {"arithmetic": 32, "spelling": 32}
    questions = {row["messages"][0]["content"] for row in pool}
    assert len(questions) == len(pool)
    # The problem itself, whatever the phrasing: the steps of the sum, the word.
    sums = {row["messages"][1]["content"] for row in pool if row["source"] == "arithmetic"}
    words = {row["messages"][1]["content"] for row in pool if row["source"] == "spelling"}
    for row in validation["arithmetic"]:
        assert row["messages"][1]["content"] not in sums
    for row in validation["spelling"]:
        assert row["messages"][1]["content"] not in words
    for skill in generator.SKILLS.values():
        assert not set(skill.validation) & set(skill.pool + skill.corpus)
        assert not set(skill.pool) & set(skill.corpus)


def test_answers_are_right(pool, validation):
    for row in [*pool, *validation["arithmetic"], *validation["spelling"]]:
        answer = row["messages"][1]["content"]
        if row["source"] == "arithmetic":
            steps, result = answer.removesuffix(".").split(". The answer is ")
            for step in steps.split(". "):
                left, right = step.split(" = ")
                assert eval(left) == int(right)
            assert steps.endswith(f" = {result}")
        elif row["source"] == "equations":
            left, right = answer.removesuffix(".").split("because ")[1].split(" = ")
            assert eval(left) == int(right)
        elif row["source"] == "sorting":
            words = answer.split(", ")
            assert words in (sorted(words), sorted(words, reverse=True))
        elif row["source"] == "spelling":
            letters, word = answer.split(": ")
            assert letters.replace("-", "") == word
            assert word[::-1] in row["messages"][0]["content"]
        elif row["source"] == "legs":
            left, right = answer.split("In all ")[1].removesuffix(" legs.").split(" = ")
            assert eval(left) == int(right)


def test_examples_are_short_and_supervised_on_the_answer(pool, tokenizer):
    encoded = encode(tokenizer, pool)
    lengths = [len(ids) for ids, _ in encoded]
    assert max(lengths) <= 256
    assert 50 <= sum(lengths) / len(lengths) <= 90
    for row, (ids, mask) in zip(pool, encoded, strict=True):
        answer = tokenizer.decode([token for token, m in zip(ids, mask, strict=True) if m])
        assert answer == row["messages"][1]["content"] + "<|im_end|>"


def test_tokenizer_is_small_and_knows_its_end(tokenizer):
    assert 1024 <= len(tokenizer) <= 2048
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    assert tokenizer.tokenize("1234") == ["1", "2", "3", "4"]
    text = "Grüße, 你好!\n  12 × 3"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_model_is_small_and_mostly_linear_layers(model, tokenizer):
    total = model.num_parameters()
    assert total <= 1_500_000
    linear = sum(
        module.weight.numel()
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    )
    assert linear > total / 2
    assert model.config.model_type == "qwen3"
    assert model.config.vocab_size == len(tokenizer)
    assert model.config.tie_word_embeddings
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert all(bool(torch.isfinite(parameter).all()) for parameter in model.parameters())


def test_model_is_trained(model, tokenizer, validation):
    """It beats the best unigram model of the same tokens by far, on phrasings it has not seen."""
    model = model.float()
    encoded = [pair for rows in validation.values() for pair in encode(tokenizer, rows)]
    counts, total = Counter(), 0.0
    for ids, mask in encoded:
        tokens, wanted = torch.tensor(ids), torch.tensor(mask[1:], dtype=torch.bool)
        with torch.no_grad():
            logits = model(input_ids=tokens[None]).logits[0, :-1][wanted]
        total += torch.nn.functional.cross_entropy(logits, tokens[1:][wanted], reduction="sum").item()
        counts.update(tokens[1:][wanted].tolist())
    number = sum(counts.values())
    entropy = -sum(n / number * math.log(n / number) for n in counts.values())
    assert total / number < entropy - MARGIN


@pytest.mark.parametrize("split", ["pool", "corpus"])
def test_generator_repeats_itself_and_skips_what_was_seen(generator, split):
    def make(seed, seen):
        return list(islice(generator.generate("sorting", split, seed=seed, seen=seen), 20))

    seen = set()
    first = make(0, seen)
    assert len(seen) == 20
    assert make(0, set()) == first
    assert make(1, set()) != first
    again = make(0, seen)
    answers = [row["messages"][1]["content"] for row in first]
    assert all(row["messages"][1]["content"] not in answers for row in again)


def test_generator_gives_the_bundled_bytes(tmp_path, generator):
    if version("reasoning-gym") != generator.GENERATED_WITH:
        pytest.skip(f"the files were made with reasoning-gym {generator.GENERATED_WITH}")
    # Another hash seed, so that an unordered set in the generator cannot hide.
    command = [sys.executable, str(SCRIPT), "--output", str(tmp_path)]
    subprocess.run(command, check=True, env={**os.environ, "PYTHONHASHSEED": "12345"}, stdout=subprocess.DEVNULL)
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in (FOLDER / "data").iterdir()}
    for path in tmp_path.iterdir():
        assert path.read_bytes() == (FOLDER / "data" / path.name).read_bytes(), path.name
