"""The Ray engine gives what the local one gives, also when machines, workers or the driver are lost on the way.

Slow to start, so one cluster of three nodes serves all tests: a head that reads and two nodes with a core each. The
test that removes a node comes last.
"""

import os
import signal
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial

import numpy as np
import pytest
import ray_jobs
from jobs import job_of
from letters import Letters
from ray_jobs import COUNT, POOL, QUIET, WINDOWS, Sines, Watched, scored, wait_for

import tiny_models
from iprox.data import Pool
from iprox.engine import cluster as clusters
from iprox.engine.cluster import share_of_each
from iprox.engine.ray import PACKAGE, ray_engine
from iprox.engine.stream import local_engine
from iprox.engine.windows import Windows
from iprox.errors import InputError
from iprox.scores import score_matrix
from tiny_models import make_model

ray = pytest.importorskip("ray", reason="the ray extra is not installed")


def test_a_server_that_is_no_cluster_is_refused(monkeypatch):
    def fails(**_):
        raise ConnectionError("Failed to connect")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", fails)
    monkeypatch.setenv("RAY_ADDRESS", "there:6379")
    with pytest.raises(InputError, match="no Ray cluster answers at there:6379"), clusters.cluster():
        pass


@pytest.fixture(scope="module")
def cluster():
    from ray.cluster_utils import Cluster

    # Else Ray Data looks for Prometheus, workers wait for whatever else the machine does, and a driver that died keeps
    # its share of the cluster for three minutes.
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}
    os.environ["RAY_DATA_AUTOSCALING_REQUEST_EXPIRE_TIME_S"] = "30"
    node = {"object_store_memory": 100 << 20, "include_dashboard": False}
    made = Cluster(initialize_head=True, head_node_args={**node, "num_cpus": 0})
    made.others = [made.add_node(**node, num_cpus=1) for _ in range(2)]
    ray.init(address=made.address, **QUIET)
    for name in (tiny_models.__name__, "jobs", "letters", "ray_jobs", __name__):  # workers cannot import them
        ray.cloudpickle.register_pickle_by_value(sys.modules[name])
    yield made
    ray.shutdown()
    made.shutdown()


@contextmanager
def when_both_work(folder, act):
    """Call a function with the files of two workers when both are at work, then let them go on."""

    def watch():
        try:
            wait_for(lambda: len(list(folder.glob("*.*"))) == 2)
            act(list(folder.glob("*.*")))
        finally:
            (folder / "go").touch()

    with ThreadPoolExecutor(1) as thread:
        watching = thread.submit(watch)
        yield
        watching.result()


def assert_same(found, expected):
    """Every window once, with the same rows, scores and statistics."""
    assert sorted(number for number, _ in found) == sorted(expected) == list(range(len(expected)))
    for number, (table, stats) in found:
        assert table["id"].equals(expected[number][0]["id"])
        np.testing.assert_allclose(score_matrix(table), score_matrix(expected[number][0]), rtol=1e-5, atol=1e-7)
        assert stats == expected[number][1]


@pytest.mark.slow
@pytest.mark.timeout(300)
class TestOnACluster:
    def test_scores_of_a_model_are_those_of_this_process(self, cluster):
        """So do warnings of iprox in a worker come here; workers that there is no room for are waited for."""
        pool = Pool([{"text": "abcdefghij"[: 3 + i % 7] + "xyz"[i % 3] * (i % 5)} for i in range(13)])

        def worker(*said):
            for each in said:
                exec(compile(f"warnings.warn({each!r})", str(PACKAGE / "x.py"), "exec"), {"warnings": warnings})
            validation = {"task": Letters().encode(list(pool)[:3])}
            return job_of(make_model("qwen3"), validation, normalize="cosine").worker()

        done = []
        with pytest.warns(UserWarning, match="heard"), pytest.warns(UserWarning, match="2 of 4 workers wait for CPUs"):
            found = list(ray_engine(4, "cpu")(partial(worker, "heard"), Windows(pool, 4), done.append))
        assert_same(found, dict(local_engine(worker, Windows(pool, 4))))
        assert sum(done) == 13

    def test_a_driver_that_is_killed_resumes(self, cluster, tmp_path):
        shards = tmp_path / "scores.parquet.shards" / "checkpoint-000"
        with subprocess.Popen([sys.executable, ray_jobs.__file__, cluster.address, tmp_path]) as first:
            try:
                wait_for(lambda: len(list(shards.glob("*.parquet"))) == 6 or first.poll() is not None)
            finally:
                first.kill()
                (tmp_path / "go").touch()  # its workers end with their windows
        ready = [int(shard.stem) for shard in shards.glob("*.parquet")]
        again = []

        def noting(*given):
            for number, each in ray_engine(2, "cpu")(*given):
                again.append(number)
                yield number, each

        found = scored(tmp_path, Sines, noting)
        assert len(ready) == 6
        assert sorted(ready + again) == list(range(COUNT))
        (tmp_path / "here").mkdir()
        expected = scored(tmp_path / "here", Sines, local_engine)
        assert found["id"].equals(expected["id"])
        np.testing.assert_allclose(score_matrix(found), score_matrix(expected), rtol=1e-5)

    def test_an_error_in_a_worker_stops_the_run_as_it_is(self, cluster):
        def broken():
            raise InputError("the gradient of x is not finite")

        with pytest.raises(InputError, match=r"^the gradient of x is not finite$"):
            list(ray_engine(1, "cpu")(broken, WINDOWS))

    def test_an_error_in_reading_the_pool_stops_the_run_as_it_is(self, cluster):
        class Broken:
            def __iter__(self):
                raise InputError("row 2 is no example")

        with pytest.raises(InputError, match=r"^row 2 is no example$"):
            list(ray_engine(1, "cpu")(Sines, Windows(Broken())))

    def test_a_worker_that_is_killed_costs_its_windows_only(self, cluster, tmp_path):
        with (
            pytest.warns(UserWarning, match="windows were lost"),
            when_both_work(tmp_path, lambda marks: os.kill(int(marks[0].stem), signal.SIGKILL)),
        ):
            found = list(ray_engine(2, "cpu")(partial(Watched, tmp_path), WINDOWS))
        assert_same(found, dict(local_engine(Sines, WINDOWS)))

    def test_workers_that_all_die_are_reported(self, cluster):
        with pytest.raises(InputError, match=r"every worker or its node is gone.* the same command resumes"):
            list(ray_engine(1, "cpu")(lambda: os._exit(1), Windows(POOL, 60)))

    def test_a_node_that_is_removed_costs_its_windows_only(self, cluster, tmp_path):
        with (
            pytest.warns(UserWarning, match="windows were lost"),
            when_both_work(tmp_path, lambda _: cluster.remove_node(cluster.others[0], allow_graceful=False)),
        ):
            found = list(ray_engine(2, "cpu")(partial(Watched, tmp_path), WINDOWS))
        assert_same(found, dict(local_engine(Sines, WINDOWS)))


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
