"""Read every layer's inputs and output gradients on a sample of examples, batch by batch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from iprox.data.batching import Batch
from iprox.models.loss import LossFn, logits_in_parts
from iprox.models.observe import Sink, frozen, watched_backward

Labels = Literal["data", "sampled"]


@dataclass(frozen=True, slots=True)
class SampleSettings:
    """Settings of reading a sample.

    Attributes:
        labels: `data` for the labels that training uses (empirical Fisher), or `sampled` from the model's predictions
            at the same tokens (true Fisher).
        balanced: whether each example's δ is scaled by the square root of its number of supervised tokens. The gradient
            of a mean over k tokens has a variance of about 1/k, so otherwise the few examples with one or two
            supervised tokens dominate C_δ.
        seed: seed for sampled labels; the same seed draws the same labels.
    """

    labels: Labels = "data"
    balanced: bool = True
    seed: int = 0


@dataclass(slots=True)
class Counts:
    """The size of a sample: examples, and tokens that count (or examples, if it is no text)."""

    examples: int = 0
    tokens: int = 0
    text: bool = True


def read_sample(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    batches: Iterable[Any],
    sink: Sink,
    loss_fn: LossFn,
    settings: SampleSettings,
) -> Counts:
    """Call a function with each layer's inputs h [B, L, n] and output gradients δ [B, L, m], batch by batch.

    Each batch takes a forward pass and a backward pass without weight gradients, and one more forward pass for sampled
    labels. Padding has δ = 0 but h ≠ 0, so h is set to zero there.

    Args:
        model: model to run; unchanged afterwards.
        layers: layers to watch, by name.
        batches: batches of the sample.
        sink: function to call for each layer and batch.
        loss_fn: per-example losses, for a model that is not a language model.
        settings: settings of the sample.
    """
    generator = torch.Generator().manual_seed(settings.seed)
    read = Counts()
    with frozen(model):
        for batch in batches:
            counted, fed = None, sink
            if isinstance(batch, Batch):
                if settings.labels == "sampled":
                    batch = sampled_labels(model, batch, generator)
                counted = counted_tokens(batch)
                read.tokens += int(counted.sum())
                if settings.balanced and not batch.paired:  # a pair's loss has sums over tokens, not means
                    fed = _scaled(sink, (batch.labels[:, 1:] != -100).sum(1).sqrt())
            losses = watched_backward(model, layers, lambda batch=batch: loss_fn(model, batch), fed, counted)
            read.examples += len(losses)
            if not isinstance(batch, Batch):
                read.tokens, read.text = read.tokens + len(losses), False
    return read


def _scaled(sink: Sink, scale: Tensor) -> Sink:
    """Return a sink that first multiplies each example's output gradients by a number [B]."""

    def fed(name: str, h: Tensor, delta: Tensor) -> None:
        sink(name, h, delta * scale[:, None, None].to(delta.dtype))

    return fed


def counted_tokens(batch: Batch) -> Tensor:
    """Return which positions count, bool [B, L]: all but padding."""
    positions = torch.arange(batch.input_ids.shape[1], device=batch.lengths.device)
    return positions[None, :] < batch.lengths[:, None]


@torch.no_grad()
def sampled_labels(model: nn.Module, batch: Batch, generator: torch.Generator) -> Batch:
    """Sample every supervised label of a batch from the model's prediction (Martens 2020: the true Fisher).

    Raises:
        FloatingPointError: a prediction is not finite.
    """
    drawn: list[Tensor] = []
    for logits, _, _ in logits_in_parts(model, batch):
        if not torch.isfinite(logits).all():
            raise FloatingPointError(
                "the model's logits are not finite, so labels cannot be sampled; try --set dtype=float32"
            )
        drawn.append(torch.multinomial(torch.softmax(logits.float(), dim=-1).cpu(), 1, generator=generator)[:, 0])
    labels = batch.labels.clone()
    labels[:, 1:][labels[:, 1:] != -100] = torch.cat(drawn).to(labels.device)
    return replace(batch, labels=labels)
