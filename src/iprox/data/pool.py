"""Read the examples of files, folders, hub data sets or rows in memory as one re-iterable stream: a pool."""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
from array import array
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from iprox.data.file_types import Record
from iprox.data.formats import Columns, Example, to_example, to_pair
from iprox.data.json_line import json_line
from iprox.data.locate import is_saved_dataset, labels, locate
from iprox.data.messages import BadRowError
from iprox.data.readers import (
    Reader,
    hash_file,
    open_file,
    open_hub,
    open_remote,
    open_rows,
    open_saved,
)
from iprox.errors import InputError
from iprox.files import replacing

# The end of a generated id, given to a row that has no id; the stem of the file comes before it.
GENERATED_ID = re.compile(r"-\d{8}$")

if TYPE_CHECKING:
    import datasets

_PROGRESS_ROWS = 1000
_KEPT_MESSAGES = 10


@dataclass(frozen=True)
class PoolSummary:
    """What one pass over a pool found.

    Attributes:
        rows: number of good rows.
        bad_rows: number of rows left out (only with `on_bad_row="skip"`).
        sources: number of good rows by `source`; rows without a source are not counted here.
        fingerprint: blake2b (hex) of the names and bytes of the files, or of the rows where there is no file.
        files: paths and addresses, in reading order; empty for rows in memory.
        bad_row_messages: `file:row: reason` of the first ten bad rows.
    """

    rows: int
    bad_rows: int
    sources: dict[str, int]
    fingerprint: str
    files: tuple[str, ...]
    bad_row_messages: tuple[str, ...] = field(default=())


class Pool:
    """A re-iterable stream of the examples of one or more inputs; it never holds them all.

    Formats are recognized row by row (see `iprox.data.formats`). A row without an `id` gets one from its file and
    number.

    Args:
        patterns: path, glob pattern, folder, `hf://datasets/OWNER/NAME[/CONFIG][:SPLIT]` or an address that fsspec
            knows (`s3://BUCKET/*.jsonl`), or a list of these; or a list of dicts; or a `datasets.Dataset`.
        name: purpose of the examples, for messages.
        on_bad_row: `"stop"` raises on bad rows, `"skip"` leaves them out everywhere and counts them.
        columns: name in the files by known name (see `iprox.data.formats.Columns`).
        pairs: whether rows are preference pairs (see `iprox.data.formats.to_pair`).

    Raises:
        InputError: a file is missing or of an unknown kind, or an argument is bad.
    """

    def __init__(
        self,
        patterns: str | Path | Sequence[str | Path] | Sequence[Mapping[str, Any]] | datasets.Dataset,
        *,
        name: str = "pool",
        on_bad_row: str = "stop",
        columns: Mapping[str, str | None] | None = None,
        pairs: bool = False,
    ) -> None:
        if on_bad_row not in ("stop", "skip"):
            raise InputError(f"{name}: on_bad_row must be 'stop' or 'skip', not {on_bad_row!r}")
        self.name = name
        self.on_bad_row = on_bad_row
        self.columns = Columns(columns)
        self.pairs = pairs
        self._readers = _open(patterns, name)
        self._summary: PoolSummary | None = None

    def __iter__(self) -> Iterator[Example]:
        """Yield the good rows in order; with `on_bad_row="stop"`, raise InputError at the first bad row."""
        for example, _, _ in self._good_rows(self._refuse if self.on_bad_row == "stop" else None):
            yield example

    def shared_file(self, other: Pool) -> Path | None:
        """Return a file that both pools read, under any name; None if there is none."""
        mine, others = ([reader.path for reader in pool._readers if reader.path is not None] for pool in (self, other))
        return next((one for one in mine if any(_same_file(one, each) for each in others)), None)

    def scan(
        self, progress: Callable[[int], None] | None = None, look: Callable[[Example], None] | None = None
    ) -> PoolSummary:
        """Read everything once, check it, count the rows, and keep the summary.

        Args:
            progress: function called with the number of rows read since its last call.
            look: function called with every good row, at the first scan only.

        Raises:
            InputError: there are bad rows (and `on_bad_row="stop"`), two rows have the same id, no row is good, or a
                row cannot be written as JSON when it is selected.
        """
        if self._summary is not None:
            return self._summary
        bad, first_bad = 0, []

        def note(origin: str, reason: str) -> None:
            nonlocal bad
            bad += 1
            if len(first_bad) < _KEPT_MESSAGES:
                first_bad.append(f"{origin}: {reason}")

        digest = hashlib.blake2b(digest_size=16)
        if self.columns.named:  # the same files with other columns are a different pool
            digest.update(json.dumps(self.columns.named, sort_keys=True).encode() + b"\n")
        if self.pairs:
            digest.update(b"pairs\n")
        for reader in self._readers:
            if reader.path is not None:
                hash_file(digest, reader.path)
        sources: Counter[str] = Counter()
        hashes = array("Q")
        writable: set[tuple[Any, ...]] = set()  # reader and types of the columns
        for example, record, reader in self._good_rows(note):
            hashes.append(_hash64(example.id))
            if look is not None:
                look(example)
            if record.line is None and (types := (id(reader), *map(type, record.data.values()))) not in writable:
                json_line(record.data, example.origin)  # refuse now rather than after the scoring
                writable.add(types)
            if progress is not None and len(hashes) % _PROGRESS_ROWS == 0:
                progress(_PROGRESS_ROWS)
            if example.source is not None:
                sources[example.source] += 1
            if reader.path is None:
                digest.update(json.dumps(record.data, sort_keys=True, default=str).encode() + b"\n")

        rows = len(hashes)
        if progress is not None:
            progress(rows % _PROGRESS_ROWS)
        files = tuple(reader.file for reader in self._readers if reader.file is not None)
        if rows == 0:
            where = ", ".join(files) or "the list given"
            missing = self.columns.missing
            because = self.columns.why_missing(missing[0]) if missing else f"the first: {next(iter(first_bad), '')}"
            why = f"; all {bad} rows are bad, {because}" if bad else ""
            raise InputError(f"{self.name}: no examples in {where}{why}")
        if bad and self.on_bad_row == "stop":
            more = f"\n  ... and {bad - len(first_bad)} more" if bad > len(first_bad) else ""
            raise InputError(
                f"{self.name}: {bad} of {bad + rows} rows are bad; fix them, or leave them out with "
                f"--set data.on_bad_row=skip:\n  " + "\n  ".join(first_bad) + more
            )
        self._check_ids(np.frombuffer(hashes, dtype=np.uint64))
        self._summary = PoolSummary(rows, bad, dict(sources), digest.hexdigest(), files, tuple(first_bad))
        return self._summary

    def take(self, rows: Iterable[int]) -> list[Example]:
        """Return the examples of some rows, in the order given, reading the pool once."""
        wanted = [int(row) for row in rows]
        found = {example.row: example for example, _, _ in self._chosen(wanted)}
        return [found[row] for row in wanted]

    def write_rows(self, rows: Sequence[int], path: Path, ids: Sequence[str] | None = None) -> None:
        """Write some rows as JSON lines, in the order given; the file is replaced atomically.

        Rows of JSON lines files are copied byte for byte (a missing last newline is added). Rows of other formats are
        written with the same columns. `ids` are the ids that the rows should have. Memory holds two numbers per row.

        Raises:
            InputError: the pool has no such row, a row has a different id, a column cannot be written as JSON, or
                `path` is a file of the pool.
        """
        path = Path(path)
        if any(reader.path is not None and _same_file(reader.path, path) for reader in self._readers):
            raise InputError(f"{path}: is a file of the {self.name} itself; choose another output")
        path.parent.mkdir(parents=True, exist_ok=True)
        wanted = [int(row) for row in rows]
        expected = dict(zip(wanted, ids, strict=True)) if ids is not None else {}
        places: dict[int, tuple[int, int]] = {}
        # Rows go to a spool file first, because they are read in a different order.
        with replacing(path) as partial, partial.open("wb") as out, tempfile.TemporaryFile(dir=path.parent) as spool:
            for example, record, _ in self._chosen(wanted):
                if expected and expected[example.row] != example.id:
                    raise InputError(
                        f"{example.origin}: has the id {example.id!r}, {expected[example.row]!r} was expected; "
                        "the scores belong to a different pool, or to the same files in a different order"
                    )
                line = json_line(record.data, example.origin) if record.line is None else record.line
                line = line if line.endswith(b"\n") else line + b"\n"
                places[example.row] = (spool.tell(), len(line))
                spool.write(line)
            for row in wanted:
                offset, length = places[row]
                spool.seek(offset)
                out.write(spool.read(length))

    def _good_rows(
        self, on_bad: Callable[[str, str], None] | None, chosen: Container[int] | None = None
    ) -> Iterator[tuple[Example, Record, Reader]]:
        """Yield every good row with its raw record and its reader; call `on_bad(origin, reason)` for the others.

        Of a pool without bad rows those that are not `chosen` can be passed over unread.
        """
        row = 0
        for reader in self._readers:
            for record in reader.records():
                if chosen is not None and row not in chosen:
                    row += 1
                    continue
                origin = f"{reader.label}:{record.row}"
                try:
                    if record.error is not None:
                        raise BadRowError(record.error)
                    default_id = f"{reader.stem}-{record.row:08d}"  # matches `GENERATED_ID`
                    data = self.columns.read(record.data)
                    read = to_pair if self.pairs else to_example
                    example = read(data, row=row, origin=origin, default_id=default_id)
                except (BadRowError, RecursionError) as error:
                    if on_bad is not None:
                        on_bad(origin, str(error) if isinstance(error, BadRowError) else "nested too deep")
                    continue
                row += 1
                yield example, record, reader

    def _chosen(self, wanted: Sequence[int]) -> Iterator[tuple[Example, Record, Reader]]:
        if not wanted:
            return
        chosen, last, seen = set(wanted), max(wanted), 0
        if min(chosen) < 0:
            raise InputError(f"{self.name}: rows are counted from 0; {min(chosen)} was asked for")
        sound = self._summary is not None and not self._summary.bad_rows
        refuse = self._refuse if self.on_bad_row == "stop" else None
        for example, record, reader in self._good_rows(refuse, chosen if sound else None):
            seen = example.row + 1
            if example.row in chosen:
                yield example, record, reader
            if example.row == last:
                return
        seen = min(last, self._summary.rows) if self._summary is not None else seen
        raise InputError(f"{self.name}: row {last} was asked for, but there are only {seen} good rows")

    def _refuse(self, origin: str, reason: str) -> None:
        raise InputError(f"{self.name}: {origin}: {reason} (--set data.on_bad_row=skip leaves such rows out)")

    def _check_ids(self, hashes: np.ndarray) -> None:
        hashes.sort()
        repeated = np.unique(hashes[1:][hashes[1:] == hashes[:-1]])
        if not repeated.size:
            return
        # Two hashes may agree by chance, so a second pass compares the ids themselves, of the suspects only.
        suspects = set(repeated.tolist())
        first: dict[str, str] = {}
        pair, duplicates = "", 0
        for example, _, _ in self._good_rows(None):
            if _hash64(example.id) not in suspects:
                continue
            if example.id in first:
                duplicates += 1
                pair = pair or f"{first[example.id]} and {example.origin} have the same id {example.id!r}"
            else:
                first[example.id] = example.origin
        if duplicates:
            more = f" ({duplicates} rows repeat an earlier id)" if duplicates > 1 else ""
            raise InputError(f"{self.name}: {pair}{more}; make ids unique, or remove `id` and rows are numbered")


class Overlap:
    """Counts the rows of a pool whose text equals that of an example in a validation or test set.

    The score of such a row says little, and selecting it invalidates a test on it. White space around the texts and the
    format of the row do not matter. Memory holds eight bytes per example of the sets, given by their names.
    """

    def __init__(self, sets: Mapping[str, Iterable[Example]]) -> None:
        self._known = {_hash64(example.words.strip()): name for name, examples in sets.items() for example in examples}
        self._found: Counter[str] = Counter()
        self._first: dict[str, str] = {}

    def look(self, example: Example) -> None:
        """Compare one row of the pool with the sets."""
        name = self._known.get(_hash64(example.words.strip()))
        if name is not None:
            self._found[name] += 1
            self._first.setdefault(name, example.origin)

    def warnings(self) -> list[str]:
        """Return one warning per set that has rows in the pool."""
        return [
            f"{number:,} {'row of the pool is' if number == 1 else 'rows of the pool are'} word for word in the {name} "
            f"(first: {self._first[name]}); leave such rows out, or scores and tests flatter the selection"
            for name, number in self._found.items()
        ]


def _open(patterns: Any, name: str) -> list[Reader]:
    if isinstance(patterns, str | os.PathLike):
        patterns = [patterns]
    elif hasattr(patterns, "with_format"):  # datasets.Dataset, IterableDataset or DatasetDict
        if hasattr(patterns, "keys"):
            raise InputError(f"{name}: a DatasetDict is given; pass one split of it: {', '.join(patterns)}")
        return [open_rows(patterns.with_format(None), "row", "row", arrow=True)]
    if not isinstance(patterns, Sequence):
        raise InputError(f"{name}: expected paths, a list of dicts or a Dataset, not {type(patterns).__name__}")
    if patterns and all(isinstance(item, Mapping) for item in patterns):
        return [open_rows(patterns, "row", "row")]
    wrong = next((item for item in patterns if not isinstance(item, str | os.PathLike)), None)
    if wrong is not None:
        raise InputError(f"{name}: expected paths or dicts in the list, not {type(wrong).__name__}")

    places = locate(patterns, name)
    named = iter(labels([place for place in places if not isinstance(place, str)]))
    readers = []
    for place in places:
        if isinstance(place, str):
            readers.append(open_hub(place))
            continue
        label, stem = next(named)
        local = open_saved if isinstance(place, Path) and is_saved_dataset(place) else open_file
        open_place = local if isinstance(place, Path) else open_remote
        readers.append(open_place(place, label, stem))
    return readers


def _same_file(one: Path, other: Path) -> bool:
    return other.exists() and one.exists() and one.samefile(other)


def _hash64(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
