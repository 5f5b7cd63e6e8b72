"""What a proxy is to match, computed once a batch and kept on disk, so that later epochs spare the target's pass.

The target does not change while a proxy is aligned, so neither do its gradients and logits. In full they take the
bytes of the target's linear layers a batch: little for a small model, too much for a large one (`stored_bytes`).
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from iprox.data.batching import Batch
from iprox.files import replacing
from iprox.models.layers import LowRankLinear
from iprox.proxy.align_loss import Signals

# Up to this many bytes they are kept.
AUTO_BYTES = 4 << 30


class SignalStore:
    """Signals of batches by number, in a folder: read if they are there, else made and written.

    Where the disk is full it goes on without, and warns.

    Args:
        folder: made if missing; what is in it is of the same target, batches and objective.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.full = False

    def __call__(self, index: int, make: Callable[[], Signals]) -> Signals:
        """The signals of a batch, bit for bit those that `make` gives."""
        file = self.folder / f"{index:06d}.safetensors"
        if file.is_file():
            try:
                return _read(file)
            except SafetensorError:
                file.unlink()  # cut off by a full disk or a crash of the machine: made again
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
            warnings.warn(f"the target is asked at every step, as what it says cannot be kept: {error}", stacklevel=2)
        return signals

    def discard(self) -> None:
        """Remove them."""
        shutil.rmtree(self.folder, ignore_errors=True)


def stored_bytes(
    layers: Mapping[str, LowRankLinear], names: Sequence[str], batches: Sequence[Batch], vocabulary: int
) -> int:
    """About what the signals of some batches take: gradients [m, n] in float32, and logits where tokens are supervised.

    Args:
        layers: the proxy's low-rank layers.
        names: of those whose gradients are matched.
        batches: of the alignment.
        vocabulary: entries of a token's logits.
    """
    gradients = sum(layers[name].out_features * layers[name].in_features for name in names)
    supervised = sum(int((batch.labels[:, 1:] != -100).sum()) for batch in batches)
    return 4 * (len(batches) * gradients + supervised * vocabulary)


def _read(file: Path) -> Signals:
    gradients: dict[str, Tensor] = {}
    hidden: dict[str, Tensor] = {}
    with safe_open(file, "pt") as saved:
        for name in saved.keys():  # noqa: SIM118  (it is no mapping)
            kind, _, rest = name.partition("/")
            if kind == "gradient":
                gradients[rest] = _aligned(saved, name)
            elif kind == "hidden":
                hidden[rest] = _aligned(saved, name)
        return Signals(gradients, _aligned(saved, "logits"), [hidden[place] for place in sorted(hidden)])


def _aligned(saved: Any, name: str) -> Tensor:
    """A tensor of an open file in memory of its own.

    What safetensors gives lies where it lies in the file, and on CPUs without AVX-512 matrix products differ in their
    last bits with where their operands begin.
    """
    return saved.get_tensor(name).clone()
