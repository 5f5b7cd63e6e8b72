"""How much the tops of two rankings share."""

from __future__ import annotations

import numpy as np

from iprox.settings import NAMED_SHARE

OVERLAP_AT = (0.01, 0.02, 0.05, 0.1, 0.2)
# The rows that a top has to hold for an overlap of two of them to say something.
TELLING = 10


def telling_share(sample: int) -> float:
    """The share whose overlap to name first: 5 %, or the next whose top is ten rows of a small sample, or the last."""
    shares = [share for share in OVERLAP_AT if share >= NAMED_SHARE]
    return next((share for share in shares if round(share * sample) >= TELLING), shares[-1])


def top_overlap(proxy: np.ndarray, target: np.ndarray, share: float) -> float:
    """Share of the target's top `share` that the proxy also ranks in its own top `share`, 0 to 1."""
    count = max(1, round(share * len(target)))
    chosen = np.argsort(-proxy, kind="stable")[:count]
    wanted = np.argsort(-target, kind="stable")[:count]
    return len(np.intersect1d(chosen, wanted)) / count
