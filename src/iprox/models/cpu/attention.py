"""Causal attention on the CPU with a backward pass as fast as its forward pass.

torch's CPU kernel for the backward pass of attention costs more than all linear layers of a small model together on
short rows. Here the probabilities of a few rows at a time are recomputed and multiplied as batched GEMMs that stay in
the cache. That is faster for short rows and slower for long ones, for which torch's kernel is used (`LONGEST`).
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

# Rows up to this length take the GEMMs below.
LONGEST = 512
# Queries at a time: the keys after a block are not read, which halves the work of long rows.
BLOCK = 128
# Bytes of probabilities at a time: about the cache of one core.
CACHE = 1 << 21


@torch.library.custom_op("iprox::causal_attention", mutates_args=(), device_types="cpu")
def causal_attention(
    query: Tensor, key: Tensor, value: Tensor, scale: float, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Run causal attention; each group of H / K query heads shares a key-value head.

    Args:
        query: queries [B, H, L, d].
        key: keys [B, K, S, d]: S - L of a prompt, which are constants, before those of the queries.
        value: values [B, K, S, d].
        scale: factor of the products of queries and keys.
        mask: added to the products, -inf for what a query does not see, [B, 1, L, S]. None: all up to its own key,
            with L = S.

    Returns:
        The output [B, L, H, d] and the logarithm of the softmax's denominator [B, H, L], for the backward pass.
    """
    groups = query.shape[1] // key.shape[1]
    out, logsumexp = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, _repeated(key, groups), _repeated(value, groups), 0.0, mask is None, attn_mask=mask, scale=scale
    )
    return out.transpose(1, 2).contiguous(), logsumexp.contiguous()


@causal_attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, scale: float, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    batch, heads, length, width = query.shape
    dtype = torch.promote_types(query.dtype, torch.float32)
    return query.new_empty(batch, length, heads, width), query.new_empty(batch, heads, length, dtype=dtype)


@torch.library.custom_op("iprox::causal_attention_backward", mutates_args=(), device_types="cpu")
def causal_attention_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    scale: float,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients [B, H, L, d], [B, K, S, d] and [B, K, S, d] of the inputs of `causal_attention`.

    A prompt's keys and values are constants: what is returned for them is not to be used.

    Args:
        grad: gradient of the output [B, L, H, d].
        query: queries that `causal_attention` was given.
        key: its keys.
        value: its values.
        out: its output.
        logsumexp: its second output.
        scale: its scale.
        mask: its mask.
    """
    grad = grad.transpose(1, 2)
    if query.shape[2] <= LONGEST:
        return _backward_by_gemm(grad, query, key, value, scale, mask)
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
        mask is None,
        attn_mask=mask,
        scale=scale,
    )
    dquery, *shared = grads
    dkey, dvalue = (part.reshape(batch, kv_heads, groups, length, width).sum(2) for part in shared)
    return dquery.contiguous(), dkey.contiguous(), dvalue.contiguous()


@causal_attention_backward.register_fake
def _(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    scale: float,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _backward_by_gemm(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, scale: float, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients as batched GEMMs.

    With P = softmax(S), S = scale·Q Kᵀ: dV = Pᵀ dO, dS = P ∘ (dO Vᵀ − rowsum(P ∘ dO Vᵀ)), dQ = scale·dS K.

    The query heads that share a key-value head are stacked into one tall matrix, so that nothing is repeated and
    the sum over them is part of the GEMM.
    """
    batch, heads, length, width = query.shape
    kv_heads, keys = key.shape[1:3]
    groups, prompt = heads // kv_heads, keys - length
    dquery = query.new_empty(query.shape)
    dkey, dvalue = key.new_zeros(key.shape), value.new_zeros(value.shape)
    hidden = torch.full((length, length), -torch.inf, dtype=query.dtype).triu_(1) if mask is None else None
    rows = max(1, CACHE // (heads * min(BLOCK, length) * keys * query.element_size()))
    for first in range(0, batch, rows):
        some = slice(first, first + rows)
        count = min(rows, batch - first)
        for start in range(0, length, BLOCK):
            end = min(length, start + BLOCK)
            seen = prompt + end
            tall = (count * kv_heads, groups * (end - start), width)
            q, g = query[some, :, start:end].reshape(tall), grad[some, :, start:end].reshape(tall)
            k, v = (x[some, :, :seen].reshape(count * kv_heads, seen, width) for x in (key, value))
            scores = torch.bmm(q, k.mT).mul_(scale)
            if mask is None:
                assert hidden is not None
                scores.view(-1, groups, end - start, seen).add_(hidden[start:end, :seen])
            else:
                scores.view(count, heads, end - start, seen).add_(mask[some, :, start:end, :seen])
            P = torch.softmax(scores, dim=-1)
            dS = torch.ops.aten._softmax_backward_data(torch.bmm(g, v.mT), P, -1, P.dtype)
            dquery[some, :, start:end] = torch.bmm(dS, k).mul_(scale).view(count, heads, end - start, width)
            dS, P = dS[..., prompt:], P[..., prompt:]
            dkey[some, :, prompt:seen] += torch.bmm(dS.mT, q).mul_(scale).view(count, kv_heads, end, width)
            dvalue[some, :, prompt:seen] += torch.bmm(P.mT, g).view(count, kv_heads, end, width)
    return dquery, dkey, dvalue


def _setup_context(
    ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, float, Tensor | None], output: tuple[Tensor, Tensor]
) -> None:
    query, key, value, scale, mask = inputs
    ctx.save_for_backward(query, key, value, *output, mask)
    ctx.scale = scale


def _backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
    *saved, mask = ctx.saved_tensors
    return *causal_attention_backward(grad, *saved, ctx.scale, mask), None, None


causal_attention.register_autograd(_backward, setup_context=_setup_context)


def _repeated(x: Tensor, groups: int) -> Tensor:
    """Return key or value heads [B, K, L, d] once per query head [B, K·groups, L, d]."""
    return x if groups == 1 else x.repeat_interleave(groups, dim=1)


def _forward(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """Run attention for transformers: by this kernel if it is plain causal attention, else by its own `sdpa`."""
    causal = options.get("is_causal")
    plain = (
        (query.shape[2] == key.shape[2] if attention_mask is None else _is_causal(attention_mask, query, key))
        and (getattr(module, "is_causal", True) if causal is None else causal)
        and query.shape[3] == value.shape[3]
        and not options.get("dropout")
        and options.get("position_bias") is None
    )
    if not plain:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    if torch.is_autocast_enabled("cpu"):  # which casts for torch's kernel, but not for this one
        query, key, value = (x.to(torch.get_autocast_dtype("cpu")) for x in (query, key, value))
    scaling = options.get("scaling")
    scale = float(query.shape[3] ** -0.5 if scaling is None else scaling)
    mask = None
    if attention_mask is not None:
        mask = torch.zeros_like(attention_mask, dtype=query.dtype).masked_fill_(~attention_mask, -torch.inf)
    return causal_attention(query, key, value, scale, mask)[0], None


def _is_causal(mask: Tensor, query: Tensor, key: Tensor) -> bool:
    """Return whether a mask is of queries that follow a prompt's keys, as `answer_losses` makes it."""
    return (
        mask.dtype == torch.bool
        and mask.shape == (query.shape[0], 1, query.shape[2], key.shape[2])
        and key.shape[2] > query.shape[2]
    )


AttentionInterface.register(NAME, _forward)
AttentionMaskInterface.register(NAME, sdpa_mask)


@contextmanager
def fast_attention(model: nn.Module) -> Iterator[None]:
    """Let a transformers model on the CPU that uses `sdpa` attention use this module's inside the block.

    It has a first derivative only, so the gradient part of alignment must not run inside.
    """
    if (
        not isinstance(model, PreTrainedModel)
        or model.device.type != "cpu"
        or model.config._attn_implementation != "sdpa"
        or model.config.sub_configs  # several models in one may each have their own
    ):
        yield
        return
    model.set_attn_implementation(NAME)
    try:
        yield
    finally:
        model.set_attn_implementation("sdpa")
