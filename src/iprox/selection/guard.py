"""The guard of a selection: compares it with the pool and the validation sets, and warns where it is unlike them.

A score can rank well by its own measure and still choose answers of another kind than the task's, such as one-word
answers for a task of worked solutions. The guard warns of a selection whose median answer is several times shorter or
longer than the validation answers, or that repeats itself, and names the setting to try.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from iprox.data.tokens import Lengths, ValidationLengths
from iprox.scores import scores_metadata, supervised_column, task_names
from iprox.selection.duplicates import NearDuplicates, Texts
from iprox.settings import ESTIMATORS, InfluenceSection, SelectSection

# Ratio from which two median lengths are far apart.
SEVERAL = 3.0
# The share of near-duplicates above which the guard warns, the similarity from which two rows are near-duplicates, and
# the largest number of rows compared: 4,000 texts take seconds, and a share of that many is known to within 2 %.
MANY_DUPLICATES, SIMILARITY, COMPARED = 1 / 3, 0.8, 4_000
# Number of sources listed.
LISTED = 5

# How a user writes a setting: as a key of a recipe, an option of a command or an argument in Python.
Spelling = Literal["recipe", "command", "python"]


@dataclass(frozen=True, slots=True)
class SourceShare:
    """The share of one source in the selection and in the pool, 0 to 1; `source` is None for rows without a source."""

    source: str | None
    selection: float
    pool: float


@dataclass(frozen=True, slots=True)
class Profile:
    """The make-up of a selection, next to its pool and the validation sets that it serves.

    Attributes:
        rows: number of selected rows.
        selection: lengths of the selected answers in supervised tokens; None where the scores do not have them.
        pool: lengths of all answers of the pool.
        validation: lengths of the validation answers, by task that the selection serves.
        together: lengths of the validation answers of all tasks; None where the selection does not serve all tasks.
        sources: sources with the largest shares of the selection.
        duplicates: share of the compared rows that are near-duplicates of better ones; None without texts to compare.
        compared: number of selected rows compared for near-duplicates.
        warnings: one line per warning.
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
        plain = asdict(self)
        return {
            "rows": self.rows,
            "supervised": {of: plain[of] for of in ("selection", "pool", "validation")},
            "sources": plain["sources"],
            "near_duplicates": {"share": self.duplicates, "compared": self.compared},
            "warnings": plain["warnings"],
        }


def guard(
    scores: pa.Table, rows: np.ndarray, settings: SelectSection, spelling: Spelling, texts: Texts | None = None
) -> Profile:
    """Compare a selection with its pool and with the validation sets that it serves.

    Args:
        scores: scores table that the selection was made from.
        rows: selected rows, best first, at least one.
        settings: settings of the selection.
        spelling: how warnings spell the settings to try.
        texts: function that returns the texts of rows, to find near-duplicates; None skips that.
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
    lines = [length_warning(found, settings, made_by, spelling), duplicates_warning(found, spelling)]
    return replace(found, warnings=[line for line in lines if line is not None])


def _served(settings: SelectSection, tasks: Sequence[str]) -> list[str]:
    """Return the tasks whose scores counted."""
    if settings.task is not None:
        return [settings.task]
    return [task for task in tasks if settings.weights.get(task, 1.0) > 0]


def source_shares(scores: pa.Table, rows: np.ndarray) -> list[SourceShare]:
    """Return the sources with the largest shares of the selection, largest first."""
    column = scores["source"]
    selected, pool = _shares(column.take(pa.array(rows))), _shares(column)
    largest = sorted(selected.items(), key=lambda item: (-item[1], str(item[0])))
    return [SourceShare(name, share, pool[name]) for name, share in largest[:LISTED]]


def _shares(column: pa.ChunkedArray) -> dict[str | None, float]:
    counted = pc.value_counts(column).to_pylist()  # pyright: ignore[reportAttributeAccessIssue]
    return {entry["values"]: entry["counts"] / len(column) for entry in counted}


def duplicate_share(rows: Sequence[int], texts: Texts, seed: int = 0) -> tuple[float, int]:
    """Return the share of rows, given best first, that are near-duplicates of a better row, and the number compared.

    This is the share that `deduplicate` at `SIMILARITY` would pass over. Of more than `COMPARED` rows a random sample
    is compared. A row whose duplicate is not drawn does not count, so the share is then too low rather than too high.
    """
    drawn = list(rows)
    if len(rows) > COMPARED:
        places = sorted(random.Random(seed).sample(range(len(rows)), COMPARED))
        drawn = [rows[place] for place in places]
    seen = NearDuplicates(SIMILARITY, texts)
    seen.read(drawn)
    return sum(not seen.add(row) for row in drawn) / len(drawn), len(drawn)


def length_warning(
    found: Profile, settings: SelectSection, made_by: Mapping[str, Any], spelling: Spelling
) -> str | None:
    """Return a warning if the selected answers are `SEVERAL` times shorter or longer than the validation answers.

    The validation answers of all tasks are taken together, unless the tasks' medians are that far apart: then the
    selection is compared with the range of these medians. Returns None where lengths are alike or not known.
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
        f"the selected answers are much {'shorter' if short else 'longer'} than the validation answers: the median is "
        f"{ours:,.0f} tokens, against {_validation(found.validation, low, high)} and {found.pool.median:,.0f} in the "
        "pool"
    )
    # No setting finds answers that the pool does not have.
    if (found.pool.high * SEVERAL <= low) if short else (found.pool.low >= SEVERAL * high):
        return (
            f"{said}; the pool has hardly any {'longer' if short else 'shorter'} answers, so add some that fit the task"
        )
    setting = _length_setting(settings, made_by)
    return said if setting is None else f"{said}; try {setting.spelled(spelling)}"


def _validation(tasks: Mapping[str, Lengths], low: float, high: float) -> str:
    """Return the median, or the range of medians, that a selection is compared with, and its tasks."""
    if low == high:
        return f"{low:,.0f} for {' and '.join(', '.join(tasks).rsplit(', ', 1))}"
    shortest, longest = (pick(tasks, key=lambda task: tasks[task].median) for pick in (min, max))
    return f"{low:,.0f} (for {shortest}) to {high:,.0f} (for {longest})"


def duplicates_warning(found: Profile, spelling: Spelling) -> str | None:
    """Return a warning if too many selected rows are near-duplicates of others."""
    if found.duplicates is None or found.duplicates <= MANY_DUPLICATES:
        return None
    setting = Setting("select", "deduplicate", SIMILARITY)
    return (
        f"{found.duplicates:.0%} of {found.compared:,} selected rows say almost the same as a better selected row; "
        f"leave them out with {setting.spelled(spelling)}"
    )


@dataclass(frozen=True, slots=True)
class Setting:
    """A setting to try: its section of the recipe, its name and its value."""

    section: Literal["influence", "select"]
    name: str
    value: str | float

    def spelled(self, how: Spelling) -> str:
        """Return the setting as a user would write it."""
        if how == "recipe":
            return f"{self.section}.{self.name}: {self.value}"
        scoring = self.section == "influence"
        if how == "python":
            return f"{self.name}={self.value!r}{' in iprox.score' if scoring else ''}"
        return f"--set {self.section}.{self.name}={self.value}{' when scoring' if scoring else ''}"


def _length_setting(settings: SelectSection, made_by: Mapping[str, Any]) -> Setting | None:
    """The setting that is likeliest to bring lengths nearer; None where all are set already."""
    traits = ESTIMATORS.get(str(made_by.get("estimator")))
    if traits is not None and not traits.gradients:
        return Setting("influence", "estimator", InfluenceSection().estimator)
    if made_by.get("normalize") == "none":
        return Setting("influence", "normalize", "cosine")
    if settings.strategy != "round-robin":
        return Setting("select", "strategy", "round-robin")
    return None
