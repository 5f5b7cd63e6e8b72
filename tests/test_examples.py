"""The examples run, and find what they say."""

import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import Subset
from transformers import AutoModelForCausalLM, AutoTokenizer

import iprox

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.mark.slow
def test_a_selection_of_digits_avoids_wrong_labels_and_other_digits():
    example = runpy.run_path(str(EXAMPLES / "digits.py"))
    sets, kinds = example["digits"](seed=0)
    model = example["train"](example["network"](), sets["pool"], epochs=3)
    pool, losses = Subset(sets["pool"], range(400)), example["losses"]
    proxy = iprox.compress(model, pool, sparsity=0.5, loss_fn=losses)
    scores = iprox.score(proxy, pool, {"0 to 4": sets["validation"]}, target=model, loss_fn=losses)
    chosen = iprox.select(scores, count=50)
    assert np.mean(kinds[:400] == "good") < 0.4
    assert np.mean(kinds[chosen] == "good") > 0.9


def tones(word, accent, speaker, speed, pitch):
    """In place of espeak-ng, which may not be installed: two tones for each word, shifted by accent and pitch."""
    number = sum(map(ord, word))
    shift = 1 + 0.03 * len(accent) + pitch / 400
    time = np.arange(int(22050 * 60 / speed)) / 22050
    return 0.3 * sum(np.sin(2 * np.pi * shift * (200 + number * step % 1500) * time) for step in (7, 13))


@pytest.mark.slow
def test_a_selection_of_recordings_avoids_noise_and_wrong_labels():
    torch.manual_seed(0)
    found = runpy.run_path(str(EXAMPLES / "spoken_words.py"))["main"](count=320, say=tones)
    assert sum(found.values()) == 28
    assert found.get("noise", 0) + found.get("mislabeled", 0) < 0.14 * 28  # half their share of the pool


@pytest.mark.slow
def test_a_selection_of_pairs_avoids_other_questions():
    example = runpy.run_path(str(EXAMPLES / "preferences.py"))
    sets, pool = example["pairs"](seed=0), []
    for kind in ("good", "swapped", "off-task"):
        pool += [pair for pair in sets["pool"] if pair["kind"] == kind][:16]
    model = AutoModelForCausalLM.from_pretrained(example["MODEL"], dtype=torch.float32)
    how = {"loss_fn": iprox.DpoLoss(), "tokenizer": AutoTokenizer.from_pretrained(example["MODEL"])}
    scores = iprox.score(model, pool, {"sums": sets["validation"][:10]}, estimator="tracin", per_example=False, **how)
    found = [pool[row]["kind"] for row in iprox.select(scores, count=12)]
    assert found.count("off-task") < 2  # a third of the pool


def test_worked_examples_are_short():
    assert len((EXAMPLES / "digits.py").read_text().splitlines()) <= 60
