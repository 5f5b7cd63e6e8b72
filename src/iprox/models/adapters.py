"""PEFT adapters: find them, merge them into their model, add them for training, and save them."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from iprox.errors import InputError, one_line, shown
from iprox.files import check_path
from iprox.models.experts import has_experts
from iprox.models.precision import out_of_memory

if TYPE_CHECKING:
    from peft import PeftModel
    from typing_extensions import TypeIs

ADAPTER = "adapter_config.json"

# Types of PEFT adapters that can be merged exactly, as they are products added to weights.
MERGED_TYPES = ("LORA", "ADALORA", "LOHA", "LOKR")


def adapter_base(path: str | Path) -> str | None:
    """Return the base model of an adapter folder; None if the folder has no adapter.

    Raises:
        InputError: the adapter names no model or a missing folder, its weights are pickled, its type cannot be merged,
            or adapters name each other.
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
                f"({' → '.join(map(str, chain))}); set it to the model that was adapted"
            )
        follower = _named_base(Path(follower))
    return base


def _named_base(folder: Path) -> str | None:
    """Return the model that an adapter folder names."""
    file = folder / ADAPTER
    if not file.is_file():
        return None
    try:
        described = json.loads(file.read_text(encoding="utf-8"))
        base, kind = described.get("base_model_name_or_path"), described.get("peft_type")
    except (ValueError, AttributeError, RecursionError) as error:
        raise InputError(f"{file}: is not a JSON object; save the adapter again") from error
    if kind not in MERGED_TYPES:
        raise InputError(
            f"{folder}: is a PEFT adapter of the type {shown(kind)}, which iprox does not merge into a model; it reads "
            f"{', '.join(MERGED_TYPES)}; give the base model instead"
        )
    if not base:
        raise InputError(f"{file}: names no base_model_name_or_path; add the model that was adapted")
    if not isinstance(base, str):
        raise InputError(f"{file}: base_model_name_or_path is {shown(base)}; set it to the model that was adapted")
    check_path(base)
    if Path(base).exists() and Path(base).samefile(folder):
        raise InputError(f"{file}: names itself as base_model_name_or_path; set it to the model that was adapted")
    if not Path(base).exists() and not may_be_hub_id(base):
        raise InputError(f"{folder}: adapts {base}, which is missing; correct base_model_name_or_path in {file}")
    if not (folder / "adapter_model.safetensors").is_file():
        raise InputError(f"{folder}: holds no adapter_model.safetensors; iprox reads safetensors only")
    return base


def may_be_hub_id(path: str | Path) -> bool:
    """Return whether a name can be that of a model on the Hub: NAME or OWNER/NAME."""
    return str(path).count("/") <= 1 and not str(path).startswith((".", "/", "~"))


def merged(model: PreTrainedModel, path: str | Path) -> PreTrainedModel:
    """Return a model with an adapter merged into its weights, without PEFT's wrappers.

    Raises:
        InputError: PEFT is not installed, or the adapter does not fit the model.
    """
    peft = _peft(f"{path}: is a PEFT adapter")
    try:
        with warnings.catch_warnings():
            # Otherwise PEFT only warns, and leaves missing weights at zero.
            warnings.filterwarnings("error", message="Found missing adapter keys")
            adapted = peft.PeftModel.from_pretrained(model, str(path), torch_device=str(model.device))
        _require_all_read(adapted, Path(path) / "adapter_model.safetensors", peft)
        whole = adapted.merge_and_unload()
    except InputError:
        raise
    except UserWarning as error:
        raise InputError(f"{path}: is incomplete: it lacks weights of some of the layers that it adapts") from error
    except Exception as error:  # PEFT raises errors of any type for a broken config or weights
        if out_of_memory(error):
            raise
        raise InputError(f"{path}: does not fit its base model ({_misfit(error)})") from error
    return whole.requires_grad_(True)  # PEFT leaves the base model frozen


def _require_all_read(adapted: Any, file: Path, peft: Any) -> None:
    """Refuse an adapter with weights of layers that its config does not adapt, which PEFT leaves out silently."""
    with safe_open(file, "pt") as stored:
        unread = set(stored.keys()) - peft.get_peft_model_state_dict(adapted, save_embedding_layers=True).keys()
    # PEFT renames the magnitudes that its older versions wrote.
    if left := sorted(name for name in unread if "magnitude" not in name):
        raise InputError(
            f"{file}: has weights for {left[0].removeprefix('base_model.model.')} ({len(left)} tensors in all), which "
            f"its {ADAPTER} does not adapt; save the adapter again"
        )


def _misfit(error: Exception) -> str:
    """Return why an adapter does not fit, from the error of PEFT or torch; for shapes, the first mismatch."""
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
    advice = "; resize the base model's embeddings like the adapter's, and save it" if "embed" in name else ""
    return f"{name} is {sizes[0]} in the adapter and {sizes[1]} in the base model{advice}"


def with_lora(model: PreTrainedModel, base: str, rank: int, seed: int = 0) -> PeftModel:
    """Add LoRA adapters (arXiv:2106.09685) to every linear layer except the head; only they are trained.

    Args:
        model: model, changed in place: its weights are frozen and its layers wrapped.
        base: folder or Hub id of the model, which the saved adapters will name.
        rank: rank of each adapter; their scale is 2 (alpha is twice the rank), without dropout.
        seed: seed for the initial values; the second factors start at 0, so the model's outputs do not change.

    Raises:
        InputError: PEFT is not installed, or the model has fused experts, which would get no adapter.
    """
    peft = check_lora(model, base)
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
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
    """Return the PEFT package, and refuse a model that cannot be trained with adapters.

    Args:
        model: model to train.
        name: name of the model, for messages.

    Raises:
        InputError: PEFT is not installed, or the model has experts.
    """
    if has_experts(model):
        raise InputError(f"{name}: has fused experts, which LoRA would not adapt; train all weights instead")
    return _peft("lora trains PEFT adapters")


def is_adapted(model: nn.Module) -> TypeIs[PeftModel]:
    """Return whether a model has PEFT adapters for training."""
    return hasattr(model, "peft_config") and hasattr(model, "get_base_model")


def merged_state(model: PeftModel, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the weights of a model with its adapters merged, under their names without adapters.

    Sums are in float32 and rounded once to `dtype`. The model does not change, so training can continue.
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
    """Write a model's adapters in float32, without the model; equal adapters give equal bytes."""
    model.save_pretrained(str(folder), save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's blank model card
    file = folder / ADAPTER
    described = json.loads(file.read_text(encoding="utf-8"))
    described["target_modules"] = sorted(described["target_modules"])  # PEFT keeps them in a set
    file.write_text(json.dumps(described, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _peft(reason: str) -> Any:
    """Return the PEFT package, an optional dependency.

    Raises:
        InputError: PEFT is not installed; the message starts with `reason`.
    """
    try:
        import peft
    except ImportError as error:
        raise InputError(f"{reason}: pip install 'iprox[lora]' (PEFT)") from error
    return peft


def refuse_adapter(model: nn.Module) -> None:
    """Refuse a model with a PEFT adapter, whose layers are not those of the model that will be trained."""
    if hasattr(model, "peft_config") and hasattr(model, "merge_and_unload"):
        raise InputError("the model has a PEFT adapter; merge it first: model = model.merge_and_unload()")
    if getattr(model, "_hf_peft_config_loaded", False):
        raise InputError(
            "transformers has loaded a PEFT adapter into the model; load it with "
            "peft.PeftModel.from_pretrained(model, adapter).merge_and_unload(), or give its folder to iprox.load"
        )
