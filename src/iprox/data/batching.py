"""Group examples into length-sorted batches under a token budget, so that little of a batch is padding."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from iprox.data.tokens import IGNORE, Encoded
from iprox.errors import InputError


@dataclass(frozen=True, slots=True)
class Batch:
    """Examples of similar lengths, padded on the right.

    Attributes:
        input_ids: int64 [B, L], padded with token 0.
        labels: int64 [B, L], -100 where there is no loss; not shifted.
        lengths: int64 [B], tokens of each row without padding.
        indices: position of each row in the caller's list. Rows beyond these are copies that only fill the batch.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    lengths: torch.Tensor
    indices: list[int]

    def to(self, device: torch.device | str) -> Batch:
        """Return the same batch with its tensors on another device."""
        return Batch(self.input_ids.to(device), self.labels.to(device), self.lengths.to(device), self.indices)

    def halves(self) -> tuple[Batch, Batch]:
        """Return the first and second half of the rows (at least two), without columns that hold only padding."""
        middle = len(self.indices) // 2
        first, second = (
            Batch(
                self.input_ids[rows, : int(self.lengths[rows].max())],
                self.labels[rows, : int(self.lengths[rows].max())],
                self.lengths[rows],
                self.indices[rows],
            )
            for rows in (slice(middle), slice(middle, None))
        )
        return first, second

    def filled(self, rows: int) -> Batch:
        """Return the batch filled up to a number of rows with copies of its first row; `indices` stay the same."""
        if rows == len(self.indices):
            return self
        index = [*range(len(self.indices)), *[0] * (rows - len(self.indices))]
        return Batch(self.input_ids[index], self.labels[index], self.lengths[index], self.indices)


def token_budget_batches(lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
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
        rows = max(1, batch_tokens // padded_width(int(sizes[order[start]])))
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
    """Pad the rows `indices` of a list of examples on the right to one batch, to a width or to the longest row.

    The padding is token 0. Any token does: attention is causal, and padding is on the right.
    """
    rows = [encoded[index] for index in indices]
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
    )


def iter_batches(encoded: Sequence[Encoded], batch_tokens: int) -> Iterator[Batch]:
    """Yield the examples that have a supervised token in length-sorted batches, longest first.

    Args:
        encoded: examples; the `indices` of a batch are positions in this list.
        batch_tokens: largest rows × padded width of a batch.
    """
    kept = [index for index, row in enumerate(encoded) if row.supervised]
    for batch in token_budget_batches([len(encoded[index].input_ids) for index in kept], batch_tokens):
        indices = [kept[position] for position in batch]
        longest = max(len(encoded[index].input_ids) for index in indices)
        yield collate(encoded, indices, width=padded_width(longest))


def example_batches(encoded: Sequence[Encoded], batch_size: int, *, batch_tokens: int | None = None) -> Iterator[Batch]:
    """Yield the examples that have a supervised token in length-sorted batches of `batch_size` examples, for training.

    Batches of long examples are smaller if `batch_tokens` limits their rows × longest row.
    """
    kept = [index for index, row in enumerate(encoded) if row.supervised]
    kept.sort(key=lambda index: -len(encoded[index].input_ids))
    start = 0
    while start < len(kept):
        size = batch_size
        if batch_tokens is not None:
            size = min(size, max(1, batch_tokens // len(encoded[kept[start]].input_ids)))
        yield collate(encoded, kept[start : start + size])
        start += size


def on_device(batches: Iterable[Batch], device: torch.device | str) -> Iterator[Batch]:
    """Yield the same batches, moved to a device one at a time."""
    for batch in batches:
        yield batch.to(device)
