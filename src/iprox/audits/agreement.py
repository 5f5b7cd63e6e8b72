"""Agreement of two rankings of the same rows: rank correlation, shared tops, intervals, where they differ most."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from iprox.audits.removal import top_rows
from iprox.settings import NAMED_SHARE

Key = TypeVar("Key", bound=Hashable)

OVERLAP_AT = (0.01, 0.02, 0.05, 0.1, 0.2)
# Fewest rows in a top for its overlap with another top to mean much.
TELLING = 10
# Resamples per confidence interval, and its level.
RESAMPLES, LEVEL = 500, 0.95
# Fewest rows that a correlation is reported for.
FEWEST = 10
LENGTH_BINS = 5
# Number of rows listed as rated too high, and as rated too low.
DISAGREEMENTS = 5


def rank_correlations(samples: np.ndarray | Sequence[np.ndarray]) -> np.ndarray:
    """Return Spearman's rank correlations of K samples [K, N] with each other [K, K]; NaN where one is constant.

    Equals scipy's `spearmanr`, but skips its checks, which take longer than the computation on a few hundred rows.
    """
    from scipy.stats import rankdata  # half a second

    with np.errstate(invalid="ignore", divide="ignore"):
        return np.corrcoef(rankdata(samples, axis=1))


def spearman(x: np.ndarray, y: np.ndarray) -> float:
    """Return Spearman's rank correlation of two samples [N]; NaN if one is constant."""
    return float(rank_correlations([x, y])[0, 1])


def top_overlap(proxy: np.ndarray, target: np.ndarray, share: float, times: int = 1) -> float:
    """Return the fraction of the target's top `share` that is also in the proxy's top `times · share`.

    With several times as many, it is what the target finds if it scores these rows again.
    """
    count = max(1, round(share * len(target)))
    looked_at = top_rows(proxy, min(times * count, len(proxy)))
    return int(np.sum(looked_at & top_rows(target, count))) / count


def telling_share(sample: int) -> float:
    """Return the share whose overlap to report first: 5 %, or more if 5 % of the sample is fewer than ten rows."""
    shares = [share for share in OVERLAP_AT if share >= NAMED_SHARE]
    return next((share for share in shares if round(share * sample) >= TELLING), shares[-1])


def bootstrap_intervals(
    measure: Callable[[np.ndarray], Mapping[Key, float]], count: int, seed: int = 0
) -> dict[Key, list[float]]:
    """Return 95 % percentile intervals from resampling rows (the bootstrap: Efron, 1979).

    Args:
        measure: function from row positions [count], with repeats, to values by name.
        count: number of rows.
        seed: seed of the resampling.

    Returns:
        [low, high] by name; NaN if a value is NaN in every resample.
    """
    generator = np.random.default_rng(seed)
    drawn = [measure(generator.integers(0, count, count)) for _ in range(RESAMPLES)]
    tails = ((1 - LEVEL) / 2, (1 + LEVEL) / 2)
    bounds = {}
    for name in drawn[0]:
        values = np.array([figures[name] for figures in drawn])
        known = values[np.isfinite(values)]
        low, high = np.quantile(known, tails) if len(known) else (np.nan, np.nan)
        bounds[name] = [float(low), float(high)]
    return bounds


def by_group(measure: Callable[[np.ndarray], float], groups: Sequence[str | None]) -> dict[str, dict[str, Any]]:
    """Return `rows` and `spearman` within each named group of at least ten rows, largest group first."""
    names, codes = np.unique(["" if group is None else group for group in groups], return_inverse=True)
    members = {str(name): np.flatnonzero(codes == code) for code, name in enumerate(names) if name}
    largest = sorted(members.items(), key=lambda item: (-len(item[1]), item[0]))
    return {name: {"rows": len(rows), "spearman": measure(rows)} for name, rows in largest if len(rows) >= FEWEST}


def by_length(measure: Callable[[np.ndarray], float], tokens: np.ndarray) -> list[dict[str, Any]]:
    """Return the range of `tokens`, `rows` and `spearman` for each fifth of the rows by length, shortest first.

    Rows of equal length stay together.
    """
    edges = np.unique(np.quantile(tokens, np.linspace(0, 1, LENGTH_BINS + 1)[1:-1]))
    bins = np.searchsorted(edges, tokens, side="left")
    found = []
    for number in np.unique(bins):
        rows = np.flatnonzero(bins == number)
        if len(rows) >= FEWEST:
            lengths = [int(tokens[rows].min()), int(tokens[rows].max())]
            found.append({"tokens": lengths, "rows": len(rows), "spearman": measure(rows)})
    return found


def disagreements(proxy: np.ndarray, target: np.ndarray) -> list[dict[str, Any]]:
    """Return the rows whose ranks differ most: those that the proxy rates too high, then those it rates too low.

    Each entry has the row's `position` in the sample and its relative ranks `proxy` and `target`, from 0 (best) to 1.
    """
    from scipy.stats import rankdata  # half a second

    places = [(rankdata(-scores) - 0.5) / len(scores) for scores in (proxy, target)]
    order = np.argsort(places[0] - places[1], kind="stable")
    too_high, too_low = order[:DISAGREEMENTS], order[::-1][:DISAGREEMENTS]
    return [
        {"position": int(row), "proxy": float(places[0][row]), "target": float(places[1][row])}
        for row in dict.fromkeys([*too_high.tolist(), *too_low.tolist()])
        if places[0][row] != places[1][row]
    ]
