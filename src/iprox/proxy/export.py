"""A proxy as a plain dense model: factors multiplied out, so that it loads without iprox."""

from __future__ import annotations

import copy

import torch
from torch import nn
from transformers import PreTrainedModel

from iprox.errors import InputError
from iprox.models.layers import low_rank_layers, replace_module
from iprox.models.precision import accumulation_dtype


def to_dense(proxy: PreTrainedModel) -> PreTrainedModel:
    """A copy of a proxy with every low-rank layer as one dense layer of the weight AB.

    The product is taken in float32 or better and stored in the proxy's dtype.

    Raises:
        InputError: it is no proxy.
    """
    if not low_rank_layers(proxy):
        raise InputError("the model has no low-rank layer: it is no proxy")
    dense = copy.deepcopy(proxy)
    for name, layer in low_rank_layers(dense).items():
        A, B = layer.A.weight.detach(), layer.B.weight.detach()
        dtype = accumulation_dtype(A)
        plain = nn.Linear(
            layer.in_features, layer.out_features, bias=layer.bias is not None, device=A.device, dtype=A.dtype
        )
        with torch.no_grad():
            plain.weight.copy_(A.to(dtype) @ B.to(dtype))
            if plain.bias is not None and layer.bias is not None:
                plain.bias.copy_(layer.bias)
        replace_module(dense, name, plain)
    quantizer = getattr(dense, "hf_quantizer", None)
    if quantizer is not None:
        quantizer.remove_quantization_config(dense)
    return dense
