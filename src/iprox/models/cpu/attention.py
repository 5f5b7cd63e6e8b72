"""Causal attention for CPUs with a backward pass as fast as its forward pass.

On short rows, torch's CPU kernel for the backward pass of attention costs more than all linear layers of a small model.
Here the probabilities of a few rows at a time are recomputed, and the products are batched GEMMs that stay in the
cache. This is faster for short rows and slower for long ones, for which torch's kernel is used (`LONGEST`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "iprox_causal"

# Longest rows that use the GEMMs below.
LONGEST = 512
# Number of queries at a time: the keys after a block are not read, which halves the work of long rows.
BLOCK = 128
# Bytes of probabilities at a time: about the cache of one core.
CACHE = 1 << 21


@torch.library.custom_op("iprox::causal_attention", mutates_args=(), device_types="cpu")
def causal_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Run causal attention; each group of H / K query heads shares a key-value head.

    Args:
        query: queries [B, H, L, d].
        key: keys [B, K, L, d].
        value: values [B, K, L, d].
        scale: factor of the products of queries and keys.

    Returns:
        The output [B, L, H, d] and the logarithm of the softmax's denominator [B, H, L], for the backward pass.
    """
    groups = query.shape[1] // key.shape[1]
    out, logsumexp = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, _repeated(key, groups), _repeated(value, groups), 0.0, True, scale=scale
    )
    return out.transpose(1, 2).contiguous(), logsumexp.contiguous()


@causal_attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    batch, heads, length, width = query.shape
    dtype = torch.promote_types(query.dtype, torch.float32)
    return query.new_empty(batch, length, heads, width), query.new_empty(batch, heads, length, dtype=dtype)


@torch.library.custom_op("iprox::causal_attention_backward", mutates_args=(), device_types="cpu")
def causal_attention_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, logsumexp: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients [B, H, L, d], [B, K, L, d] and [B, K, L, d] of the inputs of `causal_attention`.

    Args:
        grad: gradient of the output [B, L, H, d].
        query: queries, as for `causal_attention`.
        key: keys.
        value: values.
        out: output of `causal_attention`.
        logsumexp: second output of `causal_attention`.
        scale: scale.
    """
    grad = grad.transpose(1, 2)
    if query.shape[2] <= LONGEST:
        return _backward_by_gemm(grad, query, key, value, scale)
    batch, kv_heads, length, width = key.shape
    groups = query.shape[1] // kv_heads
    grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad,
        query,
        _repeated(key, groups),
        _repeated(value, groups),
        out.transpose(1, 2),
        logsumexp,
        0.0,
        True,
        scale=scale,
    )
    dquery, *shared = grads
    dkey, dvalue = (part.reshape(batch, kv_heads, groups, length, width).sum(2) for part in shared)
    return dquery.contiguous(), dkey.contiguous(), dvalue.contiguous()


@causal_attention_backward.register_fake
def _(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, logsumexp: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _backward_by_gemm(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients, computed with batched GEMMs.

    With P = softmax(S), S = scale·Q Kᵀ: dV = Pᵀ dO, dS = P ∘ (dO Vᵀ − rowsum(P ∘ dO Vᵀ)), dQ = scale·dS K.

    The query heads that share a key-value head are stacked into one tall matrix, so nothing is repeated and the sum
    over them is part of the GEMM.
    """
    batch, heads, length, width = query.shape
    kv_heads = key.shape[1]
    groups = heads // kv_heads
    dquery = query.new_empty(query.shape)
    dkey, dvalue = key.new_zeros(key.shape), value.new_zeros(value.shape)
    hidden = torch.full((length, length), -torch.inf, dtype=query.dtype).triu_(1)
    rows = max(1, CACHE // (heads * min(BLOCK, length) * length * query.element_size()))
    for first in range(0, batch, rows):
        some = slice(first, first + rows)
        count = min(rows, batch - first)
        for start in range(0, length, BLOCK):
            end = min(length, start + BLOCK)
            tall = (count * kv_heads, groups * (end - start), width)
            q, g = query[some, :, start:end].reshape(tall), grad[some, :, start:end].reshape(tall)
            k, v = (x[some, :, :end].reshape(count * kv_heads, end, width) for x in (key, value))
            scores = torch.bmm(q, k.mT).mul_(scale)
            scores.view(-1, groups, end - start, end).add_(hidden[start:end, :end])
            P = torch.softmax(scores, dim=-1)
            dS = torch.ops.aten._softmax_backward_data(torch.bmm(g, v.mT), P, -1, P.dtype)
            dquery[some, :, start:end] = torch.bmm(dS, k).mul_(scale).view(count, heads, end - start, width)
            dkey[some, :, :end] += torch.bmm(dS.mT, q).mul_(scale).view(count, kv_heads, end, width)
            dvalue[some, :, :end] += torch.bmm(P.mT, g).view(count, kv_heads, end, width)
    return dquery, dkey, dvalue


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, float], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, scale = inputs
    ctx.save_for_backward(query, key, value, *output)
    ctx.scale = scale


def _backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
    return *causal_attention_backward(grad, *ctx.saved_tensors, ctx.scale), None


causal_attention.register_autograd(_backward, setup_context=_setup_context)


def _repeated(x: Tensor, groups: int) -> Tensor:
    """Return key or value heads [B, K, L, d] once per query head [B, K·groups, L, d]."""
    return x if groups == 1 else x.repeat_interleave(groups, dim=1)


def _forward(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """Run attention for transformers, with this kernel if it is plain causal attention, else with its `sdpa`."""
    causal = options.get("is_causal")
    plain = (
        attention_mask is None
        and query.shape[2] == key.shape[2]
        and (getattr(module, "is_causal", True) if causal is None else causal)
        and query.shape[3] == value.shape[3]
        and not options.get("dropout")
        and options.get("position_bias") is None
    )
    if not plain:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    if torch.is_autocast_enabled("cpu"):  # autocast does not cast for this kernel
        query, key, value = (x.to(torch.get_autocast_dtype("cpu")) for x in (query, key, value))
    scaling = options.get("scaling")
    scale = float(query.shape[3] ** -0.5 if scaling is None else scaling)
    return causal_attention(query, key, value, scale)[0], None


AttentionInterface.register(NAME, _forward)
AttentionMaskInterface.register(NAME, sdpa_mask)


@contextmanager
def fast_attention(model: nn.Module) -> Iterator[None]:
    """Use this attention inside the block, if it is a transformers model with `sdpa` attention on the CPU.

    It has only a first derivative, so the gradient part of alignment must not run inside.
    """
    if (
        not isinstance(model, PreTrainedModel)
        or model.device.type != "cpu"
        or model.config._attn_implementation != "sdpa"
        or model.config.sub_configs  # the parts may have different attention
    ):
        yield
        return
    model.set_attn_implementation(NAME)
    try:
        yield
    finally:
        model.set_attn_implementation("sdpa")
