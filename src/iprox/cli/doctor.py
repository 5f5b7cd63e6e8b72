"""What this machine can do: devices, number formats, speed, memory, and which optional packages are there."""

from __future__ import annotations

import os
import platform
import shutil
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
import torch

from iprox.metering import measured_gemm_rate
from iprox.models.precision import DTYPES, resolve_device, resolve_dtype
from iprox.run.folder import environment

# Optional packages, and what each is for.
OPTIONAL = {
    "peft": "merges adapters into their base model, and trains them (warmup.lora, finetune.lora)",
    "bitsandbytes": "reads models quantized to 8 or 4 bits",
    "ray": "scores on several workers (ray_workers: 8)",
    "faiss": "exports indexes of gradients (iprox export)",
    "wandb": "tracks training on Weights & Biases",
    "tensorboard": "tracks training in TensorBoard",
    "mlflow": "tracks training in MLflow",
    "lm_eval": "evaluates fine-tuned models on benchmarks",
}
# Names on PyPI that differ from those imported.
DISTRIBUTIONS = {"faiss": "faiss-cpu", "lm_eval": "lm-eval"}


def examine(device: str = "auto", folder: Path = Path()) -> dict[str, Any]:
    """Look at the machine; takes about a second a number format.

    Args:
        device: as in a recipe.
        folder: whose disk is looked at.

    Returns:
        Plain data: `versions`, `device`, `dtype` (what `auto` is), `gemm_flops_per_second` by number format,
        `memory_bytes` and `free_bytes` of the device, `cores`, `threads`, `disk_free_bytes`, `compiler`, `optional`
        packages, and `notes` on what is missing.
    """
    where = resolve_device(device)
    dtype = resolve_dtype("auto", where)
    rates = {name: measured_gemm_rate(where, DTYPES[name]) for name in ("float32", "bfloat16")}
    memory, free = _memory(where)
    compiler = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("clang++")
    optional = {name: _version(name) for name in OPTIONAL}
    found: dict[str, Any] = {
        **environment(),
        "device": str(where),
        "device_name": torch.cuda.get_device_name(where) if where.type == "cuda" else _processor(),
        "dtype": str(dtype).removeprefix("torch."),
        "gemm_flops_per_second": rates,
        "memory_bytes": memory,
        "free_bytes": free,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "disk_free_bytes": shutil.disk_usage(folder).free,
        "compiler": compiler,
        "optional": optional,
    }
    return {**found, "notes": _notes(found)}


def _memory(device: torch.device) -> tuple[int, int]:
    """Bytes of memory of a device, and those that are free."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return total, free
    memory = psutil.virtual_memory()
    return memory.total, memory.available


def _processor() -> str:
    """The name of the CPU, where the system tells it."""
    listing = Path("/proc/cpuinfo")
    if listing.is_file():
        for line in listing.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _version(name: str) -> str | None:
    """The version of an optional package; None where it is not installed."""
    if find_spec(name) is None:
        return None
    try:
        return version(DISTRIBUTIONS.get(name, name))
    except PackageNotFoundError:
        return "unknown"


def _notes(found: dict[str, Any]) -> list[str]:
    """What somebody should know before a long run."""
    notes = []
    rates = found["gemm_flops_per_second"]
    faster = max(rates, key=lambda name: rates[name])
    if faster != found["dtype"] and rates[faster] > 1.2 * rates[found["dtype"]]:
        notes.append(
            f"products are {rates[faster] / rates[found['dtype']]:.1f} times as fast in {faster} as in "
            f"{found['dtype']}, which is what auto takes: try --set dtype={faster}"
        )
    if found["compiler"] is None and found["device"] == "cpu":
        notes.append("no C++ compiler: large pools are scored without torch.compile, more slowly; install g++")
    if found["device"] == "cpu" and found["threads"] < (found["cores"] or 1):
        notes.append(f"torch uses {found['threads']} of {found['cores']} cores: see OMP_NUM_THREADS")
    if found["free_bytes"] < 4e9:
        notes.append("less than 4 GB of memory are free")
    if found["disk_free_bytes"] < 10e9:
        notes.append("less than 10 GB are free on the disk; checkpoints and proxies are as large as the model")
    return notes
