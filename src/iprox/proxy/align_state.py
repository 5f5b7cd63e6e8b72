"""The state of an alignment: the history of its steps, the best factors so far, and the file to resume from."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from iprox.checked import load_checked, save_checked
from iprox.errors import InputError, one_line

# AdamW's state of a parameter: its number of steps and its two running averages.
KEPT = ("step", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True, slots=True)
class AlignmentStep:
    """One optimizer step: the total loss, its parts (KL per token, in nats) and the learning rate.

    Parts without weight are not computed and are None. With several batches per step, losses are means.
    """

    step: int
    loss: float
    gradient: float | None
    kl: float
    hidden: float | None
    learning_rate: float


@dataclass(frozen=True, slots=True)
class HeldOut:
    """Fidelity on held-out examples after some steps; 0 is before alignment."""

    step: int
    fidelity: float


@dataclass(slots=True)
class AlignmentHistory:
    """History of an alignment, written next to the proxy as `alignment.json`.

    Attributes:
        steps: all optimizer steps.
        held_out: measurements of the held-out fidelity.
        best_step: step whose factors were kept; the last one if fidelity was not measured.
        stopped_early: whether it stopped early because fidelity no longer increased.
        tokens: number of tokens read.
        seconds: wall time.
    """

    steps: list[AlignmentStep] = field(default_factory=list)
    held_out: list[HeldOut] = field(default_factory=list)
    best_step: int = 0
    stopped_early: bool = False
    tokens: int = 0
    seconds: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> AlignmentHistory:
        """Return the history that `as_dict` wrote."""
        steps = [AlignmentStep(**step) for step in data["steps"]]
        return cls(**{**data, "steps": steps, "held_out": [HeldOut(**point) for point in data["held_out"]]})


class AlignmentState:
    """The factors, the optimizer, the best factors so far, and the history.

    Args:
        factors: factors by parameter name.
        optimizer: optimizer of the factors.
        held_out: function that returns the proxy's current fidelity; None if it is not measured.
    """

    def __init__(
        self, factors: Mapping[str, nn.Parameter], optimizer: torch.optim.AdamW, held_out: Callable[[], float] | None
    ) -> None:
        self.factors, self.optimizer, self.held_out = factors, optimizer, held_out
        self.history = AlignmentHistory()
        self.best: dict[str, Tensor] = {}

    def evaluate(self, step: int) -> None:
        """Measure fidelity, and keep the factors if they are the best so far."""
        if self.held_out is None:
            return
        fidelity = self.held_out()
        if not math.isfinite(fidelity):
            raise FloatingPointError(
                f"the held-out fidelity is {fidelity} at step {step}: the scores of a task are all equal, so they have "
                "no ranking; give other held-out examples, or none"
            )
        highest = max((point.fidelity for point in self.history.held_out), default=-math.inf)
        self.history.held_out.append(HeldOut(step, fidelity))
        if fidelity > highest:
            self.history.best_step = step
            self.best = {name: factor.detach().clone() for name, factor in self.factors.items()}

    def evaluations_since_best(self) -> int:
        """Return the number of evaluations since the best one."""
        return sum(point.step > self.history.best_step for point in self.history.held_out)

    def finish(self) -> None:
        """Restore the best factors."""
        if self.held_out is None:
            self.history.best_step = len(self.history.steps)
            return
        with torch.no_grad():
            for name, factor in self.factors.items():
                factor.copy_(self.best[name])

    def save(self, file: Path, identity: str) -> None:
        """Write everything that resuming needs; the file appears only when it is complete.

        Args:
            file: file to write.
            identity: identity of the alignment.
        """
        tensors = {f"factor/{name}": factor.detach() for name, factor in self.factors.items()}
        tensors |= {f"best/{name}": factor for name, factor in self.best.items()}
        for name, factor in self.factors.items():
            # A factor without a gradient so far (of an unused expert) has no state.
            tensors |= {f"{kept}/{name}": value for kept, value in self.optimizer.state.get(factor, {}).items()}
        save_checked(tensors, file, {"identity": identity, "history": json.dumps(self.history.as_dict())})

    def load(self, file: Path, identity: str) -> bool:
        """Restore what `save` wrote, and return whether that was possible; warn of a damaged file.

        Raises:
            InputError: the file was written by another alignment.
        """
        if not file.is_file():
            return False
        try:
            saved, metadata = load_checked(file)
        except (SafetensorError, OSError) as error:
            warnings.warn(f"{file}: is damaged ({one_line(error)}); the alignment starts again", stacklevel=2)
            return False
        if metadata.get("identity") != identity:
            raise InputError(f"{file}: was written by another alignment; remove it to start again")
        for name, factor in self.factors.items():
            with torch.no_grad():
                factor.copy_(saved[f"factor/{name}"])
            if f"step/{name}" in saved:
                step, *averages = (saved[f"{kept}/{name}"] for kept in KEPT)
                moved = (average.to(factor.device) for average in averages)
                self.optimizer.state[factor] = dict(zip(KEPT, (step, *moved), strict=True))
            if f"best/{name}" in saved:
                self.best[name] = saved[f"best/{name}"].to(factor.device)
        self.history = AlignmentHistory.from_dict(json.loads(metadata["history"]))
        return True


def discard_other_states(folder: Path, identity: str) -> None:
    """Remove the saved states of other alignments from a folder, such as those with other settings."""
    for file in folder.glob("*.safetensors"):
        try:
            with safe_open(file, "pt") as saved:
                known = (saved.metadata() or {}).get("identity")
        except SafetensorError:
            known = None
        if known != identity:
            file.unlink()
