"""Save a model and its tokenizer to a folder."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from iprox.errors import InputError, one_line
from iprox.models.adapters import is_adapted, merged_state, save_adapters
from iprox.models.card import write_card
from iprox.models.checkpoint import proxy_config
from iprox.models.optimizer_state import save_adam_state
from iprox.records import RUN

if TYPE_CHECKING:
    from peft import PeftModel

# File with the checkpoints of a training and their learning rates.
CHECKPOINTS = "checkpoints.json"


def save_model(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    dtype: torch.dtype | None = None,
    optimizer: Any = None,
    *,
    adapters_only: bool = False,
    state: Mapping[str, Tensor] | None = None,
) -> None:
    """Save a model and its tokenizer to a folder that appears only when it is complete.

    Args:
        model: model to save; adapters are merged.
        tokenizer: tokenizer to save with it.
        folder: folder to write; an existing one is replaced.
        dtype: dtype to store floating-point weights in; None keeps theirs.
        optimizer: Adam optimizer of the model, to save its moments too.
        adapters_only: whether to save only the adapters, in float32, without the model.
        state: the model's weights, where each of several processes holds a part of them; the model's own if None.
    """
    # A folder with the record of a command is locked by it, so files are moved into it; others are replaced.
    held = (folder / RUN).is_file()
    partial = folder / "model.partial" if held else folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    if not is_adapted(model):
        _save_whole(model, model.state_dict() if state is None else state, partial, dtype)
    elif adapters_only:
        save_adapters(model, partial)
    else:
        base: Any = model.get_base_model()
        kept: torch.dtype = base.dtype if dtype is None else dtype
        _save_whole(base, merged_state(model, kept), partial, kept)
    tokenizer.save_pretrained(partial)
    if not is_adapted(model) and proxy_config(model) is not None:
        write_card(model, partial)
    if optimizer is not None:
        save_adam_state(model, optimizer, partial)
    for file in partial.iterdir():
        file.chmod(0o644)  # safetensors makes files that only their owner can read
    if held:
        for file in partial.iterdir():
            os.replace(file, folder / file.name)
        partial.rmdir()
        return
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(partial, folder)


def _save_whole(model: PreTrainedModel, state: Mapping[str, Tensor], folder: Path, dtype: torch.dtype | None) -> None:
    """Write a model's config, and the weights in `state`."""
    if dtype is None:
        model.save_pretrained(folder, state_dict=dict(state))
        return
    cast = {name: each.to(dtype) if each.is_floating_point() else each for name, each in state.items()}
    model.save_pretrained(folder, state_dict=cast)
    config = folder / "config.json"  # transformers writes the module's dtype, not that of the state
    stored = {**json.loads(config.read_text(encoding="utf-8")), "dtype": str(dtype).removeprefix("torch.")}
    config.write_text(json.dumps(stored, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def learning_rates_in(listing: Path) -> dict[str, float]:
    """Return the learning rates of a training's checkpoints by folder name, in order; {} if there is no such file.

    Raises:
        InputError: the file is damaged.
    """
    try:
        text = listing.read_text(encoding="utf-8") if listing.is_file() else "[]"
        return {str(each["path"]): float(each["learning_rate"]) for each in json.loads(text)}
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise InputError(f"{listing}: is damaged ({one_line(error)}); train again, or give --learning-rates") from error
