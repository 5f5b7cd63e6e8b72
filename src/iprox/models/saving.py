"""A model and its tokenizer, saved to a folder."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from iprox.models.adapters import is_adapted, save_adapters
from iprox.models.card import write_card
from iprox.models.checkpoint import proxy_config
from iprox.models.optimizer_state import save_adam_state

if TYPE_CHECKING:
    from peft import PeftModel

# Beside the checkpoints of a training: which there are, with their learning rates.
CHECKPOINTS = "checkpoints.json"


def save_model(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    dtype: torch.dtype | None = None,
    optimizer: Any = None,
) -> None:
    """Save model and tokenizer to a folder that appears only when it is whole.

    Args:
        model: what to save; of one that carries adapters, the adapters alone.
        tokenizer: saved beside it.
        folder: an older one of that name is replaced.
        dtype: cast floating weights to this for storage; None keeps theirs, as adapters do.
        optimizer: the Adam that trains it, to keep its moments; None keeps none.
    """
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    if is_adapted(model):
        save_adapters(model, partial)
    elif dtype is None:
        model.save_pretrained(partial)
    else:
        state = {k: v.to(dtype) if v.is_floating_point() else v for k, v in model.state_dict().items()}
        model.save_pretrained(partial, state_dict=state)
        config = partial / "config.json"  # transformers writes the dtype of the module, not of the state given
        stored = {**json.loads(config.read_text(encoding="utf-8")), "dtype": str(dtype).removeprefix("torch.")}
        config.write_text(json.dumps(stored, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    tokenizer.save_pretrained(partial)
    if not is_adapted(model) and proxy_config(model) is not None:
        write_card(model, partial)
    if optimizer is not None:
        save_adam_state(model, optimizer, partial)
    for file in partial.iterdir():
        file.chmod(0o644)  # safetensors writes weights that only their owner can read
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(partial, folder)
