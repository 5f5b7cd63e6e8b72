"""The rows that the page shows with their texts: cards of the best and worst, the browser, and shaded tokens."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.parquet as pq

from iprox.data import Example, Pool, said
from iprox.errors import InputError
from iprox.report import formats
from iprox.report.charts.base import safe_json

if TYPE_CHECKING:
    from iprox.report.finished_run import FinishedRun

# Cards of the best rows, and of the worst.
SHOWN_EACH = 10
# Longer texts start folded, with this many characters in view; the rest of a text longer than MOST_CHARACTERS is left
# out, so that one row does not make the page megabytes large.
EXCERPT, MOST_CHARACTERS = 320, 8_000

# Rows of the browser: the best that were selected, the best of each task, the worst, and evenly spaced ones.
SELECTED, BEST_OF_TASK, WORST, ANY = 160, 40, 40, 80
# Number of tasks whose best rows the browser has. The best rows of the others are among the best of all together.
MOST_TASKS = 6
# Characters per row of the browser, and of all of its rows.
ROW_CHARACTERS, ALL_CHARACTERS = 4_000, 300_000

# Number of shades for tokens that help, and for tokens that harm.
LEVELS = 5
# Shaded tokens per row, and in the page.
ROW_TOKENS, ALL_TOKENS = 1_200, 60_000


@dataclass(frozen=True, slots=True)
class ShadedToken:
    """A token as shown.

    Attributes:
        text: text of the token.
        level: shade, from -5 (harms most) to 5 (helps most).
        term: the token's part of the score, as text.
        supervised: whether the loss is taken on it.
    """

    text: str
    level: int
    term: str
    supervised: bool

    @property
    def classes(self) -> str:
        """CSS classes of the token's element."""
        shade = f"help{self.level}" if self.level > 0 else f"harm{-self.level}" if self.level < 0 else ""
        return " ".join(name for name in ("tok", shade, "sup" if self.supervised else "") if name)


def extreme_rows(influence: np.ndarray, most: int = SHOWN_EACH) -> tuple[list[int], list[int]]:
    """Return the rows with the highest scores, best first, and those with the lowest, worst first.

    Args:
        influence: scores [N], NaN where a row has none.
        most: number of rows of each kind; fewer in a pool so small that a row would be in both.
    """
    order = _ranked(influence).tolist()
    best = order[:most]
    return best, order[len(best) :][-most:][::-1]


def browser_rows(run: FinishedRun) -> list[int]:
    """Return the rows of the browser: the best selected, the best of each task, the worst, and evenly spaced others."""
    scores = run.scores
    order = _ranked(scores.influence)
    chosen = order if run.selection is None else run.selection.rows
    rows = [*chosen[:SELECTED], *order[: BEST_OF_TASK // 2], *order[::-1][:WORST]]
    for values in list(scores.tasks.values())[:MOST_TASKS]:
        rows += _ranked(values)[:BEST_OF_TASK].tolist()
    if len(order):
        rows += order[np.linspace(0, len(order) - 1, min(ANY, len(order))).astype(int)].tolist()
    return list(dict.fromkeys(int(row) for row in rows))


def _ranked(values: np.ndarray) -> np.ndarray:
    """Return the rows that have a score, best first."""
    return np.argsort(-values, kind="stable")[: int(np.isfinite(values).sum())]  # NaN sorts last


def roles_and_texts(example: Example) -> list[tuple[str, str]]:
    """Return the role and the text of each turn of an example."""
    if example.messages is not None:
        tools = [json.dumps(tool, ensure_ascii=False) for tool in example.rendering.get("tools", ())]
        listed = [("tools", "\n".join(tools))] if tools else []
        found = [*listed, *(part for message in example.messages for part in said(message))]
    else:
        parts = (("prompt", example.prompt), ("completion", example.completion), ("text", example.text))
        found = [(role, text) for role, text in parts if text is not None]
    if (other := example.rejected) is not None:
        answer = (other.messages or ())[other.supervised_from :]
        found += [(f"rejected {role}", text) for message in answer for role, text in said(message)]
        found += [] if other.completion is None else [("rejected", other.completion)]
    return found


def fetch_examples(run: FinishedRun, pool: Pool | None, rows: Sequence[int]) -> tuple[dict[int, Example], str | None]:
    """Return the examples of some rows, and a warning if the pool cannot be read or has changed.

    Reports are most wanted for old runs and on other machines, where the pool may have moved, so this is not an error.
    Without a pool, the files that run.json names are read.
    """
    try:
        if pool is None:
            inputs = run.record.get("inputs", {}).get("pool", {})
            if not inputs.get("files"):
                return {}, "The page shows no texts of rows, because run.json does not name the files of the pool."
            # Row numbers count good rows, so rows that the run skipped are skipped here too.
            pairs = inputs.get("pairs", False)
            pool = Pool(inputs["files"], on_bad_row="skip", columns=inputs.get("columns"), pairs=pairs)
        examples = {example.row: example for example in pool.take(rows)}
    except (InputError, OSError) as error:
        return {}, f"The page shows no texts of rows, because the pool cannot be read: {error}"
    moved = [row for row, example in examples.items() if example.id != run.scores.id(row)]
    if not moved:
        return examples, None
    row = min(moved)
    warning = (
        "The page leaves out the texts of some rows, because the pool has changed since it was scored: row "
        f"{row:,} is now {examples[row].id!r} and was {run.scores.id(row)!r}."
    )
    return {row: example for row, example in examples.items() if row not in moved}, warning


def _described(run: FinishedRun, row: int) -> dict[str, Any]:
    """Return what is shown of a row besides its texts; `scores` and `shown` have the influence, then that by task."""
    scores = run.scores
    values = [float(column[row]) for column in (scores.influence, *scores.tasks.values())]
    return {
        "rank": formats.count(int(scores.ranks[row])),
        "id": scores.id(row),
        "source": scores.source(row) or "(no source)",
        "tokens": formats.count(scores.tokens[row]),
        "selected": row in run.selected,
        "scores": values,
        "shown": [formats.score(value) for value in values],
    }


def example_cards(run: FinishedRun, examples: Mapping[int, Example], rows: Sequence[int]) -> list[dict[str, Any]]:
    """Return the cards of some rows, in the order of `rows`; cards of rows without an example show no text."""
    cards = []
    for row in rows:
        texts: dict[str, Any] = {"turns": [], "origin": "", "shading": []}
        if (example := examples.get(row)) is not None:
            turns = [_turn(*turn) for turn in roles_and_texts(example)]
            texts = {"turns": turns, "origin": example.origin, "shading": run.shading.get(row, [])}
        cards.append({**_described(run, row), "tasks": list(run.scores.tasks), **texts})
    return cards


def _turn(role: str, text: str) -> dict[str, Any]:
    shown = text[:MOST_CHARACTERS]
    return {
        "role": role,
        "excerpt": shown[:EXCERPT].rstrip() + " …" if len(shown) > EXCERPT * 1.25 else None,
        "text": shown,
        "characters": formats.count(len(text)),
        "left_out": formats.count(len(text) - len(shown)) if len(shown) < len(text) else None,
    }


def browser_data(run: FinishedRun, rows: Sequence[int], examples: Mapping[int, Example]) -> dict[str, Any] | None:
    """Return the values that the template and browser.js show, or None if there is no text to show."""
    held: list[dict[str, Any]] = []
    characters = 0
    for row in rows:
        example, described = examples.get(row), _described(run, row)
        # A row without a score for some task cannot be sorted by it.
        if example is None or not np.isfinite(described["scores"]).all():
            continue
        turns = _shortened(roles_and_texts(example))
        characters += sum(len(text) for _, text, _ in turns)
        if characters > ALL_CHARACTERS:
            break
        tokens = run.shading.get(row)
        pieces = tokens and [(token.text, token.classes, token.term) for token in tokens]
        held.append({"row": row, **described, "turns": turns, "pieces": pieces})
    if not held:
        return None
    tasks = list(run.scores.tasks)
    return {
        "data": safe_json(json.dumps({"tasks": tasks, "rows": held}, ensure_ascii=False)),
        "tasks": tasks,
        "sources": sorted({row["source"] for row in held}),
        "held": formats.rows(len(held)),
        "of": formats.count(run.scores.rows),
    }


def _shortened(turns: Sequence[tuple[str, str]]) -> list[tuple[str, str, str]]:
    """Return (role, text, number of characters left out) per turn, within the limit of characters per row."""
    left = ROW_CHARACTERS
    shortened = []
    for role, text in turns:
        shown = text[:left]
        left -= len(shown)
        shortened.append((role, shown, formats.count(len(text) - len(shown)) if len(shown) < len(text) else ""))
    return shortened


def read_shading(path: Path) -> dict[int, list[ShadedToken]]:
    """Return the shaded tokens by row of an `attribution.parquet`; none if there is no such file."""
    if not path.is_file():
        return {}
    names = ["row", "tokens", "supervised", "influence"]
    columns = [pq.read_table(path, columns=[name])[name].to_pylist() for name in names]
    found, total = {}, 0
    for row, tokens, supervised, terms in zip(*columns, strict=True):
        if terms is None:
            continue
        shown = shaded(tokens, supervised, np.array(terms))
        total += len(shown)
        if total > ALL_TOKENS:
            break
        found[row] = shown
    return found


def shaded(tokens: Sequence[str], supervised: Sequence[bool], terms: np.ndarray) -> list[ShadedToken]:
    """Return the tokens of a row with their shades, relative to the strongest term of the row.

    A long row keeps its end, where the answer is. A row whose terms are all 0 has no shades.
    """
    strongest = float(np.abs(terms).max(initial=0.0))
    levels = np.rint(LEVELS * terms / strongest).astype(int) if strongest > 0 else np.zeros(len(terms), int)
    return [
        ShadedToken(text, int(level), formats.score(float(term)), counts)
        for text, level, term, counts in list(zip(tokens, levels, terms, supervised, strict=True))[-ROW_TOKENS:]
    ]
