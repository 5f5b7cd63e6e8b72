"""Share the cores of a CPU with other programs: threads spin briefly, and a container keeps its limit."""

from __future__ import annotations

import math
import os
from pathlib import Path

# The cores that a container may use, as "QUOTA PERIOD" in microseconds, or "max PERIOD".
QUOTA = Path("/sys/fs/cgroup/cpu.max")


# How often a waiting thread of GNU's OpenMP looks for work before it sleeps: a few microseconds. Its default is some
# hundred times as long, and never to look costs as much on a free machine (`benchmarks/threads.py`).
SPINS = 1000


def spin_briefly() -> None:
    """Let OpenMP's threads sleep soon when they wait for work; to be called before torch is imported.

    On a machine with other busy programs, threads that spin take the cores from the threads that they wait for.
    Settings of the user's own stay.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", str(SPINS))


def limit_threads() -> None:
    """Use no more threads than the container has cores, of which torch counts those of the machine."""
    import torch

    try:
        quota, period = QUOTA.read_text(encoding="ascii").split()
        cores = math.ceil(int(quota) / int(period))
    except (OSError, ValueError):
        return  # no limit, or another system
    if "OMP_NUM_THREADS" not in os.environ and 0 < cores < torch.get_num_threads():
        torch.set_num_threads(cores)
