"""Name files as a user does, and write them so that a reader sees the old one or the whole new one."""

from __future__ import annotations

import errno
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from iprox.errors import InputError, one_line, system_refusal


def expanded(path: str | Path) -> Path:
    """A path with `~` expanded.

    Raises:
        InputError: it is the home of a user who is not there, or no path at all.
    """
    check_path(path)
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise InputError(f"{path}: there is no home of such a user") from error


def check_path(path: str | Path) -> None:
    """Refuse what no file system can have: a NUL in it, a name that is too long, a loop of links.

    Raises:
        InputError: it is such a path; a path where nothing is passes.
    """
    try:
        os.stat(path)
    except (OSError, ValueError) as error:
        number = getattr(error, "errno", None)
        if not isinstance(error, OSError) or number in (errno.ENAMETOOLONG, errno.ELOOP):
            raise InputError(system_refusal(error, path) or f"{path}: no path ({one_line(error)})") from error


def absolute(path: str | Path) -> Path:
    """A path expanded, made absolute and without links.

    Raises:
        InputError: it is no path that can be (see `check_path`).
    """
    return expanded(path).resolve()


def check_output(path: str | Path) -> Path:
    """Refuse an output folder that cannot be made, or not be written to, before any work; nothing is made.

    Returns:
        The path, expanded.

    Raises:
        InputError: it is a file, its place is on a read-only file system or not ours to write to, or it is no path.
    """
    folder = expanded(path)
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder}: is a file; choose a folder as output")
    place = folder
    while not place.exists() and place != place.parent:
        place = place.parent
    if not place.is_dir():
        raise InputError(f"{folder}: {place} is a file, so no folder can be in it; choose another output")
    if not os.access(place, os.W_OK | os.X_OK):
        read_only = hasattr(os, "statvfs") and os.statvfs(place).f_flag & getattr(os, "ST_RDONLY", 1)
        why = "read-only file system" if read_only else f"permission denied in {place}"
        raise InputError(f"{folder}: {why}; choose another place" + ("" if read_only else " or change its rights"))
    return folder


_KINDS = {
    stat.S_IFIFO: "a pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
    stat.S_IFDIR: "a folder",
}


def not_regular(path: Path) -> str:
    """Return why a path cannot be read as a file, which reading some would wait for without end; "" where it can.

    What a link leads to counts. That nothing is there is left to the reader to say.
    """
    try:
        kind = stat.S_IFMT(path.stat().st_mode)
    except (OSError, ValueError):
        return ""
    return (
        "" if kind == stat.S_IFREG else f"is {_KINDS.get(kind, 'something')}, not a regular file; write it to one first"
    )


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file beside `path` to write to, which takes its place when the block ends well and goes when it does not."""
    partial = path.with_name(path.name + ".partial")
    try:
        yield partial
        # On the disk before it has its name, or a power cut could leave an empty file that has it.
        descriptor = os.open(partial, os.O_RDWR)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Write a text file that appears only when whole."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


class FolderLock:
    """A folder held against other processes that would write to it too, for as long as this one lives or holds it.

    Where the file system, or Windows, has no such locks, none is taken.

    Args:
        folder: an existing one.

    Raises:
        InputError: another process holds it.
    """

    def __init__(self, folder: Path) -> None:
        self._descriptor: int | None = None
        try:
            import fcntl
        except ImportError:
            return
        self._descriptor = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self.release()
            raise InputError(
                f"{folder}: another iprox is at work there; wait for it, or choose another output"
            ) from error
        except OSError:
            self.release()

    def __del__(self) -> None:
        self.release()

    def release(self) -> None:
        """Let others have it."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def empty_folder(folder: Path, keep: str) -> None:
    """Remove all that a folder holds but one file; do nothing where there is no folder."""
    for entry in folder.iterdir() if folder.is_dir() else ():
        if entry.name != keep:
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
