"""Measure the wall time and peak memory of a stage, and the GEMM rate of this machine."""

from __future__ import annotations

import contextlib
import gc
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from iprox.models.cpu.shapes import release_memory


@dataclass(slots=True)
class Usage:
    """Wall time in seconds, and peak memory in bytes: of the accelerator if one is used, else resident memory."""

    seconds: float = 0.0
    peak_memory_bytes: int = 0


@contextmanager
def metered(device: torch.device) -> Iterator[Usage]:
    """Measure the block. Only Linux can reset the peak of a process; elsewhere it includes earlier work."""
    usage = Usage()
    # Release memory of earlier stages first; trainers are in reference cycles.
    gc.collect()
    release_memory()
    _reset_peak(device)
    started = time.perf_counter()
    try:
        yield usage
    finally:
        usage.seconds = time.perf_counter() - started
        usage.peak_memory_bytes = _peak(device)


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif sys.platform == "linux":
        try:
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        except OSError:
            return  # some containers forbid it; the peak of the whole process is then an upper bound


def _peak(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "linux":
        return _number("/proc/self/status", "VmHWM") * 1024
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


def memory_now(device: torch.device) -> tuple[int, int]:
    """Return the bytes that this process holds on a device, and those that it could hold in all."""
    if device.type == "cuda":
        held, (free, _) = torch.cuda.memory_allocated(device), torch.cuda.mem_get_info(device)
        return held, held + free
    if sys.platform != "linux":
        return 0, sys.maxsize
    held = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * resource.getpagesize()
    free = _number("/proc/meminfo", "MemAvailable") * 1024
    with contextlib.suppress(OSError, ValueError):  # the limit of a container
        most, used = (int(Path(f"/sys/fs/cgroup/memory.{name}").read_text()) for name in ("max", "current"))
        free = min(free, most - used)
    return held, held + free


def _number(file: str, name: str) -> int:
    """Return a number of a file of Linux with lines such as `VmHWM: 123 kB`."""
    lines = Path(file).read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def measured_gemm_rate(device: torch.device, dtype: torch.dtype, seconds: float = 0.5) -> float:
    """Return the FLOP/s of a matrix product [4096, 1024] × [1024, 1024] on this machine, measured for some seconds."""
    from torch.utils.benchmark import Timer  # a quarter of a second

    x = torch.randn(4096, 1024, device=device).to(dtype)
    w = torch.randn(1024, 1024, device=device).to(dtype)
    product = Timer("x @ w.mT", globals={"x": x, "w": w}, num_threads=torch.get_num_threads())
    seconds_each = product.blocked_autorange(min_run_time=seconds).mean  # after a warm-up
    return 2 * x.shape[0] * x.shape[1] * w.shape[0] / seconds_each
