"""Tokenize ahead of the model, in processes of their own: rendering templates holds Python's lock."""

from __future__ import annotations

import itertools
import multiprocessing
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor

from iprox.data import ChatEncoder, Encoded
from iprox.influence.windows import Engine, ScoredWindow, Window, WindowWorker

_encoder: ChatEncoder | None = None


def prefetching_engine(processes: int) -> Engine:
    """An engine that works in this process, on windows that others have tokenized.

    Results are those of `local_engine`. At most one window a process, and one more, is ahead of the model, so memory
    does not grow with the pool.

    Args:
        processes: how many tokenize.
    """

    def engine(
        make: Callable[[], WindowWorker], windows: Iterator[Window], progress: Callable[[int], None] | None = None
    ) -> Iterator[ScoredWindow]:
        work = make()
        # Not forked: a fork of a process with threads, or with a GPU, may hang.
        spawned = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(processes, spawned, initializer=_hold, initargs=(work.encoder,)) as pool:
            ahead: deque[tuple[Window, Future[list[Encoded]]]] = deque()

            def fill() -> None:
                for window in itertools.islice(windows, processes + 1 - len(ahead)):
                    ahead.append((window, pool.submit(_encode, window)))

            try:
                fill()
                while ahead:
                    window, encoded = ahead.popleft()
                    rows = encoded.result()
                    fill()
                    yield work(window, progress, rows)
            finally:
                for _, encoded in ahead:
                    encoded.cancel()

    return engine


def _hold(encoder: ChatEncoder) -> None:
    """Keep a process's encoder, so that it is sent once."""
    global _encoder
    _encoder = encoder


def _encode(window: Window) -> list[Encoded]:
    assert _encoder is not None
    return _encoder.encode(window)
