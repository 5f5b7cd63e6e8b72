"""A run in progress: its folder, its inputs, and how a stage is done or skipped."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from iprox.data import Example, Pool
from iprox.data.sampling import draw_rows
from iprox.files import digest_of
from iprox.influence.job import Checkpoint
from iprox.models.card import CARD
from iprox.records import RUN, StageRecord, key_of, write_json
from iprox.run.folder import RunFolder, environment
from iprox.session import AT_LEAST, Session
from iprox.settings import Settings


@dataclass(slots=True)
class Run:
    """A recipe or a single command in progress.

    A stage is up to date if `run.json` has its key and its output exists. The key is a hash of its settings, the
    fingerprints of its inputs and the keys of the stages that it reads. Keys do not depend on paths, so a run folder
    can be moved.

    Attributes:
        settings: settings of the recipe or the command.
        folder: folder that the stages write to.
        session: the session.
        read: the pool, or None for commands that read none (see `pool`).
        validation: validation sets by task.
        record: content of `run.json`.
        earlier: records of earlier starts, for stages not reached yet or switched off.
        earlier_version: version of iprox for earlier records that do not name one.
        template: chat template, if it is not the tokenizer's own.
        rows: row numbers of the pool that each stage has drawn.
        targets: checkpoints of the target, with learning rates.
        curvature: by checkpoint, the folder for its curvature, if the estimator needs one.
        proxies: proxies of these checkpoints, if there are any.
        scored: the models that the pool was scored on.
        scores: scores to select by.
        selected: examples to fine-tune on, if they are not the run's selection.
        keys: keys of the stages so far.
    """

    settings: Settings
    folder: RunFolder
    session: Session
    read: Pool | None
    validation: dict[str, Pool]
    record: dict[str, Any]
    earlier: dict[str, Any] = field(default_factory=dict)
    earlier_version: str = field(default_factory=lambda: version("iprox"))
    template: str | None = None
    rows: dict[str, list[int]] = field(default_factory=dict)
    targets: list[tuple[str, float]] = field(default_factory=list)
    curvature: list[Path] = field(default_factory=list)
    proxies: list[str] = field(default_factory=list)
    scored: list[Checkpoint] = field(default_factory=list)
    scores: Path | None = None
    selected: list[Example] | None = None
    keys: dict[str, str] = field(default_factory=dict)

    @property
    def model(self) -> str:
        """The target, as given."""
        assert self.settings.model is not None
        return self.settings.model

    @property
    def pool(self) -> Pool:
        """The pool: the candidates, or what a single command draws examples from."""
        assert self.read is not None
        return self.read

    @property
    def total(self) -> int:
        """Number of rows in the pool."""
        return self.pool.scan().rows

    def stage(
        self,
        name: str,
        key: Any,
        outputs: Callable[[], Sequence[Path]],
        work: Callable[[], StageRecord],
        passing: Sequence[Path] = (),
    ) -> str:
        """Do a stage, or skip it if it is up to date.

        Args:
            name: name of the stage in `run.json`.
            key: everything that the output depends on, as plain data.
            outputs: function that returns the files and folders that the stage writes; if one is missing or damaged,
                the stage is done again.
            work: function that does the stage.
            passing: folders that the stage writes and that may be removed later; they must not be damaged.

        Returns:
            The stage's key, for stages that read its output.
        """
        key = key_of([name, key])
        say = self.session.reporter.say
        before = self.earlier.pop(name, None)
        if before is None:
            why = ""
        elif before["key"] != key:
            why = "its inputs or settings have changed"
        else:
            why = self._damage(before.get("files", {}), outputs(), passing)
        if before is not None and not why:
            self.session.reporter.take_warnings()  # they are in the earlier record
            entry = {**before, "skipped": True}
            by = before.get("iprox", self.earlier_version)
            older = f" by iprox {by}, not {version('iprox')}; {self.folder.AGAIN}"
            say(f"✓ {name}: done already{older if by != version('iprox') else ''}")
        else:
            say(f"{name}: done again, because {why}" if why else f"{name} ...")
            self.save()  # without the stage, whose output is incomplete from here on
            try:
                with self.session.metered() as usage:
                    entry = {"tokens": 0, "flops": 0.0, **work()}
            except BaseException:
                self.folder.remove_partial()
                raise
            entry |= {
                "seconds": usage.seconds,
                "peak_memory_bytes": usage.peak_memory_bytes,
                "warnings": self.session.reporter.take_warnings(),
                "skipped": False,
                "key": key,
                "iprox": version("iprox"),
                "files": {
                    str(file.relative_to(self.folder.path)): digest_of(file)
                    for file in _files_in((*outputs(), *passing))
                },
            }
        self.record["stages"][name] = entry
        self.save()
        if not entry["skipped"]:
            self.session.tracker.stage(name, entry)
        return key

    def _damage(self, written: Mapping[str, str], outputs: Sequence[Path], passing: Sequence[Path]) -> str:
        """Return why the output of a stage is not as it was written; "" if it is.

        Args:
            written: checksums of the files that the stage wrote.
            outputs: the stage's `outputs`.
            passing: the stage's `passing`.
        """
        files = {self.folder.path / name: digest for name, digest in written.items()}
        there = [output for output in (*outputs, *passing) if output not in passing or output.exists()]
        needed = [*outputs, *(file for file in files if any(file.is_relative_to(output) for output in there))]
        for file in needed:
            if not file.exists():
                return f"its output {file.relative_to(self.folder.path)} is missing"
            if file in files and digest_of(file) != files[file]:
                return f"its output {file.relative_to(self.folder.path)} is damaged"
        return ""

    def save(self) -> None:
        """Write `run.json`."""
        seconds = sum(stage["seconds"] for stage in self.record["stages"].values())
        write_json(self.folder.run, {**self.record, "seconds": seconds, "earlier": self.earlier})

    def common_key(self) -> list[Any]:
        """Return what every stage depends on besides its own settings."""
        data = self.settings.data
        # Without bad rows `stop` and `skip` give the same results, so `skip` can resume a run that a bad row stopped.
        # With bad rows their number counts too, because another version of iprox may find others.
        sources = {None: self.pool, **self.validation}
        left = {task: source.scan().rows for task, source in sources.items() if source.scan().bad_rows}
        bad_rows = [data.on_bad_row, sorted(left.items(), key=str)] if left else "stop"
        identity, dtype = self.record["identity"], self.record["dtype"]
        common = [identity, dtype, self.settings.seed, data.max_length, self.template, bad_rows]
        return [*common, loss] if (loss := self.session.loss_identity()) else common

    def draw(self, name: str, count: int) -> list[int]:
        """Draw a seeded sample of rows that no earlier stage has drawn; in a small pool, warn that samples overlap."""
        warn, seed = self.session.reporter.warn, self.settings.seed
        used = [row for rows in self.rows.values() for row in rows]
        rows = draw_rows(name, seed, self.total, count, used)
        shared = draw_rows(name, seed, self.total, min(count, AT_LEAST) - len(rows), rows)
        if shared:
            others = ", ".join(self.rows)
            warn(
                f"{name}: the pool is small, so {len(shared)} of its {len(rows) + len(shared)} examples "
                f"are also used by {others}"
                if others
                else f"{name}: the pool has only {len(rows) + len(shared)} examples"
            )
        elif len(rows) < count:
            warn(f"{name}: {count} examples were asked for, but only {len(rows)} are left in the pool")
        self.rows[name] = sorted(rows + shared)
        return self.rows[name]


def _files_in(places: Sequence[Path]) -> list[Path]:
    """Return the files among some places and in the folders among them, but no `run.json` and no card, which change."""
    files = (each for place in places for each in (sorted(place.rglob("*")) if place.is_dir() else [place]))
    return [file for file in files if file.is_file() and file.name not in (RUN, CARD)]


def new_record(session: Session, command: str, identity: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of `run.json` before the first stage."""
    return {
        **environment(),
        "command": command,
        "identity": dict(identity),
        "seed": session.seed,
        "device": str(session.device),
        "dtype": str(session.dtype).removeprefix("torch."),
        "stages": {},
    }
