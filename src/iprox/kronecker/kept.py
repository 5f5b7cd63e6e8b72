"""The curvature of a checkpoint in files, so that all stages of a run measure it once."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from uuid import uuid4

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from iprox.errors import InputError, one_line
from iprox.kronecker.eigen import EigenBasis

# Maps the name of each layer to its file. It is written last, so a folder without it is not complete.
LISTING = "layers.json"


class KeptCurvature(Mapping[str, EigenBasis]):
    """The curvature in a folder, by layer name. A layer is read each time it is asked for, so memory holds one.

    Args:
        folder: folder that `keep_curvature` wrote.
        device: where tensors are put.
    """

    def __init__(self, folder: Path, device: torch.device) -> None:
        self._folder, self._device = folder, str(device)
        self._files: dict[str, str] = json.loads((folder / LISTING).read_text(encoding="utf-8"))

    def __getitem__(self, name: str) -> EigenBasis:
        """Read one layer.

        Raises:
            InputError: the file is missing or damaged.
        """
        path = self._folder / self._files[name]
        try:
            with safe_open(path, "pt", device=self._device) as file:
                # Copied, because products of tensors that are not aligned as torch aligns them are rounded differently.
                return EigenBasis(*(file.get_tensor(part).clone() for part in EigenBasis.__slots__))
        except (OSError, SafetensorError) as error:
            raise InputError(
                f"{path}: cannot be read ({one_line(error)}); delete {self._folder} to measure the curvature again"
            ) from error

    def __contains__(self, name: object) -> bool:
        """Return whether a layer is there, without reading it."""
        return name in self._files

    def __iter__(self) -> Iterator[str]:
        """Yield the layers' names."""
        return iter(self._files)

    def __len__(self) -> int:
        """Return the number of layers."""
        return len(self._files)


def is_kept(folder: Path) -> bool:
    """Return whether a folder has a complete curvature."""
    return (folder / LISTING).is_file()


def discard_curvature(folder: Path) -> None:
    """Remove a kept curvature; first its list of layers, so that what is left of a stopped removal is not used."""
    (folder / LISTING).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def keep_curvature(groups: Iterable[Mapping[str, EigenBasis]], folder: Path) -> None:
    """Write each layer's curvature, [m, m], [n, n] and [m, n], to a file as it is measured, then the list of layers.

    The folder appears when it is complete. If another process was faster, as Ray's workers may be, its folder stays.
    """
    made = folder.with_name(f"{folder.name}.{uuid4().hex}")
    made.mkdir(parents=True)
    files: dict[str, str] = {}
    try:
        for group in groups:
            for name, basis in group.items():
                files[name] = f"{len(files):05}.safetensors"
                parts = {part: getattr(basis, part).contiguous().cpu() for part in EigenBasis.__slots__}
                save_file(parts, made / files[name])
        (made / LISTING).write_text(json.dumps(files), encoding="utf-8")
        if not is_kept(folder):
            discard_curvature(folder)
            made.rename(folder)
    except OSError:
        if not is_kept(folder):
            raise
    finally:
        shutil.rmtree(made, ignore_errors=True)
