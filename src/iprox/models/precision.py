"""Devices, dtypes and out-of-memory errors."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn

from iprox.errors import InputError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


def accumulation_dtype(tensor: Tensor) -> torch.dtype:
    """Return the dtype of sums: float32, or float64 for float64 tensors."""
    return torch.promote_types(tensor.dtype, torch.float32)


def cast_parameters(model: nn.Module, dtype: torch.dtype) -> None:
    """Change the dtype of a model's parameters in place, but not of its buffers.

    `model.to(dtype)` would also round rotary frequencies; in bfloat16 their angles are off by radians after a few
    hundred tokens.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


def warn_of_rounded_frequencies(model: nn.Module) -> None:
    """Warn about rotary frequencies that were rounded with the parameters (see `cast_parameters`)."""
    for name, buffer in model.named_buffers():
        if "inv_freq" in name and torch.finfo(buffer.dtype).bits < 32:
            warnings.warn(
                f"{name} is {str(buffer.dtype).removeprefix('torch.')}: model.to() and model.bfloat16() round "
                "positions. Load the model in its dtype: iprox.load(..., dtype=...) or from_pretrained(..., dtype=...)",
                stacklevel=3,
            )
            return


def warn_of_slow_products(model: nn.Module) -> None:
    """Warn about a bfloat16 model on a CPU that emulates bfloat16, which is several times slower than float32."""
    weight = next(model.parameters(), None)
    if weight is None or weight.dtype != torch.bfloat16 or weight.device.type != "cpu":
        return
    if resolve_dtype("auto", weight.device) != torch.bfloat16:
        warnings.warn(
            "the model is in bfloat16, for which this CPU has no instructions: float32 is several times as fast. "
            "Load it with iprox.load(path), or from_pretrained(path, dtype=torch.float32)",
            stacklevel=3,
        )


def resolve_device(device: str = "auto") -> torch.device:
    """Return a device by name; `auto` is a CUDA device if there is one, else the CPU.

    Raises:
        InputError: the device does not support float64, which moments, factors and validation gradients need.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if torch.device(device).type == "mps":
        raise InputError("device mps does not support float64, which moments and factors need; use --set device=cpu")
    return torch.device(device)


def resolve_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """Return a dtype by name; `auto` is bfloat16 if the device supports it natively, else float32.

    Scores are accumulated in float32 either way; those in bfloat16 have a rank correlation of at least 0.9995 with
    those in float32.
    """
    if dtype != "auto":
        return DTYPES[dtype]
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device.type == "cpu":
        native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    else:
        native = False
    return torch.bfloat16 if native else torch.float32


def out_of_memory(error: BaseException) -> bool:
    """Return whether an error means that the device or the machine ran out of memory."""
    # torch's CPU allocator and CUDA's linear algebra libraries raise a plain RuntimeError.
    plain = ("can't allocate memory", "STATUS_ALLOC_FAILED", "(os error 12)")
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(words in str(error) for words in plain)
