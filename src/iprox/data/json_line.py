"""Write one row as a line of JSON."""

from __future__ import annotations

import datetime
import functools
import json
import math
import uuid
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

from iprox.errors import InputError


def json_line(data: Mapping[str, Any], origin: str) -> bytes:
    """Return one row as a line of JSON in UTF-8, with its newline.

    NaN and infinities become null, as in pandas; dates, decimals, UUIDs and durations become text.

    Raises:
        InputError: a column holds something that JSON cannot hold (bytes, images).
    """
    dumps = functools.partial(json.dumps, default=_plain, allow_nan=False)
    try:
        try:
            text = dumps(data, ensure_ascii=False)
        except ValueError:  # NaN or infinity, which JSON does not have
            data = _finite(data)
            text = dumps(data, ensure_ascii=False)
        try:
            return text.encode() + b"\n"
        except UnicodeEncodeError:  # a lone surrogate in a column that is not read
            return dumps(data).encode() + b"\n"
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"{origin}: {_unwritable(data)}; remove the column") from error


def _plain(value: Any) -> Any:
    """Return a value that JSON does not have as text, a list or a number."""
    if hasattr(value, "isoformat"):  # dates and times
        return value.isoformat()
    if isinstance(value, Decimal | uuid.UUID | datetime.timedelta):
        return str(value)
    if hasattr(value, "tolist"):  # NumPy arrays and numbers
        return value.tolist()
    raise TypeError(type(value).__name__)


def _unwritable(data: Mapping[str, Any]) -> str:
    """Return which column of a row JSON cannot hold, and why."""
    for column, value in data.items():
        try:
            json.dumps({column: value}, default=_plain)
        except TypeError as error:
            return f"the column {column!r} holds {error}, which JSON cannot"
        except (ValueError, RecursionError):
            return f"the column {column!r} holds objects within themselves, or nested too deep for JSON"
    return "a column holds what JSON cannot"


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(each) for key, each in value.items()}
    return [_finite(each) for each in value] if isinstance(value, list | tuple) else value
