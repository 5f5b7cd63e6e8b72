"""Read the rows of a file as a stream: JSON lines, JSON, Parquet, CSV, each compressed or not."""

from __future__ import annotations

import codecs
import csv
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from iprox.data.locate import COMPRESSIONS, extension
from iprox.errors import InputError, one_line, shown

_CHUNK = 1 << 20
# Characters read of a JSON array at once. The rest of a chunk is copied for every element, so large chunks are slow.
_ARRAY_CHUNK = 1 << 14
_PARQUET_ROWS = 256
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
LONGEST = 64 << 20
"""Most bytes per line, after decompression (characters per element of an array, and per field of CSV)."""
# Errors of a value in Arrow that Python does not have: text that is not UTF-8, a date after the year 9999.
UNREADABLE = (ValueError, ArithmeticError, LookupError, TypeError, RecursionError)
_SHORT = "fewer fields than the header has; quote fields with line breaks"
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
_UTF_32, _UTF_16 = (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE), (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


@dataclass(frozen=True, slots=True)
class Record:
    """One raw row.

    Attributes:
        row: 1-based row; the line in JSON lines, the data row (header not counted) in CSV.
        data: row as read; None if it could not be read.
        error: reason why it could not be read.
        line: bytes of the row with its line end; None if the input is not JSON lines.
    """

    row: int
    data: Any
    error: str | None = None
    line: bytes | None = None


def records_of(path: Any) -> Iterator[Record]:
    """Yield the rows of a file (Path or UPath), compressed or not, by its extension.

    Raises:
        InputError: it cannot be read, or is not what its name says.
    """
    try:
        _require_readable(path)
        yield from _reading(path)(path)
    except OSError as error:
        hint = "; decompress it, and name the result" if path.suffix.lower() in COMPRESSIONS else ""
        hint = "; it is not whole: copy it again" if "Truncated" in str(error) else hint
        raise InputError(f"{path}: cannot be read: {error.strerror or error}{hint}") from error
    except pa.ArrowException as error:
        raise InputError(f"{path}: not a readable Parquet file: {one_line(error)}") from error


def _reading(path: Path) -> Callable[[Path], Iterator[Record]]:
    """Return the function that reads a file, by its extension."""
    return {".parquet": _parquet, ".csv": _csv, ".json": _json}.get(extension(path), _jsonl)


def _opened(path: Path) -> IO[bytes]:
    """Open a file for its decompressed bytes; reading a compressed file that ends too early raises OSError."""
    compression = COMPRESSIONS.get(path.suffix.lower())
    if compression is None:
        return path.open("rb")
    raw = pa.OSFile(str(path)) if isinstance(path, Path) else pa.PythonFile(path.open("rb"), mode="r")
    return io.BufferedReader(pa.CompressedInputStream(raw, compression), _CHUNK)


def _text(path: Path, newline: str | None = None) -> IO[str]:
    return io.TextIOWrapper(_opened(path), encoding="utf-8-sig", errors="surrogateescape", newline=newline)


def _require_readable(path: Path) -> None:
    """Refuse placeholders of Git LFS, and files that are not UTF-8."""
    with path.open("rb") as file:
        if file.read(len(_LFS_POINTER)) == _LFS_POINTER:
            raise InputError(f"{path}: is a Git LFS pointer, not the file itself; run git lfs pull in its repository")
    if extension(path) == ".parquet":
        return
    with _opened(path) as file:
        head = file.read(4)
    for marks, name in ((_UTF_32, "UTF-32"), (_UTF_16, "UTF-16")):
        # Without a byte order mark: an ASCII character is two bytes in UTF-16, one of them 0.
        if head.startswith(marks) or (name == "UTF-16" and len(head) == 4 and sorted(head[:2])[0] == 0 < max(head[:2])):
            raise InputError(f"{path}: is {name}, and iprox reads UTF-8; convert it: iconv -f {name} -t UTF-8 IN > OUT")


def _lines(file: IO[Any], path: Path) -> Iterator[Any]:
    """Yield the lines of a file, and refuse lines that are too long to be held in memory."""
    while line := file.readline(LONGEST + 1):
        if len(line) > LONGEST:
            raise InputError(_too_long(path, "a line"))
        yield line


def _too_long(path: Path, what: str) -> str:
    return f"{path}: {what} is longer than {LONGEST >> 20} MB, the most that iprox reads; split it or leave it out"


def _jsonl(path: Path) -> Iterator[Record]:
    with _opened(path) as file:
        first = True
        # Bytes, not text, as `write_rows` copies lines byte for byte and only "\n" ends a line of JSON.
        for row, line in enumerate(_lines(file, path), start=1):
            if row == 1:
                line = line.removeprefix(_BYTE_ORDER_MARK)  # belongs to the file, not to the row
            if line.isspace():
                continue
            try:
                data = _JSON.decode(line.decode())
            except UnicodeDecodeError as error:
                yield Record(row, None, f"not UTF-8 (byte {error.start + 1} of the line)")
            except (ValueError, RecursionError) as error:
                if first:
                    _require_lines(path)
                yield Record(row, None, f"not JSON: {_json_fault(error)}")
            else:
                if first and isinstance(data, list) and any(isinstance(each, dict) for each in data):
                    _require_lines(path)
                yield Record(row, data, None, line)
            first = False


def _require_lines(path: Path) -> None:
    """Refuse a file of JSON lines that is in fact an array, or has its objects over several lines."""
    with _opened(path) as file:
        head = file.read(_CHUNK).removeprefix(_BYTE_ORDER_MARK).lstrip()
    if head.startswith(b"["):
        plain = path.with_suffix("") if path.suffix.lower() in COMPRESSIONS else path
        name = plain.with_suffix(".json").name + path.name[len(plain.name) :]
        raise InputError(f"{path}: is a JSON array, not one object per line; name it {name}")
    try:
        _, end = json.JSONDecoder().raw_decode(head.decode(errors="replace"))
    except (ValueError, RecursionError):
        # An object that does not end within the bytes read fails too.
        broken = head.startswith(b"{") and head[1:].lstrip(b" \t\r").startswith(b"\n") and len(head) > _CHUNK // 2
    else:
        broken = b"\n" in head.decode(errors="replace")[:end].encode()
    if broken:
        raise InputError(
            f"{path}: has a JSON object over several lines; write each on one line (jq -c . IN > OUT), or all as an "
            "array in a .json file"
        )


def _json(path: Path) -> Iterator[Record]:
    """Read a JSON array element by element; a `.json` file that starts with an object holds JSON lines."""
    with _opened(path) as file:
        head = file.read(_CHUNK).removeprefix(_BYTE_ORDER_MARK).lstrip()
    if head.startswith(b"{"):
        yield from _jsonl(path)
        return
    if head and not head.startswith(b"["):
        raise InputError(f"{path}: not JSON: expected an array of objects or one object per line")
    if head:
        with _text(path) as file:
            yield from _json_array(file, path)


def _json_array(file: Any, path: Path) -> Iterator[Record]:
    # Not ijson: it refuses NaN and integers over 64 bits, turns lone surrogates into "?", stops the whole file at a
    # character that is not UTF-8, and its memory for nested brackets is not limited.
    decode = _JSON.raw_decode
    buffer, row, separator, size = "", 0, "[", _ARRAY_CHUNK

    while True:
        buffer = buffer.lstrip()
        if buffer[:1] == "]" and separator == ",":
            break
        # A value is complete with its separator and the character after it: without the latter, a number that is cut
        # at the end of the buffer could look whole.
        try:
            if not buffer.startswith(separator):
                if buffer:
                    raise InputError(f"{path}: not JSON: expected {separator!r} before element {row + 1}")
                raise ValueError("the file ends inside the array")
            body = buffer[1:].lstrip()
            if separator == "[" and body.startswith("]"):
                buffer = body
                break
            data, end = decode(body) if body else (None, 0)
            if not body[end:].lstrip():
                raise ValueError("the file ends inside the array")
        except (ValueError, RecursionError) as error:
            if isinstance(error, _RepeatedKeyError):
                raise InputError(f"{path}: element {row + 1}: {error}") from error
            if isinstance(error, InputError):
                raise
            if len(buffer) > LONGEST:
                raise InputError(_too_long(path, f"element {row + 1}")) from error
            chunk = file.read(min(size, LONGEST))
            if not chunk:
                # The decoder counts from the start of the buffer, so its position would mislead.
                fault = error.msg if isinstance(error, json.JSONDecodeError) else _json_fault(error)
                raise InputError(f"{path}: not JSON at element {row + 1}: {fault}") from error
            buffer += chunk
            size *= 2  # a long element is parsed again after each read: doubling keeps the total linear
            continue
        if end > LONGEST:
            raise InputError(_too_long(path, f"element {row + 1}"))
        row, buffer, separator, size = row + 1, body[end:], ",", _ARRAY_CHUNK
        yield Record(row, data)
    if (buffer[1:] + file.read(_ARRAY_CHUNK)).strip():
        raise InputError(f"{path}: not JSON: there is more after the end of the array")


def _parquet(path: Path) -> Iterator[Record]:
    row = 0
    # Streams the column chunks; without these two settings a whole row group is read at once.
    source = path if isinstance(path, Path) else path.open("rb")
    with pq.ParquetFile(source, buffer_size=_CHUNK, pre_buffer=False) as file:
        # `datasets` writes objects of mixed types as Arrow's JSON type.
        _require_names(path, file.schema_arrow.names)
        encoded = {field.name: field.type for field in file.schema_arrow if "arrow.json" in str(field.type)}
        for batch in file.iter_batches(batch_size=_PARQUET_ROWS):
            try:
                records = [Record(0, data) for data in _python(batch, encoded)]
            except UNREADABLE:
                records = [_one_row(batch.slice(at, 1), encoded) for at in range(batch.num_rows)]
            for record in records:
                row += 1
                yield replace(record, row=row)


def _python(batch: pa.RecordBatch, encoded: Mapping[str, pa.DataType]) -> list[dict[str, Any]]:
    # Nulls are removed before decoding: those inside a JSON column are the user's own.
    rows = [unfilled(data) for data in batch.to_pylist()]
    return [data | {key: _decoded(data[key], kind) for key, kind in encoded.items() if key in data} for data in rows]


def _one_row(batch: pa.RecordBatch, encoded: Mapping[str, pa.DataType]) -> Record:
    row: dict[str, Any] = {}
    for name in batch.schema.names:
        try:
            row |= _python(batch.select([name]), encoded)[0]
        except UNREADABLE as error:
            return Record(0, None, f"the column {name!r} cannot be read: {one_line(error)}")
    return Record(0, row)


def unfilled(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row without the nulls inside its columns; the columns themselves stay.

    In Arrow all objects of a column have the same keys, with null for those that an object did not have: the schemas of
    two tools would each hold the parameters of both. TRL advises removing these nulls (`remove_none_values`).
    """
    return {key: _without_nulls(value) for key, value in row.items()}


def _without_nulls(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_nulls(each) for key, each in value.items() if each is not None}
    return [_without_nulls(each) for each in value] if isinstance(value, list | tuple) else value


def _decoded(value: Any, kind: pa.DataType) -> Any:
    """Return a value in which all that has Arrow's JSON type is decoded."""
    if value is None:
        return None
    if isinstance(kind, pa.JsonType):
        return json.loads(value)
    if pa.types.is_struct(kind):
        return {key: _decoded(each, kind.field(key).type) for key, each in value.items()}
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return [_decoded(each, kind.value_type) for each in value]
    return value


def _csv(path: Path) -> Iterator[Record]:
    csv.field_size_limit(LONGEST)  # the default, 131,072 characters, is less than a long document
    with _text(path, newline="") as file:
        reader = csv.DictReader(_lines(file, path), strict=True)
        try:
            reader.fieldnames = [name.strip() for name in reader.fieldnames or ()]
        except csv.Error as error:
            raise InputError(f"{path}: not CSV: {error}") from error
        _require_names(path, [name for name in reader.fieldnames if name])
        row = 0
        while True:
            row += 1
            try:
                data = next(reader, None)
            except csv.Error as error:
                yield Record(row, None, f"not CSV: {error}")
                continue
            if data is None:
                return
            short = None in data.values() and None not in data
            yield Record(row, data, _SHORT if short else None)


def _require_names(path: Path, names: Sequence[str]) -> None:
    """Refuse columns of one name, of which only the last would be read."""
    if repeated := next((name for name in names if names.count(name) > 1), None):
        raise InputError(f"{path}: two columns have the name {repeated!r}; rename one")


class _RepeatedKeyError(ValueError):
    """A key is given twice in one object, so that one of its values would be lost."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        keys = [key for key, _ in pairs]
        repeated = next(key for key in keys if keys.count(key) > 1)
        raise _RepeatedKeyError(f"the key {shown(repeated)} is given twice in one object; keep one")
    return made


_JSON = json.JSONDecoder(object_pairs_hook=_unique)


def _json_fault(error: BaseException) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at column {error.colno}"
    return "nested too deep" if isinstance(error, RecursionError) else one_line(error)
