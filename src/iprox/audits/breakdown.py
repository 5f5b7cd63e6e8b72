"""Where a proxy is faithful and where not: by source, by length, along its ranking, and the rows it misjudges most."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

# Fewest rows that a correlation is given for.
FEWEST = 10
LENGTH_BINS = 5
CALIBRATION_BINS = 10
DISAGREEMENTS = 5

# Positions in the sample -> a figure.
Measure = Callable[[np.ndarray], float]


def by_group(measure: Measure, groups: Sequence[str | None]) -> dict[str, dict[str, Any]]:
    """The figure within each group of at least ten rows, the largest first; rows of no group are left out."""
    names, codes = np.unique(["" if group is None else group for group in groups], return_inverse=True)
    members = {str(name): np.flatnonzero(codes == code) for code, name in enumerate(names) if name}
    largest = sorted(members.items(), key=lambda item: (-len(item[1]), item[0]))
    return {name: {"rows": len(rows), "spearman": measure(rows)} for name, rows in largest if len(rows) >= FEWEST}


def by_length(measure: Measure, tokens: np.ndarray) -> list[dict[str, Any]]:
    """The figure within fifths of the rows by length, shortest first; equal lengths stay together."""
    edges = np.unique(np.quantile(tokens, np.linspace(0, 1, LENGTH_BINS + 1)[1:-1]))
    bins = np.searchsorted(edges, tokens, side="left")
    found = []
    for number in np.unique(bins):
        rows = np.flatnonzero(bins == number)
        if len(rows) >= FEWEST:
            lengths = [int(tokens[rows].min()), int(tokens[rows].max())]
            found.append({"tokens": lengths, "rows": len(rows), "spearman": measure(rows)})
    return found


def calibration(proxy: np.ndarray, target: np.ndarray, share: float) -> list[dict[str, float]]:
    """What the target thinks of tenths of the rows in the proxy's order, best first.

    Args:
        proxy: scores [N].
        target: scores [N].
        share: of the target's best rows.

    Returns:
        For each tenth the mean score on the target in standard deviations, and which part of the target's best
        `share` it holds. Of a faithful proxy the first falls from tenth to tenth, and the first tenth holds all.
    """
    spread = target.std()
    scores = (target - target.mean()) / (spread if spread > 0 else 1.0)
    best = np.zeros(len(target), bool)
    best[np.argsort(-target, kind="stable")[: max(1, round(share * len(target)))]] = True
    tenths = np.array_split(np.argsort(-proxy, kind="stable"), min(CALIBRATION_BINS, len(proxy)))
    return [
        {"target_score": float(scores[rows].mean()), "of_target_top": float(best[rows].sum() / best.sum())}
        for rows in tenths
    ]


def disagreements(proxy: np.ndarray, target: np.ndarray) -> list[dict[str, Any]]:
    """The rows whose places in the two rankings are furthest apart: those rated too high, then those rated too low.

    Returns:
        For each its `position` in the sample and its places `proxy` and `target`, 0 the best and 1 the worst.
    """
    from scipy import stats

    places = [(stats.rankdata(-scores) - 0.5) / len(scores) for scores in (proxy, target)]
    order = np.argsort(places[0] - places[1], kind="stable")
    too_high, too_low = order[:DISAGREEMENTS], order[::-1][:DISAGREEMENTS]
    return [
        {"position": int(row), "proxy": float(places[0][row]), "target": float(places[1][row])}
        for row in dict.fromkeys([*too_high.tolist(), *too_low.tolist()])
        if places[0][row] != places[1][row]
    ]
