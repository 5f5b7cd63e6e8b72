"""Proxies that are not factorized: the first layers of the target, or another model altogether.

The factorizing baselines (SVD, SVD-LLM, ASVD, FWSVD, random) differ from IPSVD in their weighing alone: `methods.py`.
"""

from __future__ import annotations

import copy

import torch
from torch import nn
from transformers import PreTrainedModel

from iprox.errors import InputError
from iprox.models.layers import compressible_layers, decoder_layers, output_head, weight_shape


def fitting_layers(model: PreTrainedModel, budget: float) -> int:
    """How many of a model's first decoder layers a budget of parameters holds; the model needs no weights.

    Raises:
        InputError: not even one.
    """
    name, blocks = decoder_layers(model)
    spent, count = 0.0, 0
    costs = [0] * len(blocks)
    for layer_name, layer in compressible_layers(model).items():
        if layer_name.startswith(f"{name}."):
            m, n = weight_shape(layer)
            costs[int(layer_name.removeprefix(f"{name}.").split(".")[0])] += m * n
    for cost in costs:
        if spent + cost > budget:
            break
        spent += cost
        count += 1
    if count == 0:
        raise InputError("the size asked for leaves less than one decoder layer")
    return count


def first_layers(model: PreTrainedModel, budget: float) -> tuple[PreTrainedModel, int]:
    """Layer extraction: a copy of the model with its first k decoder layers, then its final norm and head.

    Args:
        model: the target; left as it was.
        budget: the most parameters that the compressible layers may have.

    Returns:
        The copy, and k: the most layers that fit.

    Raises:
        InputError: not even one layer fits.
    """
    name, blocks = decoder_layers(model)
    count = fitting_layers(model, budget)
    # deepcopy takes what the memo already holds, so layers that go are never copied.
    shorter = copy.deepcopy(model, memo={id(block): None for block in blocks[count:]})
    parent, _, attribute = name.rpartition(".")
    kept = nn.ModuleList(list(shorter.get_submodule(name).children())[:count])
    setattr(shorter.get_submodule(parent), attribute, kept)
    config = shorter.config.get_text_config()
    # Configs keep one entry a layer in lists such as `layer_types`.
    for key, value in vars(config).items():
        if isinstance(value, list) and len(value) == len(blocks):
            setattr(config, key, value[:count])
    config.num_hidden_layers = count
    return shorter, count


# Sizes of one family pad their vocabularies to other multiples (Qwen2, Gemma 3).
PADDING = 256


def off_the_shelf(model: PreTrainedModel, other: PreTrainedModel) -> PreTrainedModel:
    """Another model as it is, in the target's place.

    Raises:
        InputError: its vocabulary differs by more than padding, so that tokens of one mean nothing to the other.
    """
    sizes = [getattr(output_head(each), "weight", torch.empty(0)).shape[0] for each in (model, other)]
    if abs(sizes[0] - sizes[1]) > PADDING:
        raise InputError(
            f"the off-the-shelf model has a vocabulary of {sizes[1]:,}, the target one of {sizes[0]:,}: "
            "choose a model of the target's family"
        )
    return copy.deepcopy(other)
