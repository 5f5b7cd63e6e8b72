"""The cascade: how many of the proxy's best rows the target has to score again to find its own best (pure maths)."""

from __future__ import annotations

import math

import numpy as np

from iprox.errors import InputError


def rows_needed(share: float, recall: float) -> int:
    """The smallest random sample from which a recall of the best `share` can be promised.

    It has to hold recall / (1 - recall) of the best rows: 170 rows for nine tenths of the best 5 %.
    """
    best = math.ceil(recall / (1 - recall) - 1e-9)
    return math.ceil((best - 0.5) / share)


def too_few(sample: int, share: float, recall: float) -> InputError:
    """What to say of a sample that is smaller than `rows_needed`."""
    return InputError(
        f"{sample:,} audited rows are too few to promise a recall of {recall:g} of the best {share:.2%}: audit "
        f"{rows_needed(share, recall):,} or more, or ask for less"
    )


def candidate_share(proxy: np.ndarray, target: np.ndarray, share: float, recall: float) -> float:
    """The share of the pool, best by the proxy, that holds the asked part of the target's best `share`.

    The sample's best rows by the target are like the pool's, so the place of one of those in the proxy's ranking is
    below the ⌈recall · (k + 1)⌉-th of the k places seen here with a chance of at least `recall`: the argument of split
    conformal prediction (Vovk et al., 2005; it takes rows to be exchangeable, which a random sample's are). So the
    recall expected over the pool is at least the one asked for, whatever the two models are like.

    Args:
        proxy: scores of a random sample [n].
        target: scores of the same rows [n].
        share: of the pool that is to be selected.
        recall: part of the target's best `share` to find, in (0, 1).

    Returns:
        A share in [share, 1].

    Raises:
        InputError: the sample holds too few of the best rows to promise that much.
    """
    count = max(1, math.floor(share * len(target) + 0.5 + 1e-9))
    best = np.argsort(-target, kind="stable")[:count]
    places = np.empty(len(proxy))
    places[np.argsort(-proxy, kind="stable")] = np.arange(1, len(proxy) + 1) / len(proxy)
    needed = math.ceil(recall * (count + 1) - 1e-9)
    if needed > count:
        raise too_few(len(target), share, recall)
    return max(share, float(np.sort(places[best])[needed - 1]))


def best_rows(scores: np.ndarray, share: float) -> np.ndarray:
    """Positions of the best share of scores [N], best first; rows without a score (NaN) are none of them."""
    order = np.argsort(-scores, kind="stable")
    return order[: min(math.ceil(share * len(scores)), int(np.isfinite(scores).sum()))]
