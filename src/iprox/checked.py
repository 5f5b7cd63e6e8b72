"""Tensors in safetensors files with a checksum: what an interrupted start has left, and the next resumes from."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from iprox.files import replacing

_CHECKSUM = "checksum"


def save_checked(tensors: Mapping[str, Tensor], file: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors and metadata; the file appears only when it is complete."""
    kept = {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}
    file.parent.mkdir(parents=True, exist_ok=True)
    with replacing(file) as partial:
        save_file(kept, partial, metadata={**(metadata or {}), _CHECKSUM: _checksum(kept)})


def load_checked(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read the tensors and the metadata that `save_checked` wrote.

    Raises:
        SafetensorError: the file is damaged.
    """
    with safe_open(file, "pt") as saved:
        # Copies: tensors from safetensors are aligned as in the file, and on CPUs without AVX-512 the last bits of
        # matrix products depend on the alignment of their operands.
        tensors = {name: saved.get_tensor(name).clone() for name in sorted(saved.keys())}
        metadata = saved.metadata() or {}
    if metadata.pop(_CHECKSUM, None) != _checksum(tensors):
        raise SafetensorError("its checksum is wrong")
    return tensors, metadata


def _checksum(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
