"""PEFT adapters: put on a model to be trained, saved, found, and merged into the model that they adapt."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from iprox.errors import InputError, one_line, shown
from iprox.files import check_path
from iprox.models.experts import has_experts
from iprox.models.memory import out_of_memory

if TYPE_CHECKING:
    from peft import PeftModel
    from typing_extensions import TypeIs

ADAPTER = "adapter_config.json"


# PEFT's adapters that are products added to weights, and what each is by them alone once merged.
MERGED_TYPES = ("LORA", "ADALORA", "LOHA", "LOKR")


def adapter_base(path: str | Path) -> str | None:
    """The model that an adapter folder adapts; None where the folder holds no adapter.

    Raises:
        InputError: the adapter does not say, or names a folder that is not there, or its weights are pickled, or it is
            of a kind that is not multiplied into weights, or adapters name each other.
    """
    check_path(path)
    base = _named_base(Path(path))
    chain, follower = [Path(path)], base
    while follower is not None and Path(follower).exists():
        known = [folder for folder in chain if folder.samefile(follower)]
        chain.append(Path(follower))
        if known:
            raise InputError(
                f"{Path(path) / ADAPTER}: adapters name each other as base_model_name_or_path "
                f"({' → '.join(map(str, chain))}); put there the model that it adapts"
            )
        follower = _named_base(Path(follower))
    return base


def _named_base(folder: Path) -> str | None:
    """What one adapter folder says that it adapts."""
    file = folder / ADAPTER
    if not file.is_file():
        return None
    try:
        described = json.loads(file.read_text(encoding="utf-8"))
        base, kind = described.get("base_model_name_or_path"), described.get("peft_type")
    except (ValueError, AttributeError, RecursionError) as error:
        raise InputError(f"{file}: is no JSON object; save the adapter again") from error
    if not base:
        raise InputError(f"{file}: names no base_model_name_or_path; add the model that it adapts")
    if not isinstance(base, str):
        raise InputError(f"{file}: base_model_name_or_path is {shown(base)}; put there the model that it adapts")
    check_path(base)
    if Path(base).exists() and Path(base).samefile(folder):
        raise InputError(f"{file}: names itself as base_model_name_or_path; put there the model that it adapts")
    if not Path(base).exists() and not may_be_hub_id(base):
        raise InputError(f"{folder}: adapts {base}, which is not there; correct base_model_name_or_path in {file}")
    if kind not in MERGED_TYPES:
        raise InputError(
            f"{folder}: is a PEFT adapter of the type {shown(kind)}, which iprox does not merge into a model; it reads "
            f"{', '.join(MERGED_TYPES)}: give the model without it"
        )
    if not (folder / "adapter_model.safetensors").is_file():
        raise InputError(f"{folder}: holds no adapter_model.safetensors; iprox reads safetensors only")
    return base


def may_be_hub_id(path: str | Path) -> bool:
    """Whether a name that no folder has may be one on the hub: NAME or OWNER/NAME."""
    return str(path).count("/") <= 1 and not str(path).startswith((".", "/", "~"))


def merged(model: PreTrainedModel, path: str | Path) -> PreTrainedModel:
    """A model with an adapter multiplied into its weights, without any trace of PEFT.

    Raises:
        InputError: PEFT is not installed, or the adapter does not fit the model.
    """
    peft = _peft(f"{path}: is a PEFT adapter")
    try:
        with warnings.catch_warnings():
            # Half an adapter is none: PEFT would leave the rest at zero, and warn.
            warnings.filterwarnings("error", message="Found missing adapter keys")
            adapted = peft.PeftModel.from_pretrained(model, str(path), torch_device=str(model.device))
        whole = adapted.merge_and_unload()
    except UserWarning as error:
        raise InputError(f"{path}: is not whole: it lacks weights of some of the layers that it adapts") from error
    except Exception as error:  # of any kind: PEFT reads whatever its config and weights say
        if out_of_memory(error):
            raise
        raise InputError(f"{path}: does not fit its base model ({_misfit(error)})") from error
    return whole.requires_grad_(True)  # PEFT leaves the base model frozen, and a warm-up would train nothing


def _misfit(error: Exception) -> str:
    """What of an adapter does not fit, as PEFT or torch says it: of shapes, the first with both sizes."""
    pattern = (
        r"size mismatch for (\S+): copying a param with shape (.+?) from checkpoint, "
        r"the shape in current model is (.+?)\.?$"
    )
    found = re.search(pattern, str(error), re.MULTILINE)
    if found is None:
        return one_line(error)
    name, own, other = found.groups()
    name = name.removeprefix("base_model.model.")
    sizes = [re.sub(r"torch\.Size\((.*)\)", r"\1", each) for each in (own, other)]
    advice = "; resize the base model's embeddings as the adapter's were, and save it" if "embed" in name else ""
    return f"{name} is {sizes[0]} in the adapter and {sizes[1]} in the base model{advice}"


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
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules="all-linear",
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
        task_type="CAUSAL_LM",
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


def merged_state(model: PeftModel, dtype: torch.dtype) -> dict[str, Tensor]:
    """The weights of a model with its adapters multiplied in, under the names that they have without adapters.

    Summed in float32 and rounded once to the dtype; the model is left as it is, to be trained on.
    """
    state: dict[str, Tensor] = {}
    modules = dict(model.get_base_model().named_modules())
    for name, tensor in model.get_base_model().state_dict().items():
        if ".lora_" in name:
            continue
        owner, base, last = name.rpartition(".base_layer.")
        if base and last == "weight":
            layer: Any = modules[owner]
            tensor = (tensor.float() + layer.get_delta_weight("default").float()).to(dtype)
        state[f"{owner}.{last}" if base else name] = tensor
    return state


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
