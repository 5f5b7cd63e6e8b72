"""Several processes train as one does with the same batches: the same losses, and the same weights to rounding.

Started as a program, this file trains and aligns together with a second process.
"""

import json
import os
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from iprox.data import Encoded
from iprox.distributed import processes, rank, started, together
from iprox.errors import InputError
from iprox.models.adapters import with_lora
from iprox.proxy.align import align, share_of
from iprox.proxy.compress import derive_proxy
from iprox.proxy.size import Size
from iprox.settings import AlignSection
from programs import limited
from tiny_models import make_batch, make_model

LENGTHS = (9, 6, 12, 5, 8, 7, 11)
# Seven rows in batches of four: the last batch has three, which two processes cannot share equally.
TRAINING = {"epochs": 2, "learning_rate": 3e-3, "batch_size": 4, "seed": 1, "compile_model": False}


def encoded():
    rng = np.random.default_rng(0)
    rows = [rng.integers(2, 60, length).astype(np.int32) for length in LENGTHS]
    return [Encoded(row, np.where(np.arange(len(row)) < 3, -100, row), truncated=False) for row in rows]


def trained(output, lora, **more):
    from iprox.finetune import train

    core = Tokenizer(models.WordLevel({f"w{i}": i for i in range(64)}, unk_token="w0"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="w0", eos_token="w1")
    model = make_model(dtype=torch.float32)
    model = with_lora(model, "base", 4) if lora else model
    return train(model, tokenizer, encoded(), output, **TRAINING, **more).history


def aligned(output):
    target = make_model()
    proxy, _ = derive_proxy(make_model(), [make_batch(LENGTHS)], Size(0.4))
    fidelity = iter([0.1, 0.5, 0.3, 0.2, 0.1, 0.0])
    batches = [make_batch(LENGTHS[:4]), make_batch(LENGTHS[4:5], seed=1)]  # one row: the second process has none
    settings = AlignSection(epochs=4, learning_rate=1e-2)
    history = align(proxy, target, batches, settings, held_out=lambda: next(fidelity), state=output / "state")
    return proxy, [step.loss for step in history.steps], history.best_step


def work(output: Path):
    """What every process does; the first writes what came of it."""
    histories = {name: trained(output / name, name == "lora") for name in ("whole", "lora")}
    proxy, losses, best = aligned(output)
    factors = torch.cat([each.detach().flatten() for each in proxy.parameters()])
    histories["align"] = [{"loss": loss} for loss in (*losses, best, float(factors.double().square().sum()))]
    if rank() == 0:
        (output / "histories.json").write_text(json.dumps(histories))


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    output = tmp_path_factory.mktemp("alone")
    work(output)
    return output


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_two_processes_train_as_one_does(alone, tmp_path):
    limited([sys.executable, __file__, tmp_path], 200, PYTHONPATH=os.pathsep.join(sys.path))
    found, expected = (json.loads((folder / "histories.json").read_text()) for folder in (tmp_path, alone))
    for name, history in found.items():
        losses, alike = ([step["loss"] for step in each] for each in (history, expected[name]))
        np.testing.assert_allclose(losses, alike, rtol=1e-5, err_msg=name)
    for name in ("whole", "lora"):
        saved, same = (load_file(folder / name / "checkpoint-4" / "model.safetensors") for folder in (tmp_path, alone))
        for key, weight in same.items():
            torch.testing.assert_close(saved[key], weight, rtol=1e-3, atol=1e-4)


def test_a_share_is_every_second_row_or_a_row_without_labels():
    batch = make_batch(LENGTHS[:3])
    assert share_of(batch, 0, 2).indices == [0, 2]
    assert share_of(batch, 1, 2).indices == [1]
    assert share_of(batch, 0, 1) is batch
    empty = share_of(make_batch(LENGTHS[:1]), 1, 2)
    assert (empty.labels == -100).all()
    assert len(empty.input_ids) == 1


@pytest.mark.slow
@pytest.mark.timeout(100)
def test_a_process_that_does_not_start_is_reported(monkeypatch, tmp_path):
    (tmp_path / "datasets.py").write_text("raise ImportError('broken')")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *sys.path]))
    message = "process 1 of 2 that train together did not start"
    with pytest.raises(RuntimeError, match=message), started(2, 4, torch.device("cpu")):
        pass
    assert processes() == 1


def test_batches_that_processes_cannot_share_are_refused():
    message = "batch_size 4 is that of all 3 processes together; make it a multiple of 3"
    with pytest.raises(InputError, match=message), started(3, 4, torch.device("cpu")):
        pass


def test_gradients_are_matched_by_one_process_only(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    proxy, _ = derive_proxy(make_model(), [make_batch(LENGTHS)], Size(0.4))
    with pytest.raises(InputError, match=r"align\.gradient_weight"):
        align(proxy, make_model(), [make_batch(LENGTHS)], AlignSection(gradient_weight=1.0))


if __name__ == "__main__":
    import test_distributed as here  # under the name by which the other process finds it

    job = partial(here.work, Path(sys.argv[1]))
    with started(2, TRAINING["batch_size"], torch.device("cpu")):
        together(job, job)
