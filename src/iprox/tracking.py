"""Log costs and results of stages to an experiment tracker, next to the training curves that transformers logs.

The curves come from the trackers of transformers. The rest is not logged with `accelerate.tracking`: it ends failed
runs of W&B and MLflow as successful ones, and does not escape the names of MLflow's metrics, so only its `start` calls
could be shared.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_args

from iprox.errors import InputError
from iprox.settings import Tracking

# Environment variable with the folder of transformers' integration for TensorBoard.
TENSORBOARD_FOLDER = "TENSORBOARD_LOGGING_DIR"


class Tracker:
    """Logs to one tracking service, or to none.

    The run of the service starts before any training, so the integrations of transformers log to the same run.

    Args:
        kind: name of the service.
        folder: run folder; TensorBoard's files go to `tensorboard` in it.
        config: configuration of the run, logged if the service supports it.
        warn: function called once if the service fails later; the run itself continues.

    Raises:
        InputError: the package of the service is not installed, or the service cannot be reached or refuses the login.
    """

    def __init__(
        self, kind: Tracking, folder: Path, config: Mapping[str, Any], warn: Callable[[str], None] | None = None
    ) -> None:
        check_tracking(kind)
        self.kind, self.folder, self._warn = kind, folder, warn
        self._writer: Any = None
        self._failed = False
        try:
            self._open(config)
        except Exception as error:
            raise InputError(f"tracking: {kind} cannot be started: {' '.join(str(error).split())}") from error

    def _open(self, config: Mapping[str, Any]) -> None:
        kind, folder = self.kind, self.folder
        if kind == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(folder / "tensorboard" / "stages"))
        elif kind == "wandb":
            import wandb  # pyright: ignore[reportMissingImports]

            project = os.environ.get("WANDB_PROJECT", "iprox")
            self._writer = wandb.init(project=project, name=folder.name, config=dict(config))
        elif kind == "mlflow":
            import mlflow  # pyright: ignore[reportMissingImports]

            self._writer = mlflow
            mlflow.start_run(run_name=folder.name)
        elif kind == "trackio":
            self._open_trackio(config)

    def _open_trackio(self, config: Mapping[str, Any] | None = None) -> None:
        import trackio

        to = self.for_trainer
        with redirect_stdout(sys.stderr):  # it prints; standard output is for results
            trackio.init(to["project"], to["run_name"], config=dict(config or {}), resume="allow", embed=False)
        self._writer = trackio

    @property
    def for_trainer(self) -> dict[str, str]:
        """The arguments of transformers' `TrainingArguments` that make a trainer log to the same run."""
        project = os.environ.get("TRACKIO_PROJECT", "iprox")
        return {"report_to": self.kind, "project": project, "run_name": self.folder.name or "iprox"}

    def stage(self, name: str, entry: Mapping[str, Any]) -> None:
        """Log the numbers of a stage under `name/...`."""
        self._log(dict(numbers(entry, name)), 0)

    def curve(self, name: str, points: list[dict[str, Any]]) -> None:
        """Log the numbers of several steps; each point has a `step`."""
        for point in points:
            values = {key: value for key, value in point.items() if key != "step"}
            self._log(dict(numbers(values, name)), int(point["step"]))

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_error: object) -> None:
        """Finish the run of the service, as failed if the block failed."""
        try:
            if self.kind == "tensorboard":
                self._writer.close()
            elif self.kind == "wandb":
                self._writer.finish(exit_code=0 if kind is None else 1)
            elif self.kind == "mlflow":
                self._writer.end_run("FINISHED" if kind is None else "FAILED")
            elif self.kind == "trackio" and self._writer is not None:
                with redirect_stdout(sys.stderr):
                    self._writer.finish()
        except Exception as error:
            self._give_up(error)

    @contextmanager
    def training(self, name: str) -> Iterator[None]:
        """Let a trainer log inside the block, to a separate TensorBoard folder."""
        if self.kind == "trackio":
            with redirect_stdout(sys.stderr):
                yield
            self._writer = None  # the trainer has finished the run; the next number resumes it
            return
        if self.kind != "tensorboard":
            yield
            return
        before = os.environ.get(TENSORBOARD_FOLDER)
        os.environ[TENSORBOARD_FOLDER] = str(self.folder / "tensorboard" / name)
        try:
            yield
        finally:
            if before is None:
                del os.environ[TENSORBOARD_FOLDER]
            else:
                os.environ[TENSORBOARD_FOLDER] = before

    def _log(self, values: dict[str, float], step: int) -> None:
        """Log numbers; if the service fails, warn and log nothing more, so that no stage is lost."""
        if self._failed:
            return
        try:
            self._send(values, step)
        except Exception as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self._failed = True
        if self._warn is not None:
            self._warn(f"tracking: {self.kind} failed, so nothing more is logged: {' '.join(str(error).split())}")

    def _send(self, values: dict[str, float], step: int) -> None:
        if self.kind == "tensorboard":
            for key, value in values.items():
                self._writer.add_scalar(key, value, step)
            self._writer.flush()
        elif self.kind == "wandb":
            # W&B's own step counter continues that of the trainers, so our step is logged as a value.
            self._writer.log({**values, "iprox/step": step})
        elif self.kind == "trackio":
            if self._writer is None:
                self._open_trackio()
            writer: Any = self._writer
            writer.log({**values, "iprox/step": step})
        elif self.kind == "mlflow":
            # MLflow allows only some characters in a name.
            named = {re.sub(r"[^\w\-. /:]", "_", name): value for name, value in values.items()}
            self._writer.log_metrics(named, step=step)


def check_tracking(kind: Tracking) -> None:
    """Refuse a service whose package is not installed.

    Raises:
        InputError: the package is not installed.
    """
    assert kind in get_args(Tracking)
    if kind != "none" and find_spec(kind) is None:
        raise InputError(f"tracking: {kind} needs its package: pip install {kind}")


def numbers(entry: Mapping[str, Any], name: str) -> Iterator[tuple[str, float]]:
    """Yield the numbers in nested plain data as (path, number), without lists and strings."""
    for key, value in entry.items():
        if isinstance(value, Mapping):
            yield from numbers(value, f"{name}/{key}")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield f"{name}/{key}", float(value)
