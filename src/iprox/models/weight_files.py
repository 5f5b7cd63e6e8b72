"""Check the weight files of a model: safetensors files in its own folder, or on the Hub."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    HTTPError,  # pyright: ignore[reportPrivateImportUsage]
    OfflineModeIsEnabled,
)
from huggingface_hub.file_download import repo_folder_name
from safetensors import SafetensorError, safe_open
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME
from transformers.utils.hub import cached_file

from iprox.errors import InputError, one_line, shown
from iprox.files import not_regular

SAFETENSORS = ".safetensors"
INDEX = f"{SAFETENSORS}.index.json"


def check_weight_files(folder: Path) -> None:
    """Refuse a folder without safetensors, or with an index or config that refers to other files.

    An index may map a tensor to any path, such as a pickle or a file that the folder's fingerprint does not cover.
    """
    for file in sorted(folder.iterdir()):
        if not file.is_dir() and (irregular := not_regular(file)):
            raise InputError(f"{file}: {irregular}")
    if not any(folder.glob(f"*{SAFETENSORS}")):
        pickled = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth"))
        if pickled:
            raise InputError(
                f"{folder}: holds pickled weights only ({pickled[0]}); iprox reads safetensors. "
                "Convert with model.save_pretrained(folder), which writes safetensors"
            )
        raise InputError(f"{folder}: holds no *.safetensors weights")
    for index in sorted(folder.glob(f"*{INDEX}")):
        for name in _named_by(index):
            _check_name(name, index)
            if not (folder / name).is_file():
                raise InputError(f"{index}: names {name}, which is missing; copy the model's files again")
    explicit = _read(folder / CONFIG_NAME).get("transformers_weights")
    if explicit is not None and not (isinstance(explicit, str) and explicit.endswith(INDEX) and _is_plain(explicit)):
        _check_name(explicit, folder / CONFIG_NAME)


def check_reachable(repo: str) -> None:
    """Refuse a Hub model that is not cached if the Hub cannot be reached.

    huggingface_hub retries for 23 seconds before it reports that, which is long for a typo in a folder's name. Other
    answers of the Hub (no such model, no access) are left to the function that loads the model.
    """
    cached = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repo, repo_type="model")
    if constants.HF_HUB_OFFLINE or any(cached.glob("snapshots/*/*")):
        return
    try:
        get_hf_file_metadata(hf_hub_url(repo, CONFIG_NAME))
    except (HfHubHTTPError, HFValidationError, OfflineModeIsEnabled):
        return
    except HTTPError as error:
        raise InputError(
            f"{repo}: no such folder here, and the Hub cannot be reached ({one_line(error)}); correct the path, or try "
            "again once there is a connection"
        ) from error


def check_hub_index(repo: str) -> None:
    """Refuse a Hub model whose index refers to files other than safetensors."""
    try:
        index = cached_file(repo, SAFE_WEIGHTS_INDEX_NAME, _raise_exceptions_for_missing_entries=False)
    except OSError:
        return  # an error that loading the weights reports
    if index is not None:
        for name in _named_by(Path(index)):
            _check_name(name, Path(index))


def count_weights(folder: Path) -> tuple[int, int]:
    """Return the number of tensors in a folder's weights and of their elements (see `stored_weights`)."""
    stored = stored_weights(folder)
    return len(stored), sum(math.prod(shape) for _, shape in stored.values())


def stored_weights(folder: Path) -> dict[str, tuple[str, list[int]]]:
    """Return the type and shape of each tensor in a folder's weights, from the headers of its files.

    Raises:
        InputError: a file is not a safetensors file.
    """
    found: dict[str, tuple[str, list[int]]] = {}
    for file in sorted(folder.glob(f"*{SAFETENSORS}")):
        try:
            with safe_open(file, framework="pt") as stored:
                for key in stored.keys():  # noqa: SIM118  not a mapping
                    part = stored.get_slice(key)
                    found[key] = part.get_dtype(), part.get_shape()
        except SafetensorError as error:
            raise InputError(
                f"{file}: cannot be loaded as a causal language model: incomplete safetensors: {one_line(error)}"
            ) from error
    return found


def _named_by(index: Path) -> Iterable[Any]:
    """Return the files that an index maps tensors to."""
    mapping = _read(index).get("weight_map")
    if not isinstance(mapping, dict) or not mapping:
        raise InputError(f"{index}: has no weight_map that says which file each tensor is in")
    return sorted({each if isinstance(each, str) else shown(each) for each in mapping.values()})


def _read(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file}: not JSON ({one_line(error)}); copy the model's files again") from error
    if not isinstance(value, dict):
        raise InputError(f"{file}: not a JSON object; copy the model's files again")
    return value


def _check_name(name: Any, where: Path) -> None:
    if not (isinstance(name, str) and name.endswith(SAFETENSORS) and _is_plain(name)):
        raise InputError(
            f"{where}: names the weights {shown(name)}; iprox reads only safetensors files in the model's own folder"
        )


def _is_plain(name: str) -> bool:
    """Return whether a name is a plain file name on every system."""
    return not set(name) & set("/\\:\0") and name not in ("", ".", "..")
