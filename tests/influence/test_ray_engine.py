"""The Ray engine gives what the local one gives. Slow to start, so one cluster serves all tests."""

import functools
import logging
import os
import sys
import warnings

import pytest

from iprox.data import Pool
from iprox.engine.ray import PACKAGE, ray_engine, share_of_each
from iprox.engine.stream import ScoringStats, local_engine, windows_of
from iprox.errors import InputError
from iprox.scores import scores_table

ray = pytest.importorskip("ray", reason="the ray extra is not installed")


@pytest.fixture(scope="module", autouse=True)
def cluster():
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    yield
    ray.shutdown()


class LengthScorer:
    """Stands in for a WindowWorker: a model is not needed to see that windows come back whole and in order."""

    def __call__(self, window, progress=None):
        import numpy as np

        scores = np.array([[float(len(example.text))] for example in window])
        if progress is not None:
            progress(len(window))
        table = scores_table([example.id for example in window], [None] * len(window), [1] * len(window), scores, ["t"])
        return table, ScoringStats(rows=len(window))


def make(scorer=LengthScorer):
    return scorer()


def test_windows_come_back_whole_and_in_order():
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    pool = Pool([{"text": "x" * (1 + i % 7)} for i in range(53)])
    done = []
    spread = list(ray_engine(2, "cpu")(make, windows_of(pool, 4), done.append))
    here = list(local_engine(make, windows_of(pool, 4)))
    assert len(spread) == len(here) == 14
    for (table, stats), (expected, counted) in zip(spread, here, strict=True):
        assert table.equals(expected)
        assert stats == counted
    assert sum(done) == 53


def test_a_worker_that_fails_stops_the_run_with_its_own_error():
    def broken():
        raise InputError("the gradient of x is not finite")

    with pytest.raises(InputError, match=r"^the gradient of x is not finite$"):
        list(ray_engine(1, "cpu")(functools.partial(broken), windows_of(Pool([{"text": "a"}]), 4)))


def test_a_worker_that_dies_is_no_fault_of_iprox():
    def dying():
        os._exit(1)

    with pytest.raises(InputError, match=r"ray_workers: a worker or its node is gone .* the same command resumes"):
        list(ray_engine(1, "cpu")(dying, windows_of(Pool([{"text": "a"}]), 4)))


def test_what_iprox_warns_of_in_a_worker_is_heard_here():
    def warning():
        exec(compile("warnings.warn('said')", str(PACKAGE / "x.py"), "exec"), {"warnings": warnings})
        return LengthScorer()

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    with pytest.warns(UserWarning, match="said"):
        list(ray_engine(1, "cpu")(warning, windows_of(Pool([{"text": "a"}]), 4)))


@pytest.mark.parametrize(
    ("nodes", "workers", "share"),
    [
        ([8], 2, 4),
        ([5], 2, 2),
        ([2, 2, 2], 2, 2),  # not three of the six, which no node has
        ([4, 4, 4], 4, 2),
        ([2, 2, 2], 5, 1),
        ([1, 7], 3, 2),
        ([2], 3, 0),
        ([], 1, 0),
    ],
)
def test_every_worker_has_its_cores_on_one_node(nodes, workers, share):
    assert share_of_each(nodes, workers) == share


def test_more_workers_than_there_is_room_for_are_refused():
    with pytest.raises(InputError, match="64 workers requested"):
        list(ray_engine(64, "cpu")(make, windows_of(Pool([{"text": "a"}]), 4)))
