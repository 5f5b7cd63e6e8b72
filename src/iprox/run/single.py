"""A single command: one stage in a folder of its own, done by the step that a whole run does it by."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from iprox.data import Pool
from iprox.errors import InputError, one_line
from iprox.files import FolderLock, check_output, empty_folder
from iprox.records import key_of, read_json
from iprox.run.folder import RunFolder
from iprox.run.runner import Run, new_record
from iprox.run.whole import judging
from iprox.session import Session, encode_validation
from iprox.settings import Settings


class SingleFolder(RunFolder):
    """The folder of one command: the output of its stage is the folder itself.

    Args:
        path: The folder.
        stage: Attribute of `RunFolder` that it takes the place of, e.g. `proxy`; "" for those that a run's folder
            holds as files.
    """

    def __init__(self, path: Path, stage: str) -> None:
        super().__init__(path)
        if stage:
            setattr(self, stage, path)
        self.align_state = path.with_name(f"{path.name}.state")

    def claim(self, identity: Mapping[str, Any], fresh: bool = False) -> dict[str, Any]:
        """Make the folder ours, and return what an earlier start of the same command left to resume from.

        Raises:
            InputError: It holds something else, or another process is at work there.
        """
        advice = "choose another output or remove it"
        earlier: dict[str, Any] = {}
        if self.run.is_file():
            try:
                earlier = read_json(self.run)
                before = dict(earlier["identity"])
            except (ValueError, KeyError, TypeError) as error:
                raise InputError(f"{self.run}: cannot be read ({one_line(error)}); {advice}") from error
            differ = [key for key in dict.fromkeys([*before, *identity]) if before.get(key) != identity.get(key)]
            if differ:
                raise InputError(
                    f"{self.path}: exists already, with another result ({', '.join(differ)} differ); {advice}"
                )
        elif self.path.is_dir() and any(self.path.iterdir()):
            raise InputError(f"{self.path}: exists already; {advice}")
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = FolderLock(self.path)
        self.remove_partial()
        return earlier

    def remove_partial(self) -> None:
        """Remove what an interrupted write left."""
        for left in (self.path.with_name(f"{self.path.name}.partial"), *self.path.glob("**/*.partial")):
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
    read_by: str | None = None,
    kept: str | None = None,
) -> Iterator[Run]:
    """Open the run of one command, and tidy up after it.

    What a failed command leaves half-made goes, unless there are files of the pattern `kept`, from which the same
    command resumes.

    Args:
        session: How to compute.
        settings: Settings of the command.
        command: The command line, for `run.json`.
        stage: Where a run's folder keeps the stage's output (`SingleFolder`).
        pool: What it reads; None for nothing but validation sets.
        validation: Validation sets by task.
        identity: What it computes with, next to the settings: the command's name, fingerprints of models.
        read_by: Model whose tokenizer reads the validation sets, which are checked with it at once.
        kept: Pattern of the files in the folder that a second start resumes from.
    """
    assert settings.output is not None
    output = check_output(settings.output)
    folder = SingleFolder(output, stage)
    existed = output.exists()
    whole = {
        **identity,
        "settings": key_of(settings.model_dump(exclude={"model", "output", "data", "tracking", "ray_workers"})),
        "reading": key_of([settings.data.model_dump(exclude={"pool", "validation", "num_proc"}), str(session.dtype)]),
        "pool": None if pool is None else session.read(pool, judging(validation, {})).fingerprint,
        "validation": {task: source.scan().fingerprint for task, source in validation.items()},
    }
    template = None
    if read_by is not None:
        encoder = session.encoder(read_by)
        encode_validation(encoder, dict(validation))
        template = encoder.chat_template
        session.reporter.take_warnings()  # said once: the stage makes an encoder of its own
    earlier = folder.claim(whole)
    run = Run(settings, folder, session, pool, dict(validation), new_record(session, command, whole), template=template)
    run.earlier = {**earlier.get("earlier", {}), **earlier.get("stages", {})}
    run.keys["inputs"] = key_of(whole)
    try:
        run.save()
        yield run
    except BaseException:
        folder.remove_partial()
        if not run.record["stages"] and not (kept and any(output.glob(kept))):
            empty_folder(output, keep="")
            if not existed:
                output.rmdir()
        raise
    finally:
        folder.release()
