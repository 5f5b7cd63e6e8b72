"""The run folder: the outputs of the stages, and `run.json`."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Mapping
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from iprox.errors import InputError
from iprox.files import PARTIAL, FolderLock, remove, remove_partial
from iprox.records import RUN, read_record

LIBRARIES = ("torch", "transformers", "trl", "datasets", "accelerate", "peft", "safetensors", "pyarrow", "numpy")


class RunFolder:
    """The files of a run; `claim` creates the folder."""

    # How to repeat a stage that is up to date, for messages.
    AGAIN = "--fresh repeats all stages"
    CONTENT = (
        "warmup",
        "curvature",
        "proxy",
        "aligned",
        "align-state",
        "audit",
        "scores.parquet",
        "scores.parquet.shards",
        "refined",
        "selected.jsonl",
        "selection.json",
        "attribution.parquet",
        "finetune",
        "report.html",
        "tensorboard",
        "recipe.yaml",
        "run.json",  # last, because it marks the folder as ours
    )

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._lock: FolderLock | None = None
        self.warmup = self.path / "warmup"
        self.curvature = self.path / "curvature"
        self.proxy = self.path / "proxy"
        self.aligned = self.path / "aligned"
        self.align_state = self.path / "align-state"
        self.audit = self.path / "audit"
        self.scores = self.path / "scores.parquet"
        self.refined = self.path / "refined"
        self.selected = self.path / "selected.jsonl"
        self.selection = self.path / "selection.json"
        self.attribution = self.path / "attribution.parquet"
        self.finetune = self.path / "finetune"
        self.report = self.path / "report.html"
        self.recipe = self.path / "recipe.yaml"
        self.run = self.path / RUN

    def earlier(self) -> dict[str, Any]:
        """Return the `run.json` of an earlier start in this folder, or {}; nothing is written.

        Raises:
            InputError: the folder is a file, or holds something else than a run.
        """
        if self.path.exists() and not self.path.is_dir():
            raise InputError(f"{self.path}: is a file; choose a folder as output")
        if self.run.is_file():
            record = read_record(self.run, "choose another output folder")
            if "command" in record["identity"]:
                raise InputError(f"{self.path}: it is the output of a single command; choose another output folder")
            return record
        if self.path.exists() and any(file.name != f"{self.run.name}.partial" for file in self.path.iterdir()):
            raise InputError(
                f"{self.path}: is not empty and has no run.json, so it is no run folder; choose another output folder"
            )
        return {}

    def claim(self, identity: Mapping[str, Any], fresh: bool) -> dict[str, Any]:
        """Create and lock the folder, and return the `run.json` of an earlier start of the same run, or {}.

        Args:
            identity: what makes it the same run (model and data). Settings may change; stages notice that themselves.
            fresh: whether to remove the results of an earlier run. Only files that iprox writes are removed, and only
                from a run folder.

        Raises:
            InputError: the folder holds another run or other files, or another process is using it.
        """
        earlier = self.earlier()
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = FolderLock(self.path)
        try:
            return self._taken_over(earlier, identity, fresh)
        except BaseException:
            self.release()
            raise

    def _taken_over(self, earlier: dict[str, Any], identity: Mapping[str, Any], fresh: bool) -> dict[str, Any]:
        if fresh:
            earlier = {}
            for name in self.CONTENT:
                remove(self.path / name)
        elif earlier and earlier["identity"] != dict(identity):
            before = earlier["identity"]
            changed = [key for key in dict.fromkeys([*before, *identity]) if before.get(key) != identity.get(key)]
            raise InputError(
                f"{self.path}: holds another run ({', '.join(changed) or 'inputs'} differ); "
                "choose another output, or --fresh to replace it"
            )
        self.remove_partial()  # not before the folder is known to be ours
        return earlier

    def release(self) -> None:
        """Unlock the folder."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def remove_partial(self) -> None:
        """Remove the remains of interrupted writes."""
        for name in self.CONTENT:
            remove(self.path / f"{name}{PARTIAL}")
            if not (self.path / name).is_symlink():
                remove_partial(self.path / name)


def environment() -> dict[str, Any]:
    """Return versions, machine, time, and the git revision of the working directory."""
    versions = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    try:
        revision = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, timeout=5, check=True
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        revision = None
    return {
        "iprox": version("iprox"),
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "git": revision,
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "versions": versions,
    }
