"""Layer extraction, a baseline: the first decoder layers of the target, with its final norm and its head."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

from iprox.errors import InputError
from iprox.models import flops
from iprox.models.layers import compressible_layers, copied, decoder_layers, weight_shape
from iprox.proxy.size import Size


def fitting_layers(model: PreTrainedModel, size: Size) -> int:
    """Return how many of a model's first decoder layers fit in a size; the model needs no weights.

    Raises:
        InputError: not even one layer fits.
    """
    budget = size.budget(model, flops.linear_parameters(model))
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
        raise InputError("the requested size leaves less than one decoder layer")
    return count


def first_layers(model: PreTrainedModel, size: Size) -> PreTrainedModel:
    """Return a copy of the model with its first decoder layers, its final norm and its head (layer extraction).

    Raises:
        InputError: not even one layer fits.
    """
    name, blocks = decoder_layers(model)
    count = fitting_layers(model, size)
    # deepcopy uses the memo's objects, so the omitted layers are never copied.
    shorter = copied(model, {id(block): None for block in blocks[count:]})
    parent, _, attribute = name.rpartition(".")
    kept = nn.ModuleList(list(shorter.get_submodule(name).children())[:count])
    setattr(shorter.get_submodule(parent), attribute, kept)
    config = shorter.config.get_text_config()
    # Configs have lists with one entry per layer, such as `layer_types`.
    for key, value in vars(config).items():
        if isinstance(value, list) and len(value) == len(blocks):
            setattr(config, key, value[:count])
    config.num_hidden_layers = count
    return shorter
