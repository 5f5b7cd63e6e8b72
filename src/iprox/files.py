"""Name files as a user does, and write them so that a reader sees the old one or the whole new one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from iprox.errors import InputError


def expanded(path: str | Path) -> Path:
    """A path with `~` expanded.

    Raises:
        InputError: it is the home of a user who is not there.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise InputError(f"{path}: there is no home of such a user") from error


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file beside `path` to write to, which takes its place when the block ends well and goes when it does not."""
    partial = path.with_name(path.name + ".partial")
    try:
        yield partial
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Write a text file that appears only when whole."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")
