"""Run the rows of a window through a model: length-sorted batches, halved where memory does not hold one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from iprox.data import Batch, Encoded, Example, iter_batches
from iprox.models.cpu.shapes import RELEASE_EVERY, release_memory
from iprox.models.precision import out_of_memory

T = TypeVar("T")


def fitting(make: Callable[[int], T], batch_tokens: int, least: int) -> tuple[T, int]:
    """Make something of batches that are halved until it fits in memory.

    Args:
        make: takes the largest rows × longest row of a batch.
        batch_tokens: to start with.
        least: where halving ends: the longest row.

    Returns:
        What was made, and the `batch_tokens` that fitted.
    """
    while True:
        try:
            return make(batch_tokens), batch_tokens
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory(error) or batch_tokens <= least:
                raise
        # Outside the handler: its traceback holds on to what did not fit.
        release_memory()
        batch_tokens = batch_tokens // 2


def filled_rows(rows: int, full: int) -> int:
    """Rows that a batch is filled up to: a quarter, half, three quarters or all of a full batch.

    Only the last batch of a window is not full. Without this it would be of a new shape in most windows, and what CPU
    libraries generate and keep for new shapes (`iprox.models.cpu.shapes`) would let memory grow with the pool.
    """
    quarter = max(1, full // 4)
    return max(rows, min(full, -(-rows // quarter) * quarter))


@dataclass(slots=True)
class RowRunner:
    """Gives every row of a window its numbers, batch by batch.

    Attributes:
        run: a batch of B rows -> their numbers [B, columns].
        device: where batches are to be.
        pad_id: token id of the padding.
        batch_tokens: largest rows × longest row of a batch; halved whenever a batch does not fit in memory.
        noun: what the numbers of a row are, in messages.
    """

    run: Callable[[Batch], Tensor]
    device: torch.device
    pad_id: int
    batch_tokens: int
    noun: str

    def __call__(
        self,
        window: Sequence[Example],
        encoded: Sequence[Encoded],
        out: np.ndarray,
        progress: Callable[[int], None] | None = None,
    ) -> None:
        """Fill in the rows of a window.

        Args:
            window: examples.
            encoded: their tokens.
            out: [N, columns]; rows without a supervised token are left as they are.
            progress: called with the number of rows done.

        Raises:
            FloatingPointError: a number is not finite (the example is named).
        """
        for number, batch in enumerate(iter_batches(encoded, self.batch_tokens, self.pad_id)):
            if number % RELEASE_EVERY == 0:
                release_memory()
            numbers = self._fitting(batch.to(self.device)).cpu().numpy()
            bad = ~np.isfinite(numbers).all(axis=1)
            if bad.any():
                culprit = window[batch.indices[int(bad.argmax())]]
                raise FloatingPointError(f"{culprit.origin}: the {self.noun} is not finite; try --set dtype=float32")
            out[batch.indices] = numbers
            if progress is not None:
                progress(len(batch.indices))
        empty = sum(example.supervised == 0 for example in encoded)
        if progress is not None and empty:
            progress(empty)

    def _fitting(self, batch: Batch) -> Tensor:
        """Numbers of a batch, in halves where it does not fit in memory; later batches are then smaller."""
        if len(batch.indices) == 1 or batch.input_ids.numel() <= self.batch_tokens:
            rows = filled_rows(len(batch.indices), self.batch_tokens // batch.input_ids.shape[1])
            try:
                return self.run(batch.filled(rows))[: len(batch.indices)]
            except (MemoryError, RuntimeError) as error:
                if not out_of_memory(error) or len(batch.indices) == 1:
                    raise
            release_memory()
            self.batch_tokens = max(1, self.batch_tokens // 2)
        return torch.cat([self._fitting(half) for half in batch.halves()])
