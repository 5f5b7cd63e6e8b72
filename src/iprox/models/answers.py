"""Losses whose gradients pass through the answers alone: prompts are read without a graph.

A prompt's tokens act on the loss only through the keys and values that the answer attends to. Here these are constants:
the prompt is run without gradients, and the answer, from the token that predicts its first one, in a second pass over
the prompt's cache. The losses are the same. The gradient lacks what reaches the weights through the prompt's positions;
the backward pass, its activations, the contraction and the norms shrink to the answer's share of the tokens.
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
    """Return the position that predicts each row's first supervised token [B]; its last one where there is none."""
    supervised = batch.labels[:, 1:] != IGNORE
    return torch.where(supervised.any(1), supervised.int().argmax(1), batch.lengths - 1)


def has_cache(model: nn.Module) -> bool:
    """Return whether a model is a decoder whose attention reads keys and values, at given positions, from a cache."""
    if not isinstance(model, PreTrainedModel) or getattr(model.config, "is_encoder_decoder", False):
        return False
    stateful = getattr(model, "_is_stateful", False)  # such as Mamba, whose state is not keys and values
    # Latent attention makes the prompt's keys and values from its cache again, by layers that have gradients.
    latent = getattr(model.config.get_text_config(), "kv_lora_rank", None)
    return (
        not stateful
        and not latent
        and {"past_key_values", "position_ids"} <= set(inspect.signature(model.forward).parameters)
    )


def placed(values: Tensor, batch: Batch) -> Tensor:
    """Return values of the answers' tokens [B, A, ...] at their places in whole rows [B, L, ...], 0 elsewhere."""
    starts = answer_starts(batch)
    whole = values.new_zeros(*batch.labels.shape, *values.shape[2:])
    for row, start in enumerate(starts.tolist()):
        length = int(batch.lengths[row]) - start
        whole[row, start : start + length] = values[row, :length]
    return whole


def answer_losses(model: nn.Module, batch: Batch) -> Tensor:
    """Return the losses of `causal_lm_losses`, with the gradient of the answers alone.

    Forward 2P per token, backward 2P per token of an answer. Prompts are padded on the left and answers on the right,
    so that they meet at one column, as attention windows need.

    Returns:
        Losses [B]; 0 for an example without a supervised token.

    The model is one that `has_cache`.
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
