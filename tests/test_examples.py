"""The examples run, and find what they say."""

import runpy
from pathlib import Path

import numpy as np
import pytest
from torch.utils.data import Subset

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


def test_worked_examples_are_short():
    assert len((EXAMPLES / "digits.py").read_text().splitlines()) <= 60
