"""Columns of a user's own names, read under the names that iprox knows."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from iprox.data.formats import COLUMNS, REFUSED
from iprox.errors import InputError


class Columns:
    """Which column of a row is read as which that iprox knows.

    A row keeps the others. A column that it does not have, or has empty beside a filled one of the known name, is not
    read, so that rows of several kinds go together.

    Args:
        named: by the name that iprox knows (`COLUMNS`) the name in the files, e.g. `{"output": "response"}`. An empty
            one, or None, leaves the column unread as if no row had it; so may those be that rows are refused for
            (`REFUSED`).

    Attributes:
        named: the same, with "" for None.
        unmet: of the names in the files, those that no row so far has had.
        there: the columns of the first row.

    Raises:
        InputError: a name is not one that iprox knows.
    """

    def __init__(self, named: Mapping[str, str | None] | None = None) -> None:
        self.named = {known: own or "" for known, own in (named or {}).items()}
        for known, own in self.named.items():
            if known not in COLUMNS and (own or known not in REFUSED):
                raise InputError(_unknown(known, own))
        self.unread = frozenset(known for known, own in self.named.items() if not own)
        self.unmet = [own or known for known, own in self.named.items()]
        self.there: tuple[str, ...] = ()

    def why_unmet(self, own: str) -> str:
        """That no row has had a column, with the nearest that the first row has."""
        known = next((known for known, named in self.named.items() if named == own), None)
        near = difflib.get_close_matches(own, self.there, n=1, cutoff=0.5)
        what = "leave unread" if known is None else f"read as {known}"
        return f"no row has the column {own!r} to {what}{f'; did you mean {near[0]!r}?' if near else ''}"

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
            if own and own in data and (data[own] not in (None, "") or known not in data)
        }
        gone = self.unread | {own for known, own in self.named.items() if known in found}
        return {**{key: value for key, value in data.items() if key not in gone}, **found}


def _unknown(known: str, own: str) -> str:
    if not own:
        near = difflib.get_close_matches(known, (*COLUMNS, *REFUSED), n=1, cutoff=0.5)
        mend = f"; did you mean {near[0]}=?" if near else ""
        return f"columns: {known!r} is a column that iprox does not read anyway{mend}"
    mend = f"did you mean {own}={known}?" if own in COLUMNS else f"there are {', '.join(COLUMNS)}"
    return f"columns: no column is read as {known!r}; {mend}"
