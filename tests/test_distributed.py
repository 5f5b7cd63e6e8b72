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
from accelerate.state import DistributedType, PartialState
from safetensors.torch import load_file
from tokenizers import Tokenizer, models
from torch.distributed.tensor import DTensor
from transformers import PreTrainedTokenizerFast

from iprox.data import Encoded
from iprox.distributed import check_sharded, is_sharded, processes, rank, started, together
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


def trained(output, model):
    from iprox.finetune import train

    core = Tokenizer(models.WordLevel({f"w{i}": i for i in range(64)}, unk_token="w0"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="w0", eos_token="w1")
    return train(model, tokenizer, encoded(), output, **TRAINING).history


def aligned(output):
    target = make_model()
    proxy, _ = derive_proxy(make_model(), [make_batch(LENGTHS)], Size(0.4))
    fidelity = iter([0.1, 0.5, 0.3, 0.2, 0.1, 0.0])
    batches = [make_batch(LENGTHS[:4]), make_batch(LENGTHS[4:5], seed=1)]  # one row: the second process has none
    settings = AlignSection(epochs=4, learning_rate=1e-2)
    history = align(proxy, target, batches, settings, held_out=lambda: next(fidelity), state=output / "state")
    return proxy, [step.loss for step in history.steps], history.best_step


def shard():
    """Let Accelerate take this process for one with a GPU, as it has FSDP for these only."""
    made = PartialState.__init__

    def of_gpu(self, *given, **how):
        made(self, *given, **how)
        self.distributed_type = DistributedType.MULTI_GPU

    PartialState.__init__ = of_gpu


def work(output: Path):
    """What every process does; the first writes what came of it."""
    if is_sharded():
        shard()
        model = make_model(dtype=torch.float32)
        history = trained(output / "whole", model)
        held = sum(weight.to_local().numel() for weight in model.parameters() if isinstance(weight, DTensor))
        if rank() == 0:
            (output / "histories.json").write_text(json.dumps({"whole": history}))
            (output / "share.txt").write_text(str(held / sum(weight.numel() for weight in model.parameters())))
        return
    histories = {
        "whole": trained(output / "whole", make_model(dtype=torch.float32)),
        "lora": trained(output / "lora", with_lora(make_model(dtype=torch.float32), "base", 4)),
    }
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
    assert compared(tmp_path, alone) == ["whole", "lora", "align"]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_two_processes_that_hold_half_of_the_weights_train_as_one_does(alone, tmp_path):
    fsdp = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP"}
    limited([sys.executable, __file__, tmp_path], 200, PYTHONPATH=os.pathsep.join(sys.path), **fsdp)
    assert compared(tmp_path, alone) == ["whole"]
    assert 0.4 < float((tmp_path / "share.txt").read_text()) < 0.6


def compared(output, alone):
    """The names of the trainings in a folder, each of which has the losses and the weights of one process."""
    found, expected = (json.loads((folder / "histories.json").read_text()) for folder in (output, alone))
    for name, history in found.items():
        losses, alike = ([step["loss"] for step in each] for each in (history, expected[name]))
        np.testing.assert_allclose(losses, alike, rtol=1e-5, err_msg=name)
        if name == "align":
            continue
        saved, same = (load_file(folder / name / "checkpoint-4" / "model.safetensors") for folder in (output, alone))
        assert saved.keys() == same.keys()
        for key, weight in same.items():
            torch.testing.assert_close(saved[key], weight, rtol=1e-3, atol=1e-4)
    return list(found)


def test_what_fsdp_cannot_train_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.delenv("FSDP_VERSION", raising=False)
    with pytest.raises(InputError, match="FSDP version 2"), started(2, 4, torch.device("cpu")):
        pass
    monkeypatch.setenv("FSDP_VERSION", "2")
    with started(2, 4, torch.device("cpu")) as number:
        assert number == 2
    check_sharded(adapters=False, moments=False)
    with pytest.raises(InputError, match="adapters are not trained by FSDP"):
        check_sharded(adapters=True, moments=False)
    with pytest.raises(InputError, match="Adam's moments, which `less` needs, are not kept by FSDP"):
        check_sharded(adapters=False, moments=True)


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
