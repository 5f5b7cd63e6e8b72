"""The target's signals, computed once per batch and kept on disk, so that later epochs do not run the target.

The target does not change while a proxy is aligned, and neither do its gradients and logits. Per batch they take the
bytes of the target's linear layers: little for a small model, too much for a large one (`stored_bytes`).
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from iprox.files import replacing
from iprox.models.layers import LowRankLinear
from iprox.proxy.align_loss import Objective, Signals

# Signals that take more bytes than this are not kept.
AUTO_BYTES = 4 << 30


class SignalStore:
    """Signals of batches by number, in a folder: read if they are there, else made and written.

    Where the disk is full, signals are made every time, with a warning.

    Args:
        folder: folder for one target, one list of batches and one objective; made if missing.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.full = False

    def __call__(self, index: int, make: Callable[[], Signals]) -> Signals:
        """Return the signals of a batch, bit for bit those that `make` gives."""
        file = self.folder / f"{index:06d}.safetensors"
        if file.is_file():
            try:
                return _read(file)
            except SafetensorError:
                file.unlink()  # incomplete after a full disk or a crash of the machine: made again
        signals = make()
        if self.full:
            return signals
        tensors = {f"gradient/{name}": gradient for name, gradient in signals.gradients.items()}
        tensors |= {f"hidden/{place:04d}": state for place, state in enumerate(signals.hidden)}
        tensors["logits"] = signals.logits
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with replacing(file) as partial:
                save_file({name: tensor.contiguous().cpu() for name, tensor in tensors.items()}, partial)
        except (OSError, SafetensorError) as error:
            self.full = True
            self.discard()
            warnings.warn(f"the target runs at every step, as its signals cannot be kept: {error}", stacklevel=2)
        return signals

    def discard(self) -> None:
        """Remove all signals."""
        shutil.rmtree(self.folder, ignore_errors=True)


def stored_bytes(
    layers: Mapping[str, LowRankLinear], objective: Objective, batches: int, supervised: int, vocabulary: int
) -> int:
    """Return about how many bytes the signals of some batches take: gradients [m, n] and supervised logits, in float32.

    Args:
        layers: low-rank layers of the proxy.
        objective: objective, by whose weights gradients are stored or not.
        batches: number of batches.
        supervised: supervised tokens of all batches.
        vocabulary: number of logits per token.
    """
    matched = layers.values() if objective.gradient_weight else ()
    gradients = sum(layer.out_features * layer.in_features for layer in matched)
    return 4 * (batches * gradients + supervised * vocabulary)


def _read(file: Path) -> Signals:
    gradients: dict[str, Tensor] = {}
    hidden: dict[str, Tensor] = {}
    with safe_open(file, "pt") as saved:
        for name in saved.keys():  # noqa: SIM118  (not a mapping)
            kind, _, rest = name.partition("/")
            if kind == "gradient":
                gradients[rest] = _aligned(saved, name)
            elif kind == "hidden":
                hidden[rest] = _aligned(saved, name)
        return Signals(gradients, _aligned(saved, "logits"), [hidden[place] for place in sorted(hidden)])


def _aligned(saved: Any, name: str) -> Tensor:
    """Return a tensor of an open file in memory of its own.

    The memory that safetensors returns is aligned as in the file, and on CPUs without AVX-512 matrix products differ in
    their last bits with the alignment of their operands.
    """
    return saved.get_tensor(name).clone()
