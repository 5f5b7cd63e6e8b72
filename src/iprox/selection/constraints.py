"""What a selection keeps to beside its ranking: a budget, shares of sources, no near-duplicates."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from iprox.errors import InputError
from iprox.selection.duplicates import READ_AT_ONCE, NearDuplicates
from iprox.selection.strategies import Ranking


@dataclass(frozen=True, slots=True)
class Limits:
    """What the rows taken must keep to.

    Attributes:
        count: most rows, or None.
        tokens: most tokens, or None.
        floors: by source, the fewest rows.
        caps: by source, the most rows; under None those of a source not named.
    """

    count: int | None = None
    tokens: int | None = None
    floors: Mapping[str, int] = field(default_factory=dict)
    caps: Mapping[str | None, int] = field(default_factory=dict)

    @property
    def by_source(self) -> bool:
        """Whether any source has a floor or a cap."""
        return bool(self.floors or self.caps)


@dataclass(slots=True)
class Taken:
    """The rows taken, best first (fewer than the count where the limits leave fewer), and how many were passed over."""

    rows: np.ndarray
    passed_over: Counter[str]


def take(
    ranking: Ranking,
    available: int,
    limits: Limits,
    sources: Sequence[str | None],
    tokens: np.ndarray,
    kept: NearDuplicates | None = None,
) -> Taken:
    """Take rows in the order of a ranking as long as they keep to the limits.

    One pass: a row is passed over if its source is at its cap, if the places left are owed to the floors of other
    sources, or if it is a near-duplicate of one taken. A budget of tokens ends before the first row that would not fit.

    Args:
        ranking: best first.
        available: rows that it can rank.
        limits: to keep to.
        sources: of all rows [N].
        tokens: of all rows [N].
        kept: knows near-duplicates of the rows taken.

    Raises:
        InputError: a floor asks for more rows than there are.
    """
    places = available if limits.count is None else limits.count
    if limits.tokens is None and not limits.by_source and kept is None:
        return Taken(ranking(places), Counter())
    owed = Counter({source: number for source, number in limits.floors.items() if number})
    used: Counter[str | None] = Counter()
    passed_over: Counter[str] = Counter()
    rows: list[int] = []
    spent = 0
    expected = places
    if limits.tokens is not None:
        expected = min(places, int(limits.tokens / max(1.0, float(np.mean(tokens)))) + 1)
    for row in _in_order(ranking, available, expected, kept):
        if len(rows) == places:
            break
        source = sources[row]
        cap = limits.caps.get(source, limits.caps.get(None))
        # Asked last, as what it is asked for it keeps.
        if cap is not None and used[source] >= cap:
            passed_over["source at its cap"] += 1
        elif places - len(rows) <= owed.total() and not owed.get(source):  # pyright: ignore[reportArgumentType]
            passed_over["place owed to another source"] += 1
        elif limits.tokens is not None and spent + tokens[row] > limits.tokens:
            break
        elif kept is not None and not kept.add(row):
            passed_over["near-duplicate"] += 1
        else:
            rows.append(row)
            used[source] += 1
            spent += int(tokens[row])
            if owed.get(source):  # pyright: ignore[reportArgumentType]
                owed[source] -= 1  # pyright: ignore[reportArgumentType]
    if short := next((source for source, number in owed.items() if number), None):
        raise InputError(
            f"only {used[short]} rows of the source {short!r} can be chosen, fewer than its floor of "
            f"{limits.floors[short]}"
        )
    return Taken(np.array(rows, np.int64), passed_over)


def _in_order(ranking: Ranking, available: int, expected: int, kept: NearDuplicates | None) -> Iterator[int]:
    """The ranking, asked for twice as much each time it runs out, so that its tail is ranked only if it is needed.

    Texts are read for many rows at a time, as each reading is a pass over the pool.
    """
    done, limit = 0, min(available, max(1024, 2 * expected))
    while True:
        further = ranking(limit)[done:].tolist()
        for start in range(0, len(further), READ_AT_ONCE):
            piece = further[start : start + READ_AT_ONCE]
            if kept is not None:
                kept.read(piece)
            yield from piece
        if limit >= available:
            return
        done, limit = limit, min(available, 2 * limit)
