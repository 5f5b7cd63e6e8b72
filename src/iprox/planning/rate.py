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

    for _ in range(3):
        nn.functional.linear(x, w)
    wait()
    started, count = time.perf_counter(), 0
    while time.perf_counter() - started < seconds:
        nn.functional.linear(x, w)
        wait()
        count += 1
    return 2 * x.shape[0] * x.shape[1] * w.shape[0] * count / (time.perf_counter() - started)
