"""The inputs that rows are read from: files, addresses, hub data sets, saved data sets, rows in memory."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from iprox.data.file_types import UNREADABLE, Record, records_of, unfilled
from iprox.data.locate import HUB_PREFIX
from iprox.errors import InputError, one_line
from iprox.files import not_regular

# Bytes of a file that are read at once for its hash.
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Reader:
    """One re-readable input.

    Attributes:
        label: name to show in messages.
        stem: start of generated ids.
        file: path or address, as recorded; None for rows in memory.
        path: local file whose bytes are the fingerprint; None if the rows themselves are fingerprinted.
        records: function that starts a new pass over the rows.
    """

    label: str
    stem: str
    file: str | None
    path: Path | None
    records: Callable[[], Iterator[Record]]


def open_file(path: Path, label: str, stem: str) -> Reader:
    """Return the reader of one local file, compressed or not, by its extension.

    Raises:
        InputError: it is not a regular file. Reading a pipe or a device may never end, and iprox reads more than once.
    """
    if irregular := not_regular(path):
        raise InputError(f"{path}: {irregular}")
    return Reader(label, stem, str(path), path, lambda: records_of(path))


def open_remote(path: Any, label: str, stem: str) -> Reader:
    """Return the reader of a file at an address (UPath), read as a stream; its rows are the fingerprint."""
    return Reader(label, stem, str(path), None, lambda: records_of(path))


def open_rows(rows: Iterable[Any], label: str, stem: str, file: str | None = None, *, arrow: bool = False) -> Reader:
    """Return the reader of rows that can be iterated more than once.

    `arrow` says whether they come from `datasets`, which keeps them in Arrow (see `unfilled`).
    """

    def records() -> Iterator[Record]:
        row = 0
        try:
            for row, data in enumerate(rows, start=1):
                yield Record(row, unfilled(data) if arrow else data)
        except UNREADABLE as error:
            if not arrow:
                raise
            raise InputError(f"{label}:{row + 1}: cannot be read: {one_line(error)}") from error

    return Reader(label, stem, file, None, records)


def open_hub(address: str) -> Reader:
    """Return the reader of a data set on the Hugging Face Hub, streamed.

    Args:
        address: `hf://datasets/OWNER/NAME[/CONFIG][:SPLIT]`; the split is `train` unless given.

    Raises:
        InputError: the address is malformed, or the data set cannot be opened.
    """
    import datasets

    body, _, split = address[len(HUB_PREFIX) :].partition(":")
    parts = body.strip("/").split("/")
    if len(parts) not in (2, 3) or not all(parts):
        raise InputError(f"{address}: a hub dataset is written {HUB_PREFIX}OWNER/NAME[/CONFIG][:SPLIT]")
    config = parts[2] if len(parts) == 3 else None
    split = split or "train"
    try:
        rows = datasets.load_dataset("/".join(parts[:2]), config, split=split, streaming=True)
    except Exception as error:  # the hub client raises its own, requests', httpx' and fsspec's errors
        raise InputError(f"{address}: cannot be opened: {one_line(error)}") from error
    stem = "-".join([*parts, split])
    return open_rows(rows, address, stem, address, arrow=True)


def open_saved(folder: Path, label: str, stem: str) -> Reader:
    """Return the reader of a folder written by `datasets.save_to_disk`; its rows stay on disk."""
    import datasets

    try:
        rows = datasets.load_from_disk(str(folder))
    except Exception as error:
        raise InputError(f"{folder}: not a readable saved dataset: {one_line(error)}") from error
    return open_rows(rows.with_format(None), label, stem, str(folder), arrow=True)


def hash_file(digest: hashlib.blake2b, path: Path) -> None:
    """Add the name and bytes of a file to a hash.

    Raises:
        InputError: the file cannot be read.
    """
    try:
        digest.update(f"{path.name}\0{os.path.getsize(path)}\0".encode())
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from error
