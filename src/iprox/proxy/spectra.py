"""Spectra of a model's layers, in memory or, where they would take too much of it, in a folder."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file, save_file

from iprox.proxy.ipsvd import Spectrum


class SpectrumStore:
    """Spectra by layer name.

    Args:
        folder: where to keep them, one safetensors file each; None keeps them in memory.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        self._kept: dict[str, Spectrum] = {}

    def put(self, name: str, spectrum: Spectrum) -> None:
        """Keep a layer's spectrum."""
        if self._folder is None:
            self._kept[name] = spectrum
        else:
            parts = {part: getattr(spectrum, part).contiguous() for part in ("left", "singular_values", "right")}
            save_file(parts, self._file(name))

    def get(self, name: str) -> Spectrum:
        """The spectrum of a layer that was put."""
        return self._kept[name] if self._folder is None else Spectrum(**load_file(self._file(name)))

    def _file(self, name: str) -> Path:
        assert self._folder is not None
        return self._folder / f"{name}.safetensors"
