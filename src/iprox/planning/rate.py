"""How fast this machine multiplies matrices."""

from __future__ import annotations

import time

import torch
from torch import nn


def measured_gemm_rate(device: torch.device, dtype: torch.dtype, seconds: float = 0.5) -> float:
    """FLOP/s of a matrix product [4096, 1024] × [1024, 1024] on this machine."""
    x = torch.randn(4096, 1024, device=device).to(dtype)
    w = torch.randn(1024, 1024, device=device).to(dtype)

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    def repeat(seconds: float) -> tuple[int, float]:
        """Products for about that long, one at least; how many, and the seconds they took."""
        started, count, elapsed = time.perf_counter(), 0, 0.0
        while not count or elapsed < seconds:
            nn.functional.linear(x, w)
            wait()
            count, elapsed = count + 1, time.perf_counter() - started
        return count, elapsed

    repeat(seconds / 10)  # warms up: clocks, and the choice of a kernel
    count, elapsed = repeat(seconds)
    return 2 * x.shape[0] * x.shape[1] * w.shape[0] * count / elapsed
