"""PEFT adapters: found, and merged into the model that they adapt."""

from __future__ import annotations

import json
from pathlib import Path

from torch import nn
from transformers import PreTrainedModel

from iprox.errors import InputError

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
    try:
        from peft import PeftModel
    except ImportError as error:
        raise InputError(f"{path}: is a PEFT adapter; pip install peft, so that it can be merged") from error
    try:
        whole = PeftModel.from_pretrained(model, str(path)).merge_and_unload()  # pyright: ignore
    except (ValueError, RuntimeError, KeyError) as error:
        raise InputError(f"{path}: does not fit its base model ({str(error).splitlines()[0]})") from error
    return whole.requires_grad_(True)  # PEFT leaves the base model frozen, and a warm-up would train nothing


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
