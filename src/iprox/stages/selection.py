"""The stage that chooses rows by their scores."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from iprox.data import Pool
from iprox.influence.index import GradientIndex
from iprox.influence.scores import read_scores
from iprox.recipe import SelectSection
from iprox.run_folder import StageRecord, write_json
from iprox.selection import SelectionSettings, select_rows
from iprox.session import Session


def selection_settings(settings: SelectSection, seed: int) -> SelectionSettings:
    """What a recipe asks to be chosen, checked.

    Raises:
        InputError: it cannot be meant; or there is no index of features.
    """
    if settings.features is not None:
        GradientIndex.open(settings.features)
    return SelectionSettings(**settings.model_dump(exclude={"features"}), seed=seed)


def select(
    session: Session, scores: Path, pool: Pool, output: Path, description: Path, settings: SelectSection
) -> StageRecord:
    """Choose rows of a scores table; writes the chosen pool rows, best first, and which they are as JSON."""
    table = read_scores(scores)

    def texts(rows: Sequence[int]) -> list[str]:
        return [example.words for example in pool.take(rows)]

    def features(rows: np.ndarray) -> np.ndarray:
        return GradientIndex.open(str(settings.features)).features_of(table, rows)

    selection = select_rows(
        table,
        selection_settings(settings, session.seed),
        texts=texts,
        features=features if settings.features else None,
    )
    if selection.count_asked is not None and len(selection.rows) < selection.count_asked:
        session.reporter.warn(
            f"{len(selection.rows)} rows chosen where {selection.count_asked} were asked for: no more have an "
            f"influence of {settings.threshold} or above"
            + "".join(f", and {number} were passed over ({why})" for why, number in selection.passed_over.items())
        )
    rows = selection.rows.tolist()
    ids = table["id"].take(pa.array(rows)).to_pylist()
    pool.write_rows(rows, output, ids)
    chosen = selection.as_dict()
    write_json(description, chosen)
    return {key: chosen[key] for key in ("strategy", "count", "fraction", "threshold", "tokens", "passed_over")}
