"""Per-example losses: mean cross-entropy over the supervised tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad

from iprox.data.batching import Batch, padded_width
from iprox.errors import InputError
from iprox.models.layers import output_head
from iprox.models.precision import accumulation_dtype

# The loss of a model that is not a language model: (model, batch) -> losses [B].
LossFn = Callable[[nn.Module, Any], Tensor]


def examples_with_loss(batch: Any, losses: Tensor) -> Tensor:
    """Return which examples of a batch have a loss, bool [B]: for text, those with a supervised token; else all.

    Args:
        batch: batch of text, or of a model that is not a language model.
        losses: losses of its examples [B].
    """
    if isinstance(batch, Batch):
        return (batch.labels[:, 1:] != -100).any(1)
    return torch.ones_like(losses, dtype=torch.bool)


def causal_lm_logits(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Return the logits of the positions that predict a supervised token.

    Prompts are often most of the tokens, and the head a large share of a small model, so hidden states are gathered
    before the head. This is done by a hook on the head, so that later operations on logits (scaling, soft-capping)
    still apply, for any model.

    No attention mask is passed: rows are right-padded and attention is causal, so no real token sees padding, and
    attention can use its faster unmasked kernel.

    Returns:
        logits [N, V] in the model's dtype, targets [N] and example numbers [N], for N supervised tokens.
    """
    logits, targets, rows = _filled_logits(model, batch)
    return logits[: len(targets)], targets, rows


def _filled_logits(model: nn.Module, batch: Batch, **inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Return `causal_lm_logits` with the logits padded to repeated shapes (`padded_width`)."""
    head = output_head(model)
    if head is None:
        raise TypeError(f"{type(model).__name__} has no output head; pass loss_fn for such a model")
    targets = batch.labels[:, 1:]
    supervised = targets != -100
    rows, positions = supervised.nonzero(as_tuple=True)
    surplus = padded_width(len(rows)) - len(rows)

    def gather(_module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (inputs[0][pad(rows, (0, surplus)), pad(positions, (0, surplus))].unsqueeze(0), *inputs[1:])

    handle = head.register_forward_pre_hook(gather)
    try:
        logits = model(input_ids=batch.input_ids, use_cache=False, **inputs).logits[0]
    finally:
        handle.remove()
    return logits, targets[supervised], rows


def causal_lm_losses(model: nn.Module, batch: Batch, **inputs: Any) -> Tensor:
    """Return the mean cross-entropy in nats over each example's supervised tokens, in float32 or better.

    It has only a first derivative (see `TokenLosses`). `inputs` are passed to the model.

    Returns:
        Losses [B]; 0 for an example without a supervised token.

    Raises:
        InputError: the batch is not an `iprox.data.Batch`, so its padding and labels are unknown.
    """
    if not isinstance(batch, Batch):
        raise InputError(
            f"a DataLoader for a language model must give batches of the type iprox.data.Batch, not "
            f"{type(batch).__name__}; pass the examples (a list of dicts or a Dataset), or a loss_fn for these batches"
        )
    logits, targets, rows = _filled_logits(model, batch, **inputs)
    token_losses = TokenLosses.apply(logits, targets)
    return mean_by_row(token_losses, rows, batch.input_ids.shape[0])  # pyright: ignore[reportArgumentType]


class TokenLosses(torch.autograd.Function):
    """Cross-entropy of the first N rows of logits with targets [N], a few rows at a time.

    Logits are the largest tensor of a batch. In float32, together with their softmax and gradients, they would take six
    times as much memory as in bfloat16, and every pass over them would go to main memory; here only a few rows that fit
    in the cache are in float32.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        """Return losses [N] in float32 or better."""
        dtype = accumulation_dtype(logits)
        counted = logits[: len(targets)]
        normalizers = torch.cat([torch.logsumexp(rows.to(dtype), 1) for rows in _few_rows(counted)])
        ctx.save_for_backward(logits, targets, normalizers)
        return normalizers - counted.gather(1, targets[:, None])[:, 0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        """Return softmax(logits) - onehot(targets), times each row's gradient."""
        logits, targets, normalizers = ctx.saved_tensors
        (gradient,) = gradients
        result = torch.empty_like(logits)
        result[len(targets) :] = 0
        start = 0
        for rows in _few_rows(logits[: len(targets)]):
            some = slice(start, start + rows.shape[0])
            part = (rows.to(normalizers.dtype) - normalizers[some, None]).exp_()
            part.scatter_add_(1, targets[some, None], part.new_full((len(part), 1), -1.0))
            result[some] = part.mul_(gradient[some, None])
            start += rows.shape[0]
        return result, None


def _few_rows(logits: Tensor) -> tuple[Tensor, ...]:
    """Split logits into groups of rows that fit in a core's cache in float32; an accelerator gets larger groups."""
    numbers = 1 << 18 if logits.device.type == "cpu" else 1 << 26
    return logits.split(max(1, numbers // logits.shape[1]))


def mean_by_row(values: Tensor, rows: Tensor, count: int) -> Tensor:
    """Return the mean of values [N] per row [count]; 0 for a row without values."""
    sums = values.new_zeros(count).index_add(0, rows, values)
    numbers = torch.bincount(rows, minlength=count).clamp(min=1)
    return sums / numbers
