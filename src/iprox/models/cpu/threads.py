"""Share the cores of a CPU with other programs: threads wait without spinning, and a container keeps its limit."""

from __future__ import annotations

import math
import os
from pathlib import Path

# The cores that a container may use, as "QUOTA PERIOD" in microseconds, or "max PERIOD".
QUOTA = Path("/sys/fs/cgroup/cpu.max")


def wait_without_spinning() -> None:
    """Make OpenMP's threads sleep while they wait for work; to be called before torch is imported.

    By default they spin for a while, and on a machine with other busy programs they take the cores from the threads
    that they wait for. Settings of the user's own stay.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("KMP_BLOCKTIME", "0")  # Intel's library, which does not read the other


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
