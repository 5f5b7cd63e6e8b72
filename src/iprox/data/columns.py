"""Columns of a user's own names, read under the names that iprox knows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from iprox.data.formats import COLUMNS
from iprox.errors import InputError


class Columns:
    """Which column of a row is read as which that iprox knows.

    A row keeps the others; a column that it does not have is not read, so that rows of several kinds go together.

    Args:
        named: by the name that iprox knows (`COLUMNS`) the name in the files, e.g. `{"output": "response"}`.

    Attributes:
        named: the same.
        unmet: of the names in the files, those that no row so far has had.

    Raises:
        InputError: a name is not one that iprox knows, or names nothing.
    """

    def __init__(self, named: Mapping[str, str] | None = None) -> None:
        self.named = dict(named or {})
        for known, own in self.named.items():
            if known not in COLUMNS:
                raise InputError(f"columns: no column is read as {known!r}; there are {', '.join(COLUMNS)}")
            if not own:
                raise InputError(f"columns: {known} names no column; write e.g. {known}=response")
        self.unmet = list(self.named.values())

    def read(self, data: Any) -> Any:
        """A row as read from a file, under the names that iprox knows."""
        if not self.named or not isinstance(data, Mapping):
            return data
        if self.unmet:
            self.unmet = [own for own in self.unmet if own not in data]
        return {**data, **{known: data[own] for known, own in self.named.items() if own in data}}
