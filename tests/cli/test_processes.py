"""Two processes, as a launcher starts them, train and align as one does, to rounding, and say so in `run.json`."""

import json
import socket
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from programs import limited

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


def losses(output):
    warmed = json.loads((output / "warmup/history.json").read_text())
    aligned = json.loads((output / "aligned/alignment.json").read_text())["steps"]
    return [[step["loss"] for step in steps] for steps in (warmed, aligned)]


def test_a_run_by_two_processes_has_the_losses_of_one(place):
    plain = ["--set", "dtype=float32", "device=cpu", "proxy={sparsity: 0.5}", "audit=false", "--stop-after", "align"]
    assert place.run(*plain) == 0
    alone = losses(place.output)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    run = [sys.executable, "-m", "iprox.cli", "run", place.recipe, "--quiet", "--fresh", *plain]
    with ThreadPoolExecutor(2) as both:
        started = [both.submit(limited, run, 200, RANK=rank, LOCAL_RANK=rank, **group) for rank in "01"]
    for each in started:
        each.result()
    for found, expected in zip(losses(place.output), alone, strict=True):
        # The divergences of the alignment are 2e-5, which float32 knows to 1e-8.
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-7)
    assert place.record()["stages"]["warmup"]["processes"] == 2
