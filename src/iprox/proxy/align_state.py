"""What an interrupted alignment goes on from: factors, the optimizer's moments and the best factors; safetensors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from iprox.errors import InputError
from iprox.files import replacing

# What AdamW keeps of a parameter: its two running averages and the steps they are of.
KEPT = ("step", "exp_avg", "exp_avg_sq")


def save_state(
    file: Path,
    identity: str,
    factors: Mapping[str, nn.Parameter],
    optimizer: torch.optim.AdamW,
    best: Mapping[str, Tensor],
    history: dict[str, Any],
) -> None:
    """Write the state of an alignment; the file appears only when whole.

    Args:
        file: to write.
        identity: of the run that may go on from it.
        factors: by name, as they are.
        optimizer: whose parameters they are.
        best: the best factors so far by name; empty where none are kept.
        history: plain data.
    """
    tensors = {f"factor/{name}": factor.detach() for name, factor in factors.items()}
    tensors |= {f"best/{name}": factor for name, factor in best.items()}
    for name, factor in factors.items():
        # Nothing is kept of a factor that has had no gradient yet: one of an expert that no token was routed to.
        tensors |= {f"{kept}/{name}": value for kept, value in optimizer.state.get(factor, {}).items()}
    file.parent.mkdir(parents=True, exist_ok=True)
    with replacing(file) as partial:
        save_file(
            {name: tensor.contiguous().cpu() for name, tensor in tensors.items()},
            partial,
            metadata={"identity": identity, "history": json.dumps(history)},
        )


def load_state(
    file: Path, identity: str, factors: Mapping[str, nn.Parameter], optimizer: torch.optim.AdamW
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Put a saved state back into factors and optimizer.

    Returns:
        The best factors by name, and the history.

    Raises:
        InputError: the file is of another alignment, or cannot be read.
    """
    try:
        with safe_open(file, "pt") as saved:
            metadata = saved.metadata() or {}
            if metadata.get("identity") != identity:
                raise InputError(f"{file}: is of another alignment; remove it to start anew")
            names = set(saved.keys())
            history = json.loads(metadata["history"])
            with torch.no_grad():
                for name, factor in factors.items():
                    factor.copy_(saved.get_tensor(f"factor/{name}"))
                    if f"step/{name}" in names:
                        step, *moments = (saved.get_tensor(f"{kept}/{name}") for kept in KEPT)
                        averages = (moment.to(factor.device) for moment in moments)
                        optimizer.state[factor] = dict(zip(KEPT, (step, *averages), strict=True))
            best = {
                name: saved.get_tensor(f"best/{name}").to(factor.device)
                for name, factor in factors.items()
                if f"best/{name}" in names
            }
    except SafetensorError as error:
        raise InputError(f"{file}: cannot be read ({error}); remove it to start anew") from error
    return best, history


def discard_other_states(folder: Path, identity: str) -> None:
    """Remove the saved states of other alignments from a folder, so that a changed setting starts anew."""
    for file in folder.glob("*.safetensors"):
        try:
            with safe_open(file, "pt") as saved:
                known = (saved.metadata() or {}).get("identity")
        except SafetensorError:
            known = None
        if known != identity:
            file.unlink()
