"""A proxy of one checkpoint as the start of another's: factors follow the weights, no moments are measured again."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from iprox.errors import InputError
from iprox.models.checkpoint import IproxConfig, mark_as_proxy, proxy_config
from iprox.models.layers import LowRankLinear, compressible_layers, dense_weight, layer_bias, low_rank_layers
from iprox.models.loading import model_fingerprint
from iprox.proxy.norms import norm_layers, scale_norm


@torch.no_grad()
def rebased(
    proxy: PreTrainedModel,
    base: PreTrainedModel,
    other: PreTrainedModel,
    norm_scales: Mapping[str, float],
    target: str | None = None,
) -> PreTrainedModel:
    """A proxy of another checkpoint of the same model, from a proxy of this one.

    The factors take up what a change D of the weight has in the row space of B: A + D Bᵀ (B Bᵀ)⁻¹, which makes
    ‖D - ΔA B‖_F least. All that is not factorised is the other checkpoint's; norms are scaled as the proxy's were.
    Cost: 2mnr + 2nr² FLOPs a layer.

    Args:
        proxy: of `base`, low-rank.
        base: the checkpoint it was made of.
        other: of the same shapes.
        norm_scales: what each norm of the proxy was multiplied by (`CompressionReport.norm_scales`).
        target: what to name `other` in the proxy's config.

    Raises:
        InputError: the model is no low-rank proxy.
    """
    config, factors = proxy_config(proxy), low_rank_layers(proxy)
    if config is None or not factors:
        raise InputError("the proxy has no factors to start another checkpoint's from")
    before, after = compressible_layers(base), compressible_layers(other)
    replaced: dict[int, Any] = {}
    for name, layer in factors.items():
        change = dense_weight(after[name]).double() - dense_weight(before[name]).double()
        bias = layer_bias(after[name])
        A = layer.A.weight.double() + followed(change, layer.B.weight.double())
        replaced[id(after[name])] = LowRankLinear.from_factors(
            A.float(), layer.B.weight.clone(), None if bias is None else bias.detach(), layer.A.weight.dtype
        )
    moved = copy.deepcopy(other, memo=replaced)
    norms = norm_layers(moved)
    for name, scale in norm_scales.items():
        scale_norm(norms[name], scale)
    sparsity, fingerprint = config.sparsity, model_fingerprint(other)
    mark_as_proxy(moved, IproxConfig(config.ranks, config.method, sparsity, target, fingerprint))
    return moved


def followed(change: Tensor, B: Tensor) -> Tensor:
    """ΔA [m, r] with the least ‖D - ΔA B‖_F for a change D [m, n] of the weight, B [r, n]."""
    # The pseudo-inverse, as a factor of a weight of low rank has rows of zeros; least squares on a GPU knows none.
    return change @ B.mT @ torch.linalg.pinv(B @ B.mT, hermitian=True)
