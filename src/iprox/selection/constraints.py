"""What a selection keeps to beside its ranking: a budget, shares of sources, no near-duplicates, no length bias."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from iprox.errors import InputError
from iprox.selection.duplicates import READ_AT_ONCE, NearDuplicates
from iprox.selection.strategies import Ranking

# Bins of equal numbers of rows, between which scores are made alike.
LENGTH_BINS = 20


def without_length_bias(scores: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """Scores less the median of rows of about their length, over the interquartile range of these.

    Gradients of short examples are larger, or of long ones, as the loss and the normalisation have it; after this no
    length is favoured, and within a length the order is as it was. O(n log n).

    Args:
        scores: float64 [N], NaN where there is none.
        tokens: length of each row [N].
    """
    result = np.full(len(scores), np.nan)
    known = np.flatnonzero(np.isfinite(scores))
    edges = np.unique(np.quantile(tokens[known], np.linspace(0, 1, LENGTH_BINS + 1)[1:-1])) if len(known) else []
    bins = np.searchsorted(edges, tokens[known], side="left")
    for number in np.unique(bins):
        rows = known[bins == number]
        low, middle, high = np.quantile(scores[rows], (0.25, 0.5, 0.75))
        result[rows] = (scores[rows] - middle) / (high - low if high > low else 1.0)
    return result


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
