"""What scores are for: choosing rows, and comparing a proxy's with its target's."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
from torch import nn

from iprox.api.arguments import check_model
from iprox.api.examples import Examples, as_pool
from iprox.api.scoring import score
from iprox.audits.fidelity import AuditReport, compare_scores
from iprox.errors import InputError
from iprox.influence.scoring import Query
from iprox.models.layers import low_rank_layers
from iprox.recipe import section_of
from iprox.selection import select_rows
from iprox.selection.guard import guard
from iprox.settings import SelectSection, Strategy


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
    """Return the row numbers of the selected rows of a scores table: int64, best first.

    Warns where the selected answers are several times shorter or longer than the validation answers, or, with `pool`,
    where many of them are near-duplicates. The arguments from `fraction` to `deduplicate` are the settings of
    `iprox.settings.SelectSection`.

    Args:
        scores: scores table from `score`.
        fraction: share of the rows; at most one of this, `count` and `tokens`. 0.05 if none of them and no `threshold`
            is given.
        count: number of rows.
        tokens: number of tokens that the rows may have in all.
        strategy: `top` or `round-robin`.
        task: the one task whose scores count; None uses those of all tasks.
        weights: weight of each task, 1 where a task is not named.
        threshold: lowest score that may be chosen, so there may be fewer rows than asked for.
        source_floor: smallest share of the selection, by source.
        source_cap: largest share of the selection, of every source or by source.
        deduplicate: similarity of words from which two rows are near-duplicates, of which the better is kept; needs
            `pool`.
        pool: examples that were scored, in the same order; near-duplicates are found by their texts.

    Raises:
        InputError: bad input; the message names the argument and how to fix it.
    """
    if not isinstance(scores, pa.Table):
        raise InputError(
            f"scores: expected the pyarrow.Table of iprox.score, not a {type(scores).__name__}; "
            "pyarrow.parquet.read_table reads scores.parquet, pyarrow.Table.from_pandas a frame of it"
        )
    settings = section_of(
        SelectSection,
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
    rows = select_rows(scores, settings, texts=texts).rows
    for line in guard(scores, rows, settings, "python", texts).warnings:
        warnings.warn(line, stacklevel=2)
    return rows


def audit(
    model: nn.Module,
    proxy: nn.Module,
    sample: Examples,
    validation: Mapping[str, Examples],
    *,
    query: Query = "target",
    **settings: Any,
) -> AuditReport:
    """How faithfully a proxy ranks a sample: its scores against the target's.

    Args:
        model: the target.
        proxy: its proxy.
        sample: examples to compare on.
        validation: validation examples by task.
        query: where the proxy's validation gradients are taken, on its `target` or on the `proxy` too. Proxies that
            are not factorized take their own.
        **settings: as for `score`; a `query_norm` is of the proxy's scores, the target's are exact.
    """
    check_model("model", model)
    check_model("proxy", proxy)
    target = model if query == "target" and low_rank_layers(proxy) else None
    settings = {"per_example": False, **settings}
    on_proxy = score(proxy, sample, validation, target=target, **settings)
    # Whole validation gradients and exact norms, so that the two have no error in common.
    exact = {name: value for name, value in settings.items() if name != "norm_sketch"}
    return compare_scores(on_proxy, score(model, sample, validation, **{**exact, "query_norm": 1.0}))
