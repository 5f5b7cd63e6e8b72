"""Check one field of a raw row: texts and labels, and the reason when it is neither."""

from __future__ import annotations

import math
import uuid
from decimal import Decimal
from typing import Any


class BadRowError(ValueError):
    """A row that is no example; the message is the reason, without file and row number."""


def is_blank(value: Any) -> bool:
    """Return whether a column says nothing: null, white space, or the NaN of a missing value (pandas)."""
    return (
        value is None or (isinstance(value, str) and not value.strip()) or (isinstance(value, float) and value != value)
    )


def leave_unread(column: str) -> str:
    """Return how a column of the row is left unread, for messages."""
    return f"--columns {column}= leaves the column unread"


def text_of(value: Any, what: str) -> str:
    """A text that says something."""
    if is_blank(value):
        raise BadRowError(f"{what} is empty")
    if not isinstance(value, str):
        raise BadRowError(f"{what} must be text, not {kind_of(value)}")
    return valid(value, what)


def label_of(value: Any, what: str) -> str | None:
    """A text or whole number that names something, None where there is none."""
    # pandas keeps whole numbers as floats where a column lacks some, and NaN for those it lacks.
    if value is None or value == "" or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, float | Decimal) and math.isfinite(value) and value == int(value):
        value = int(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, uuid.UUID):
        return str(value)
    if not isinstance(value, str):
        given = repr(value) if isinstance(value, float) else kind_of(value)
        raise BadRowError(f"{what} must be text or a whole number, not {given} ({leave_unread(what)})")
    return valid(value, what)


def valid(value: str, what: str) -> str:
    """A text that is Unicode. Lone surrogates stand for bytes that were not UTF-8 (CSV), or a broken JSON escape."""
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:
            raise BadRowError(f"{what} is not valid UTF-8") from None
    return value


def kind_of(value: Any) -> str:
    """What a value is, in words."""
    if value is None:
        return "null"
    names = {str: "text", int: "a number", float: "a number", bool: "true/false", list: "a list", dict: "an object"}
    return names.get(type(value), f"a {type(value).__name__}")
