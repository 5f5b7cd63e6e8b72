"""Experiment tracking: what stages cost and found, beside the training curves that transformers' integrations log."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, get_args

from iprox.errors import InputError

Tracking = Literal["none", "tensorboard", "wandb", "mlflow"]

# Where transformers' integration for TensorBoard is told to write.
TENSORBOARD_FOLDER = "TENSORBOARD_LOGGING_DIR"


class Tracker:
    """Logs to one tracking service, or to none.

    Its own run is opened before any training, so transformers' integrations log into the same one.

    Args:
        kind: which.
        folder: the run folder; TensorBoard's files go to `tensorboard` in it.
        config: what the run is, kept where the service has a place for it.
        warn: told once where the service fails later on; the run itself goes on.

    Raises:
        InputError: the service's package is not installed, or it cannot be reached or logged in to.
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

    def stage(self, name: str, entry: Mapping[str, Any]) -> None:
        """Log the numbers of a stage, under `name/...`."""
        self._log(dict(numbers(entry, name)), 0)

    def curve(self, name: str, points: list[dict[str, Any]]) -> None:
        """Log numbers step by step; each point has a `step`."""
        for point in points:
            values = {key: value for key, value in point.items() if key != "step"}
            self._log(dict(numbers(values, name)), int(point["step"]))

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_error: object) -> None:
        """Finish the service's run, as failed where the block did."""
        try:
            if self.kind == "tensorboard":
                self._writer.close()
            elif self.kind == "wandb":
                self._writer.finish(exit_code=0 if kind is None else 1)
            elif self.kind == "mlflow":
                self._writer.end_run("FINISHED" if kind is None else "FAILED")
        except Exception as error:
            self._give_up(error)

    @contextmanager
    def training(self, name: str) -> Iterator[None]:
        """Have what a trainer logs go beside the rest, in a part of its own."""
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
        """Log numbers; a service that fails is given up with a warning, as no stage must be lost to it."""
        if self._failed:
            return
        try:
            self._send(values, step)
        except Exception as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self._failed = True
        if self._warn is not None:
            self._warn(f"tracking: {self.kind} failed, so it is told nothing more: {' '.join(str(error).split())}")

    def _send(self, values: dict[str, float], step: int) -> None:
        if self.kind == "tensorboard":
            for key, value in values.items():
                self._writer.add_scalar(key, value, step)
            self._writer.flush()
        elif self.kind == "wandb":
            # W&B's own counter goes on from the trainers', so ours is a value of its own.
            self._writer.log({**values, "iprox/step": step})
        elif self.kind == "mlflow":
            # MLflow takes only some characters in a name.
            named = {re.sub(r"[^\w\-. /:]", "_", name): value for name, value in values.items()}
            self._writer.log_metrics(named, step=step)


def check_tracking(kind: Tracking) -> None:
    """Refuse a service whose package is not there.

    Raises:
        InputError: it is not installed.
    """
    assert kind in get_args(Tracking)
    if kind != "none" and find_spec(kind) is None:
        raise InputError(f"tracking: {kind} needs its package: pip install {kind}")


def numbers(entry: Mapping[str, Any], name: str) -> Iterator[tuple[str, float]]:
    """The numbers in nested plain data, by path; lists and texts are left out."""
    for key, value in entry.items():
        if isinstance(value, Mapping):
            yield from numbers(value, f"{name}/{key}")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield f"{name}/{key}", float(value)
