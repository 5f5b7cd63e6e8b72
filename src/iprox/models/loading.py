"""Models and tokenizers from a folder or the hub, with the refusals of design 12."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import CONFIG_NAME
from transformers.utils.hub import cached_file, extract_commit_hash

from iprox.errors import InputError
from iprox.models.adapters import ADAPTER, adapter_base, may_be_hub_id, merged
from iprox.models.checkpoint import IproxConfig, make_low_rank, proxy_config
from iprox.models.experts import split_experts

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")
# What decides a model's scores beside its weights and templates; not what was written beside it (`run.json`, ...).
MODEL_FILES = ("config.json", ADAPTER, "model.safetensors.index.json", "special_tokens_map.json", *TOKENIZER_FILES)


def load_model(
    path: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    trust_remote_code: bool = False,
    fused: bool = False,
) -> PreTrainedModel:
    """A causal language model, or a proxy of one, from a folder or the hub, in eval mode.

    A folder with a PEFT adapter gives its base model with the adapter merged.

    Args:
        path: folder or hub id.
        dtype: of the weights.
        device: where.
        trust_remote_code: let the model's own code run.
        fused: leave fused experts as they are stored, for training and saving; otherwise they are split into linear
            layers (`iprox.models.experts`).

    Raises:
        InputError: no such model, no config, pickled weights only, or weights that are missing, of another shape or
            not finite (named).
    """
    base = adapter_base(path)
    if base is None:
        model = _stored_model(path, dtype, trust_remote_code)
    else:  # which may be an adapter itself
        model = merged(load_model(base, dtype=dtype, trust_remote_code=trust_remote_code, fused=True), path)
    check_finite(model, str(path))
    if not fused:
        split_experts(model)
    return model.to(torch.device(device)).eval()  # pyright: ignore[reportArgumentType]


def _stored_model(path: str | Path, dtype: torch.dtype, trust_remote_code: bool) -> PreTrainedModel:
    """What a model folder or the hub holds, whole."""
    _check_folder(path)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            ignore_mismatched_sizes=True,  # refused below, with names
            output_loading_info=True,
        )
    except (OSError, ValueError, SafetensorError) as error:
        raise InputError(
            f"{path}: {_absent(path)}cannot be loaded as a causal language model: {_first_line(error)}"
        ) from error
    model, found = loaded
    _refuse_random_weights(str(path), found)
    return model


def _refuse_random_weights(path: str, found: Mapping[str, Any]) -> None:
    """Refuse a checkpoint of which transformers would leave tensors at random values.

    Raises:
        InputError: a tensor is not in it, or is of another shape (which is named).
    """
    wrong = sorted(str(name if isinstance(name, str) else name[0]) for name in found["mismatched_keys"])
    if wrong:
        raise InputError(f"{path}: {wrong[0]} has another shape than its config says ({len(wrong)} tensors in all)")
    missing = sorted(found["missing_keys"])
    if missing:
        others = f"; it has {sorted(found['unexpected_keys'])[0]}" if found["unexpected_keys"] else ""
        raise InputError(
            f"{path}: has no weights for {missing[0]} ({len(missing)} tensors in all){others}: it is not whole, or "
            "saved from a wrapped model"
        )


def load_tokenizer(path: str | Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder or hub id.

    Raises:
        InputError: there is none.
    """
    folder, base = Path(path), adapter_base(path)
    if base is not None and not any((folder / name).is_file() for name in TOKENIZER_FILES):
        return load_tokenizer(base, trust_remote_code=trust_remote_code)
    if folder.exists() and not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise InputError(
            f"{path}: no tokenizer in it ({TOKENIZER_FILES[0]}); copy the tokenizer files of the model there"
        )
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{path}: {_absent(path)}no tokenizer can be loaded from it: {_first_line(error)}") from error


def check_finite(model: torch.nn.Module, name: str) -> None:
    """Refuse NaN or infinite weights, naming the tensor.

    Raises:
        InputError: a parameter is not finite.
    """
    for parameter_name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise InputError(f"{name}: the weight {parameter_name} holds NaN or infinity; the checkpoint is broken")


def model_fingerprint(model: torch.nn.Module) -> str:
    """A short fingerprint of a model's shape and weights, the same whatever dtype it was loaded in.

    Each parameter counts as the sum of its bfloat16 bit patterns: an integer, so exact in any order, and enough
    to tell checkpoints apart.
    """
    digest = hashlib.blake2b(digest_size=8)
    for name, parameter in sorted(model.named_parameters()):
        bits = parameter.detach().to(torch.bfloat16).view(torch.int16)
        digest.update(f"{name}{tuple(parameter.shape)}{int(bits.sum(dtype=torch.int64))}".encode())
    return digest.hexdigest()


def checkpoint_fingerprint(path: str | Path) -> str:
    """A fingerprint of a model's files, without loading it: of their bytes, or of a hub model its commit."""
    base, folder = adapter_base(path), Path(path)
    digest = hashlib.blake2b(digest_size=8)
    if base is None:
        _check_folder(path)
    else:
        digest.update(checkpoint_fingerprint(base).encode())
    if folder.exists():
        for file in sorted(folder.iterdir()):
            if file.suffix in (".safetensors", ".jinja", ".py") or file.name in MODEL_FILES:
                digest.update(file.name.encode())
                with file.open("rb") as stream:
                    while block := stream.read(1 << 24):
                        digest.update(block)
    else:
        digest.update(f"{path}@{_commit_of(str(path))}".encode())
    return digest.hexdigest()


def _commit_of(repo: str) -> str:
    """The commit of a hub model, as its config's place in the cache says; the config is fetched if it is not there."""
    try:
        commit = extract_commit_hash(cached_file(repo, CONFIG_NAME), None)
    except OSError as error:
        raise InputError(
            f"{repo}: {_absent(repo)}no model config can be loaded from it: {_first_line(error)}"
        ) from error
    if commit is None:
        raise InputError(f"{repo}: the cache does not say which commit it is of; download it, and give the folder")
    return commit


def load_config(path: str | Path, *, trust_remote_code: bool = False) -> PretrainedConfig:
    """The config of a model folder or hub id.

    Raises:
        InputError: there is none.
    """
    base = adapter_base(path)
    if base is not None:
        return load_config(base, trust_remote_code=trust_remote_code)
    _check_folder(path)
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path}: {_absent(path)}no model config can be loaded from it: {_first_line(error)}"
        ) from error


def stored_dtype(path: str | Path, *, trust_remote_code: bool = False) -> torch.dtype:
    """The number format a checkpoint is stored in, as its config says; float32 where it does not."""
    dtype = load_config(path, trust_remote_code=trust_remote_code).dtype
    return dtype if isinstance(dtype, torch.dtype) else getattr(torch, dtype or "float32")


def skeleton(path: str | Path, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model's modules, a proxy's low-rank ones among them, without weights (on the meta device), to count costs."""
    config = load_config(path, trust_remote_code=trust_remote_code)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    proxy = getattr(config, "quantization_config", None)
    split_experts(model)
    if isinstance(proxy, dict) and proxy.get("quant_method") == "iprox":
        make_low_rank(model, proxy["ranks"])
        model.config.quantization_config = IproxConfig.from_dict(proxy)  # a proxy, as a loaded one is
    return model


def check_belongs(proxy: PreTrainedModel, proxy_path: str, target: PreTrainedModel, target_path: str) -> None:
    """Refuse a proxy offered with another target.

    Raises:
        InputError: it is no proxy, or one of another model.
    """
    config = proxy_config(proxy)
    if config is None:
        raise InputError(f"{proxy_path}: is no iprox proxy; make one with iprox compress")
    if config.target_fingerprint and config.target_fingerprint != model_fingerprint(target):
        raise InputError(
            f"{proxy_path}: is a proxy of {config.target or 'another model'}, not of {target_path} (the weights differ)"
        )


def _check_folder(path: str | Path) -> None:
    folder = Path(path)
    if not folder.exists():
        if may_be_hub_id(path):
            return
        raise InputError(f"{path}: no such model folder")
    if not (folder / "config.json").is_file():
        raise InputError(f"{path}: no config.json in it; give a transformers model folder or a hub id")
    if not any(folder.glob("*.safetensors")):
        pickled = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth"))
        if pickled:
            raise InputError(
                f"{path}: holds pickled weights only ({pickled[0]}); iprox reads safetensors. "
                "Convert with model.save_pretrained(folder), which writes safetensors"
            )
        raise InputError(f"{path}: holds no *.safetensors weights")


def _absent(path: str | Path) -> str:
    """That no folder has the name, which the hub has been asked for then."""
    return "" if Path(path).exists() else "there is no such folder here, and as a model of the Hub: "


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
