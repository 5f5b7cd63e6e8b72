"""The limits of a selection: a number of rows or tokens, shares of sources, no near-duplicates."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from iprox.errors import InputError
from iprox.selection.duplicates import READ_AT_ONCE, NearDuplicates
from iprox.selection.strategies import Ranking
from iprox.settings import SelectSection


@dataclass(frozen=True, slots=True)
class Limits:
    """The limits of a selection, in rows and tokens.

    Attributes:
        count: largest number of rows, or None.
        tokens: largest number of tokens, or None.
        floors: smallest number of rows, by source.
        caps: largest number of rows, by source; the key None stands for every source that is not named.
    """

    count: int | None = None
    tokens: int | None = None
    floors: Mapping[str, int] = field(default_factory=dict)
    caps: Mapping[str | None, int] = field(default_factory=dict)


def rows_in(share: float, count: int) -> int:
    """Return a share of a selection in rows, rounded down."""
    return int(share * count + 1e-9)


def check_feasible(settings: SelectSection, rows: int, sources: Mapping[str | None, int]) -> None:
    """Refuse a selection that no ranking of a pool can fill, before anything is scored.

    Args:
        settings: settings of the selection.
        rows: number of rows in the pool.
        sources: number of rows by source; the key None stands for rows without a source.

    Raises:
        InputError: more rows are asked for than there are or than the caps leave, a floor or a cap names a source that
            the pool does not have, or a floor asks for more rows of a source than there are.
    """
    count = settings.rows_of(rows)
    if count is not None and count > rows:
        raise InputError(f"{count:,} rows are to be selected, but the pool has only {rows:,}; ask for fewer")
    caps = settings.caps()
    for what, names in (("floor", settings.source_floor), ("cap", caps)):
        unknown = next((name for name in names if name is not None and name not in sources), None)
        if unknown is not None:
            known = [name for name in sources if name is not None]
            near = difflib.get_close_matches(unknown, known, n=1, cutoff=0.5)
            hint = (
                f"did you mean {near[0]!r}?" if near else f"its sources are {', '.join(sorted(known)[:10]) or 'none'}"
            )
            raise InputError(f"the {what} of the source {unknown!r}: the pool has no such source; {hint}")
    if count is None:
        return
    for name, share in settings.source_floor.items():
        if rows_in(share, count) > sources[name]:
            raise InputError(
                f"the floor of the source {name!r}, {share:g} of {count:,} rows, is more than the pool has "
                f"({sources[name]:,}); lower the floor"
            )
    most = sum(
        min(size, count if (cap := caps.get(name, caps.get(None))) is None else rows_in(cap, count))
        for name, size in sources.items()
    )
    if most < count and settings.threshold is None:
        raise InputError(
            f"{count:,} rows are to be selected, but the caps of sources leave {most:,}; ask for fewer rows or raise "
            "the caps"
        )


@dataclass(slots=True)
class Taken:
    """The rows taken, best first, and the number of rows passed over, by reason."""

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
    """Take rows in the order of a ranking, within limits; fewer than `limits.count` if the limits leave fewer.

    One pass: a row is passed over if its source is at its cap, if the remaining places are owed to the floors of other
    sources, or if it is a near-duplicate of a row taken before. With a budget of tokens, taking ends before the first
    row that does not fit.

    Args:
        ranking: ranking of the rows, best first.
        available: number of rows that the ranking has.
        limits: limits of the selection.
        sources: source of each row [N].
        tokens: number of tokens of each row [N].
        kept: near-duplicates of the rows taken; None allows near-duplicates.

    Raises:
        InputError: a floor asks for more rows than there are.
    """
    places = available if limits.count is None else limits.count
    if limits.tokens is None and kept is None and not (limits.floors or limits.caps):
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
        # Near-duplicates come last, because `kept.add` keeps the row.
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
            f"only {used[short]} rows of the source {short!r} can be chosen, and its floor is {limits.floors[short]}; "
            "lower the floor"
        )
    return Taken(np.array(rows, np.int64), passed_over)


def _in_order(ranking: Ranking, available: int, expected: int, kept: NearDuplicates | None) -> Iterator[int]:
    """Yield the rows of a ranking in order.

    The ranking is asked for twice as many rows each time it runs out, so its tail is ranked only if it is needed. Texts
    are read for many rows at a time, because each reading is a pass over the pool.
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
