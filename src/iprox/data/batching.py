"""Group examples into length-sorted batches under a token budget, so that little of a batch is padding."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch

from iprox.data.tokens import IGNORE, Encoded
from iprox.errors import InputError
from iprox.settings import ON_ACCELERATOR, ON_CPU


def batch_tokens_for(device: torch.device, given: int | Literal["auto"]) -> int:
    """Return the largest rows × longest row of a batch on a device, unless it is given."""
    if given != "auto":
        return given
    return ON_CPU if device.type == "cpu" else ON_ACCELERATOR


@dataclass(frozen=True, slots=True)
class Batch:
    """Examples of similar lengths, padded on the right.

    Attributes:
        input_ids: int64 [B, L], padded with token 0.
        labels: int64 [B, L], -100 where there is no loss; not shifted.
        lengths: int64 [B], tokens of each row without padding.
        indices: position of each example in the caller's list. Rows beyond these are copies that only fill the batch.
        paired: whether every two rows are a preference pair: the chosen answer, then the rejected one.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    lengths: torch.Tensor
    indices: list[int]
    paired: bool = False

    @property
    def rows_each(self) -> int:
        """Rows per example."""
        return 2 if self.paired else 1

    def to(self, device: torch.device | str) -> Batch:
        """Return the same batch with its tensors on another device."""
        moved = {name: getattr(self, name).to(device) for name in ("input_ids", "labels", "lengths")}
        return replace(self, **moved)

    def part(self, start: int, stop: int | None = None) -> Batch:
        """Return the examples from `start` to before `stop`, without columns that hold only padding."""
        rows = slice(start * self.rows_each, None if stop is None else stop * self.rows_each)
        width = int(self.lengths[rows].max())
        input_ids, labels = self.input_ids[rows, :width], self.labels[rows, :width]
        return Batch(input_ids, labels, self.lengths[rows], self.indices[start:stop], self.paired)

    def halves(self) -> tuple[Batch, Batch]:
        """Return the first and second half of the examples (at least two)."""
        middle = len(self.indices) // 2
        return self.part(0, middle), self.part(middle)

    def filled(self, examples: int) -> Batch:
        """Return the batch filled up to a number of examples with copies of the first one; `indices` stay the same."""
        lacking = examples - len(self.indices)
        if lacking == 0:
            return self
        index = [*range(len(self.lengths)), *[*range(self.rows_each)] * lacking]
        return replace(self, input_ids=self.input_ids[index], labels=self.labels[index], lengths=self.lengths[index])


def token_budget_batches(lengths: Sequence[int], batch_tokens: int, rows_each: int = 1) -> list[list[int]]:
    """Group positions by length so that each padded batch holds at most `batch_tokens` tokens.

    Every position is in exactly one batch; an example that is longer than the budget has a batch of its own. The
    longest examples come first, so that a budget that is too large fails at once; equal lengths keep their order.

    Raises:
        InputError: `batch_tokens` is less than 1.
    """
    if batch_tokens < 1:
        raise InputError(f"batch tokens must be at least 1, not {batch_tokens}")
    sizes = np.asarray(lengths, dtype=np.int64)
    order = np.argsort(-sizes, kind="stable").tolist()
    batches: list[list[int]] = []
    start = 0
    while start < len(order):
        rows = max(1, batch_tokens // (rows_each * padded_width(int(sizes[order[start]]))))
        batches.append(order[start : start + rows])
        start += rows
    return batches


def padded_width(length: int) -> int:
    """Return the padded width of a length: a multiple of 8, of 16 from 257 tokens, of 32 from 513 tokens, and so on.

    CPU libraries generate code for every new shape of a bfloat16 product, which takes longer than a small product
    itself; with sixteen widths per octave the shapes of a pool repeat. Accelerators are fastest at multiples of 8. No
    row of up to 2ᵏ tokens (k ≥ 3) becomes wider than 2ᵏ, so none exceeds a model of 2ᵏ positions.
    """
    step = max(8, 1 << max(0, (length - 1).bit_length() - 5))
    return -(-max(1, length) // step) * step


def collate(encoded: Sequence[Encoded], indices: Sequence[int], *, width: int | None = None) -> Batch:
    """Pad the examples `indices` of a list on the right to one batch, to a width or to the longest row.

    The padding is token 0. Any token does: attention is causal, and padding is on the right.
    """
    rows = [row for index in indices for row in encoded[index].rows]
    lengths = [len(row.input_ids) for row in rows]
    shape = (len(rows), max(lengths, default=0) if width is None else width)
    input_ids = np.zeros(shape, dtype=np.int64)
    labels = np.full(shape, IGNORE, dtype=np.int64)
    for position, (row, length) in enumerate(zip(rows, lengths, strict=True)):
        input_ids[position, :length] = row.input_ids
        labels[position, :length] = row.labels
    return Batch(
        torch.from_numpy(input_ids),
        torch.from_numpy(labels),
        torch.tensor(lengths, dtype=torch.int64),
        list(indices),
        paired=len(rows) > len(indices),
    )


def iter_batches(encoded: Sequence[Encoded], batch_tokens: int) -> Iterator[Batch]:
    """Yield the examples that have a supervised token in length-sorted batches, longest first.

    Args:
        encoded: examples; the `indices` of a batch are positions in this list.
        batch_tokens: largest rows × padded width of a batch.
    """
    kept = [index for index, row in enumerate(encoded) if row.supervised]
    rows_each = max((len(encoded[index].rows) for index in kept), default=1)
    for batch in token_budget_batches([encoded[index].longest for index in kept], batch_tokens, rows_each):
        indices = [kept[position] for position in batch]
        longest = max(encoded[index].longest for index in indices)
        yield collate(encoded, indices, width=padded_width(longest))


def example_batches(encoded: Sequence[Encoded], batch_size: int, *, batch_tokens: int | None = None) -> Iterator[Batch]:
    """Yield the examples that have a supervised token in length-sorted batches of `batch_size` examples, for training.

    Batches of long examples are smaller if `batch_tokens` limits their rows × longest row.
    """
    kept = [index for index, row in enumerate(encoded) if row.supervised]
    kept.sort(key=lambda index: -encoded[index].longest)
    start = 0
    while start < len(kept):
        size = batch_size
        if batch_tokens is not None:
            first = encoded[kept[start]]
            size = min(size, max(1, batch_tokens // (len(first.rows) * first.longest)))
        yield collate(encoded, kept[start : start + size])
        start += size


def on_device(batches: Iterable[Batch], device: torch.device | str) -> Iterator[Batch]:
    """Yield the same batches, moved to a device one at a time."""
    for batch in batches:
        yield batch.to(device)
