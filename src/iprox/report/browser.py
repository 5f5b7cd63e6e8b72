"""The rows that the browser of examples holds, as JSON: enough to look around in, few enough for a page."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from markupsafe import Markup

from iprox.data import Example
from iprox.report import formats
from iprox.report.charts import safe_json
from iprox.report.examples import roles_and_texts
from iprox.report.run_folder import RunFolder
from iprox.report.shading import browser_tokens

# How many of each kind; a row may be of several.
SELECTED, BEST_OF_TASK, WORST, ANY = 160, 40, 40, 80
# Tasks whose best rows are held; the others' are among the best of all together.
MOST_TASKS = 6
# Of one row's texts, and of all of them.
ROW_CHARACTERS, ALL_CHARACTERS = 6_000, 1_500_000


def browser_rows(folder: RunFolder) -> list[int]:
    """The rows to hold: the best that are selected, the best of each task, the worst, and evenly spaced others."""
    scores = folder.scores
    order = np.argsort(-scores.influence, kind="stable")[: int(np.isfinite(scores.influence).sum())]
    chosen = order if folder.selection is None else folder.selection.rows
    rows = [*chosen[:SELECTED], *order[: BEST_OF_TASK // 2], *order[::-1][:WORST]]
    for values in list(scores.tasks.values())[:MOST_TASKS]:
        rows += np.argsort(-values, kind="stable")[: min(BEST_OF_TASK, int(np.isfinite(values).sum()))].tolist()
    if len(order):
        rows += order[np.linspace(0, len(order) - 1, min(ANY, len(order))).astype(int)].tolist()
    return list(dict.fromkeys(int(row) for row in rows))


def browser_data(folder: RunFolder, rows: Sequence[int], examples: Mapping[int, Example]) -> dict[str, Any] | None:
    """What the template and browser.js need, or None where no text can be shown.

    Args:
        folder: the run.
        rows: from `browser_rows`.
        examples: their texts, by row; those missing are left out.
    """
    scores = folder.scores
    selected = set() if folder.selection is None else set(folder.selection.rows.tolist())
    held: list[dict[str, Any]] = []
    characters = 0
    for row in rows:
        example = examples.get(row)
        columns = [scores.influence[row], *(values[row] for values in scores.tasks.values())]
        # A row that a task has no score of cannot be sorted by it.
        if example is None or not np.isfinite(columns).all():
            continue
        turns = _shortened(roles_and_texts(example))
        characters += sum(len(text) for _, text, _ in turns)
        if characters > ALL_CHARACTERS:
            break
        held.append(
            {
                "row": row,
                "rank": formats.count(int(scores.ranks[row])),
                "id": scores.id(row),
                "source": scores.source(row) or "(no source)",
                "tokens": formats.count(scores.tokens[row]),
                "selected": row in selected,
                "scores": [float(value) for value in columns],
                "shown": [formats.score(value) for value in columns],
                "turns": turns,
                "pieces": browser_tokens(folder.shading.get(row)),
            }
        )
    if not held:
        return None
    data: Markup = safe_json(json.dumps({"tasks": list(scores.tasks), "rows": held}, ensure_ascii=False))
    return {
        "data": data,
        "tasks": list(scores.tasks),
        "sources": sorted({row["source"] for row in held}),
        "held": formats.rows(len(held)),
        "of": formats.count(scores.rows),
    }


def _shortened(turns: Sequence[tuple[str, str]]) -> list[tuple[str, str, str]]:
    """Each (role, text, characters left out), together within what a row may have."""
    left = ROW_CHARACTERS
    shortened = []
    for role, text in turns:
        shown = text[:left]
        left -= len(shown)
        shortened.append((role, shown, formats.count(len(text) - len(shown)) if len(shown) < len(text) else ""))
    return shortened
