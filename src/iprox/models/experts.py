"""Split the fused expert tensors of mixture-of-experts models into ordinary linear layers, one pair per expert.

transformers keeps all experts of a block in two tensors, `gate_up_proj` [E, 2I, H] and `down_proj` [E, H, I], which
code for linear layers does not see. `SplitExperts` replaces the fused module and computes the same, with the gating of
its class; its layers are named `...experts.gate_up.3` and `...experts.down.3`. Blocks with another layout are refused,
as most of such a model would be left out.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from iprox.errors import InputError
from iprox.models.layers import LowRankLinear, replace_module
from iprox.models.observe import routed_to


class SplitExperts(nn.Module):
    """Experts as two lists of linear layers, called expert by expert.

    Args:
        gate_up: first layer of each expert, H → 2I, gate first.
        down: second layer of each expert, I → H.
        fused: module to replace, which provides the gating and the class for fusing the layers again.
    """

    def __init__(self, gate_up: list[nn.Linear], down: list[nn.Linear], fused: nn.Module) -> None:
        super().__init__()
        self.gate_up = nn.ModuleList(gate_up)
        self.down = nn.ModuleList(down)
        self.fused = type(fused)
        # Has the activation and limits, but no parameters; it is not registered as a submodule.
        shell = copy.copy(fused)
        shell._parameters = {}
        self.__dict__["shell"] = shell

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Return the weighted sum of the chosen experts' outputs.

        Args:
            hidden_states: hidden states [T, H].
            top_k_index: experts of each token [T, k].
            top_k_weights: weights of these experts [T, k].
        """
        mixed = torch.zeros_like(hidden_states)
        for expert, (gate_up, down) in enumerate(zip(self.gate_up, self.down, strict=True)):
            tokens, slots = torch.where(top_k_index == expert)
            if not len(tokens):
                continue
            with routed_to(tokens):
                out = down(self.gated(gate_up(hidden_states[tokens])))
            weighted = out * top_k_weights[tokens, slots, None]
            mixed = mixed.index_add(0, tokens, weighted.to(mixed.dtype))
        return mixed

    def gated(self, gate_up: Tensor) -> Tensor:
        """Return the input of an expert's second layer, [T, 2I] to [T, I], with the gating of the fused class."""
        shell: Any = self.__dict__["shell"]
        if hasattr(shell, "_apply_gate"):
            return shell._apply_gate(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        return shell.act_fn(gate) * up


def is_fused(module: nn.Module) -> bool:
    """Return whether a module is a block of fused experts in the layout that `split` supports."""
    tensors = [getattr(module, name, None) for name in ("gate_up_proj", "down_proj")]
    return (
        all(isinstance(tensor, nn.Parameter) and tensor.ndim == 3 for tensor in tensors)
        and hasattr(module, "act_fn")
        and not any(name.endswith("bias") for name, _ in module.named_parameters())
        and not getattr(module, "is_transposed", False)
        and tensors[0].shape[2] == tensors[1].shape[1]  # pyright: ignore[reportOptionalMemberAccess]
        and len(tensors[0]) == len(tensors[1])  # pyright: ignore[reportArgumentType]
    )


def _is_unknown(module: nn.Module) -> bool:
    """Return whether a module keeps several experts in one tensor, in a layout that `split` does not support."""
    stacked = {name for name, each in module.named_parameters(recurse=False) if each.ndim == 3}
    named = type(module).__name__.endswith("Experts") or stacked & {"gate_up_proj", "down_proj"}
    return bool(stacked and named) and not is_fused(module)


def has_experts(model: nn.Module) -> bool:
    """Return whether a model has a block of experts, split or fused in any layout."""
    return any(isinstance(each, SplitExperts) or is_fused(each) or _is_unknown(each) for each in model.modules())


def split(fused: nn.Module) -> SplitExperts:
    """Return fused experts as linear layers whose weights are views of the fused tensors."""

    def linears(tensor: nn.Parameter) -> list[nn.Linear]:
        layers = []
        for weight in tensor.detach():
            layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
            layer.weight = nn.Parameter(weight, requires_grad=tensor.requires_grad)
            layers.append(layer)
        return layers

    gate_up, down = fused.gate_up_proj, fused.down_proj
    assert isinstance(gate_up, nn.Parameter)
    assert isinstance(down, nn.Parameter)
    return SplitExperts(linears(gate_up), linears(down), fused).train(fused.training)


def split_experts(model: nn.Module) -> dict[str, nn.Module]:
    """Split every block of fused experts of a model, in place.

    Returns:
        The fused modules that were replaced, by name.

    Raises:
        InputError: a block of experts has an unknown layout.
    """
    replaced: dict[str, nn.Module] = {}
    modules = list(model.named_modules())
    for name, module in modules:
        if _is_unknown(module):
            raise InputError(
                f"{name}: iprox cannot tell the linear layers of these experts ({type(module).__name__}), which are "
                "most of the model; give another model, or one that keeps its experts as nn.Linear layers"
            )
    for name, module in modules:
        if is_fused(module):
            replace_module(model, name, split(module))
            replaced[name] = module
    return replaced


def expert_layers(model: nn.Module) -> set[str]:
    """Return the names of the linear layers of split experts, including low-rank layers and their factors."""
    return {
        f"{name}.{inner}"
        for name, block in model.named_modules()
        if isinstance(block, SplitExperts)
        for inner, layer in block.named_modules()
        if isinstance(layer, nn.Linear | LowRankLinear)
    }


@contextmanager
def experts_split(*models: nn.Module) -> Iterator[None]:
    """Split the fused experts of some models inside the block, and restore them afterwards; weights are shared."""
    replaced: list[tuple[nn.Module, dict[str, nn.Module]]] = []
    try:
        replaced.extend((model, split_experts(model)) for model in models)
        yield
    finally:
        for model, modules in replaced:
            for name, module in modules.items():
                replace_module(model, name, module)


def fuse_experts(model: nn.Module, config: object) -> None:
    """Replace split experts that are all dense by fused tensors.

    Args:
        model: model, changed in place.
        config: config to make the fused modules from.

    Raises:
        InputError: an expert is low-rank.
    """
    for name, module in list(model.named_modules()):
        if not isinstance(module, SplitExperts):
            continue
        if not all(isinstance(layer, nn.Linear) for layer in (*module.gate_up, *module.down)):
            raise InputError(f"{name}: has low-rank experts; multiply the factors out first")
        with torch.device("meta"):
            fused = module.fused(config)
        for tensor, layers in (("gate_up_proj", module.gate_up), ("down_proj", module.down)):
            weights = torch.stack([layer.weight.detach() for layer in layers])  # pyright: ignore
            setattr(fused, tensor, nn.Parameter(weights))
        replace_module(model, name, fused.train(module.training))
