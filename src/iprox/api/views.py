"""What a notebook shows of scores and of proxies: a table, and `.plot()`. Audits and alignments show themselves."""

from __future__ import annotations

import re
from html import escape
from typing import overload

import numpy as np
import plotly.graph_objects as go
import pyarrow as pa
from plotly.subplots import make_subplots
from torch import nn
from transformers import PreTrainedModel

from iprox.errors import InputError
from iprox.models import flops
from iprox.models.checkpoint import proxy_config
from iprox.models.layers import LowRankLinear, compressible_layers, low_rank_layers, weight_shape
from iprox.scores import TASK_PREFIX, score_matrix, task_names

BINS = 60


class ScoresView:
    """A scores table, to look at.

    Args:
        scores: from `iprox.score`, or `scores.parquet`.
    """

    def __init__(self, scores: pa.Table) -> None:
        self.scores, self.tasks = scores, task_names(scores)

    def _repr_html_(self) -> str:
        """A row a task: how its scores spread, and the best row by it."""
        ids = self.scores["id"]
        rows = []
        for task, values in zip(self.tasks, score_matrix(self.scores).T, strict=True):
            known = values[np.isfinite(values)]
            if not len(known):
                rows.append([escape(task), "0", *[""] * 4])
                continue
            best = str(ids[int(np.nanargmax(values))].as_py())
            cells = (f"{known.mean():.3g}", f"{known.std():.3g}", f"{(known > 0).mean():.0%}", escape(best))
            rows.append([escape(task), f"{len(known):,}", *cells])
        heads = ["task", "scored", "mean", "deviation", "positive", "best row"]
        return _table(f"Influence of {len(self.scores):,} rows; positive lowers the validation loss", heads, rows)

    def plot(self, task: str | None = None) -> go.Figure:
        """Histograms of the scores, as a Plotly figure.

        Args:
            task: the one to draw; all if None.

        Raises:
            InputError: there is no such task.
        """
        names = self.tasks if task is None else [task]
        if unknown := set(names) - set(self.tasks):
            raise InputError(f"scores: no task {unknown.pop()!r}; there are {', '.join(self.tasks)}")
        columns = min(3, len(names))
        lines = -(-len(names) // columns)
        figure = make_subplots(lines, columns, subplot_titles=[escape(name) for name in names])
        for number, name in enumerate(names):
            values = self.scores[TASK_PREFIX + name].to_numpy(zero_copy_only=False)
            counts, edges = np.histogram(values[np.isfinite(values)], BINS)
            bars = go.Bar(x=(edges[1:] + edges[:-1]) / 2, y=counts, width=np.diff(edges))
            row, column = number // columns + 1, number % columns + 1
            figure.add_trace(bars, row, column)
            figure.update_xaxes(title_text="influence", row=row, col=column)
        return figure.update_layout(showlegend=False, height=320 * lines)


class ProxyView:
    """A proxy, to look at.

    Args:
        proxy: from `iprox.compress`, `iprox.align` or `iprox.load`.

    Raises:
        InputError: it is no proxy.
    """

    def __init__(self, proxy: PreTrainedModel) -> None:
        config = proxy_config(proxy)
        if config is None:
            raise InputError("the model is no iprox proxy; make one with iprox.compress")
        self.proxy, self.config = proxy, config

    def _repr_html_(self) -> str:
        """Of what and how it was made, and how large it is."""
        layers = low_rank_layers(self.proxy)
        ranks = sorted(layer.rank for layer in layers.values())
        facts = [
            ["method", escape(self.config.method)],
            ["target", escape(self.config.target or "not named")],
            ["sparsity", f"{self.config.sparsity:.1%}"],
            ["parameters", f"{sum(parameter.numel() for parameter in self.proxy.parameters()):,}"],
            ["FLOPs a token, forward", f"{flops.forward_flops(self.proxy):.3g}"],
            ["low-rank layers", f"{len(layers)} of {len(layers) + len(self._dense())}"],
        ]
        if ranks:
            facts.append(["ranks", f"{ranks[0]} to {ranks[-1]}, median {ranks[len(ranks) // 2]}"])
        return _table("Proxy", ["", ""], facts)

    def plot(self) -> go.Figure:
        """The rank of each layer over the full one, by block and kind of layer, as a Plotly figure; dense layers are 1.

        Raises:
            InputError: it has no factors: it is a shorter or another model.
        """
        layers = low_rank_layers(self.proxy)
        if not layers:
            raise InputError(f"the proxy has no low-rank layers to draw (method {self.config.method})")
        places: dict[tuple[str, int], tuple[float, str]] = {}
        for name, layer in {**self._dense(), **layers}.items():
            m, n = weight_shape(layer)
            rank = layer.rank if isinstance(layer, LowRankLinear) else min(m, n)
            kind, block = _place(name)
            places[kind, block] = rank / min(m, n), f"{name}<br>rank {rank} of {min(m, n)}, {m} × {n}"
        kinds = list(dict.fromkeys(kind for kind, _ in places))
        blocks = sorted({block for _, block in places})
        empty = (np.nan, "")
        grid = [[places.get((kind, block), empty) for block in blocks] for kind in kinds]
        heat = go.Heatmap(
            x=blocks,
            y=kinds,
            z=[[share for share, _ in row] for row in grid],
            text=[[text for _, text in row] for row in grid],
            hovertemplate="%{text}<extra></extra>",
            zmin=0,
            zmax=1,
            colorbar={"title": "rank / full"},
        )
        figure = go.Figure(heat)
        return figure.update_layout(height=120 + 34 * len(kinds), xaxis_title="block", yaxis_autorange="reversed")

    def _dense(self) -> dict[str, nn.Module]:
        return compressible_layers(self.proxy)


@overload
def view(shown: pa.Table) -> ScoresView: ...
@overload
def view(shown: PreTrainedModel) -> ProxyView: ...
def view(shown: pa.Table | PreTrainedModel) -> ScoresView | ProxyView:
    """A scores table or a proxy as a notebook shows it: a table of what matters, and `.plot()`.

    Raises:
        InputError: it is neither.
    """
    if isinstance(shown, PreTrainedModel):
        return ProxyView(shown)
    if not isinstance(shown, pa.Table):
        raise InputError(f"iprox.view shows scores and proxies, not {type(shown).__name__}")
    if "influence" not in shown.column_names:
        raise InputError(f"the table has no column influence, so it is none of scores: {shown.column_names}")
    return ScoresView(shown)


def _place(name: str) -> tuple[str, int]:
    """The kind of a layer and its block: model.layers.3.mlp.up_proj -> (mlp.up_proj, 3)."""
    found = re.search(r"\.(\d+)\.(.+)$", name)
    return (found.group(2), int(found.group(1))) if found else (name, 0)


def _table(caption: str, heads: list[str], rows: list[list[str]]) -> str:
    head = "".join(f"<th>{text}</th>" for text in heads)
    body = "".join(f"<tr><th>{row[0]}</th>" + "".join(f"<td>{cell}</td>" for cell in row[1:]) + "</tr>" for row in rows)
    return f"<table><caption>{caption}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
