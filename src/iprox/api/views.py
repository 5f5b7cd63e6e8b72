"""Notebook views of scores and proxies: a table and `.plot()`."""

from __future__ import annotations

from typing import TYPE_CHECKING, overload

import numpy as np
import pyarrow as pa
from transformers import PreTrainedModel

from iprox.errors import InputError
from iprox.models import flops
from iprox.models.checkpoint import proxy_config
from iprox.models.layers import compressible_layers, low_rank_layers, weight_shape
from iprox.report import charts, formats
from iprox.scores import TASK_PREFIX, score_matrix, task_names

if TYPE_CHECKING:
    import plotly.graph_objects as go


class ScoresView:
    """A view of a scores table.

    Args:
        scores: scores table from `iprox.score`, or `scores.parquet`.
    """

    def __init__(self, scores: pa.Table) -> None:
        self.scores, self.tasks = scores, task_names(scores)

    def _repr_html_(self) -> str:
        """Return one line per task: the spread of its scores, and its best row."""
        ids = self.scores["id"]
        rows = []
        for task, values in zip(self.tasks, score_matrix(self.scores).T, strict=True):
            known = values[np.isfinite(values)]
            if not len(known):
                rows.append([task, "0", *[""] * 4])
                continue
            best = str(ids[int(np.nanargmax(values))].as_py())
            spread = (f"{known.mean():.3g}", f"{known.std():.3g}", f"{(known > 0).mean():.0%}")
            rows.append([task, f"{len(known):,}", *spread, best])
        heads = ["task", "scored", "mean", "standard deviation", "positive", "best row"]
        caption = f"Influence of {len(self.scores):,} rows; a positive score means a lower validation loss"
        return formats.html_table(caption, heads, rows)

    def plot(self, task: str | None = None) -> go.Figure:
        """Return histograms of the scores as a Plotly figure.

        Args:
            task: task to draw; None draws all.

        Raises:
            InputError: there is no such task.
        """
        names = self.tasks if task is None else [task]
        if unknown := set(names) - set(self.tasks):
            raise InputError(f"scores: no task {unknown.pop()!r}; the tasks are {', '.join(self.tasks)}")
        columns = {name: self.scores[TASK_PREFIX + name].to_numpy(zero_copy_only=False) for name in names}
        known = {name: values for name, values in columns.items() if np.isfinite(values).any()}
        if not known:
            raise InputError("scores: no row has a score, so there is nothing to draw")
        return charts.figures([charts.score_histogram(values, title=name) for name, values in known.items()])


class ProxyView:
    """A view of a proxy.

    Args:
        proxy: proxy from `iprox.compress`, `iprox.align` or `iprox.load`.

    Raises:
        InputError: the model is not a proxy.
    """

    def __init__(self, proxy: PreTrainedModel) -> None:
        config = proxy_config(proxy)
        if config is None:
            raise InputError("the model is not an iprox proxy; make one with iprox.compress")
        self.proxy, self.config = proxy, config

    def _repr_html_(self) -> str:
        """Return how the proxy was made, from which target, and its size."""
        layers = low_rank_layers(self.proxy)
        ranks = sorted(layer.rank for layer in layers.values())
        facts = [
            ["method", self.config.method],
            ["target", self.config.target or "not named"],
            ["sparsity", f"{self.config.sparsity:.1%}"],
            ["parameters", f"{sum(parameter.numel() for parameter in self.proxy.parameters()):,}"],
            ["FLOPs per token, forward", f"{flops.forward_flops(self.proxy):.3g}"],
            ["low-rank layers", f"{len(layers)} of {len(layers) + len(compressible_layers(self.proxy))}"],
        ]
        if ranks:
            facts.append(["ranks", f"{ranks[0]} to {ranks[-1]}, median {ranks[len(ranks) // 2]}"])
        return formats.html_table("Proxy", ["", ""], facts)

    def plot(self) -> go.Figure:
        """Return the rank of each layer, in front of its full rank, as a Plotly figure.

        Raises:
            InputError: the proxy has no low-rank layers, because it is a shorter or another model.
        """
        low_rank = low_rank_layers(self.proxy)
        if not low_rank:
            raise InputError(f"the proxy has no low-rank layers to draw (method {self.config.method})")
        every = {**compressible_layers(self.proxy), **low_rank}
        layers = {
            name: {"shape": weight_shape(every[name]), "rank": low_rank[name].rank if name in low_rank else None}
            for name, _ in self.proxy.named_modules()
            if name in every
        }
        return charts.figures([charts.rank_chart(layers)])


@overload
def view(shown: pa.Table) -> ScoresView: ...
@overload
def view(shown: PreTrainedModel) -> ProxyView: ...
def view(shown: pa.Table | PreTrainedModel) -> ScoresView | ProxyView:
    """Return a notebook view of a scores table or a proxy: a table, and `.plot()`.

    Raises:
        InputError: it is neither.
    """
    if isinstance(shown, PreTrainedModel):
        return ProxyView(shown)
    if not isinstance(shown, pa.Table):
        raise InputError(f"iprox.view shows scores and proxies, not {type(shown).__name__}")
    if "influence" not in shown.column_names:
        raise InputError(f"the table has no column influence, so it has no scores; its columns: {shown.column_names}")
    return ScoresView(shown)
