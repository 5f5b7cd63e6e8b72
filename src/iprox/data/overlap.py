"""Rows of a pool that are, word for word, examples that it is judged by."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping

from iprox.data.formats import Example


class Overlap:
    """Counts the rows of a pool that say just what an example of a validation or test set says.

    Such a row has a score that says little, and a test on it is none once it is selected. White space around the
    texts and the layout of the row do not matter. Memory holds eight bytes an example of the sets, and a row of the
    pool costs one hash of its text.

    Args:
        sets: examples by what they are for, e.g. `validation set of gsm8k`.
    """

    def __init__(self, sets: Mapping[str, Iterable[Example]]) -> None:
        self._known = {_fingerprint(example): name for name, examples in sets.items() for example in examples}
        self._found: Counter[str] = Counter()
        self._first: dict[str, str] = {}

    def look(self, example: Example) -> None:
        """At one row of the pool."""
        name = self._known.get(_fingerprint(example))
        if name is not None:
            self._found[name] += 1
            self._first.setdefault(name, example.origin)

    def warnings(self) -> list[str]:
        """What there is to say: a line a set."""
        return [
            f"{number:,} {'row of the pool is' if number == 1 else 'rows of the pool are'} word for word in the {name} "
            f"(first: {self._first[name]}); leave such rows out, or scores and tests flatter the selection"
            for name, number in self._found.items()
        ]


def _fingerprint(example: Example) -> bytes:
    return hashlib.blake2b(example.words.strip().encode(), digest_size=8).digest()
