"""How long answers are: quantiles of their numbers of supervised tokens, of which a scores file keeps the tasks'."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from iprox.data.encoded import Encoded

# The key in the metadata of a scores file.
VALIDATION_LENGTHS = "validation_supervised"


@dataclass(frozen=True, slots=True)
class Lengths:
    """Quantiles of the supervised tokens of some examples, in tokens.

    Attributes:
        low: the 10th percentile.
        median: the 50th.
        high: the 90th.
    """

    low: float
    median: float
    high: float

    @classmethod
    def of(cls, supervised: np.ndarray | Iterable[int]) -> Lengths | None:
        """Return the quantiles of some counts; None where no example has a supervised token.

        Examples without one are left out: nothing is trained on them.
        """
        counts = np.asarray(supervised if isinstance(supervised, np.ndarray) else list(supervised))
        counts = counts[counts > 0]
        if not len(counts):
            return None
        return cls(*(float(each) for each in np.quantile(counts, (0.1, 0.5, 0.9))))

    def as_dict(self) -> dict[str, float]:
        """Return plain data for JSON."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class ValidationLengths:
    """The lengths of the validation examples of each task, and of all tasks together."""

    tasks: Mapping[str, Lengths]
    together: Lengths | None

    @classmethod
    def of(cls, validation: Mapping[str, Sequence[Encoded]]) -> ValidationLengths:
        """Return the lengths of encoded validation examples by task."""
        counts = {task: [example.supervised for example in examples] for task, examples in validation.items()}
        found = {task: Lengths.of(each) for task, each in counts.items()}
        known = {task: each for task, each in found.items() if each is not None}
        return cls(known, Lengths.of(count for each in counts.values() for count in each))

    def as_metadata(self) -> dict[str, Any]:
        """Return what the metadata of a scores file keeps."""
        together = self.together and self.together.as_dict()
        kept = {"tasks": {task: each.as_dict() for task, each in self.tasks.items()}, "together": together}
        return {VALIDATION_LENGTHS: kept}

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any]) -> ValidationLengths | None:
        """Return the lengths that metadata keeps; None where it keeps none, as older files do."""
        kept = metadata.get(VALIDATION_LENGTHS)
        if kept is None:
            return None
        tasks = {task: Lengths(**each) for task, each in kept["tasks"].items()}
        return cls(tasks, kept["together"] and Lengths(**kept["together"]))
