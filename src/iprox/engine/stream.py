"""Stream a pool through a scorer window by window, so that memory does not grow with the pool."""

from __future__ import annotations

import functools
import itertools
import multiprocessing
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from operator import itemgetter
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import pyarrow as pa
import torch
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedModel

from iprox.checked import load_checked, save_checked
from iprox.data import Batch, ChatEncoder, Encoded, Example, iter_batches
from iprox.engine.windows import Engine, ScoredWindow, ScoringStats, Window, Windows
from iprox.errors import one_line
from iprox.models.compiled import compile_layers, uncompile_layers, why_compiling_failed, why_not_compiled
from iprox.models.cpu.shapes import RELEASE_EVERY, release_memory
from iprox.models.precision import out_of_memory
from iprox.records import key_of

# Most seconds between two times that the numbers of a window in progress are kept.
KEEP_EVERY = 60.0

T = TypeVar("T")


class RowFunction(Protocol):
    """A function from a batch to numbers per row: a scorer, or the projector of an index.

    Attributes:
        noun: name of the numbers in messages.
        dtype: NumPy dtype that they are collected in.
        columns: number of them per row.
        device: device that batches must be on.
    """

    noun: str
    dtype: Any

    @property
    def columns(self) -> int: ...  # noqa: D102

    @property
    def device(self) -> torch.device: ...  # noqa: D102

    def __call__(self, batch: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the numbers [B, columns] of a batch, and losses [B] if there are any."""
        ...

    def count(self, stats: ScoringStats, lengths: Sequence[int]) -> None:
        """Record the work done for rows of some lengths."""
        ...

    def table(self, window: Sequence[Example], encoded: Sequence[Encoded], numbers: np.ndarray) -> pa.Table:
        """Return a table of the examples from their numbers [N, columns], NaN without a supervised token."""
        ...


class WindowWorker:
    """Processes windows of examples in length-sorted batches.

    Args:
        rows: function that gives each row its numbers.
        encoder: encoder that makes tokens and labels.
        batch_tokens: largest batch size, rows × longest row; halved whenever a batch does not fit in memory.
        uncompiled: why the model does not run compiled although the settings ask for it.

    Attributes:
        kept: folder in which the numbers of the window in progress are kept every `KEEP_EVERY` seconds, so that a
            window that takes longer resumes too; None keeps nothing.
    """

    def __init__(self, rows: RowFunction, encoder: ChatEncoder, batch_tokens: int, uncompiled: str = "") -> None:
        self.rows, self.encoder, self.batch_tokens, self.uncompiled = rows, encoder, batch_tokens, uncompiled
        self.kept: Path | None = None

    def __call__(
        self, window: Window, progress: Callable[[int], None] | None = None, encoded: list[Encoded] | None = None
    ) -> ScoredWindow:
        """Return a table with one row per example, in order, and its statistics.

        Args:
            window: examples.
            progress: called with the number of rows done. A part of a window counts by its tokens, as the longest rows
                come first, so that the rate is that of the pool.
            encoded: encoded examples, if they are ready.

        Raises:
            FloatingPointError: a number is not finite (the message names the example).
        """
        encoded = self.encoder.encode(window) if encoded is None else encoded
        numbers = np.full((len(encoded), self.rows.columns), np.nan, self.rows.dtype)
        file, known = self._kept(window, numbers)
        work = np.array([row.tokens if row.supervised else 0 for row in encoded], np.float64)
        told, saved = 0, time.monotonic()
        for number, batch in enumerate(iter_batches(encoded, self.batch_tokens)):
            if number % RELEASE_EVERY == 0:
                release_memory()
            waiting = [] if known[batch.indices].all() else [batch.to(self.rows.device)]
            while waiting:
                part = waiting.pop()
                rows = len(part.indices)
                fits = rows == 1 or part.input_ids.numel() <= self.batch_tokens  # which may be smaller by now
                if fits:
                    full = self.batch_tokens // (part.rows_each * part.input_ids.shape[1])
                    filled = part.filled(filled_rows(rows, full))
                    try:
                        numbers[part.indices] = self.rows(filled)[0][:rows].cpu().numpy()
                    except (MemoryError, RuntimeError) as error:
                        if not out_of_memory(error) or rows == 1:
                            raise
                        fits, self.batch_tokens = False, max(1, self.batch_tokens // 2)
                if not fits:  # outside the handler, whose traceback keeps the tensors alive
                    release_memory()
                    waiting += reversed(part.halves())
                else:
                    known[part.indices] = True
                    if file is not None and time.monotonic() - saved >= KEEP_EVERY:
                        saved = time.monotonic()
                        save_checked({"numbers": torch.from_numpy(numbers), "known": torch.from_numpy(known)}, file)
                    done = int(len(encoded) * work[known].sum() / work.sum())
                    if progress is not None and done > told:
                        progress(done - told)
                        told = done
        if progress is not None and told < len(encoded):
            progress(len(encoded) - told)
        return self._described(window, encoded, numbers)

    def _kept(self, window: Window, numbers: np.ndarray) -> tuple[Path | None, np.ndarray]:
        """Fill in the numbers of a window that an interrupted start has kept.

        Returns:
            The file to keep numbers in, and which rows are known, bool [N].
        """
        known = np.zeros(len(numbers), np.bool_)
        if self.kept is None or not self.kept.is_dir():  # a worker on another machine
            return None, known
        file = self.kept / f"{key_of([window[0].origin, window[-1].origin, len(window)])}.safetensors"
        if file.is_file():
            try:
                tensors, _ = load_checked(file)
            except (SafetensorError, OSError) as error:
                warnings.warn(f"{file}: is damaged ({one_line(error)}); its rows are scored again", stacklevel=2)
            else:
                numbers[:], known[:] = tensors["numbers"].numpy(), tensors["known"].numpy()
        return file, known

    def _described(self, window: Window, encoded: Sequence[Encoded], numbers: np.ndarray) -> ScoredWindow:
        """Return the table and the statistics of a window from its numbers [N, columns]."""
        finite = np.asarray(np.isfinite(numbers).all(axis=1))
        for example, row, good in zip(window, encoded, finite, strict=True):
            if row.supervised and not good:
                raise FloatingPointError(
                    f"{example.origin}: the {self.rows.noun} is not finite; try --set dtype=float32"
                )
        stats = ScoringStats.of(encoded)
        self.rows.count(stats, [row.tokens for row in encoded if row.supervised])
        stats.uncompiled, stats.batch_tokens = self.uncompiled, self.batch_tokens
        return self.rows.table(window, encoded, numbers), stats


def filled_rows(rows: int, full: int) -> int:
    """Return the number of rows that a batch is padded to: a quarter, half, three quarters or all of a full batch.

    Only the last batch of a window is not full. Otherwise it would have a new shape in most windows, and memory would
    grow with the code that CPU libraries cache per shape (`iprox.models.cpu.shapes`).
    """
    quarter = max(1, full // 4)
    return max(rows, min(full, -(-rows // quarter) * quarter))


def fitting(make: Callable[[int], T], batch_tokens: int, least: int) -> tuple[T, int]:
    """Call a function with a batch size that is halved until it does not run out of memory.

    Args:
        make: function of the largest batch size, rows × longest row.
        batch_tokens: batch size to start with.
        least: smallest batch size: the longest row.

    Returns:
        The function's result, and the `batch_tokens` that fit.
    """
    while True:
        try:
            return make(batch_tokens), batch_tokens
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory(error) or batch_tokens <= least:
                raise
        release_memory()  # outside the handler, whose traceback keeps the tensors alive
        batch_tokens = batch_tokens // 2


def compile_model(model: nn.Module | None, run: Callable[[Batch], object], trial: Batch) -> str:
    """Compile a model in place.

    Args:
        model: model to compile, if any.
        run: function that runs the model on a batch.
        trial: batch to test the compiled model with.

    Returns:
        Why the model cannot be compiled, in which case it is left unchanged; otherwise an empty string.
    """
    if model is None:
        return ""
    reason = why_not_compiled(model)
    if reason is not None:
        return reason
    assert isinstance(model, PreTrainedModel)
    compile_layers(model)
    if failed := why_compiling_failed(lambda: run(trial)):
        uncompile_layers(model)
    return failed


def local_engine(
    make: Callable[[], WindowWorker], windows: Windows, progress: Callable[[int], None] | None = None
) -> Iterator[tuple[int, ScoredWindow]]:
    """Process windows in this process, one after the other."""
    # Maps rather than a loop, so that a reader who follows a row to its score passes one function fewer.
    numbers, contents = itertools.tee(windows)
    work = functools.partial(make(), progress=progress)
    return zip(map(itemgetter(0), numbers), map(work, map(itemgetter(1), contents)), strict=True)


_encoder: ChatEncoder | None = None


def prefetching_engine(processes: int) -> Engine:
    """Return an engine that scores in this process while others tokenize; chat templates hold Python's GIL.

    The results are those of `local_engine`. At most one window per process and one more are tokenized ahead, so memory
    does not grow with the pool.

    Args:
        processes: number of processes that tokenize.
    """

    def engine(
        make: Callable[[], WindowWorker], windows: Windows, progress: Callable[[int], None] | None = None
    ) -> Iterator[tuple[int, ScoredWindow]]:
        work, unread = make(), iter(windows)
        # Forking a process with threads or a GPU may hang.
        spawned = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(processes, spawned, initializer=_hold, initargs=(work.encoder,)) as pool:
            ahead: deque[tuple[int, Window, Future[list[Encoded]]]] = deque()

            def fill() -> None:
                for number, window in itertools.islice(unread, processes + 1 - len(ahead)):
                    ahead.append((number, window, pool.submit(_encode, window)))

            try:
                fill()
                while ahead:
                    number, window, encoded = ahead.popleft()
                    rows = encoded.result()
                    fill()
                    yield number, work(window, progress, rows)
            finally:
                for *_, encoded in ahead:
                    encoded.cancel()

    return engine


def _hold(encoder: ChatEncoder) -> None:
    """Keep the encoder of a tokenizing process, so that it is sent only once."""
    global _encoder
    _encoder = encoder


def _encode(window: Window) -> list[Encoded]:
    assert _encoder is not None
    return _encoder.encode(window)
