"""What is to be chosen: how many rows, in which order, and what they must keep to."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

from iprox.errors import InputError

Strategy = Literal["top", "round-robin"]


@dataclass(frozen=True, slots=True)
class SelectionSettings:
    """What to choose.

    Attributes:
        fraction: share of all rows, in (0, 1]; rounded to the nearest row, at least one.
        count: number of rows.
        tokens: number of tokens that the rows may have in all. At most one of the three; none only with a threshold.
        strategy: `round-robin` (validation examples take turns, each the row that is best for it; the tasks do where
            scores by example were not kept) or `top` (highest `influence`).
        task: the one task whose scores count; None takes all of them, by the column `influence`.
        weights: by task, how much it counts, 1 where it is not named. Rows are then chosen by the weighted mean of
            standardized scores; by `round-robin` tasks have turns in proportion.
        threshold: rows with a lower score are not chosen, so there may be fewer than asked for.
        source_floor: by source, the least share of the selection.
        source_cap: the largest share of the selection, of any source or by source.
        deduplicate: similarity from which two rows are near-duplicates, of which the better is kept; None keeps all.
    """

    fraction: float | None = None
    count: int | None = None
    tokens: int | None = None
    strategy: Strategy = "round-robin"
    task: str | None = None
    weights: Mapping[str, float] = field(default_factory=dict)
    threshold: float | None = None
    source_floor: Mapping[str, float] = field(default_factory=dict)
    source_cap: float | Mapping[str, float] | None = None
    deduplicate: float | None = None

    def __post_init__(self) -> None:
        """Refuse what cannot be meant."""
        if self.strategy not in get_args(Strategy):
            raise InputError(f"unknown strategy {self.strategy!r}; known: {', '.join(get_args(Strategy))}")
        if self.weights and self.task is not None:
            raise InputError(f"weights are of several tasks, and task says to choose by {self.task}: leave one out")
        if not all(0 <= weight < math.inf for weight in self.weights.values()):
            raise InputError("weights of tasks are finite numbers, 0 or more")
        sizes = [name for name in ("fraction", "count", "tokens") if getattr(self, name) is not None]
        if len(sizes) > 1 or (not sizes and self.threshold is None):
            raise InputError("give exactly one of fraction, count and tokens (or a threshold alone)")
        if self.fraction is not None and not 0 < self.fraction <= 1:
            raise InputError(f"the fraction to select is {self.fraction}; it must be above 0 and at most 1")
        for name, unit in (("count", "rows"), ("tokens", "tokens")):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"the number of {unit} to select is {value}; it must be at least 1")
        if self.deduplicate is not None and not 0 < self.deduplicate <= 1:
            raise InputError(f"deduplicate is {self.deduplicate}, a similarity; it must be above 0 and at most 1")
        shares = [*self.source_floor.values(), *self.caps().values()]
        if shares and (self.tokens is not None or not sizes):
            raise InputError("floors and caps of sources are shares of a number of rows: give fraction or count")
        if any(not 0 <= share <= 1 for share in shares):
            raise InputError("floors and caps of sources are shares of the selection, from 0 to 1")
        if sum(self.source_floor.values()) > 1:
            raise InputError(f"the floors of sources add up to {sum(self.source_floor.values()):g}, more than all")

    def weights_of(self, tasks: Sequence[str]) -> list[float]:
        """The weight of each task.

        Raises:
            InputError: a weight is of none of the tasks, or all are 0.
        """
        unknown = next((name for name in self.weights if name not in tasks), None)
        if unknown is not None:
            raise InputError(f"the weight of the task {unknown!r}: the scores are of {', '.join(tasks)}")
        weights = [self.weights.get(task, 1.0) for task in tasks]
        if not any(weights):
            raise InputError("the weights of all tasks are 0, so there is nothing to choose by")
        return weights

    def rows_of(self, total: int) -> int | None:
        """The number of rows asked for of a pool of that many; None where another limit decides."""
        return self.count if self.fraction is None else rows_in_share(self.fraction, total)

    @property
    def by_source(self) -> bool:
        """Whether any source has a floor or a cap."""
        return bool(self.source_floor or self.source_cap is not None)

    def caps(self) -> dict[str | None, float]:
        """Caps by source; None stands for every source not named."""
        if self.source_cap is None:
            return {}
        return {**self.source_cap} if isinstance(self.source_cap, Mapping) else {None: self.source_cap}


def rows_in_share(share: float, total: int) -> int:
    """Return a share of all rows, rounded to the nearest number, at least one."""
    return max(1, round(share * total))


def rows_in(share: float, count: int) -> int:
    """A share of a selection in rows, rounded down."""
    return int(share * count + 1e-9)
