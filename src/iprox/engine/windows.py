"""Windows of a pool, and what an engine makes of them. Imports nothing heavy: Ray's processes start with it."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol, TypeAlias

if TYPE_CHECKING:
    import pyarrow as pa

    from iprox.data import Encoded, Example
    from iprox.engine.stream import WindowWorker

# Rows that are tokenized and sorted by length together: enough for little padding, few enough that their tokens are
# small next to a model. A window is also the unit of resuming and of work for Ray.
WINDOW = 1024

Window: TypeAlias = "list[Example]"
ScoredWindow: TypeAlias = "tuple[pa.Table, ScoringStats]"


@dataclass(slots=True)
class ScoringStats:
    """Counts of what was read, and the work done.

    Attributes:
        rows: number of rows read.
        unscored: number of rows without a score.
        tokens: number of tokens read.
        supervised: number of supervised tokens among them.
        truncated: number of examples that were truncated.
        contraction_flops: FLOPs of contracting with the validation gradients and of norms, at all checkpoints.
        query_kept: share of the validation gradients' norm that was kept; the minimum over tasks.
        uncompiled: why the model did not run compiled although the settings ask for it; otherwise empty.
        batch_tokens: largest batch that fit in memory, in tokens.
    """

    rows: int = 0
    unscored: int = 0
    tokens: int = 0
    supervised: int = 0
    truncated: int = 0
    contraction_flops: float = 0.0
    query_kept: float = 1.0
    uncompiled: str = ""
    batch_tokens: int = sys.maxsize

    @classmethod
    def of(cls, encoded: Sequence[Encoded]) -> ScoringStats:
        """Return the counts of some examples."""
        return cls(
            rows=len(encoded),
            unscored=sum(example.supervised == 0 for example in encoded),
            tokens=sum(example.tokens for example in encoded),
            supervised=sum(example.supervised for example in encoded),
            truncated=sum(example.truncated for example in encoded),
        )

    @classmethod
    def over_checkpoints(cls, each: Sequence[ScoringStats]) -> ScoringStats:
        """Return the counts of the same rows at several checkpoints: rows count once, work adds up."""
        total = replace(each[0])
        for other in each[1:]:
            total._add_work(other)
        return total

    def add(self, other: ScoringStats) -> None:
        """Add the counts and the work of other rows."""
        for name in ("rows", "unscored", "tokens", "supervised", "truncated"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self._add_work(other)

    def _add_work(self, other: ScoringStats) -> None:
        self.contraction_flops += other.contraction_flops
        self.query_kept = min(self.query_kept, other.query_kept)
        self.uncompiled = self.uncompiled or other.uncompiled
        self.batch_tokens = min(self.batch_tokens, other.batch_tokens)


def windows_of(pool: Iterable[Example], size: int) -> Iterator[Window]:
    """Yield the windows of a stream of examples."""
    rows = iter(pool)
    while window := list(itertools.islice(rows, size)):
        yield window


@dataclass(frozen=True, slots=True)
class Windows:
    """Windows of a pool with their numbers, from 0, which can be iterated again, and in other processes.

    Attributes:
        pool: examples, which can be iterated again.
        size: rows per window.
        leave_out: numbers of the windows to leave out.
    """

    pool: Iterable[Example]
    size: int = WINDOW
    leave_out: Collection[int] = ()

    def __iter__(self) -> Iterator[tuple[int, Window]]:
        """Yield the number and the examples of each window, in order."""
        return (each for each in enumerate(windows_of(self.pool, self.size)) if each[0] not in self.leave_out)


class Engine(Protocol):
    """A way to process windows."""

    def __call__(
        self, make: Callable[[], WindowWorker], windows: Windows, progress: Callable[[int], None] | None = None
    ) -> Iterator[tuple[int, ScoredWindow]]:
        """Yield the number of each window with its table and statistics, in any order.

        Args:
            make: function that makes a worker; it is called where windows are processed.
            windows: windows to process.
            progress: called with the number of rows done.
        """
        ...
