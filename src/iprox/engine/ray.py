"""An engine of Ray workers, each with the model and the validation gradients; results come back in order."""

from __future__ import annotations

import itertools
import logging
import os
import signal
import socket
import sys
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers.dynamic_module_utils import init_hf_modules

from iprox.engine.stream import Engine, ScoredWindow, Window, WindowWorker
from iprox.errors import InputError, one_line

PACKAGE = Path(__file__).parents[1]

# Seconds after which to warn about workers that have not started; other work may hold their cores or GPUs.
PATIENCE = 60
# Seconds within which a cluster must answer.
PATIENCE_FOR_CLUSTER = 10
# File in which Ray keeps the address of a cluster on this machine.
RUNNING_CLUSTER = Path("/tmp/ray/ray_current_cluster")
_NOT_INSTALLED = "ray_workers: Ray is not installed; pip install 'iprox[ray]', or leave ray_workers at 0"


class _Worker:
    """One Ray actor. It makes its worker with the first window, so that an error is reported as from that window.

    `make` is pickled bytes, as Ray itself would send it, so that it is unpickled only after its modules can be found.
    """

    def __init__(self, make: bytes, threads: int) -> None:
        torch.set_num_threads(threads)
        self.make, self.work = make, None

    def started(self) -> None:
        """Do nothing: the answer shows that the actor has its resources."""

    def score(self, window: Window) -> tuple[ScoredWindow, list[str]]:
        """Return a window's scores, and iprox's warnings."""
        from ray import cloudpickle

        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("default")
            if self.work is None:
                init_hf_modules()  # a tokenizer's own code is pickled by name, and found there
                self.work = cloudpickle.loads(self.make)()
            scored = self.work(window)
        return scored, [str(each.message) for each in heard if Path(each.filename).is_relative_to(PACKAGE)]


def check_ray(workers: int, device: str) -> None:
    """Refuse Ray if it is not installed or cannot hold the workers, before any work and without starting it.

    The resources of a running cluster are left to `ray_engine`, as only Ray knows them; here it must only answer.

    Args:
        workers: number of actors.
        device: device of each actor, `cpu` or `cuda`.

    Raises:
        InputError: Ray is missing, too small, or cannot be reached.
    """
    if find_spec("ray") is None:
        raise InputError(_NOT_INSTALLED)
    if "ray" in sys.modules and _is_running():
        return
    if address := os.environ.get("RAY_ADDRESS"):
        return _check_reachable(address, "RAY_ADDRESS")
    if RUNNING_CLUSTER.is_file():
        return _check_reachable(RUNNING_CLUSTER.read_text(encoding="utf-8").strip(), str(RUNNING_CLUSTER))
    cuda = device.startswith("cuda")
    there = torch.cuda.device_count() if cuda else os.cpu_count() or 1
    if workers > there:
        raise InputError(_too_many(workers, there, "GPU" if cuda else "CPU"))


def _check_reachable(address: str, named_in: str) -> None:
    """Refuse an address at which nothing listens, where Ray itself would wait for minutes.

    Raises:
        InputError: there is no answer within `PATIENCE_FOR_CLUSTER` seconds.
    """
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if address in ("auto", "local"):
        return
    try:
        socket.create_connection((host, int(port)), timeout=PATIENCE_FOR_CLUSTER).close()
    except (OSError, ValueError, OverflowError) as error:
        raise InputError(
            f"ray_workers: no Ray cluster answers at {address} (from {named_in}: {one_line(error)}); start it, correct "
            "the address (HOST:PORT), or remove it to use this machine"
        ) from error


def _is_running() -> bool:
    import ray

    return bool(ray.is_initialized())


def _too_many(workers: int, there: float, need: str) -> str:
    return f"ray_workers: {workers} workers requested, but Ray has {there:.0f} {need}s; set ray_workers lower"


def ray_engine(workers: int, device: str) -> Engine:
    """Return an engine of `workers` Ray actors, on the cluster that Ray finds or else on this machine.

    Each actor requests one GPU on a GPU, else an equal share of the cores. At most two windows per actor are in
    progress, so the pool is read no faster than it is scored.

    Args:
        workers: number of actors.
        device: device of each actor, `cpu` or `cuda`.

    Raises:
        InputError: Ray is not installed, or the cluster cannot hold that many actors.
    """
    try:
        import ray
        from ray import cloudpickle
    except ImportError as error:
        raise InputError(_NOT_INSTALLED) from error

    def result(pending: Any, progress: Callable[[int], None] | None) -> ScoredWindow:
        try:
            scored, heard = ray.get(pending)
        except ray.exceptions.RayTaskError as error:  # pyright: ignore[reportAttributeAccessIssue]
            raise error.cause from error  # the error itself, as in this process
        except ray.exceptions.RayError as error:  # pyright: ignore[reportAttributeAccessIssue]
            raise InputError(
                f"ray_workers: a worker or its node is gone ({one_line(error)}); the same command resumes from here"
            ) from error
        for message in heard:
            warnings.warn(message, stacklevel=2)
        if progress is not None:
            progress(scored[1].rows)
        return scored

    def engine(
        make: Callable[[], WindowWorker], windows: Iterator[Window], progress: Callable[[int], None] | None = None
    ) -> Iterator[ScoredWindow]:
        begun = not ray.is_initialized()
        if begun:
            handler = signal.getsignal(signal.SIGTERM)
            ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, handler)  # Ray's own ends the process
        try:
            need = "GPU" if device.startswith("cuda") else "CPU"
            nodes = [node["Resources"].get(need, 0) for node in ray.nodes() if node["Alive"]]
            share = share_of_each(nodes, workers)
            if share == 0:
                raise InputError(_too_many(workers, sum(nodes), need))
            options: dict[str, Any] = {"num_gpus": 1} if need == "GPU" else {"num_cpus": share}
            actor = ray.remote(**options)(_Worker)
            made = ray.put(cloudpickle.dumps(make))  # pyright: ignore[reportPrivateImportUsage]
            actors = [actor.remote(made, 1 if need == "GPU" else share) for _ in range(workers)]
            late = ray.wait([each.started.remote() for each in actors], num_returns=workers, timeout=PATIENCE)[1]
            if late:
                warnings.warn(
                    f"ray_workers: {len(late)} of {workers} workers are waiting for {need}s held by other work",
                    stacklevel=2,
                )
            # Round robin keeps the order: the oldest window in progress is always the next result.
            turn = itertools.cycle(actors)
            pending: deque[Any] = deque()
            for window in windows:
                pending.append(next(turn).score.remote(window))
                if len(pending) >= 2 * workers:
                    yield result(pending.popleft(), progress)
            while pending:
                yield result(pending.popleft(), progress)
            for each in actors:
                ray.kill(each)  # pyright: ignore[reportArgumentType]
        finally:
            if begun:
                ray.shutdown()

    return engine


def share_of_each(nodes: Sequence[float], workers: int) -> int:
    """Return the most cores (or GPUs) that every worker can have on one node; 0 if there are too few for one each.

    Args:
        nodes: number of cores of each node.
        workers: number of workers to place.
    """
    most = int(max(nodes, default=0))
    return next((share for share in range(most, 0, -1) if sum(int(n) // share for n in nodes) >= workers), 0)
