"""Seeded random samples of rows."""

from __future__ import annotations

import random
from collections.abc import Iterable


def draw_rows(name: str, seed: int, total: int, count: int, exclude: Iterable[int] = ()) -> list[int]:
    """Return a seeded random sample of row numbers, none of them in `exclude`, in pool order.

    Each `name` has its own stream, so changing one stage's sample leaves the others alone.
    """
    taken = set(exclude)
    count = max(0, min(count, total - len(taken)))
    drawn = random.Random(f"{seed}:{name}").sample(range(total), min(total, count + len(taken)))
    return sorted([row for row in drawn if row not in taken][:count])
