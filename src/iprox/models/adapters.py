"""PEFT adapters: put on a model to be trained, saved, found, and merged into the model that they adapt."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PreTrainedModel

from iprox.errors import InputError
from iprox.models.experts import has_experts

if TYPE_CHECKING:
    from peft import PeftModel
    from typing_extensions import TypeIs

ADAPTER = "adapter_config.json"


def adapter_base(path: str | Path) -> str | None:
    """The model that an adapter folder adapts; None where the folder holds no adapter.

    Raises:
        InputError: the adapter does not say, or its weights are pickled.
    """
    folder = Path(path)
    if not (folder / ADAPTER).is_file():
        return None
    base = json.loads((folder / ADAPTER).read_text(encoding="utf-8")).get("base_model_name_or_path")
    if not base:
        raise InputError(f"{folder / ADAPTER}: names no base_model_name_or_path; add the model that it adapts")
    if not (folder / "adapter_model.safetensors").is_file():
        raise InputError(f"{folder}: holds no adapter_model.safetensors; iprox reads safetensors only")
    return base


def merged(model: PreTrainedModel, path: str | Path) -> PreTrainedModel:
    """A model with an adapter multiplied into its weights, without any trace of PEFT.

    Raises:
        InputError: PEFT is not installed, or the adapter does not fit the model.
    """
    peft = _peft(f"{path}: is a PEFT adapter")
    try:
        whole = peft.PeftModel.from_pretrained(model, str(path)).merge_and_unload()
    except (ValueError, RuntimeError, KeyError) as error:
        raise InputError(f"{path}: does not fit its base model ({str(error).splitlines()[0]})") from error
    return whole.requires_grad_(True)  # PEFT leaves the base model frozen, and a warm-up would train nothing


def with_lora(
    model: PreTrainedModel, base: str, rank: int, alpha: float, dropout: float = 0.0, seed: int = 0
) -> PeftModel:
    """A model with LoRA adapters (arXiv:2106.09685) on every linear layer but the head, which alone are to be trained.

    Args:
        model: changed in place: its weights are frozen, its layers wrapped.
        base: where it was loaded from, which the saved adapters will name: a folder or a hub id.
        rank: of each adapter.
        alpha: adapters are scaled by alpha/rank.
        dropout: of what goes into them.
        seed: of their first values; the second factors are 0, so that the model computes what it did.

    Raises:
        InputError: PEFT is not installed, or the model has fused experts, on which there would be no adapter.
    """
    peft = check_lora(model, base)
    config = peft.LoraConfig(
        r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        adapted = peft.get_peft_model(model, config)
    folder = Path(base)
    adapted.peft_config["default"].base_model_name_or_path = str(folder.resolve()) if folder.exists() else base
    return adapted


def check_lora(model: nn.Module, name: str) -> Any:
    """PEFT, for a model of this name that can be trained with adapters.

    Raises:
        InputError: PEFT is not installed, or the model has experts.
    """
    if has_experts(model):
        raise InputError(f"{name}: has fused experts, which LoRA would leave as they are; train all its weights")
    return _peft("lora trains PEFT adapters")


def is_adapted(model: nn.Module) -> TypeIs[PeftModel]:
    """Whether a model carries adapters that PEFT trains."""
    return hasattr(model, "peft_config") and hasattr(model, "get_base_model")


def save_adapters(model: PeftModel, folder: Path) -> None:
    """Write a model's adapters, float32, without the model; the same adapters always give the same bytes."""
    model.save_pretrained(str(folder), save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's blank model card
    file = folder / ADAPTER
    described = json.loads(file.read_text(encoding="utf-8"))
    described["target_modules"] = sorted(described["target_modules"])  # PEFT has them as a set, in any order
    file.write_text(json.dumps(described, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _peft(reason: str) -> Any:
    """PEFT, which is an extra.

    Raises:
        InputError: it is not installed; the message begins with the reason.
    """
    try:
        import peft
    except ImportError as error:
        raise InputError(f"{reason}: pip install 'iprox[lora]' (PEFT)") from error
    return peft


def refuse_adapter(model: nn.Module) -> None:
    """Refuse a model that carries an adapter by PEFT: its layers are not those of the model that will be trained.

    Raises:
        InputError: it does.
    """
    if hasattr(model, "peft_config") and hasattr(model, "merge_and_unload"):
        raise InputError("the model carries a PEFT adapter; merge it first: model = model.merge_and_unload()")
    if getattr(model, "_hf_peft_config_loaded", False):
        raise InputError(
            "transformers has loaded a PEFT adapter into the model; load it with "
            "peft.PeftModel.from_pretrained(model, adapter).merge_and_unload(), or give its folder to iprox.load"
        )
