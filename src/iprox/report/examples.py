"""The best and the worst rows, with their texts."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from iprox.data import Example, Pool, said
from iprox.errors import InputError
from iprox.report import formats
from iprox.report.run_folder import RunFolder
from iprox.report.shading import ShadedToken

SHOWN_EACH = 10
# Longer texts start folded, with this much in view.
EXCERPT = 320
# What is beyond this is left out of the page: one row must not make it megabytes.
MOST_CHARACTERS = 20_000


@dataclass(frozen=True, slots=True)
class Turn:
    """One message as shown: the role, an excerpt where the text is long, the text, and how much was left out."""

    role: str
    excerpt: str | None
    text: str
    characters: str
    left_out: str | None


@dataclass(frozen=True, slots=True)
class ExampleCard:
    """One row as shown."""

    rank: str
    id: str
    source: str
    tokens: str
    influence: str
    selected: bool
    tasks: tuple[tuple[str, str], ...]
    turns: tuple[Turn, ...]
    origin: str
    shading: tuple[ShadedToken, ...]


def extreme_rows(influence: np.ndarray, most: int = SHOWN_EACH) -> tuple[list[int], list[int]]:
    """Finds the rows with the highest and the lowest scores.

    Args:
        influence: scores [N], NaN where a row has none.
        most: how many of each; fewer where the pool is so small that the two would meet.

    Returns:
        Best rows, best first; worst rows, worst first.
    """
    order = np.argsort(-influence, kind="stable")  # NaN sorts last
    scored = int(np.isfinite(influence).sum())
    order = order[:scored]
    best = [int(row) for row in order[:most]]
    worst = [int(row) for row in order[len(best) :][-most:][::-1]]
    return best, worst


def _turn(role: str, text: str) -> Turn:
    shown = text[:MOST_CHARACTERS]
    return Turn(
        role=role,
        excerpt=shown[:EXCERPT].rstrip() + " …" if len(shown) > EXCERPT * 1.25 else None,
        text=shown,
        characters=formats.count(len(text)),
        left_out=formats.count(len(text) - len(shown)) if len(shown) < len(text) else None,
    )


def roles_and_texts(example: Example) -> list[tuple[str, str]]:
    """What an example says, turn by turn."""
    if example.messages is not None:
        tools = [json.dumps(tool, ensure_ascii=False) for tool in example.rendering.get("tools", ())]
        listed = [("tools", "\n".join(tools))] if tools else []
        return [*listed, *(part for message in example.messages for part in said(message))]
    parts = (("prompt", example.prompt), ("completion", example.completion), ("text", example.text))
    return [(role, text) for role, text in parts if text is not None]


def _fetch(folder: RunFolder, pool: Pool | None, rows: Sequence[int]) -> tuple[dict[int, Example], str | None]:
    """Reads the texts of some rows; where the pool cannot be read, says so instead of failing.

    A report is most wanted for old runs and on other machines, where the pool may have moved.
    """
    if pool is None:
        inputs = folder.run.get("inputs", {}).get("pool", {})
        files = inputs.get("files")
        if not files:
            return {}, "Texts are not shown: run.json names no pool files."
        try:
            # Row numbers count good rows, so rows that the run skipped are skipped here too.
            pool = Pool(files, on_bad_row="skip", columns=inputs.get("columns"))
        except (InputError, OSError) as error:
            return {}, f"Texts are not shown, because the pool cannot be read: {error}"
    try:
        return {e.row: e for e in pool.take(rows)}, None
    except (InputError, OSError) as error:
        return {}, f"Texts are not shown, because the pool cannot be read: {error}"


def fetch_examples(folder: RunFolder, pool: Pool | None, rows: Sequence[int]) -> tuple[dict[int, Example], str | None]:
    """Reads the texts of some rows, those left out whose pool has changed since.

    Args:
        folder: the run.
        pool: where texts come from; None opens the files that run.json names.
        rows: row numbers.

    Returns:
        Examples by row; a warning, or None.
    """
    scores = folder.scores
    examples, warning = _fetch(folder, pool, rows)
    moved = [row for row, example in examples.items() if example.id != scores.id(row)]
    if moved:
        row = min(moved)
        warning = (
            f"Some texts are not shown, because the pool has changed since it was scored: row {row:,} is now "
            f"{examples[row].id!r} and was {scores.id(row)!r}."
        )
        for row in moved:
            del examples[row]
    return examples, warning


def example_cards(folder: RunFolder, examples: Mapping[int, Example], rows: Sequence[int]) -> list[ExampleCard]:
    """Builds the cards of some rows.

    Args:
        folder: the run.
        examples: texts by row; cards of others show none.
        rows: in the order of the cards.
    """
    scores = folder.scores
    ranks = scores.ranks
    chosen = set() if folder.selection is None else {int(row) for row in folder.selection.rows}

    def card(row: int) -> ExampleCard:
        example = examples.get(row)
        return ExampleCard(
            rank=formats.count(int(ranks[row])),
            id=scores.id(row),
            source=scores.source(row) or "(no source)",
            tokens=formats.count(scores.tokens[row]),
            influence=formats.score(scores.influence[row]),
            selected=row in chosen,
            tasks=tuple((task, formats.score(values[row])) for task, values in scores.tasks.items()),
            turns=() if example is None else tuple(_turn(*turn) for turn in roles_and_texts(example)),
            origin="" if example is None else example.origin,
            shading=() if example is None else tuple(folder.shading.get(row, ())),
        )

    return [card(row) for row in rows]
