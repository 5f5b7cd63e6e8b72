"""A single command: one stage in its own folder, done by the same step as in a whole run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

from iprox.data import Pool
from iprox.errors import InputError
from iprox.files import FolderLock, absolute, check_output, empty_folder, remove_partial
from iprox.models.loading import checkpoint_fingerprint
from iprox.records import RUN, key_of, read_record
from iprox.run.folder import RunFolder
from iprox.run.runner import Run, new_record
from iprox.run.whole import judging
from iprox.session import Session, encode_validation, pool_of, tasks_of
from iprox.settings import Settings

# Settings that do not change results, and those whose contents are part of the identity.
_APART = {"model", "output", "data", "device", "tracking", "ray_workers", "processes"}
_ADVICE = "choose another output or remove it"


class SingleFolder(RunFolder):
    """The folder of one command; the output of its stage is the folder itself.

    Args:
        path: absolute path of the folder.
        stage: attribute of `RunFolder` that becomes the folder itself, e.g. `proxy`; "" if the stage writes files into
            it.

    Attributes:
        new: whether the folder did not exist before `taken`.
        known: whether it had the record of a command before `taken`.
    """

    AGAIN = "choose another output to repeat it"

    def __init__(self, path: Path, stage: str) -> None:
        super().__init__(path)
        self.new, self.known = True, False
        if stage:
            setattr(self, stage, path)

    def refuse_foreign(self) -> None:
        """Refuse a folder that has files but no record of a command."""
        foreign = self.path.is_dir() and any(file.name != f"{RUN}.partial" for file in self.path.iterdir())
        if foreign and not self.run.is_file():
            raise InputError(f"{self.path}: exists already; {_ADVICE}")

    def taken(self, identity: Mapping[str, Any]) -> dict[str, Any]:
        """Create and lock the folder, and return the record of an earlier start of the same command, or {}.

        A folder that another command of the same name left unfinished is reused; partial results have keys of their
        own.

        Raises:
            InputError: the folder holds another result, or another process is using it.
        """
        self.new = not self.path.exists()
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = FolderLock(self.path)
        self.known = self.run.is_file()  # after locking, as another process may just have finished
        self.refuse_foreign()
        if not self.known:
            return {}
        earlier = read_record(self.run, _ADVICE)
        before, finished = earlier["identity"], {**earlier.get("earlier", {}), **earlier["stages"]}
        differ = [key for key in dict.fromkeys([*before, *identity]) if before.get(key) != identity.get(key)]
        if differ and (finished or before.get("command") != identity.get("command")):
            raise InputError(
                f"{self.path}: exists already and has another result ({', '.join(differ)} differ); {_ADVICE}"
            )
        self.remove_partial()
        return {} if differ else earlier

    def remove_partial(self) -> None:
        """Remove the remains of interrupted writes."""
        remove_partial(self.path)


@contextmanager
def single_run(
    session: Session,
    settings: Settings,
    command: str,
    line: str,
    stage: str,
    *,
    pool: Pool | None = None,
    tests: Mapping[str, Pool] = MappingProxyType({}),
    identity: Mapping[str, Any] = MappingProxyType({}),
    read_by: str | None = None,
    kept: str | None = None,
    **models: str | None,
) -> Iterator[Run]:
    """Open the run of one command, and clean up after it.

    If the command fails, its unfinished output is removed, unless there are files that match `kept`, from which the
    same command resumes. What was there before stays.

    Args:
        session: the session.
        settings: settings of the command.
        command: name of the command.
        line: command line, for `run.json`.
        stage: attribute of `RunFolder` for the stage's output (see `SingleFolder`).
        pool: pool that is read; that of the settings if None.
        tests: test sets by task, which must not share files with the pool.
        identity: what the result depends on besides settings, data and models.
        read_by: model whose tokenizer encodes the validation sets, to check them now.
        kept: pattern of the files in the folder that a second start resumes from.
        **models: models by their role; their fingerprints are part of the identity.
    """
    assert settings.output is not None
    if pool is None and settings.data.pool:
        pool = pool_of(settings.data.pool, settings)
    validation = tasks_of(settings.data.validation, settings)
    check_output(settings.output)
    output = absolute(settings.output)
    folder = SingleFolder(output, stage)
    folder.refuse_foreign()
    template = settings.data.chat_template
    if template is not None and Path(template).is_file():
        template = Path(template).read_text(encoding="utf-8")
    reading = settings.data.model_dump(exclude={"pool", "validation", "num_proc", "chat_template"})
    whole = {
        "command": f"iprox {command}",
        **{role: checkpoint_fingerprint(model) for role, model in models.items() if model is not None},
        **identity,
        "settings": key_of(settings.model_dump(exclude=_APART)),
        "reading": key_of([reading, template, str(session.dtype)]),
        "pool": None if pool is None else session.read(pool, judging(validation, tests)).fingerprint,
        "validation": {task: source.scan().fingerprint for task, source in validation.items()},
    }
    if read_by is not None:
        encode_validation(session.encoder(read_by), validation)
        session.reporter.take_warnings()  # the stage's own encoder repeats them
    try:
        earlier = folder.taken(whole)
        record = new_record(session, line, whole)
        run = Run(settings, folder, session, pool, validation, record, template=template)
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
