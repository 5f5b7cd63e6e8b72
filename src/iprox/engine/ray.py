"""An engine on Ray Data: windows stream through a pool of actors, each with the model and the validation gradients.

One task on this machine reads the pool, so that its files need to be here only, and Ray holds it back when the actors
have enough to do. A window that is lost with its actor or machine is processed again by the others.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from iprox.engine.cluster import NOT_INSTALLED, cluster, need_of, share_of_each
from iprox.engine.windows import Engine, ScoredWindow, Windows
from iprox.errors import InputError, one_line

if TYPE_CHECKING:
    from iprox.engine.stream import WindowWorker

PACKAGE = Path(__file__).parents[1]
# Number of the row that ends a pass over the pool, with the number of its windows, or with the error that ended it.
_END = -1


def ray_engine(workers: int, device: str) -> Engine:
    """Return an engine of up to `workers` Ray actors, on the cluster that Ray finds or else on this machine.

    Each actor requests one GPU on a GPU, else an equal share of the cores. Ray starts as many as there is room for, and
    more when machines join; it restarts those that die. At most two windows per actor are in progress.

    Args:
        workers: largest number of actors.
        device: device of each actor, `cpu` or `cuda`.

    Raises:
        InputError: Ray is not installed; or, when windows are processed, every worker dies or the cluster is lost.
    """
    try:
        import ray
        import ray.data
        from ray import cloudpickle
    except ImportError as error:
        raise InputError(NOT_INSTALLED) from error

    def engine(
        make: Callable[[], WindowWorker], windows: Windows, progress: Callable[[int], None] | None = None
    ) -> Iterator[tuple[int, ScoredWindow]]:
        done: set[int] = set()
        total, need = None, need_of(device)
        with cluster():
            made = ray.put(cloudpickle.dumps(make))  # pyright: ignore[reportPrivateImportUsage]
            if (room := _room(workers, need)[0]) < workers:
                warnings.warn(
                    f"ray_workers: {workers - room} of {workers} workers wait for {need}s, which Ray's machines lack",
                    stacklevel=2,
                )
            while len(done) != total:
                before = len(done)
                left = replace(windows, leave_out={*windows.leave_out, *done})
                most = workers if total is None else min(workers, total - before)
                # What an error leaves is closed at once, so that its actors hold no cores.
                with closing(_pass(left, made, most, _room(workers, need)[1], need)) as results:
                    for number, content in results:
                        if isinstance(content, Exception):
                            raise content
                        if number == _END:
                            total = before + content
                            continue
                        scored, heard = content
                        for message in heard:
                            warnings.warn(message, stacklevel=2)
                        if progress is not None:
                            progress(scored[1].rows)
                        done.add(number)
                        yield number, scored
                if len(done) == before != total:
                    raise InputError(
                        "ray_workers: every worker or its node is gone, and none has processed another window (see "
                        "Ray's logs); the same command resumes from here"
                    )
                if len(done) != total:
                    warnings.warn(
                        "windows were lost with Ray workers that died; they are processed again", stacklevel=2
                    )

    return engine


def _room(workers: int, need: str) -> tuple[int, int]:
    """Return how many actors the machines that are there have room for, and the cores or GPUs of each actor."""
    import ray

    nodes = [node["Resources"].get(need, 0) for node in ray.nodes() if node["Alive"]]
    share = max(1, share_of_each(nodes, workers)) if need == "CPU" else 1
    return sum(int(node) // share for node in nodes), share


def _pass(windows: Windows, made: Any, workers: int, share: int, need: str) -> Generator[tuple[int, Any], None, None]:
    """Stream windows through an actor pool; yield their numbers with what came of them, then the end.

    What dies with its actor or machine is missing.

    Args:
        windows: windows to process.
        made: reference of the pickled function that makes a worker.
        workers: largest number of actors.
        share: cores or GPUs of each actor.
        need: which of the two, `CPU` or `GPU`.
    """
    import ray
    from ray.data import ActorPoolStrategy, read_datasource
    from ray.exceptions import ObjectLostError, RayError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    resources: dict[str, Any] = {"num_cpus": share} if need == "CPU" else {"num_cpus": 0, "num_gpus": share}
    data = read_datasource(
        _source(windows),
        override_num_blocks=1,
        num_cpus=0,  # else a cluster of as many cores as actors would have none to read with
        scheduling_strategy=NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False),
    ).map_batches(
        _Worker,
        batch_size=1,
        batch_format="pyarrow",
        zero_copy_batch=True,
        fn_constructor_args=(made,),
        compute=ActorPoolStrategy(min_size=1, max_size=workers, initial_size=workers, max_tasks_in_flight_per_actor=2),
        **resources,
        max_restarts=-1,
        max_task_retries=0,
    )
    data.context.enable_progress_bars = data.context.print_on_execution_start = False
    data.context.target_max_block_size = 1  # one window per block, so that each goes to the next free actor
    # Ray would wait for a lost machine to come back. Here its windows go to the others instead, in the next pass.
    data.context.max_errored_blocks = -1
    data.context.execution_no_progress_timeout_s = -1  # a window may take long, as may waiting for a GPU
    try:
        batch: Any
        # Prefetching would hold each window back until the next one is there.
        for batch in data.iter_batches(prefetch_batches=0, batch_size=None, batch_format="pyarrow"):
            for place in range(batch.num_rows):
                yield _content(batch.slice(place, 1))
    except ObjectLostError:  # scores on a machine that went away before they were fetched
        return
    except RayError as error:
        raise InputError(f"ray_workers: Ray failed ({one_line(error)}); the same command resumes from here") from error


def _source(windows: Windows) -> Any:
    """Return a source of Ray Data: one task that yields a row per window, and the end."""
    from ray.data import Datasource, ReadTask
    from ray.data.block import BlockMetadata

    def read() -> Iterator[pa.Table]:
        count = 0
        try:
            for number, window in windows:
                yield _row(number, window)
                count += 1
            yield _row(_END, count)
        except Exception as error:
            yield _row(_END, error)

    class Source(Datasource):
        def get_read_tasks(self, parallelism: int, *_: Any, **__: Any) -> list[ReadTask]:
            return [ReadTask(read, BlockMetadata(None, None, None, None))]

        def estimate_inmemory_data_size(self) -> None:
            return None

    return Source()


class _Worker:
    """One actor, with as many threads as it has cores, which Ray sees to if torch is not imported yet.

    It makes its worker with the first window, so that an error is reported as from that window. `make` is pickled
    bytes, as Ray itself would send them, so that they are unpickled only after their modules can be found.
    """

    def __init__(self, make: Any) -> None:
        self.make, self.work = make, None

    def __call__(self, row: pa.Table) -> pa.Table:
        """Return the scores of a window and iprox's warnings, or the error; an end passes through."""
        number, content = _content(row)
        if number == _END:
            return row
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("default")
            try:
                self.work = self.work or self._made()
                scored = self.work(content)
            except Exception as error:  # raised again by the driver; Ray would only count it
                return _row(_END, error)
        own = [str(each.message) for each in heard if Path(each.filename).is_relative_to(PACKAGE)]
        return _row(number, (scored, own))

    def _made(self) -> Any:
        import ray
        from ray import cloudpickle

        pickled: Any = ray.get(self.make)
        try:
            make = cloudpickle.loads(pickled)
        except ModuleNotFoundError:  # a tokenizer's own code, which is pickled by name
            from transformers.dynamic_module_utils import init_hf_modules

            init_hf_modules()
            make = cloudpickle.loads(pickled)
        return make()


def _row(number: int, content: object) -> pa.Table:
    from ray import cloudpickle

    dumped = cloudpickle.dumps(content)  # pyright: ignore[reportPrivateImportUsage]
    return pa.table({"number": [number], "content": [dumped]})


def _content(row: pa.Table) -> tuple[int, Any]:
    from ray import cloudpickle

    return row["number"][0].as_py(), cloudpickle.loads(row["content"][0].as_py())
