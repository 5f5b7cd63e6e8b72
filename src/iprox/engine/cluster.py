"""The Ray cluster that scores: whether it is there, and the use of it."""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from iprox.errors import InputError, one_line

# Seconds within which a cluster must answer.
PATIENCE = 10
# File in which Ray keeps the address of a cluster on this machine.
RUNNING_CLUSTER = Path("/tmp/ray/ray_current_cluster")
NOT_INSTALLED = "ray_workers: Ray is not installed; pip install 'iprox[ray]', or leave ray_workers at 0"


def check_ray(workers: int, device: str) -> None:
    """Refuse Ray if it is not installed or cannot hold the workers, before any work and without starting it.

    A running cluster must answer. It may grow, so `ray_engine` only warns of the workers that wait for it.

    Args:
        workers: number of actors.
        device: device of each actor, `cpu` or `cuda`.

    Raises:
        InputError: Ray is missing, too small, or cannot be reached.
    """
    if find_spec("ray") is None:
        raise InputError(NOT_INSTALLED)
    if "ray" in sys.modules and _is_running():
        return
    if address := os.environ.get("RAY_ADDRESS"):
        return _check_reachable(address, "RAY_ADDRESS")
    if RUNNING_CLUSTER.is_file():
        return _check_reachable(RUNNING_CLUSTER.read_text(encoding="utf-8").strip(), str(RUNNING_CLUSTER))
    need = need_of(device)
    there = _gpus() if need == "GPU" else os.cpu_count() or 1
    if workers > there:
        raise InputError(
            f"ray_workers: {workers} workers requested, but this machine has {there} {need}s; set ray_workers lower"
        )


def _check_reachable(address: str, named_in: str) -> None:
    """Refuse an address at which nothing listens, where Ray itself would wait for minutes.

    Raises:
        InputError: there is no answer within `PATIENCE` seconds.
    """
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if address in ("auto", "local"):
        return
    try:
        socket.create_connection((host, int(port)), timeout=PATIENCE).close()
    except (OSError, ValueError, OverflowError) as error:
        raise no_answer(address, f"from {named_in}", error) from error


def no_answer(address: str, what: str, error: Exception) -> InputError:
    """Return the refusal of an address where there is no cluster."""
    return InputError(
        f"ray_workers: no Ray cluster answers at {address} ({what}: {one_line(error)}); start it, correct the address "
        "(HOST:PORT), or remove it to use this machine"
    )


def _is_running() -> bool:
    import ray

    return bool(ray.is_initialized())


def _gpus() -> int:
    import torch

    return torch.cuda.device_count()


def need_of(device: str) -> str:
    """Return the resource that an actor on a device requests."""
    return "GPU" if device.startswith("cuda") else "CPU"


@contextmanager
def cluster() -> Iterator[None]:
    """Use the cluster that Ray is connected to or finds, else start one on this machine and stop it afterwards."""
    import ray

    begun = not ray.is_initialized()
    if begun:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Ray would send statistics of the run to its makers
        handler = signal.getsignal(signal.SIGTERM)
        try:
            ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
        except ConnectionError as error:  # something listens there, but it is no cluster
            raise no_answer(os.environ.get("RAY_ADDRESS") or str(RUNNING_CLUSTER), "Ray", error) from error
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)  # Ray's own ends the process
    # Ray Data tells of every lost window with a traceback; all of it is in its own log too.
    consoles = [each for each in logging.getLogger("ray.data").handlers if isinstance(each, logging.StreamHandler)]
    levels = [each.level for each in consoles]
    for each in consoles:
        each.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for each, level in zip(consoles, levels, strict=True):
            each.setLevel(level)
        if begun:
            ray.shutdown()


def share_of_each(nodes: Sequence[float], workers: int) -> int:
    """Return the most cores (or GPUs) that every worker can have on one node; 0 if there are too few for one each.

    Args:
        nodes: number of cores of each node.
        workers: number of workers to place.
    """
    most = int(max(nodes, default=0))
    return next((share for share in range(most, 0, -1) if sum(int(n) // share for n in nodes) >= workers), 0)
