"""Columns of a user's own names, read under the names that iprox knows."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from iprox.data.formats import COLUMNS
from iprox.errors import InputError


class Columns:
    """Which column of a row is read as which that iprox knows.

    A row keeps the others. A column that it does not have, or has empty beside a filled one of the known name, is not
    read, so that rows of several kinds go together.

    Args:
        named: by the name that iprox knows (`COLUMNS`) the name in the files, e.g. `{"output": "response"}`.

    Attributes:
        named: the same.
        unmet: of the names in the files, those that no row so far has had.
        there: the columns of the first row.

    Raises:
        InputError: a name is not one that iprox knows, or names nothing.
    """

    def __init__(self, named: Mapping[str, str] | None = None) -> None:
        self.named = dict(named or {})
        for known, own in self.named.items():
            if known not in COLUMNS:
                mend = f"did you mean {own}={known}?" if own in COLUMNS else f"there are {', '.join(COLUMNS)}"
                raise InputError(f"columns: no column is read as {known!r}; {mend}")
            if not own:
                raise InputError(f"columns: {known} names no column; write e.g. {known}=response")
        self.unmet = list(self.named.values())
        self.there: tuple[str, ...] = ()

    def why_unmet(self, own: str) -> str:
        """That no row has had a column, with the nearest that the first row has."""
        known = next(known for known, named in self.named.items() if named == own)
        near = difflib.get_close_matches(own, self.there, n=1, cutoff=0.5)
        return f"no row has the column {own!r} to read as {known}{f'; did you mean {near[0]!r}?' if near else ''}"

    def read(self, data: Any) -> Any:
        """A row as read from a file, under the names that iprox knows."""
        if not self.named or not isinstance(data, Mapping):
            return data
        self.there = self.there or tuple(map(str, data))
        if self.unmet:
            self.unmet = [own for own in self.unmet if own not in data]
        found = {
            known: data[own]
            for known, own in self.named.items()
            if own in data and (data[own] not in (None, "") or known not in data)
        }
        moved = {own for known, own in self.named.items() if known in found}
        return {**{key: value for key, value in data.items() if key not in moved}, **found}
