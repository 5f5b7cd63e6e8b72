"""A cache on disk of the target's signals on each batch, so that later epochs do not run the target.

The target's gradients and logits do not change during alignment. Per batch they take as many bytes as the target's
linear layers: little for a small model, too much for a large one (`stored_bytes`).
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

from safetensors import SafetensorError

from iprox.checked import load_checked, save_checked
from iprox.models.layers import LowRankLinear
from iprox.proxy.align_loss import Signals
from iprox.settings import AlignSection

# Signals that take more bytes are not kept.
AUTO_BYTES = 4 << 30


class SignalStore:
    """Signals by batch number in a folder: read if they exist, else computed and written.

    If the disk is full, signals are computed every time, with a warning.

    Args:
        folder: folder for one target, list of batches and weights of the loss; created if missing.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.full = False

    def __call__(self, index: int, make: Callable[[], Signals]) -> Signals:
        """Return the signals of a batch, bit for bit those that `make` returns."""
        file = self.folder / f"{index:06d}.safetensors"
        if file.is_file():
            try:
                return _read(file)
            except SafetensorError:
                file.unlink()  # damaged by a full disk or a crash; computed again
        signals = make()
        if self.full:
            return signals
        tensors = {f"gradient/{name}": gradient for name, gradient in signals.gradients.items()}
        tensors |= {f"hidden/{place:04d}": state for place, state in enumerate(signals.hidden)}
        tensors["logits"] = signals.logits
        try:
            save_checked(tensors, file)
        except (OSError, SafetensorError) as error:
            self.full = True
            self.discard()
            warnings.warn(f"the target runs at every step, as its signals cannot be kept: {error}", stacklevel=2)
        return signals

    def discard(self) -> None:
        """Remove all signals."""
        shutil.rmtree(self.folder, ignore_errors=True)


def stored_bytes(
    layers: Mapping[str, LowRankLinear], settings: AlignSection, batches: int, supervised: int, vocabulary: int
) -> int:
    """Return roughly the size in bytes of the signals of some batches: gradients and supervised logits, in float32.

    Args:
        layers: low-rank layers of the proxy.
        settings: weights of the loss; without a gradient weight, gradients are not stored.
        batches: number of batches.
        supervised: number of supervised tokens in all batches.
        vocabulary: number of logits per token.
    """
    matched = layers.values() if settings.gradient_weight else ()
    gradients = sum(layer.out_features * layer.in_features for layer in matched)
    return 4 * (batches * gradients + supervised * vocabulary)


def _read(file: Path) -> Signals:
    found, _ = load_checked(file)
    gradients = {name.removeprefix("gradient/"): each for name, each in found.items() if name.startswith("gradient/")}
    return Signals(gradients, found["logits"], [each for name, each in found.items() if name.startswith("hidden/")])
