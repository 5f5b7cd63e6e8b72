"""Load models and tokenizers from a folder or the Hub, or refuse them."""

from __future__ import annotations

import hashlib
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
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

from iprox.errors import InputError, one_line
from iprox.files import check_path
from iprox.models.adapters import ADAPTER, adapter_base, may_be_hub_id, merged
from iprox.models.checkpoint import make_low_rank, proxy_config, proxy_description
from iprox.models.experts import split_experts
from iprox.models.precision import out_of_memory
from iprox.models.quantized import check_scales, compute_in, quantization_method, quantization_of, quantized_layers
from iprox.models.suitability import (
    check_config,
    check_layers_by_weights,
    check_size_by_weights,
    check_sizes,
    follows_order,
    run_attention_here,
)
from iprox.models.weight_files import (
    check_hub_index,
    check_reachable,
    check_weight_files,
    count_weights,
    stored_weights,
)

# More tokens than a sound tokenizer makes of two letters; a broken one can make text grow without end.
_MOST_TOKENS = 100
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")
# Files that a model's scores depend on, in addition to weights, templates and code.
MODEL_FILES = ("config.json", ADAPTER, "model.safetensors.index.json", "special_tokens_map.json", *TOKENIZER_FILES)


def load_model(
    path: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    trust_remote_code: bool = False,
    fused: bool = False,
) -> PreTrainedModel:
    """Load a causal language model, or a proxy of one, from a folder or the Hub, in eval mode.

    For the folder of a PEFT adapter, the base model is loaded and the adapter merged into it.

    Args:
        path: folder or Hub id.
        dtype: dtype of the weights.
        device: device to load to.
        trust_remote_code: whether the model's own code may run.
        fused: whether to keep fused experts, for training and saving; otherwise they are split into linear layers
            (`iprox.models.experts`).

    Raises:
        InputError: there is no model or config, the model is not a causal language model, or its weights are quantized,
            pickled, missing, of another shape or not finite (the message names them).
    """
    where = torch.device(device)
    model = _whole_model(path, dtype, where, trust_remote_code)
    if not fused:
        split_experts(model)
    if not quantized_layers(model):  # others are on the device
        model = model.to(where)  # pyright: ignore[reportArgumentType]
    model.eval()
    _refuse_looking_ahead(model, str(path))
    return model


def _whole_model(
    path: str | Path, dtype: torch.dtype, device: torch.device, trust_remote_code: bool
) -> PreTrainedModel:
    """Load a model to the CPU, with its adapter merged and its experts fused; it will run on `device`."""
    base = adapter_base(path)
    if base is None:
        model = _stored_model(path, dtype, device, trust_remote_code)
    else:  # the base may be an adapter too
        load_config(path, trust_remote_code=trust_remote_code)  # refuses an adapter that cannot be merged
        model = merged(_whole_model(base, dtype, device, trust_remote_code), path)
    check_finite(model, str(path))
    return model


def _stored_model(
    path: str | Path, dtype: torch.dtype, device: torch.device, trust_remote_code: bool
) -> PreTrainedModel:
    """Load a model as stored in a folder or on the Hub."""
    config = load_config(path, trust_remote_code=trust_remote_code)
    run_attention_here(config, dtype, device, str(path))
    quantized = quantization_method(config) == "bitsandbytes"
    if Path(path).exists():
        skeleton(path, trust_remote_code=trust_remote_code)  # refuses a config that does not match the weights
    else:
        check_hub_index(str(path))
    with _refusing(f"{path}: cannot be loaded as a causal language model"):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path,
            config=config,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            ignore_mismatched_sizes=True,  # refused below
            output_loading_info=True,
            **({"device_map": {"": device}} if quantized else {}),
        )
    model, found = loaded
    _refuse_random_weights(str(path), found)
    _check_unexpected(model, str(path), found["unexpected_keys"])
    if quantized or quantization_method(config) is None:
        _refuse_integers(model, Path(path))
    check_scales(model, str(path))
    if quantized:
        compute_in(model, dtype)
    return model


@contextmanager
def _refusing(refusal: str) -> Iterator[None]:
    """Turn errors inside the block into one-line refusals; a broken checkpoint can raise any type of error.

    Args:
        refusal: start of the message: the model's name, a colon and what failed.
    """
    name = refusal.partition(":")[0]
    try:
        yield
    except InputError as error:
        raise InputError(str(error) if str(error).startswith(name) else f"{name}: {error}") from error
    except Exception as error:
        if out_of_memory(error):
            raise InputError(
                f"{name}: not enough memory to load it ({one_line(error)}); use a smaller model, or check whether its "
                "config.json matches its weights"
            ) from error
        if isinstance(error, OSError) and error.filename is not None and error.errno is not None:
            raise  # a system error, which names the file
        kind = "" if isinstance(error, OSError | ValueError | SafetensorError) else f"{type(error).__name__}: "
        also = "; pip install what it asks for" if isinstance(error, ImportError) else ""
        raise InputError(f"{refusal}: {kind}{one_line(error)}{also}") from error


def _refuse_looking_ahead(model: PreTrainedModel, path: str) -> None:
    """Refuse a model whose logits at a token depend on later tokens, as its loss would see the answers."""
    vocabulary = getattr(model.config.get_text_config(), "vocab_size", None)
    with _refusing(f"{path}: cannot be run"):
        ordered = not isinstance(vocabulary, int) or follows_order(model, vocabulary)
    if not ordered:
        raise InputError(
            f"{path}: {type(model).__name__} sees the tokens after each token (its attention is bidirectional), so it "
            "would see every answer before predicting it; iprox scores causal language models"
        )


def _refuse_random_weights(path: str, found: Mapping[str, Any]) -> None:
    """Refuse a checkpoint for which transformers would initialize tensors at random."""
    wrong = sorted((each,) if isinstance(each, str) else tuple(each) for each in found["mismatched_keys"])
    if wrong:
        name, *shapes = wrong[0]
        sizes = " ({} instead of {})".format(*(list(shape) for shape in shapes)) if len(shapes) == 2 else ""
        raise InputError(f"{path}: {name} has another shape than its config says{sizes} ({len(wrong)} tensors in all)")
    missing = sorted(found["missing_keys"])
    if missing:
        others = f"; it has {sorted(found['unexpected_keys'])[0]}" if found["unexpected_keys"] else ""
        raise InputError(
            f"{path}: has no weights for {missing[0]} ({len(missing)} tensors in all){others}: it is incomplete, or "
            "was saved from a wrapped model"
        )


def _check_unexpected(model: PreTrainedModel, path: str, unexpected: Iterable[str]) -> None:
    """Refuse a checkpoint with more layers than its config says, and warn of other tensors that the model lacks."""
    ours = {re.sub(r"\d+", "N", name) for name in model.state_dict()}
    others = sorted(unexpected)
    for name in others:
        if re.sub(r"\d+", "N", name) in ours:
            raise InputError(f"{path}: has weights for {name}, of which its config has no layer; correct config.json")
    if others:
        warnings.warn(
            f"{path}: has {len(others)} tensors that a model of its config does not have, so they are not read "
            f"(first: {others[0]})",
            stacklevel=2,
        )


def _refuse_integers(model: PreTrainedModel, folder: Path) -> None:
    """Refuse integers stored for weights that are not quantized by the config, which would be taken for the weights."""
    stored = stored_weights(folder) if folder.exists() else {}
    for name, parameter in model.named_parameters():
        kind = stored.get(name, ("F32",))[0]
        if parameter.is_floating_point() and kind.startswith(("I", "U", "BOOL", "C")):
            raise InputError(f"{folder}: {name} is stored as {kind}, but its config does not quantize it")


def load_tokenizer(path: str | Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model folder or Hub id.

    Raises:
        InputError: there is no tokenizer.
    """
    folder, base = Path(path), adapter_base(path)
    if not folder.exists():
        _check_folder(path)
    elif not any((folder / name).is_file() for name in TOKENIZER_FILES):
        if base is not None:
            return load_tokenizer(base, trust_remote_code=trust_remote_code)
        raise InputError(f"{path}: no tokenizer in it ({TOKENIZER_FILES[0]}); copy the model's tokenizer files there")
    with _refusing(f"{_found(path)}: no tokenizer can be loaded from it"):
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
        if len(tokenizer("a b").input_ids) > _MOST_TOKENS:  # also raises what a broken vocabulary does
            raise InputError(
                f"{path}: its tokenizer makes more than {_MOST_TOKENS} tokens of 'a b'; copy its files again"
            )
    return tokenizer


def check_finite(model: torch.nn.Module, name: str) -> None:
    """Refuse NaN or infinite weights."""
    for parameter_name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise InputError(f"{name}: the weight {parameter_name} has NaN or infinity; the checkpoint is broken")


def model_fingerprint(model: torch.nn.Module) -> str:
    """Return a short fingerprint of a model's shapes and weights that does not depend on the dtype it is loaded in.

    Each parameter counts as the sum of its bfloat16 bit patterns, which is exact in any order and distinguishes
    checkpoints.
    """
    digest = hashlib.blake2b(digest_size=8)
    for name, parameter in sorted(model.named_parameters()):
        bits = parameter.detach().to(torch.bfloat16).view(torch.int16)
        digest.update(f"{name}{tuple(parameter.shape)}{int(bits.sum(dtype=torch.int64))}".encode())
    return digest.hexdigest()


def checkpoint_fingerprint(path: str | Path) -> str:
    """Return a fingerprint of a model without loading it, from its files or the commit of a Hub model."""
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
    """Return the commit of a Hub model, from its config's path in the cache; download the config if needed."""
    with _refusing(f"{_found(repo)}: no model config can be loaded from it"):
        commit = extract_commit_hash(cached_file(repo, CONFIG_NAME), None)
    if commit is None:
        raise InputError(f"{repo}: the cache does not name the commit; download the model, and give its folder")
    return commit


def load_config(path: str | Path, *, trust_remote_code: bool = False) -> PretrainedConfig:
    """Load the config of a model folder or Hub id.

    Raises:
        InputError: there is no config, or iprox cannot score the model.
    """
    base = adapter_base(path)
    if base is not None:
        config = load_config(base, trust_remote_code=trust_remote_code)
        if quantization_method(config) == "bitsandbytes":
            raise InputError(
                f"{path}: adapts a quantized model, into which it cannot be merged exactly; name the model that was "
                f"quantized as base_model_name_or_path in its {ADAPTER}"
            )
        return config
    _check_folder(path)
    with _refusing(f"{_found(path)}: no model config can be loaded from it"):
        written, _ = PretrainedConfig.get_config_dict(path)
        check_sizes(written, str(path))
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
        check_config(config, str(path))
        if Path(path).exists():
            check_layers_by_weights(config, count_weights(Path(path))[0], str(path))
    return config


def _found(path: str | Path) -> str:
    """Return a model's name for messages, which says if there is no such folder."""
    return str(path) if Path(path).exists() else f"{path}: no such folder here, and on the hub"


def stored_dtype(path: str | Path, *, trust_remote_code: bool = False) -> torch.dtype:
    """Return the dtype that a checkpoint is stored in, from its config; float32 if the config has none."""
    dtype = load_config(path, trust_remote_code=trust_remote_code).dtype
    return dtype if isinstance(dtype, torch.dtype) else getattr(torch, dtype or "float32")


def skeleton(path: str | Path, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """Return a model or proxy without weights (on the meta device), to compute costs."""
    config = load_config(path, trust_remote_code=trust_remote_code)
    config._attn_implementation = None  # it computes nothing
    with torch.device("meta"), _refusing(f"{path}: cannot be loaded as a causal language model"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
        proxy = proxy_description(config, str(path))
        split_experts(model)
        if proxy is not None:
            make_low_rank(model, proxy.ranks)
            model.config.quantization_config = proxy
        whole = Path(path).exists() and adapter_base(path) is None  # an adapter's own weights are few
        if whole and (proxy is not None or quantization_of(config) is None):
            check_size_by_weights(model, count_weights(Path(path))[1], str(path))
    return model


def check_belongs(proxy: PreTrainedModel, proxy_path: str, target: PreTrainedModel, target_path: str) -> None:
    """Refuse a model that is not a proxy, or a proxy of another target."""
    config = proxy_config(proxy)
    if config is None:
        raise InputError(f"{proxy_path}: is not an iprox proxy; make one with iprox compress")
    if config.target_fingerprint and config.target_fingerprint != model_fingerprint(target):
        raise InputError(
            f"{proxy_path}: is a proxy of {config.target or 'another model'}, not of {target_path} (the weights differ)"
        )


def _check_folder(path: str | Path) -> None:
    """Refuse a path that is neither a model folder with safetensors nor a possible Hub id."""
    check_path(path)
    folder = Path(path)
    if not folder.exists():
        if not may_be_hub_id(path):
            raise InputError(f"{path}: no such model folder")
        check_reachable(str(path))
        return
    if not folder.is_dir():
        raise InputError(f"{path}: is a file; give the folder that it is in")
    if not (folder / CONFIG_NAME).is_file():
        raise InputError(f"{path}: no config.json in it; give a transformers model folder or a hub id")
    check_weight_files(folder)


def hidden_size(config: PretrainedConfig) -> int:
    """Return the width of a model's hidden states, which determines its default learning rate."""
    return int(config.get_text_config().hidden_size)
