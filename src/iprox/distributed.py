"""Training by several processes: those that `accelerate launch` or `torchrun` has started, or that iprox starts itself.

The first process runs the command. The others wait for its trainings and take part in them, so that everything else,
such as reading, scoring and the run folder, is the work of one process.
"""

from __future__ import annotations

import functools
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from iprox.errors import InputError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

T = TypeVar("T")

# Commands that train; others run as one process.
TRAINING = ("run", "quickstart", "warmup", "align", "finetune")
# How long the other processes wait between trainings, as scoring may take days. Gloo counts milliseconds in 32 bits.
LONGEST = timedelta(days=24)
# What a process does that iprox starts: it says when it is ready, and later prints to standard error only.
_FOLLOW = f"import os, iprox.finetune, {__name__} as own; print(flush=True); os.dup2(2, 1); own.follow()"


def processes() -> int:
    """Return the number of processes that work together."""
    return _number("WORLD_SIZE", 1)


def is_sharded() -> bool:
    """Return whether a launcher asks for FSDP: each process holds a part of the weights that are trained."""
    return processes() > 1 and _asked("FSDP")


def check_sharded(*, adapters: bool, moments: bool) -> None:
    """Refuse what FSDP does not train here: adapters, and Adam's moments to keep for `less`.

    Raises:
        InputError: the launcher asks for FSDP, and this is to be trained or kept.
    """
    if is_sharded() and (adapters or moments):
        what = "adapters are not trained" if adapters else "Adam's moments, which `less` needs, are not kept"
        raise InputError(f"{what} by FSDP; start the command with accelerate launch --multi_gpu")


def _asked(name: str) -> bool:
    return os.environ.get(f"ACCELERATE_USE_{name}", "").lower() == "true"


def rank() -> int:
    """Return the number of this process, from 0."""
    return _number("RANK", 0) if processes() > 1 else 0


def _number(name: str, default: int) -> int:
    text = os.environ.get(name) or str(default)
    if not text.isdecimal():
        raise InputError(f"{name}={text} in the environment is not a number of a launcher's; unset it")
    return int(text)


# Whether the other processes wait for a job. If one failed in the middle of a job, they end without being told.
_waiting = True


@contextmanager
def started(count: int, batch_size: int, device: torch.device) -> Iterator[int]:
    """Start processes on this machine that take part in the trainings of this one, and end them after the block.

    Yields the number of processes: that of `accelerate launch` or `torchrun`, if one of these has started this process.

    Args:
        count: number of processes, with this one.
        batch_size: examples per batch of all together.
        device: device of this process.

    Raises:
        InputError: the processes cannot share a batch equally, or a launcher asks for DeepSpeed or FSDP version 1.
        RuntimeError: a process does not start.
    """
    here = processes() if processes() > 1 else count
    if _asked("DEEPSPEED") or (_asked("FSDP") and os.environ.get("FSDP_VERSION", "1") != "2"):
        raise InputError(
            "training is data parallel, or by FSDP version 2; start it with accelerate launch --use_fsdp "
            "--fsdp_version 2, or without FSDP and DeepSpeed"
        )
    if batch_size % here:
        raise InputError(
            f"batch_size {batch_size} is that of all {here} processes together; make it a multiple of {here}"
        )
    if here == processes():
        yield here
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    before = dict(os.environ)
    os.environ |= {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "ACCELERATE_USE_CPU": str(device.type == "cpu").lower()}
    quiet = {"TRANSFORMERS_VERBOSITY": "error", "PYTHONWARNINGS": "ignore"}
    others: list[subprocess.Popen[bytes]] = []
    try:
        _leave()  # Accelerate may have noted earlier that this process is alone
        for number in range(1, count):
            env = {**os.environ, **quiet, "RANK": str(number), "LOCAL_RANK": str(number)}
            others.append(subprocess.Popen([sys.executable, "-c", _FOLLOW], env=env, stdout=subprocess.PIPE))
        for number, each in enumerate(others, 1):
            if not (each.stdout and each.stdout.readline()):
                raise RuntimeError(f"process {number} of {count} that train together did not start; it says why above")
        yield count
        dismiss()
        for each in others:
            each.wait()
    finally:
        for each in others:
            each.kill()
            each.communicate()
        _leave()
        os.environ.clear()
        os.environ |= before


def _leave() -> None:
    """Leave the group of processes, if there is one, so that no process finds another gone, and another can be made."""
    global _waiting
    import torch.distributed as dist
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    _group.cache_clear()
    _waiting = True
    if dist.is_initialized():
        dist.destroy_process_group()


def own_device() -> torch.device:
    """Return the device of this one of several processes: on a machine with several GPUs, each has one."""
    from accelerate import PartialState

    _group()
    device = PartialState().device
    assert device is not None
    return device


def together(here: Callable[[], T], elsewhere: Callable[[], object]) -> T:
    """Run a job in all processes, and return what it returns in this one, the first.

    Args:
        here: the job of this process.
        elsewhere: the job of the others, a function that can be pickled.
    """
    global _waiting
    if processes() > 1:
        from_first(elsewhere)
    _waiting = False
    result = here()
    _waiting = True
    return result


def follow() -> None:
    """Take part in the jobs of the first process until it is done."""
    while (job := from_first(None)) is not None:
        job()
    _leave()


def dismiss() -> None:
    """Tell the other processes that there is no more to do."""
    if processes() > 1 and _waiting:
        from_first(None)
        _leave()


def from_first(value: T) -> T:
    """Return what the first process gives, in all processes; it is pickled."""
    import torch.distributed as dist

    given = [value]
    dist.broadcast_object_list(given, src=0, group=_group(), device="cpu")  # pyright: ignore[reportArgumentType]
    return given[0]


def average(tensors: Iterable[Tensor]) -> None:
    """Average tensors over all processes, in place."""
    if processes() > 1:
        import torch.distributed as dist

        for each in tensors:
            dist.all_reduce(each)
            each /= processes()


def whole_weights(model: torch.nn.Module) -> dict[str, Any]:
    """Return the weights of which each process holds a part, tied ones once, on the CPU of the first process.

    All processes have to call this; the others get no weights.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    found = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    every, once = ({name for name, _ in model.named_parameters(remove_duplicate=each)} for each in (False, True))
    return {name: weight for name, weight in found.items() if name not in every - once}


@functools.cache
def _group() -> Any:
    """Return a group for messages, apart from the one for gradients, which gives up after minutes."""
    import torch
    import torch.distributed as dist
    from accelerate import PartialState

    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"  # or only the first process would read the weights
    PartialState(cpu=not torch.cuda.is_available() or os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true")
    return dist.new_group(backend="gloo", timeout=LONGEST)
