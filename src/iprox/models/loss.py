"""Per-example losses: mean cross-entropy over the supervised tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad
from torch.utils.hooks import RemovableHandle

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
        return (batch.labels[:, 1:] != -100).any(1).view(len(losses), -1).all(1)
    return torch.ones_like(losses, dtype=torch.bool)


def causal_lm_logits(model: nn.Module, batch: Batch, **inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Return the logits of the positions that predict a supervised token.

    Prompts are often most of the tokens, and the head a large share of a small model, so hidden states are gathered
    before the head. This is done by a hook on the head, so that later operations on logits (scaling, soft-capping)
    still apply, for any model.

    No attention mask is passed: rows are right-padded and attention is causal, so no real token sees padding, and
    attention can use its faster unmasked kernel.

    Returns:
        logits [N, V] in the model's dtype, targets [N] and example numbers [N], for N supervised tokens.
    """
    rows, gathered, targets = _predicting(batch)
    with _on_inputs_of(_head_of(model), lambda hidden: hidden[gathered].unsqueeze(0)):
        logits = model(input_ids=batch.input_ids, use_cache=False, **inputs).logits[0]
    return logits[: len(targets)], targets, rows


def causal_lm_losses(model: nn.Module, batch: Batch, **inputs: Any) -> Tensor:
    """Return the mean cross-entropy in nats over each example's supervised tokens, in float32 or better.

    It has only a first derivative. Where the head is frozen (see `iprox.models.observe.frozen`), it runs on a few
    tokens at a time (`HeadLosses`), so memory does not grow with tokens × vocabulary. `inputs` are passed to the model.

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
    head = _head_of(model)
    if any(parameter.requires_grad for parameter in head.parameters()) or not plain_logits(model):
        logits, targets, rows = causal_lm_logits(model, batch, **inputs)
        token_losses = TokenLosses.apply(logits, targets)
    else:
        hidden, targets, rows = _head_inputs(model, batch, **inputs)
        token_losses = HeadLosses.apply(hidden, head, targets)
    return mean_by_row(token_losses, rows, batch.input_ids.shape[0])  # pyright: ignore[reportArgumentType]


@torch.no_grad()
def logits_in_parts(model: nn.Module, batch: Batch) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield what `causal_lm_logits` returns, without gradients, for a few tokens at a time."""
    if plain_logits(model):
        head = _head_of(model)
        hidden, targets, rows = _head_inputs(model, batch)
        parts = (head(part)[: max(0, len(targets) - start)] for start, part in _parts(hidden, head))
    else:
        logits, targets, rows = causal_lm_logits(model, batch)
        parts = iter((logits,))
    start = 0
    for logits in parts:
        some = slice(start, start + len(logits))
        yield logits, targets[some], rows[some]
        start += len(logits)


# Whether a model's logits are what its head returns, by model; see `plain_logits`.
_plain: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def plain_logits(model: nn.Module) -> bool:
    """Return whether a model's logits are what its head returns, not scaled or capped; tried once on a few tokens."""
    if model not in _plain:
        made: list[Any] = []
        # Several tokens, because the embedding of a pad token may be zero, and then its logits are too.
        tokens = torch.linspace(0, len(model.get_input_embeddings().weight) - 1, 8).long()[None]  # pyright: ignore
        with (
            _head_of(model).register_forward_hook(lambda _module, _inputs, output: made.append(output)),
            torch.no_grad(),
        ):
            logits = model(input_ids=tokens.to(next(model.parameters()).device), use_cache=False).logits
        _plain[model] = len(made) == 1 and bool(made[0].any()) and torch.equal(made[0].float(), logits.float())
    return _plain[model]


def _head_of(model: nn.Module) -> nn.Module:
    head = output_head(model)
    if head is None:
        raise TypeError(f"{type(model).__name__} has no output head; pass loss_fn for such a model")
    return head


def _predicting(batch: Batch) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor]:
    """Return example numbers [N], the places that predict supervised tokens, and these tokens [N].

    The places (rows and positions) have surplus ones after the N, so that the head's shapes repeat (`padded_width`).
    """
    targets = batch.labels[:, 1:]
    supervised = targets != -100
    rows, positions = supervised.nonzero(as_tuple=True)
    surplus = padded_width(len(rows)) - len(rows)
    return rows, (pad(rows, (0, surplus)), pad(positions, (0, surplus))), targets[supervised]


def _head_inputs(model: nn.Module, batch: Batch, **inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Return the hidden states that the head is given for supervised tokens, with surplus ones, targets and rows."""
    rows, gathered, targets = _predicting(batch)
    taken: list[Tensor] = []

    def take(hidden: Tensor) -> Tensor:
        taken.append(hidden[gathered])
        return hidden[:1, :1].detach()

    with _on_inputs_of(_head_of(model), take):
        model(input_ids=batch.input_ids, use_cache=False, **inputs)
    return taken[0], targets, rows


def _on_inputs_of(head: nn.Module, change: Callable[[Tensor], Tensor]) -> RemovableHandle:
    """Change the hidden states that the head is given, inside a `with` block of the result."""
    return head.register_forward_pre_hook(lambda _module, inputs: (change(inputs[0]), *inputs[1:]))


def _parts(hidden: Tensor, head: nn.Module) -> Iterator[tuple[int, Tensor]]:
    """Yield hidden states [N, d] in parts whose logits take 64 MiB in float32, with the place that each starts at.

    On an accelerator they take 512 MiB, to keep it busy.

    A part has 64 tokens or more, so that the head's product reuses what it reads of the weights.
    """
    numbers = 1 << 24 if hidden.device.type == "cpu" else 1 << 27
    at_once = max(64, numbers // next(head.parameters()).shape[0])
    for start in range(0, len(hidden), at_once):
        yield start, hidden[start : start + at_once]


class HeadLosses(torch.autograd.Function):
    """Cross-entropy of the first N of the hidden states [M, d] with targets [N], through a frozen head.

    The gradient (softmax(logits) - onehot(targets)) W is computed in the forward pass, while the logits of a part
    exist, so that no tensor has all tokens and the whole vocabulary. 4dV FLOPs per token, as without parts.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: nn.Module, targets: Tensor) -> Tensor:
        """Return losses [N] in float32 or better."""
        wanted = ctx.needs_input_grad[0]
        gradient = torch.zeros_like(hidden) if wanted else None
        losses = hidden.new_zeros(len(targets), dtype=accumulation_dtype(hidden))
        for start, part in _parts(hidden.detach(), head):
            own = targets[start : start + len(part)]
            with torch.set_grad_enabled(wanted):
                inputs = part.requires_grad_(wanted)
                logits = head(inputs)
            normalizers = _normalizers(logits.detach()[: len(own)])
            chosen = logits.detach()[: len(own)].gather(1, own[:, None])[:, 0]
            losses[start : start + len(own)] = normalizers - chosen
            if gradient is not None and len(own):
                slopes = _slopes(logits.detach(), own, normalizers)
                logits.backward(slopes)
                assert inputs.grad is not None
                gradient[start : start + len(part)] = inputs.grad
        ctx.save_for_backward(gradient)
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        """Return the gradient of each token's own loss, times the gradient with regard to that loss."""
        (whole,), (weights,) = ctx.saved_tensors, gradients
        weights = pad(weights, (0, len(whole) - len(weights)))
        return whole * weights[:, None].to(whole.dtype), None, None


class TokenLosses(torch.autograd.Function):
    """Cross-entropy of the first N rows of logits with targets [N], a few rows at a time.

    Logits are the largest tensor of a batch. In float32, together with their softmax and gradients, they would take six
    times as much memory as in bfloat16, and every pass over them would go to main memory; here only a few rows that fit
    in the cache are in float32.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        """Return losses [N] in float32 or better."""
        counted = logits[: len(targets)]
        normalizers = _normalizers(counted)
        ctx.save_for_backward(logits, targets, normalizers)
        return normalizers - counted.gather(1, targets[:, None])[:, 0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        """Return softmax(logits) - onehot(targets), times each row's gradient."""
        logits, targets, normalizers = ctx.saved_tensors
        return _slopes(logits, targets, normalizers, *gradients), None


def _normalizers(logits: Tensor) -> Tensor:
    """Return log Σ exp of each row, in float32 or better."""
    dtype = accumulation_dtype(logits)
    return torch.cat([torch.logsumexp(rows.to(dtype), 1) for rows in _few_rows(logits)])


def _slopes(logits: Tensor, targets: Tensor, normalizers: Tensor, weights: Tensor | None = None) -> Tensor:
    """Return softmax(logits) - onehot(targets) of the first N rows, times weights [N] if given; 0 for other rows."""
    result = torch.empty_like(logits)
    result[len(targets) :] = 0
    start = 0
    for rows in _few_rows(logits[: len(targets)]):
        some = slice(start, start + rows.shape[0])
        part = (rows.to(normalizers.dtype) - normalizers[some, None]).exp_()
        part.scatter_add_(1, targets[some, None], part.new_full((len(part), 1), -1.0))
        result[some] = part if weights is None else part.mul_(weights[some, None])
        start += rows.shape[0]
    return result


def _few_rows(logits: Tensor) -> tuple[Tensor, ...]:
    """Split logits into groups of rows that fit in a core's cache in float32; an accelerator gets larger groups."""
    numbers = 1 << 18 if logits.device.type == "cpu" else 1 << 26
    return logits.split(max(1, numbers // logits.shape[1]))


def mean_by_row(values: Tensor, rows: Tensor, count: int) -> Tensor:
    """Return the mean of values [N] per row [count]; 0 for a row without values."""
    sums = values.new_zeros(count).index_add(0, rows, values)
    numbers = torch.bincount(rows, minlength=count).clamp(min=1)
    return sums / numbers
