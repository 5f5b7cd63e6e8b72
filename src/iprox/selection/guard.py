"""The guard of a selection: what it is made of next to the pool and the validation sets, and what to be warned of.

A score can rank well by its own measure and still choose answers of another kind than the task's: one-word answers for
a task of worked solutions. A selection whose median length is several times that of the validation answers, or that
says the same again and again, is said to be so, with the setting to try.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from iprox.data.lengths import Lengths, ValidationLengths
from iprox.scores import scores_metadata, supervised_column, task_names
from iprox.selection.duplicates import NearDuplicates, Texts
from iprox.selection.settings import SelectionSettings
from iprox.settings import ESTIMATORS, InfluenceSection

# Times from which a selection's median length, or the tasks' own, are far apart.
SEVERAL = 3.0
# Share of near-duplicates to be warned above, the similarity that makes one, and the rows that are compared at most.
MANY_DUPLICATES, SIMILARITY, COMPARED = 1 / 3, 0.8, 4_000
# Sources that are listed.
LISTED = 5

# How a person sets what is to be tried: in a recipe, as an option of a command, or as an argument in Python.
Spelling = Literal["recipe", "command", "python"]


@dataclass(frozen=True, slots=True)
class SourceShare:
    """The share of one source in the selection and in the pool, from 0 to 1; None is the source of rows without one."""

    source: str | None
    selection: float
    pool: float


@dataclass(frozen=True, slots=True)
class Profile:
    """What a selection is made of next to its pool and the validation sets that it serves.

    Attributes:
        rows: number of selected rows.
        selection: supervised tokens of the selected rows; None where the scores do not say.
        pool: those of all rows of the pool.
        validation: those of the validation examples, by task that the selection serves.
        together: those of all tasks' validation examples; None where the selection does not serve all.
        sources: the sources with the largest shares of the selection.
        duplicates: the share of the compared rows that are near-duplicates of better ones; None where there were no
            texts to compare.
        compared: the number of selected rows that were compared, best first; of more than `COMPARED` a random sample,
            which has fewer duplicates than the whole.
        warnings: what to be warned of, a line each.
    """

    rows: int
    selection: Lengths | None
    pool: Lengths | None
    validation: Mapping[str, Lengths]
    together: Lengths | None
    sources: Sequence[SourceShare]
    duplicates: float | None
    compared: int
    warnings: Sequence[str] = ()

    def as_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return {
            "rows": self.rows,
            "supervised": {
                "selection": self.selection and self.selection.as_dict(),
                "pool": self.pool and self.pool.as_dict(),
                "validation": {task: each.as_dict() for task, each in self.validation.items()},
            },
            "sources": [
                {"source": each.source, "selection": each.selection, "pool": each.pool} for each in self.sources
            ],
            "near_duplicates": {"share": self.duplicates, "compared": self.compared},
            "warnings": list(self.warnings),
        }


def guard(
    scores: pa.Table, rows: np.ndarray, settings: SelectionSettings, spelling: Spelling, texts: Texts | None = None
) -> Profile:
    """Compare a selection with its pool and with the validation sets that it serves.

    Args:
        scores: the scores table that the selection was made from.
        rows: the selected rows, best first, one at least.
        settings: how they were chosen.
        spelling: how the settings to try are written.
        texts: of rows, for near-duplicates.
    """
    made_by = scores_metadata(scores)
    supervised = supervised_column(scores)
    lengths = ValidationLengths.from_metadata(made_by) or ValidationLengths({}, None)
    served = _served(settings, task_names(scores))
    whole = set(served) >= set(lengths.tasks)
    share, compared = (None, 0) if texts is None else duplicate_share(rows.tolist(), texts)
    found = Profile(
        rows=len(rows),
        selection=None if supervised is None else Lengths.of(supervised[rows]),
        pool=None if supervised is None else Lengths.of(supervised),
        validation={task: each for task, each in lengths.tasks.items() if task in served},
        together=lengths.together if whole else None,
        sources=source_shares(scores, rows),
        duplicates=share,
        compared=compared,
    )
    told = [length_warning(found, settings, made_by, spelling), duplicates_warning(found, spelling)]
    return replace(found, warnings=[line for line in told if line is not None])


def _served(settings: SelectionSettings, tasks: Sequence[str]) -> list[str]:
    """The tasks whose scores counted."""
    if settings.task is not None:
        return [settings.task]
    return [task for task in tasks if settings.weights.get(task, 1.0) > 0]


def source_shares(scores: pa.Table, rows: np.ndarray) -> list[SourceShare]:
    """Return the shares of the sources that the selection has most of, largest first."""
    column = scores["source"]
    selected, pool = _shares(column.take(pa.array(rows))), _shares(column)
    largest = sorted(selected.items(), key=lambda item: (-item[1], str(item[0])))
    return [SourceShare(name, share, pool[name]) for name, share in largest[:LISTED]]


def _shares(column: pa.ChunkedArray) -> dict[str | None, float]:
    counted = pc.value_counts(column).to_pylist()  # pyright: ignore[reportAttributeAccessIssue]
    return {entry["values"]: entry["counts"] / len(column) for entry in counted}


def duplicate_share(rows: Sequence[int], texts: Texts, seed: int = 0) -> tuple[float, int]:
    """Return the share of rows that are near-duplicates of a better one, and how many rows were compared.

    It is the share that `deduplicate` of `SIMILARITY` would pass over. Of more than `COMPARED` rows a random sample is
    compared; a row whose double is not drawn does not count, so the share is then too low rather than too high.

    Args:
        rows: best first, one at least.
        texts: of rows.
        seed: of the sample.
    """
    drawn = list(rows)
    if len(rows) > COMPARED:
        places = sorted(random.Random(seed).sample(range(len(rows)), COMPARED))
        drawn = [rows[place] for place in places]
    seen = NearDuplicates(SIMILARITY, texts)
    seen.read(drawn)
    return sum(not seen.add(row) for row in drawn) / len(drawn), len(drawn)


def length_warning(
    found: Profile, settings: SelectionSettings, made_by: Mapping[str, Any], spelling: Spelling
) -> str | None:
    """Return the line to print where the selected answers are `SEVERAL` times shorter or longer than the tasks'.

    The tasks' validation examples are taken together, unless their own medians are that far apart: then the selection
    is compared with the range of these. None where nothing is to be said, or the lengths are not known.
    """
    if found.selection is None or found.pool is None or not found.validation:
        return None
    medians = [each.median for each in found.validation.values()]
    low, high = min(medians), max(medians)
    if found.together is not None and high < SEVERAL * low:
        low = high = found.together.median
    ours = found.selection.median
    short = ours * SEVERAL <= low
    if not short and ours < SEVERAL * high:
        return None
    said = (
        f"the selected answers are {'short' if short else 'long'}: median {ours:,.0f} supervised tokens, the "
        f"validation answers of {_validation(found.validation, low, high)} (pool: {found.pool.median:,.0f})"
    )
    # What the pool does not have no setting finds.
    if (found.pool.high * SEVERAL <= low) if short else (found.pool.low >= SEVERAL * high):
        return f"{said}; the pool has hardly any {'longer' if short else 'shorter'} ones"
    setting = _length_setting(settings, made_by)
    return said if setting is None else f"{said}; try {setting.spelled(spelling)}"


def _validation(tasks: Mapping[str, Lengths], low: float, high: float) -> str:
    """The tasks and the median, or the range of medians, that a selection is compared with."""
    if low == high:
        names = list(tasks)
        named = f"{', '.join(names[:-1])} and {names[-1]}" if len(names) > 1 else names[0]
        return f"{named} have {low:,.0f}"
    shortest, longest = (pick(tasks, key=lambda task: tasks[task].median) for pick in (min, max))
    return f"the tasks have {low:,.0f} ({shortest}) to {high:,.0f} ({longest})"


def duplicates_warning(found: Profile, spelling: Spelling) -> str | None:
    """Return the line to print where too many selected rows are near-duplicates of others."""
    if found.duplicates is None or found.duplicates <= MANY_DUPLICATES:
        return None
    setting = Setting("select", "deduplicate", SIMILARITY)
    return (
        f"{found.duplicates:.0%} of the selected rows are near-duplicates of better ones (of {found.compared:,} "
        f"compared); try {setting.spelled(spelling)}"
    )


@dataclass(frozen=True, slots=True)
class Setting:
    """A setting to try: its section of the recipe, its name and its value."""

    section: Literal["influence", "select"]
    name: str
    value: str | float | bool

    def spelled(self, how: Spelling) -> str:
        """Return it as a person would write it."""
        if how == "recipe":
            return f"{self.section}.{self.name}: {str(self.value).lower() if self.value is True else self.value}"
        scoring = self.section == "influence"
        if how == "python":
            return f"{self.name}={self.value!r}{' in iprox.score' if scoring else ''}"
        option = "--" + self.name.replace("_", "-")
        return f"{option if self.value is True else f'{option} {self.value}'}{' when scoring' if scoring else ''}"


def _length_setting(settings: SelectionSettings, made_by: Mapping[str, Any]) -> Setting | None:
    """The setting that is likeliest to bring lengths nearer; None where all are set already."""
    traits = ESTIMATORS.get(str(made_by.get("estimator")))
    if traits is not None and not traits.gradients:
        return Setting("influence", "estimator", InfluenceSection().estimator)
    if made_by.get("normalize") == "none":
        return Setting("influence", "normalize", "cosine")
    if settings.strategy != "round-robin":
        return Setting("select", "strategy", "round-robin")
    return None
