"""Select rows by scores, and audit a proxy's scores."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from torch import nn

from iprox.api.arguments import check_model, chosen, takes
from iprox.api.examples import Examples, as_pool
from iprox.api.scoring import score
from iprox.audits.fidelity import AuditReport, compare_scores
from iprox.errors import InputError
from iprox.models.layers import low_rank_layers
from iprox.recipe import validated
from iprox.selection import select_rows
from iprox.selection.guard import guard
from iprox.settings import InfluenceSection, SelectSection

_OF_SELECTION = tuple(SelectSection.model_fields)


@takes(SelectSection, *_OF_SELECTION)
def select(scores: pa.Table, *, pool: Examples | None = None, **settings: Any) -> np.ndarray:
    """Return the row numbers of the selected rows of a scores table: int64, best first.

    Warns if the selected answers are several times shorter or longer than the validation answers or, with `pool`, if
    many of them are near-duplicates.

    Args:
        scores: scores table from `score`.
        pool: the examples that were scored, in the same order, to find near-duplicates by their texts.
        **settings: settings of `select` in a recipe.

    Raises:
        InputError: bad input; the message names the argument and how to fix it.
    """
    if not isinstance(scores, pa.Table):
        raise InputError(
            f"scores: expected the pyarrow.Table of iprox.score, not a {type(scores).__name__}; "
            "pyarrow.parquet.read_table reads scores.parquet, pyarrow.Table.from_pandas a frame of it"
        )
    how = chosen(SelectSection, select, settings, _OF_SELECTION)
    source = None if pool is None else as_pool(pool, "pool")
    texts = None if source is None else lambda rows: [example.words for example in source.take(rows)]
    rows = select_rows(scores, how, texts=texts).rows
    for line in guard(scores, rows, how, "python", texts).warnings:
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
    """Return how faithfully a proxy ranks a sample: its scores compared with the target's.

    Args:
        model: the target.
        proxy: its proxy.
        sample: examples to compare the scores of.
        validation: validation examples by task.
        query: where the proxy's validation gradients are taken: on the `target` or on the `proxy`. Proxies without
            low-rank layers always use their own.
        **settings: as for `score`; `query_norm` applies to the proxy only, the target's scores are exact.
    """
    check_model("model", model)
    check_model("proxy", proxy)
    validated(InfluenceSection, {"query": query}, "audit")
    settings = {"per_example": False, **settings}
    target = model if query == "target" and low_rank_layers(proxy) else None
    on_proxy = score(proxy, sample, validation, target=target, **settings)
    # The target's scores are exact, so that proxy and target share no approximation error.
    return compare_scores(on_proxy, score(model, sample, validation, **{**settings, "query_norm": 1.0}))
