"""Score windows on Ray workers: each holds the model and the validation gradients, results come back in order."""

from __future__ import annotations

import itertools
import logging
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import torch

from iprox.errors import InputError
from iprox.influence.windows import Engine, ScoredWindow, Window, WindowWorker


class _Worker:
    """One Ray actor: makes its own worker once."""

    def __init__(self, make: Callable[[], WindowWorker], threads: int) -> None:
        torch.set_num_threads(threads)
        self.work = make()

    def score(self, window: Window) -> ScoredWindow:
        return self.work(window)


def ray_engine(workers: int, device: str) -> Engine:
    """An engine of `workers` Ray actors, on the cluster that Ray finds or else on this machine.

    Each actor asks for one GPU if the device is one, else for an equal share of the machine's cores. At most two
    windows an actor are under way, so the pool is read no faster than it is scored.

    Args:
        workers: number of actors.
        device: what each scores on, `cpu` or `cuda`.

    Raises:
        InputError: Ray is not installed, or the cluster cannot hold that many actors.
    """
    try:
        import ray
    except ImportError as error:
        raise InputError("engine ray: Ray is not installed; pip install 'iprox[ray]', or use engine: local") from error

    def engine(
        make: Callable[[], WindowWorker], windows: Iterator[Window], progress: Callable[[int], None] | None = None
    ) -> Iterator[ScoredWindow]:
        started = not ray.is_initialized()
        if started:
            ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
        try:
            resources = ray.cluster_resources()
            need = "GPU" if device.startswith("cuda") else "CPU"
            if workers > resources.get(need, 0):
                raise InputError(
                    f"engine ray: {workers} workers asked for, but Ray has {resources.get(need, 0):.0f} {need}s"
                )
            share = 1 if need == "GPU" else int(resources["CPU"] // workers)
            options: dict[str, Any] = {"num_gpus": 1} if need == "GPU" else {"num_cpus": share}
            actor = ray.remote(**options)(_Worker)
            shared = ray.put(make)
            actors = [actor.remote(shared, share) for _ in range(workers)]
            # Round robin keeps the order: the oldest window under way is always the next result.
            turn = itertools.cycle(actors)
            pending: deque[Any] = deque()
            for window in windows:
                pending.append(next(turn).score.remote(window))
                if len(pending) >= 2 * workers:
                    yield _result(ray.get(pending.popleft()), progress)
            while pending:
                yield _result(ray.get(pending.popleft()), progress)
            for each in actors:
                ray.kill(each)  # pyright: ignore[reportArgumentType]
        finally:
            if started:
                ray.shutdown()

    return engine


def _result(scored: ScoredWindow, progress: Callable[[int], None] | None) -> ScoredWindow:
    if progress is not None:
        progress(scored[1].rows)
    return scored
