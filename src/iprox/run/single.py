"""A single command: one stage in a folder of its own, done by the step that a whole run does it by."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

from iprox.data import Pool
from iprox.errors import InputError, one_line
from iprox.files import FolderLock, absolute, check_output, empty_folder
from iprox.records import RUN, key_of, read_json
from iprox.run.folder import RunFolder
from iprox.run.runner import Run, new_record
from iprox.run.whole import judging
from iprox.session import Session, encode_validation
from iprox.settings import Settings

# Settings that change no result, and those whose contents are in the identity by themselves.
_APART = {"model", "output", "data", "device", "tracking", "ray_workers"}
_ADVICE = "choose another output or remove it"


class SingleFolder(RunFolder):
    """The folder of one command: the output of its stage is the folder itself.

    Args:
        path: The folder, absolute.
        stage: Attribute of `RunFolder` that it takes the place of, e.g. `proxy`; "" for stages that write files into
            it.

    Attributes:
        new: Whether there was no such folder before, once it is taken.
        known: Whether there was a record of the command in it, once it is taken.
    """

    AGAIN = "choose another output to do it again"

    def __init__(self, path: Path, stage: str) -> None:
        super().__init__(path)
        self.new, self.known = True, False
        if stage:
            setattr(self, stage, path)

    def refuse_foreign(self) -> None:
        """Refuse a folder that holds something, and no record of a command.

        Raises:
            InputError: It does.
        """
        foreign = self.path.is_dir() and any(file.name != f"{RUN}.partial" for file in self.path.iterdir())
        if foreign and not self.run.is_file():
            raise InputError(f"{self.path}: exists already; {_ADVICE}")

    def taken(self, identity: Mapping[str, Any]) -> dict[str, Any]:
        """Make the folder ours, and return the record of an earlier start of the same command.

        What another command has left unfinished is taken over: what can be resumed from knows what it was made from.

        Raises:
            InputError: It holds something else, or another process is at work there.
        """
        self.new = not self.path.exists()
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = FolderLock(self.path)
        self.known = self.run.is_file()  # only now: another process may have finished here a moment ago
        self.refuse_foreign()
        if not self.known:
            return {}
        try:
            earlier = read_json(self.run)
            before, finished = dict(earlier["identity"]), {**earlier.get("earlier", {}), **earlier["stages"]}
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{self.run}: cannot be read ({one_line(error)}); {_ADVICE}") from error
        differ = [key for key in dict.fromkeys([*before, *identity]) if before.get(key) != identity.get(key)]
        if differ and (finished or before.get("command") != identity.get("command")):
            raise InputError(
                f"{self.path}: exists already, with another result ({', '.join(differ)} differ); {_ADVICE}"
            )
        self.remove_partial()
        return {} if differ else earlier

    def remove_partial(self) -> None:
        """Remove what an interrupted write left."""
        for left in self.path.glob("**/*.partial"):
            shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink(missing_ok=True)


@contextmanager
def single_run(
    session: Session,
    settings: Settings,
    command: str,
    stage: str,
    pool: Pool | None,
    validation: Mapping[str, Pool],
    *,
    identity: Mapping[str, Any],
    tests: Mapping[str, Pool] = MappingProxyType({}),
    read_by: str | None = None,
    kept: str | None = None,
) -> Iterator[Run]:
    """Open the run of one command, and tidy up after it.

    What a failed command leaves half-made goes, unless there are files of the pattern `kept`, from which the same
    command resumes. What was there before stays.

    Args:
        session: How to compute.
        settings: Settings of the command.
        command: The command line, for `run.json`.
        stage: Where a run's folder keeps the stage's output (`SingleFolder`).
        pool: What it reads; None for nothing but validation sets.
        validation: Validation sets by task.
        identity: What it computes with, next to the settings: the command's name, fingerprints of models.
        tests: Test sets by task, which the pool must not be.
        read_by: Model whose tokenizer reads the validation sets, which are checked with it at once.
        kept: Pattern of the files in the folder that a second start resumes from.
    """
    assert settings.output is not None
    check_output(settings.output)
    output = absolute(settings.output)
    folder = SingleFolder(output, stage)
    folder.refuse_foreign()
    template = settings.data.chat_template
    if template is not None and Path(template).is_file():
        template = Path(template).read_text(encoding="utf-8")
    reading = settings.data.model_dump(exclude={"pool", "validation", "num_proc", "chat_template"})
    whole = {
        **identity,
        "settings": key_of(settings.model_dump(exclude=_APART)),
        "reading": key_of([reading, template, str(session.dtype)]),
        "pool": None if pool is None else session.read(pool, judging(validation, tests)).fingerprint,
        "validation": {task: source.scan().fingerprint for task, source in validation.items()},
    }
    if read_by is not None:
        encode_validation(session.encoder(read_by), validation)
        session.reporter.take_warnings()  # the stage makes an encoder of its own, whose warnings are recorded
    try:
        earlier = folder.taken(whole)
        record = new_record(session, command, whole)
        run = Run(settings, folder, session, pool, dict(validation), record, template=template)
        run.earlier = {**earlier.get("earlier", {}), **earlier.get("stages", {})}
        run.keys["inputs"] = key_of(whole)
        try:
            if not run.earlier:
                run.save()
            yield run
        except BaseException:
            folder.remove_partial()
            if not folder.known and not run.record["stages"] and not (kept and any(output.glob(kept))):
                empty_folder(output, keep="")
                if folder.new:
                    output.rmdir()
            raise
    finally:
        folder.release()
