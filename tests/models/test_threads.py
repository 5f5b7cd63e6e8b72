"""How many threads a command takes, and how they wait."""

import os

import pytest
import torch

from iprox.cli import main
from iprox.models.cpu import threads


@pytest.fixture
def taken(monkeypatch, tmp_path):
    """Return how many threads are taken of eight, under a limit of the container."""

    def call(limit, variable=None):
        (tmp_path / "cpu.max").write_text(limit)
        monkeypatch.setattr(threads, "QUOTA", tmp_path / "cpu.max")
        monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
        set_to = []
        monkeypatch.setattr(torch, "set_num_threads", set_to.append)
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        if variable is not None:
            monkeypatch.setenv("OMP_NUM_THREADS", variable)
        threads.limit_threads()
        return set_to

    return call


def test_a_container_gets_no_more_threads_than_it_has_cores(taken):
    assert taken("250000 100000") == [3]
    assert taken("max 100000") == []
    assert taken("1600000 100000") == []
    assert taken("nonsense") == []
    assert taken("250000 100000", variable="6") == []


@pytest.mark.parametrize(
    ("own", "spins"), [({}, "1000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "ACTIVE"}, None)]
)
def test_threads_spin_briefly_unless_the_user_says_otherwise(monkeypatch, capsys, own, spins):
    environment = {key: value for key, value in os.environ.items() if key not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    monkeypatch.setattr(os, "environ", {**environment, **own})
    assert main(["--version"]) == 0
    assert os.environ.get("GOMP_SPINCOUNT") == spins
