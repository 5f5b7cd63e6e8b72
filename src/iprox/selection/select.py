"""From a scores table to the rows to train on: who may be chosen, in which order, and how many."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Literal, get_args

import numpy as np
import pyarrow as pa

from iprox.errors import InputError
from iprox.influence.scores import AGGREGATE, score_matrix, source_column
from iprox.selection.constraints import Limits, take, without_length_bias
from iprox.selection.diverse import Features, diverse
from iprox.selection.duplicates import NearDuplicates, Texts
from iprox.selection.strategies import Ranking, balanced, round_robin, sampled, top

Strategy = Literal["top", "round-robin", "balanced", "diverse", "sample"]


@dataclass(frozen=True, slots=True)
class SelectionSettings:
    """What to choose.

    Attributes:
        fraction: share of all rows, in (0, 1]; rounded to the nearest row, at least one.
        count: number of rows.
        tokens: number of tokens that the rows may have in all. At most one of the three; none only with a threshold.
        strategy: `top` (highest `influence`), `round-robin` (tasks take turns), `balanced` (the task served least takes
            next), `diverse` (good rows with unlike gradients) or `sample` (drawn, good rows more often).
        threshold: rows with a lower `influence` are not chosen, so there may be fewer than asked for.
        temperature: of `sample`, in standard deviations of the score.
        source_floor: by source, the least share of the selection.
        source_cap: the largest share of the selection, of any source or by source.
        deduplicate: similarity from which two rows are near-duplicates, of which the better is kept; None keeps all.
        control_length: compare rows with those of about their length only.
        seed: of `sample`.
    """

    fraction: float | None = None
    count: int | None = None
    tokens: int | None = None
    strategy: Strategy = "top"
    threshold: float | None = None
    temperature: float = 1.0
    source_floor: Mapping[str, float] = field(default_factory=dict)
    source_cap: float | Mapping[str, float] | None = None
    deduplicate: float | None = None
    control_length: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what cannot be meant."""
        if self.strategy not in get_args(Strategy):
            raise InputError(f"unknown strategy {self.strategy!r}; known: {', '.join(get_args(Strategy))}")
        sizes = [name for name in ("fraction", "count", "tokens") if getattr(self, name) is not None]
        if len(sizes) > 1 or (not sizes and self.threshold is None):
            raise InputError("give exactly one of fraction, count and tokens (or a threshold alone)")
        if self.fraction is not None and not 0 < self.fraction <= 1:
            raise InputError(f"the fraction to select is {self.fraction}; it must be above 0 and at most 1")
        for name, unit in (("count", "rows"), ("tokens", "tokens")):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"the number of {unit} to select is {value}; it must be at least 1")
        if self.temperature <= 0:
            raise InputError(f"the temperature is {self.temperature}; it must be above 0")
        if self.deduplicate is not None and not 0 < self.deduplicate <= 1:
            raise InputError(f"deduplicate is {self.deduplicate}, a similarity; it must be above 0 and at most 1")
        shares = [*self.source_floor.values(), *_caps(self.source_cap).values()]
        if shares and (self.tokens is not None or not sizes):
            raise InputError("floors and caps of sources are shares of a number of rows: give fraction or count")
        if any(not 0 <= share <= 1 for share in shares):
            raise InputError("floors and caps of sources are shares of the selection, from 0 to 1")
        if sum(self.source_floor.values()) > 1:
            raise InputError(f"the floors of sources add up to {sum(self.source_floor.values()):g}, more than all")
        if self.strategy == "diverse" and (shares or self.deduplicate or not (self.fraction or self.count)):
            raise InputError(
                "the strategy diverse chooses a number of rows as a whole: it takes fraction or count, and neither "
                "floors and caps of sources nor deduplicate (near-duplicates have like gradients)"
            )


@dataclass(frozen=True, slots=True)
class Selection:
    """The chosen rows of a scores table.

    Attributes:
        rows: int64 [K], row numbers, best first.
        strategy: how they were chosen.
        fraction: the share asked for, if a share was.
        threshold: the lowest `influence` chosen, where that is what decided; else None.
        tokens: what they have in all.
        count_asked: the rows asked for, if a number was; a threshold may leave fewer.
        passed_over: rows that ranked high enough and were not chosen, by reason.
    """

    rows: np.ndarray
    strategy: str
    fraction: float | None
    threshold: float | None
    tokens: int
    count_asked: int | None
    passed_over: dict[str, int]

    def as_dict(self) -> dict[str, object]:
        """Plain data for JSON."""
        return {
            "strategy": self.strategy,
            "count": len(self.rows),
            "fraction": self.fraction,
            "threshold": self.threshold,
            "tokens": self.tokens,
            "passed_over": self.passed_over,
            "rows": self.rows.tolist(),
        }


def select_rows(
    scores: pa.Table, settings: SelectionSettings, *, texts: Texts | None = None, features: Features | None = None
) -> Selection:
    """Choose rows of a scores table, best first.

    Ties go to the earlier row. A row without a score is never chosen. Without near-duplicates or gradients to
    compare, 10 million rows take seconds (`benchmarks/selection_speed.py`).

    Args:
        scores: a scores table.
        settings: what to choose.
        texts: of rows, for `deduplicate`.
        features: of rows, for `diverse`.

    Raises:
        InputError: the settings ask for more than the table has, or for texts or features that are not given.
    """
    if settings.deduplicate is not None and texts is None:
        raise InputError("near-duplicates are found by the rows' texts, which a scores table has not: give the pool")
    if settings.strategy == "diverse" and features is None:
        raise InputError("the strategy diverse compares gradients: give features, an index made by iprox index")
    influence = scores[AGGREGATE].to_numpy(zero_copy_only=False).astype(np.float64)
    scored = int(np.isfinite(influence).sum())
    count = settings.count
    if settings.fraction is not None:
        count = max(1, round(settings.fraction * scores.num_rows))
    if count is not None and count > scored:
        raise InputError(f"{count} rows asked for, but only {scored} of {scores.num_rows} have a score")
    tokens = scores["tokens"].to_numpy(zero_copy_only=False)
    allowed = np.isfinite(influence)
    if settings.threshold is not None:
        allowed &= influence >= settings.threshold
    available = int(allowed.sum())
    if not available:
        raise InputError(f"no row has an influence of {settings.threshold} or more" if scored else "no row has a score")
    asked, count = count, None if count is None else min(count, available)

    def comparable(column: np.ndarray) -> np.ndarray:
        column = np.where(allowed, column, np.nan)
        return without_length_bias(column, tokens) if settings.control_length else column

    ranking = _ranking(settings, scores, influence, comparable, features)
    limits = Limits(
        count,
        settings.tokens,
        floors={source: _share(share, count) for source, share in settings.source_floor.items()},
        caps={source: _share(share, count) for source, share in _caps(settings.source_cap).items()},
    )
    sources = source_column(scores).tolist() if limits.by_source else [None] * scores.num_rows
    seen = None
    if settings.deduplicate is not None:
        assert texts is not None
        seen = NearDuplicates(settings.deduplicate, texts)
    taken = take(ranking, available, limits, sources, tokens, seen)
    why = ", ".join(f"{number:,} {reason}" for reason, number in taken.passed_over.items())
    if count is not None and len(taken.rows) < count and settings.threshold is None:
        raise InputError(
            f"{count} rows asked for, but only {len(taken.rows)} can be chosen ({why}); ask for fewer, or loosen the "
            "limits"
        )
    if not len(taken.rows):
        if settings.tokens is not None:
            raise InputError(f"the best row alone has more than {settings.tokens} tokens; raise the budget")
        raise InputError(f"no row can be chosen ({why}); loosen the limits")
    by_score = settings.strategy == "top" and not settings.control_length and not taken.passed_over
    return Selection(
        taken.rows,
        settings.strategy,
        settings.fraction,
        float(influence[taken.rows[-1]]) if by_score else None,
        int(tokens[taken.rows].sum()),
        asked,
        dict(taken.passed_over),
    )


def _ranking(
    settings: SelectionSettings,
    scores: pa.Table,
    influence: np.ndarray,
    comparable: Callable[[np.ndarray], np.ndarray],
    features: Features | None,
) -> Ranking:
    """The ranking that a strategy gives."""
    if settings.strategy in ("round-robin", "balanced"):
        tasks = [comparable(column) for column in score_matrix(scores).T]
        return partial(round_robin if settings.strategy == "round-robin" else balanced, tasks)
    ranked = comparable(influence)
    if settings.strategy == "sample":
        return partial(sampled, ranked, temperature=settings.temperature, seed=settings.seed)
    if settings.strategy == "diverse":
        assert features is not None
        return partial(diverse, ranked, features=features)
    return partial(top, ranked)


def _caps(cap: float | Mapping[str, float] | None) -> dict[str | None, float]:
    """Caps by source; None stands for every source not named."""
    if cap is None:
        return {}
    return {**cap} if isinstance(cap, Mapping) else {None: cap}


def _share(share: float, count: int | None) -> int:
    """A share of the selection in rows, rounded down."""
    assert count is not None  # shares go with a number of rows
    return int(share * count + 1e-9)
