"""The weight files of a model folder: safetensors in the folder itself, and nothing else."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME
from transformers.utils.hub import cached_file

from iprox.errors import InputError, one_line, shown

SAFETENSORS = ".safetensors"
INDEX = f"{SAFETENSORS}.index.json"


def check_weight_files(folder: Path) -> None:
    """Refuse a folder without safetensors, or whose index or config would have other files read.

    An index may map a tensor to any path: to a pickle, or to a file that no fingerprint of the folder covers.

    Raises:
        InputError: it is one.
    """
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
                raise InputError(f"{index}: names {name}, which is not there; copy the model's files again")
    explicit = _read(folder / CONFIG_NAME).get("transformers_weights")
    if explicit is not None and not (isinstance(explicit, str) and explicit.endswith(INDEX) and _is_plain(explicit)):
        _check_name(explicit, folder / CONFIG_NAME)


def check_hub_index(repo: str) -> None:
    """Refuse a hub model whose index names other files than safetensors.

    Raises:
        InputError: it does.
    """
    try:
        index = cached_file(repo, SAFE_WEIGHTS_INDEX_NAME, _raise_exceptions_for_missing_entries=False)
    except OSError:
        return  # what cannot be fetched is told of when the weights are
    if index is not None:
        for name in _named_by(Path(index)):
            _check_name(name, Path(index))


def count_weights(folder: Path) -> tuple[int, int]:
    """Tensors of a folder's weights, and numbers in them, by the headers of its files.

    Raises:
        InputError: a file is no safetensors file.
    """
    tensors, numbers = 0, 0
    for file in sorted(folder.glob(f"*{SAFETENSORS}")):
        try:
            with safe_open(file, framework="pt") as stored:
                for key in stored.keys():  # noqa: SIM118  not a mapping
                    size = 1
                    for width in stored.get_slice(key).get_shape():
                        size *= width
                    tensors, numbers = tensors + 1, numbers + size
        except SafetensorError as error:
            raise InputError(
                f"{file}: cannot be loaded as a causal language model: no whole file of safetensors: {one_line(error)}"
            ) from error
    return tensors, numbers


def _named_by(index: Path) -> Iterable[Any]:
    """The files that an index maps tensors to."""
    mapping = _read(index).get("weight_map")
    if not isinstance(mapping, dict) or not mapping:
        raise InputError(f"{index}: has no weight_map that says which file each tensor is in")
    return sorted({each if isinstance(each, str) else shown(each) for each in mapping.values()})


def _read(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file}: no JSON ({one_line(error)}); copy the model's files again") from error
    if not isinstance(value, dict):
        raise InputError(f"{file}: no JSON object; copy the model's files again")
    return value


def _check_name(name: Any, where: Path) -> None:
    if not (isinstance(name, str) and name.endswith(SAFETENSORS) and _is_plain(name)):
        raise InputError(
            f"{where}: names the weights {shown(name)}; iprox reads only safetensors files of the model's own folder"
        )


def _is_plain(name: str) -> bool:
    """Whether a name is that of a file in the folder, on every system."""
    return not set(name) & set("/\\:\0") and name not in ("", ".", "..")
