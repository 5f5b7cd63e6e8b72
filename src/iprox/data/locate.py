"""Find the files that a user's paths, patterns and folders name."""

from __future__ import annotations

import difflib
import glob
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from iprox.errors import InputError, one_line
from iprox.files import expanded

EXTENSIONS = (".jsonl", ".ndjson", ".json", ".parquet", ".csv")
# May follow all of these except .parquet, which is compressed inside; the values are pyarrow's names of the codecs.
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
_READ = f"{', '.join(EXTENSIONS)}, and all but Parquet also with {' or '.join(COMPRESSIONS)}"
HUB_PREFIX = "hf://datasets/"
# Descriptions of a data set next to its files, in a folder cloned from the Hub or saved by `datasets`.
_DESCRIPTIONS = ("dataset_infos.json", "dataset_info.json", "dataset_dict.json", "state.json")
_SAVED_DATASET, _SAVED_DICT = "state.json", "dataset_dict.json"  # the marks of `datasets.save_to_disk`


def is_remote(pattern: str | Path) -> bool:
    """Return whether a pattern is an address in object storage or another of fsspec's file systems."""
    return "://" in str(pattern) and not str(pattern).startswith(HUB_PREFIX)


def locate(patterns: Iterable[str | Path], name: str) -> list[Any]:
    """Expand paths, glob patterns, folders and addresses to the files to read.

    Files come in the order of the patterns, sorted by name within one pattern or folder. A file that two patterns match
    is read once. In folders and patterns, hidden files and descriptions of a data set are ignored. `name` is the
    purpose of the files ("pool"), for messages.

    Returns:
        Hub addresses `hf://datasets/...` (str); files, and folders written by `datasets.save_to_disk` (Path); files at
        other addresses, such as `s3://...` (UPath, which is like a Path).

    Raises:
        InputError: nothing is found, a file has an unknown extension, or a file is also there in compressed form.
    """
    found: dict[str, Any] = {}
    for pattern in patterns:
        if str(pattern).startswith(HUB_PREFIX):
            found[str(pattern)] = str(pattern)
            continue
        if is_remote(pattern):
            found |= {str(path): path for path in _expand_remote(str(pattern), name)}
            continue
        for path in _expand(str(pattern), name):
            found.setdefault(os.path.realpath(path), path)
    if not found:
        raise InputError(f"{name}: no file is given; name at least one file, pattern or folder")
    plain: dict[str, Path] = {}
    for path in found.values():
        if isinstance(path, Path):
            other = plain.setdefault(os.path.realpath(_decompressed(path)), path)
            if other is not path:
                raise InputError(f"{name}: {other} and {path} would both be read; leave one of them out")
    return list(found.values())


def extension(path: Path) -> str:
    """Return the format of a file by its name, one of `EXTENSIONS`; "" if it is unknown."""
    plain = _decompressed(path)
    last = plain.suffix.lower()
    return last if last in EXTENSIONS and not (last == ".parquet" and plain != path) else ""


def _decompressed(path: Path) -> Path:
    """Return the path without the extension of a compression."""
    return path.with_suffix("") if path.suffix.lower() in COMPRESSIONS else path


def labels(paths: Sequence[Path]) -> list[tuple[str, str]]:
    """Return, for each file of a pool, a short name for messages (`pool.jsonl`) and the stem of generated ids (`pool`).

    Files with the same name get as many parent folders in front as distinguish them.
    """
    deepest = max((len(path.parts) for path in paths), default=0)
    names = [["/".join(path.parts[-depth:]) for path in paths] for depth in range(1, deepest + 1)]
    names.append([str(path) for path in paths])
    stems = [_decompressed(path).stem for path in paths]
    return list(zip(_first_distinct(names), _first_distinct([stems, *names]), strict=True))


def _first_distinct(choices: list[list[str]]) -> list[str]:
    """Return the first choice of names that are all different, else the last choice."""
    return next((names for names in choices if len(set(names)) == len(names)), choices[-1])


def _expand(pattern: str, name: str) -> list[Path]:
    path = expanded(pattern)
    if path.is_dir():
        return _folder(path, name)
    if path.exists():  # before globbing: a file name may hold brackets
        return [_known(path, name)]
    matches = sorted(glob.glob(str(path), recursive=True)) if glob.has_magic(pattern) else []
    matches = [match for match in matches if Path(match).name not in _DESCRIPTIONS]
    if not matches:
        raise InputError(f"{name}: {_not_found(path)}")
    return [file for match in matches for file in _expand(match, name)]


def _expand_remote(address: str, name: str) -> list[Any]:
    """Return the files that an address, a pattern or a folder names."""
    try:
        from upath import UPath
    except ImportError as error:
        raise InputError(f"{name}: {address} needs pip install 'iprox[remote]'") from error
    try:
        place: Any = UPath(address)
        matches: list[Any]
        if glob.has_magic(address):
            matches = [UPath(place.fs.unstrip_protocol(match)) for match in sorted(place.fs.glob(place.path))]
        else:
            matches = [place] if place.exists() else []
        files = [
            file for match in matches for file in (sorted(match.iterdir(), key=str) if match.is_dir() else [match])
        ]
    except Exception as error:  # each file system raises errors of its own
        raise InputError(f"{name}: {address} cannot be read: {one_line(error)}") from error
    files = [_known(file, name) for file in files if len(files) == 1 or _is_data(file)]
    if not files:
        raise InputError(f"{name}: no file to read at {address} ({_READ})")
    return files


def _folder(folder: Path, name: str) -> list[Path]:
    if (folder / _SAVED_DATASET).is_file():
        return [folder]
    if (folder / _SAVED_DICT).is_file():
        splits = sorted(str(child) for child in folder.iterdir() if is_saved_dataset(child))
        raise InputError(f"{name}: {folder} holds several splits; name one: {', '.join(splits)}")
    # Files that are not regular are refused by their reader rather than ignored.
    files = sorted(child for child in folder.iterdir() if _is_data(child) and not child.is_dir())
    if files:
        return files
    found = (file for file in folder.rglob("*") if _is_data(file))
    below = sorted({file.parent for file in found if "/." not in f"/{file.relative_to(folder).as_posix()}"})[:5]
    hint = f"; there are some in {', '.join(map(str, below))}" if below else ""
    raise InputError(f"{name}: no file to read in the folder {folder} ({_READ}){hint}")


def _is_data(path: Path) -> bool:
    """Return whether a file in a folder holds examples, by its name."""
    return bool(extension(path)) and path.name not in _DESCRIPTIONS and not path.name.startswith(".")


def is_saved_dataset(path: Path) -> bool:
    """Return whether a path is a folder written by `datasets.save_to_disk`."""
    return (path / _SAVED_DATASET).is_file()


def _known(path: Path, name: str) -> Path:
    if not extension(path):
        what = f"the extension {path.suffix!r}" if path.suffix else "a name without extension"
        raise InputError(f"{name}: {path} has {what}; known are {_READ}")
    return path


def _not_found(path: Path) -> str:
    parent = path.parent
    while not parent.is_dir() and parent != parent.parent:
        parent = parent.parent
    wanted = path.relative_to(parent).parts[0] if parent != path else path.name
    names = sorted(child.name for child in parent.iterdir()) if os.access(parent, os.R_OK) else []
    near = difflib.get_close_matches(wanted, names, n=3, cutoff=0.5)
    hint = f"; the nearest names there: {', '.join(near)}" if near else ""
    what = "no file matches" if glob.has_magic(str(path)) else "there is no file"
    return f"{what} {path} (looked in {parent.resolve()}){hint}"
