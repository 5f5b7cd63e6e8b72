"""Losses whose gradients pass through the answers only; prompts are run without an autograd graph.

A prompt's tokens affect the loss only through the keys and values that the answer attends to. Here these are constants:
the prompt is run without gradients, and then the answer (from the token that predicts its first one) with the prompt's
cache. The losses are the same. The gradient lacks the part through the prompt's positions; the backward pass, its
activations, the contraction and the norms shrink to the answer's share of the tokens.
"""

from __future__ import annotations

import inspect

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import PreTrainedModel

from iprox.data.batching import Batch, padded_width
from iprox.data.tokens import IGNORE
from iprox.models.loss import causal_lm_losses


def answer_starts(batch: Batch) -> Tensor:
    """Return the position that predicts each row's first supervised token [B], or its last position without one."""
    supervised = batch.labels[:, 1:] != IGNORE
    return torch.where(supervised.any(1), supervised.int().argmax(1), batch.lengths - 1)


def has_cache(model: nn.Module) -> bool:
    """Return whether a model is a decoder with a key-value cache and position ids."""
    if not isinstance(model, PreTrainedModel) or getattr(model.config, "is_encoder_decoder", False):
        return False
    stateful = getattr(model, "_is_stateful", False)  # such as Mamba, whose state is not keys and values
    # Latent attention computes the prompt's keys and values from its cache again, with layers that have gradients.
    latent = getattr(model.config.get_text_config(), "kv_lora_rank", None)
    return (
        not stateful
        and not latent
        and {"past_key_values", "position_ids"} <= set(inspect.signature(model.forward).parameters)
    )


def placed(values: Tensor, batch: Batch) -> Tensor:
    """Return values of the answers' tokens [B, A, ...] at their positions in full rows [B, L, ...], 0 elsewhere."""
    starts = answer_starts(batch)
    whole = values.new_zeros(*batch.labels.shape, *values.shape[2:])
    for row, start in enumerate(starts.tolist()):
        length = int(batch.lengths[row]) - start
        whole[row, start : start + length] = values[row, :length]
    return whole


def answer_losses(model: nn.Module, batch: Batch) -> Tensor:
    """Return the losses of `causal_lm_losses`, with gradients through the answers only.

    Forward 2P per token, backward 2P per answer token. Prompts are padded on the left and answers on the right, so that
    all answers start at the same column, as attention windows require.

    Args:
        model: model for which `has_cache` is true.
        batch: batch on the model's device.

    Returns:
        Losses [B]; 0 for an example without a supervised token.
    """
    assert isinstance(model, PreTrainedModel)
    starts = answer_starts(batch)
    longest = int(starts.max())
    if longest == 0:
        return causal_lm_losses(model, batch)
    width = padded_width(longest)
    columns = torch.arange(width, device=starts.device) - (width - starts)[:, None]
    prompt = (columns >= 0).long()
    with torch.no_grad():
        cache = model.base_model(
            input_ids=batch.input_ids.gather(1, columns.clamp(min=0)),
            attention_mask=prompt,
            position_ids=columns.clamp(min=0),
            use_cache=True,
        ).past_key_values
    width = padded_width(int((batch.lengths - starts).max()))
    positions = torch.arange(width, device=starts.device) + starts[:, None]
    columns = positions.clamp(max=batch.labels.shape[1] - 1)
    outside = positions >= batch.lengths[:, None]
    answers = Batch(
        batch.input_ids.gather(1, columns),
        batch.labels.gather(1, columns).masked_fill(outside, IGNORE),
        batch.lengths - starts,
        batch.indices,
    )
    return causal_lm_losses(
        model,
        answers,
        attention_mask=pad(prompt, (0, width), value=1),
        position_ids=columns,
        past_key_values=cache,
    )
