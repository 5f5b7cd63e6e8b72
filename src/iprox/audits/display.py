"""How an audit shows itself in a notebook: a table, and scatter plots of the scores that were compared."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

import numpy as np
import plotly.graph_objects as go
import pyarrow as pa
from plotly.subplots import make_subplots


def audit_html(sample: int, tasks: Mapping[str, Mapping[str, Any]], mean: Mapping[str, Any]) -> str:
    """An audit as an HTML table: a row a task, and their mean."""
    shares = sorted(mean["overlap"], key=float)
    heads = ["task", "Spearman (95 %)", "Kendall", *(f"top {100 * float(share):g} %" for share in shares)]
    rows = []
    for name, entry in (*tasks.items(), ("mean", mean)):
        low, high = entry["intervals"]["spearman"]
        cells = [f"{entry['spearman']:.3f} ({low:.2f} to {high:.2f})", f"{entry['kendall']:.3f}"]
        cells += [f"{entry['overlap'][share]:.0%}" for share in shares]
        rows.append(f"<tr><th>{escape(name)}</th>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    head = "".join(f"<th>{text}</th>" for text in heads)
    caption = f"<caption>Proxy against target on {sample:,} rows</caption>"
    return f"<table>{caption}<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def audit_figure(scores: pa.Table, tasks: Mapping[str, Mapping[str, Any]], task: str | None = None) -> go.Figure:
    """Scatter plots of proxy against target scores, one a task.

    Args:
        scores: `AuditReport.scores`.
        tasks: `AuditReport.tasks`.
        task: the one to draw; all if None.

    Raises:
        KeyError: there is no such task.
    """
    names = list(tasks) if task is None else [task]
    columns = min(3, len(names))
    titles = [f"{name}: Spearman {tasks[name]['spearman']:.2f}" for name in names]
    figure = make_subplots(-(-len(names) // columns), columns, subplot_titles=[escape(title) for title in titles])
    ids = np.array([escape(name) for name in scores["id"].to_pylist()])
    for number, name in enumerate(names):
        target, proxy = (scores[f"{side}/{name}"].to_numpy(zero_copy_only=False) for side in ("target", "proxy"))
        row, column = number // columns + 1, number % columns + 1
        dots = go.Scattergl(x=target, y=proxy, mode="markers", text=ids, marker={"size": 5, "opacity": 0.6})
        figure.add_trace(dots, row, column)
        figure.update_xaxes(title_text="target score", row=row, col=column)
        figure.update_yaxes(title_text="proxy score", row=row, col=column)
    return figure.update_layout(showlegend=False, height=340 * (-(-len(names) // columns)))
