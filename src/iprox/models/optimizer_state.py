"""Save and load Adam's moments of a model's linear layers, as safetensors with a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from iprox.errors import InputError
from iprox.models.experts import is_fused
from iprox.models.layers import compressible_layers

OPTIMIZER_FILE = "optimizer.safetensors"


@dataclass(frozen=True, slots=True)
class Moments:
    """Running moments of one parameter: a weight [m, n] (in the layout of nn.Linear) or a bias [m].

    Attributes:
        mean: exponential moving average of gradients.
        square: exponential moving average of their squares.
    """

    mean: Tensor
    square: Tensor


@dataclass(frozen=True, slots=True)
class AdamState:
    """The state of Adam at a checkpoint.

    Attributes:
        weights: moments of each layer's weight, by layer name.
        biases: moments of each layer's bias, if it has one.
        step: number of steps taken.
        betas: decay rates of the two averages.
        eps: number added to the square root of the second average.
    """

    weights: Mapping[str, Moments]
    biases: Mapping[str, Moments]
    step: int
    betas: tuple[float, float]
    eps: float


def save_adam_state(model: nn.Module, optimizer: Any, folder: Path) -> None:
    """Write the moments of a model's compressible layers, float32: eight bytes per parameter.

    Args:
        model: model that was trained; the moments of fused experts are written per expert, as they are scored.
        optimizer: torch's Adam or AdamW, or a wrapper with `state` and `param_groups`.
        folder: folder of the checkpoint.
    """
    tensors: dict[str, Tensor] = {}
    step = 0
    for name, parameter, part in _parameters(model):
        state = optimizer.state[parameter]
        step = int(state["step"])
        for moment in ("exp_avg", "exp_avg_sq"):
            tensors[f"{moment}.{name}"] = part(state[moment].detach()).to("cpu", torch.float32).contiguous()
    group = optimizer.param_groups[0]
    settings = {"step": step, "betas": list(group["betas"]), "eps": group["eps"]}
    save_file(tensors, folder / OPTIMIZER_FILE, metadata={"iprox": json.dumps(settings)})


def load_adam_state(folder: str | Path, device: torch.device | str = "cpu") -> AdamState:
    """Read what `save_adam_state` wrote.

    Raises:
        InputError: there is no such file, or it is incomplete.
    """
    file = Path(folder) / OPTIMIZER_FILE
    if not file.is_file():
        raise InputError(
            f"{file}: the estimator less needs the optimizer state of this checkpoint; `iprox warmup "
            "--optimizer-state`, or a run with influence.estimator: less, saves it"
        )
    found: dict[str, dict[str, Moments]] = {"weight": {}, "bias": {}}
    try:
        with safe_open(file, framework="pt", device=str(device)) as stored:
            settings = json.loads(stored.metadata()["iprox"])
            for key in stored.keys():  # noqa: SIM118  not a mapping
                moment, _, parameter = key.partition(".")
                if moment == "exp_avg":
                    name, _, kind = parameter.rpartition(".")
                    pair = Moments(stored.get_tensor(key), stored.get_tensor(f"exp_avg_sq.{parameter}"))
                    found[kind][name] = pair
            return AdamState(
                found["weight"], found["bias"], settings["step"], tuple(settings["betas"]), settings["eps"]
            )
    except (OSError, KeyError, TypeError, ValueError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{file}: is not an optimizer state written by iprox ({reason}); warm up again") from error


def _parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter, Callable[[Tensor], Tensor]]]:
    """Yield each linear layer's parameters: name, trained parameter, and the function that selects its part of it."""
    for name, layer in compressible_layers(model).items():
        weight, bias = layer.weight, layer.bias
        assert isinstance(weight, nn.Parameter)
        yield f"{name}.weight", weight, (lambda x: x.mT) if isinstance(layer, Conv1D) else (lambda x: x.flatten(1))
        if isinstance(bias, nn.Parameter):
            yield f"{name}.bias", bias, lambda x: x
    for name, module in model.named_modules():
        if is_fused(module):
            for layers, stacked in (("gate_up", module.gate_up_proj), ("down", module.down_proj)):
                assert isinstance(stacked, nn.Parameter)
                for expert in range(len(stacked)):
                    yield f"{name}.{layers}.{expert}.weight", stacked, lambda x, expert=expert: x[expert]
