"""What scores are for: choosing rows, and comparing a proxy's with its target's."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from torch import nn

from iprox.api.arguments import check_model
from iprox.api.examples import Examples, as_pool
from iprox.api.scoring import influence_settings, score
from iprox.audits.fidelity import AuditReport, compare_scores
from iprox.errors import InputError
from iprox.models.layers import low_rank_layers
from iprox.selection import SelectionSettings, Strategy, select_rows
from iprox.selection.guard import guard


def select(
    scores: pa.Table,
    *,
    fraction: float | None = None,
    count: int | None = None,
    tokens: int | None = None,
    strategy: Strategy = "round-robin",
    task: str | None = None,
    weights: Mapping[str, float] | None = None,
    threshold: float | None = None,
    source_floor: Mapping[str, float] | None = None,
    source_cap: float | Mapping[str, float] | None = None,
    deduplicate: float | None = None,
    pool: Examples | None = None,
) -> np.ndarray:
    """The chosen rows of a scores table: int64 row numbers, best first.

    Warns where the selected answers are several times shorter or longer than the validation answers, or, with `pool`,
    where many of them are near-duplicates (`iprox.selection.guard`).

    Args:
        scores: from `score`.
        fraction: share of the rows; exactly one of this, `count` and `tokens` (or a `threshold` alone).
        count: number of rows.
        tokens: number of tokens that they may have in all.
        strategy: `top` or `round-robin` (`iprox.selection.SelectionSettings`).
        task: the one task whose scores count, where they are of several.
        weights: by task, how much it counts; 1 where it is not named.
        threshold: lowest score to choose; there may then be fewer rows.
        source_floor: by source, the least share of the selection.
        source_cap: the largest share of the selection, of any source or by source.
        deduplicate: similarity of words from which two rows are near-duplicates, of which the better is kept; it
            needs `pool`.
        pool: what was scored; near-duplicates are looked for in its texts.

    Raises:
        InputError: bad input; the message says which and how to fix it.
    """
    if not isinstance(scores, pa.Table):
        raise InputError(
            f"scores: expected the pyarrow.Table of iprox.score, not a {type(scores).__name__}; "
            "pyarrow.parquet.read_table reads scores.parquet, pyarrow.Table.from_pandas a frame of it"
        )
    settings = SelectionSettings(
        fraction=fraction,
        count=count,
        tokens=tokens,
        strategy=strategy,
        task=task,
        weights=weights or {},
        threshold=threshold,
        source_floor=source_floor or {},
        source_cap=source_cap,
        deduplicate=deduplicate,
    )
    source = None if pool is None else as_pool(pool, "pool")
    texts = None if source is None else lambda rows: [example.words for example in source.take(rows)]
    rows = select_rows(
        scores,
        settings,
        texts=texts,
    ).rows
    for line in guard(scores, rows, settings, "python", texts).warnings:
        warnings.warn(line, stacklevel=2)
    return rows


def audit(
    model: nn.Module,
    proxy: nn.Module,
    sample: Examples,
    validation: Mapping[str, Examples],
    *,
    query: Literal["target", "proxy"] = "target",
    **settings: Any,
) -> AuditReport:
    """Return how faithfully a proxy ranks a sample: its scores against the target's.

    Args:
        model: the target.
        proxy: its proxy.
        sample: examples to compare on.
        validation: validation examples by task.
        query: where the proxy's validation gradients are taken, on its `target` or on the `proxy` too. Proxies that
            are not factorized take their own.
        **settings: as for `score`; a `query_norm` applies to the proxy's scores, the target's are exact.
    """
    check_model("model", model)
    check_model("proxy", proxy)
    influence_settings(query=query)
    settings = {"per_example": False, **settings}
    target = model if query == "target" and low_rank_layers(proxy) else None
    on_proxy = score(proxy, sample, validation, target=target, **settings)
    # Whole validation gradients and exact norms, so that the two have no error in common.
    return compare_scores(on_proxy, score(model, sample, validation, **{**settings, "query_norm": 1.0}))
