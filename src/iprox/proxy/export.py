"""Export a proxy as a plain dense model, with its factors multiplied out, so that it loads without iprox."""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from iprox.errors import InputError
from iprox.models.experts import fuse_experts, split_experts
from iprox.models.layers import LowRankLinear, compressible_layers, copied, low_rank_layers, replace_module
from iprox.models.precision import accumulation_dtype


def to_dense(proxy: PreTrainedModel) -> PreTrainedModel:
    """Return a copy of a proxy in which every low-rank layer is a dense layer with the weight up·down.

    The product is computed in float32 or better and stored in the proxy's dtype.

    Raises:
        InputError: the model has no low-rank layer.
    """
    if not low_rank_layers(proxy):
        raise InputError("the model has no low-rank layer: it is not a proxy")
    dense = copied(proxy)
    with torch.device("meta"):
        bare = type(proxy)(proxy.config)  # has the original kind of each layer
    split_experts(bare)
    originals = compressible_layers(bare)
    for name, layer in low_rank_layers(dense).items():
        with torch.no_grad():
            replace_module(dense, name, _multiplied_out(layer, originals[name]))
    fuse_experts(dense, dense.config)
    quantizer = getattr(dense, "hf_quantizer", None)
    if quantizer is not None:
        quantizer.remove_quantization_config(dense)
    return dense


def _multiplied_out(layer: LowRankLinear, original: nn.Module) -> nn.Module:
    """Return a dense layer of the original's kind, which it overwrites, with the weight up·down."""
    up, down = layer.factors
    dtype = accumulation_dtype(up)
    weight = (up.to(dtype) @ down.to(dtype)).to(up.dtype)
    weight = weight.mT.contiguous() if isinstance(original, Conv1D) else weight.reshape(original.weight.shape)  # pyright: ignore
    original.weight = nn.Parameter(weight)
    if layer.bias is not None:
        original.bias = nn.Parameter(layer.bias.detach().clone())
    return original
