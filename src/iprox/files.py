"""Check and resolve the paths that a user gives, and write files atomically."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from iprox.errors import InputError, one_line, system_refusal

# Ending of the names of files that are not complete.
PARTIAL = ".partial"


def expanded(path: str | Path) -> Path:
    """Return a path with `~` expanded.

    Raises:
        InputError: it is the home of an unknown user, or not a valid path.
    """
    check_path(path)
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise InputError(f"{path}: there is no user of this name") from error


def check_path(path: str | Path) -> None:
    """Refuse a path that no file system can have: one with a NUL, with too long a name, or in a loop of links.

    Raises:
        InputError: it is such a path. A path that does not exist is fine.
    """
    try:
        str(path).encode()
        os.stat(path)
    except (OSError, ValueError) as error:
        number = getattr(error, "errno", None)
        if not isinstance(error, OSError) or number in (errno.ENAMETOOLONG, errno.ELOOP):
            raise InputError(system_refusal(error, path) or f"{path}: not a valid path ({one_line(error)})") from error


def absolute(path: str | Path) -> Path:
    """Return a path expanded, absolute and without links.

    Raises:
        InputError: it is not a valid path (see `check_path`).
    """
    return expanded(path).resolve()


def check_output(path: str | Path) -> Path:
    """Refuse an output folder that cannot be created or written to, before any work, and return it expanded.

    The folder is not created.

    Raises:
        InputError: it is a file, is on a read-only file system, cannot be written to, or is not a valid path.
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
        raise InputError(f"{folder}: {why}; choose another place" + ("" if read_only else " or change its permissions"))
    return folder


_KINDS = {
    stat.S_IFIFO: "a pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
    stat.S_IFDIR: "a folder",
}


def not_regular(path: Path) -> str:
    """Return why a path is not a regular file, as reading a pipe or a device may never end; "" if it is one.

    Links are followed. A path that does not exist gives "", as its reader reports that.
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
    """Yield a temporary path next to `path`; it replaces `path` if the block succeeds, and is deleted otherwise."""
    partial = path.with_name(path.name + PARTIAL)
    try:
        yield partial
        # The content must be on the disk before the name, or a power cut could leave an empty file.
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
    """Write a text file atomically."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


class FolderLock:
    """Lock on a folder against other processes that write to it, held until `release` or the end of this process.

    On Windows and on file systems without such locks, nothing is locked.

    Args:
        folder: existing folder.

    Raises:
        InputError: another process holds the lock.
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
                f"{folder}: another iprox process is writing there; wait for it, or choose another output"
            ) from error
        except OSError:
            self.release()

    def __del__(self) -> None:
        self.release()

    def release(self) -> None:
        """Release the lock."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def remove(path: Path) -> None:
    """Remove a file or a folder if it exists; of a link only the link, not what it leads to."""
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)


def empty_folder(folder: Path, keep: str) -> None:
    """Remove everything in a folder except one file; do nothing if there is no folder."""
    for entry in folder.iterdir() if folder.is_dir() else ():
        if entry.name != keep:
            remove(entry)


def remove_partial(folder: Path) -> None:
    """Remove the remains of interrupted writes in a folder and the folders in it, but follow no links."""
    for place, folders, names in os.walk(folder):
        for name in (*folders, *names):
            if name.endswith(PARTIAL):
                remove(Path(place) / name)


def digest_of(file: Path) -> str:
    """Return a checksum of a file's content."""
    digest = hashlib.blake2b(digest_size=8)
    with file.open("rb") as stream:
        while block := stream.read(1 << 24):
            digest.update(block)
    return digest.hexdigest()
