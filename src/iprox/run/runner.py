"""A run in progress: its folder, its inputs, and how a stage is done, or skipped when it is done."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from iprox.data import Example, Pool
from iprox.data.sampling import draw_rows
from iprox.influence.job import Checkpoint
from iprox.models.loading import checkpoint_fingerprint
from iprox.records import StageRecord, key_of, write_json
from iprox.run.folder import RunFolder, environment
from iprox.session import AT_LEAST, Session
from iprox.settings import Settings


@dataclass(slots=True)
class Run:
    """A recipe or a single command at work.

    A stage is done when `run.json` has its key (its settings, its inputs' fingerprints and the keys of the stages that
    it reads) and its output is there. Keys hold no paths, so a run folder can be moved.

    Attributes:
        settings: Of the recipe or the command.
        folder: Where each stage writes.
        session: How to compute.
        read: The pool, see `pool`; None for commands that read none.
        validation: Validation sets by task.
        record: What `run.json` holds.
        earlier: What earlier starts say of stages that this one has not reached, or that are switched off now.
        earlier_version: Version of iprox that they were done by, where they do not say so.
        template: Chat template, if it is not the tokenizer's own.
        rows: Rows of the pool that each stage has drawn, by stage.
        targets: Checkpoints of the target to score at, with learning rates.
        proxies: Their proxies, if there are any.
        scored: What the pool was scored on.
        scores: The scores to select by.
        selected: Examples to fine-tune on, where they are not the run's selection.
        keys: Keys of the stages so far.
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
        """The candidates; of single commands, whatever they draw examples from."""
        assert self.read is not None
        return self.read

    @property
    def total(self) -> int:
        """Rows of the pool."""
        return self.pool.scan().rows

    def stage(self, name: str, key: Any, outputs: Sequence[Path], work: Callable[[], StageRecord]) -> str:
        """Do a stage, or skip it when it is done.

        Args:
            name: Its name in `run.json`.
            key: All that its output depends on, as plain data.
            outputs: Files that it leaves; if one is gone, the stage is done again.
            work: Does it.

        Returns:
            The stage's key, for the stages that read it.
        """
        key = key_of([name, key])
        say = self.session.reporter.say
        before = self.earlier.pop(name, None)
        if before is not None and before["key"] == key and all(output.exists() for output in outputs):
            self.session.reporter.take_warnings()  # the entry has them from when the stage was done
            entry = {**before, "skipped": True}
            by = before.get("iprox", self.earlier_version)
            older = f" by iprox {by}, and this is {version('iprox')}; {self.folder.AGAIN}"
            say(f"✓ {name}: done already{older if by != version('iprox') else ''}")
        else:
            if before is not None:
                changed = "what it is made from has changed" if before["key"] != key else "its output is gone"
                say(f"{name}: done again, because {changed}")
            self.save()  # without the stage: from here on its output is neither the earlier one nor the new one
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
            }
        self.record["stages"][name] = entry
        self.save()
        if not entry["skipped"]:
            self.session.tracker.stage(name, entry)
        return key

    def save(self) -> None:
        """Write `run.json`."""
        seconds = sum(stage["seconds"] for stage in self.record["stages"].values())
        write_json(self.folder.run, {**self.record, "seconds": seconds, "earlier": self.earlier})

    def common_key(self) -> list[Any]:
        """Return what every stage depends on, next to its own settings."""
        data = self.settings.data
        # From rows that are all good the same is made either way, so that `skip` can resume where a refused row stopped
        # a run. Another version may find other rows bad, so the number of good ones counts where some are bad.
        sources = {None: self.pool, **self.validation}
        left = {task: source.scan().rows for task, source in sources.items() if source.scan().bad_rows}
        bad_rows = [data.on_bad_row, sorted(left.items(), key=str)] if left else "stop"
        identity, dtype = self.record["identity"], self.record["dtype"]
        return [identity, dtype, self.settings.seed, data.max_length, self.template, bad_rows]

    def draw(self, name: str, count: int) -> list[int]:
        """Return rows for a stage: a seeded sample that no earlier stage has used, or, in a small pool, has."""
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
            warn(f"{name}: {count} examples asked for, {len(rows)} are left of the pool")
        self.rows[name] = sorted(rows + shared)
        return self.rows[name]


def new_record(session: Session, command: str, identity: Mapping[str, Any]) -> dict[str, Any]:
    """Return what `run.json` holds before the first stage."""
    return {
        **environment(),
        "command": command,
        "identity": dict(identity),
        "seed": session.seed,
        "device": str(session.device),
        "dtype": str(session.dtype).removeprefix("torch."),
        "stages": {},
    }


def fingerprints(**inputs: str | None) -> dict[str, str]:
    """Return the fingerprints of models, by what each is for; those that are None are left out."""
    return {name: checkpoint_fingerprint(path) for name, path in inputs.items() if path is not None}
