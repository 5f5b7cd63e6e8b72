"""Comparison of any number of scores of the same pool: how alike they rank it, and how much their tops share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np
import plotly.graph_objects as go
import pyarrow as pa
import pyarrow.compute as pc
from plotly.subplots import make_subplots
from scipy import stats

from iprox.audit.overlap import NAMED
from iprox.errors import InputError
from iprox.influence.scores import TASK_PREFIX, task_names

FEWEST = 10


@dataclass(frozen=True, slots=True)
class Comparison:
    """How K scores of the same rows agree, two and two.

    Attributes:
        names: of the scores, K.
        tasks: those that all have.
        rows: rows that all have a score of; ranks are among them.
        share: of the rows that a top is.
        spearman: by task the rank correlations, float64 [K, K]; NaN where one side is constant.
        overlap: by task the share of one top that is in the other, float64 [K, K].
    """

    names: list[str]
    tasks: list[str]
    rows: int
    share: float
    spearman: dict[str, np.ndarray]
    overlap: dict[str, np.ndarray]

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON, where what is not known is null."""
        by_task = {
            task: {"spearman": _plain(self.spearman[task]), "overlap": _plain(self.overlap[task])}
            for task in self.tasks
        }
        mean = {"spearman": _plain(_mean(self.spearman)), "overlap": _plain(_mean(self.overlap))}
        return {"names": self.names, "rows": self.rows, "share": self.share, "tasks": by_task, "mean": mean}

    def against_first(self) -> list[dict[str, Any]]:
        """Of each but the first: its `name`, and beside the first `spearman` by task, their `mean`, and `overlap`."""
        mean, overlap = _mean(self.spearman)[0], _mean(self.overlap)[0]
        return [
            {
                "name": name,
                "spearman": {task: float(self.spearman[task][0, place]) for task in self.tasks},
                "mean": float(mean[place]),
                "overlap": float(overlap[place]),
            }
            for place, name in enumerate(self.names)
            if place
        ]

    def _repr_html_(self) -> str:
        """The table that a notebook shows: all beside the first."""
        heads = ["", *self.tasks, "mean", f"top {self.share:.0%} shared"]
        lines = [
            [
                entry["name"],
                *(f"{value:.3f}" for value in (*entry["spearman"].values(), entry["mean"])),
                f"{entry['overlap']:.0%}",
            ]
            for entry in self.against_first()
        ]
        head = "".join(f"<th>{escape(text)}</th>" for text in heads)
        body = "".join(
            f"<tr><th>{escape(first)}</th>{''.join(f'<td>{cell}</td>' for cell in rest)}</tr>" for first, *rest in lines
        )
        caption = f"<caption>Spearman with {escape(self.names[0])} on {self.rows:,} rows</caption>"
        return f"<table>{caption}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"

    def plot(self, task: str | None = None) -> go.Figure:
        """Heat maps of rank correlations and shared tops, as a Plotly figure.

        Args:
            task: the one to draw; the mean over tasks if None.

        Raises:
            InputError: there is no such task.
        """
        if task is not None and task not in self.tasks:
            raise InputError(f"no task {task!r}; there are {', '.join(self.tasks)}")
        names = [escape(name) for name in self.names]
        figure = make_subplots(1, 2, subplot_titles=["Spearman", f"top {self.share:.0%} shared"])
        for column, found in enumerate((self.spearman, self.overlap), start=1):
            values = _mean(found) if task is None else found[task]
            heat = go.Heatmap(
                z=values, x=names, y=names, zmin=min(0.0, float(np.nanmin(values))), zmax=1.0, colorscale="Blues"
            )
            heat.update(texttemplate="%{z:.2f}", showscale=False)
            figure.add_trace(heat, 1, column)
            figure.update_yaxes(autorange="reversed", row=1, col=column)
        return figure


def compare_all(scores: Mapping[str, pa.Table], *, share: float = NAMED) -> Comparison:
    """Compare scores of the same pool: of several proxies, estimators or seeds, with the first or two and two.

    Rows are matched by id, so they may be in any order; those that one lacks, or has no score of, are left out of all.

    Args:
        scores: two or more scores tables by name, from `iprox.score`, or `scores.parquet`.
        share: of the rows that a top is, in (0, 1).

    Raises:
        InputError: fewer than two tables, no task or fewer than 10 rows in common, an id twice in a table, or a share
            out of range.
    """
    if len(scores) < 2:
        raise InputError("a comparison needs two scores or more")
    if not 0 < share < 1:
        raise InputError(f"share must be above 0 and below 1, not {share}")
    names, tables = list(scores), list(scores.values())
    tasks = [task for task in task_names(tables[0]) if all(TASK_PREFIX + task in each.column_names for each in tables)]
    if not tasks:
        listed = "; ".join(f"{name} has {', '.join(task_names(each))}" for name, each in scores.items())
        raise InputError(f"no task is in all of the scores: {listed}")
    values = _matched(names, tables, tasks)
    known = np.isfinite(values).all((0, 1))
    if known.sum() < FEWEST:
        raise InputError(f"only {known.sum()} rows have all of the scores; a comparison needs at least {FEWEST}")
    spearman, overlap = {}, {}
    count = max(1, round(share * int(known.sum())))
    for number, task in enumerate(tasks):
        of_task = values[:, number, known]
        with np.errstate(invalid="ignore", divide="ignore"):
            spearman[task] = np.corrcoef(stats.rankdata(of_task, axis=1))
        tops = np.zeros(of_task.shape, dtype=np.float32)
        np.put_along_axis(tops, np.argsort(-of_task, axis=1, kind="stable")[:, :count], 1.0, axis=1)
        overlap[task] = (tops @ tops.T / count).astype(np.float64)
    return Comparison(names, tasks, int(known.sum()), share, spearman, overlap)


def _matched(names: list[str], tables: list[pa.Table], tasks: list[str]) -> np.ndarray:
    """Scores [K, tasks, N] of the first table's rows, NaN where another lacks the row."""
    ids = tables[0]["id"].combine_chunks()
    found = []
    for name, table in zip(names, tables, strict=True):
        own = table["id"].combine_chunks()
        if len(own.unique()) < len(own):
            raise InputError(f"{name}: an id is there twice, so rows cannot be matched")
        columns = [table[TASK_PREFIX + task].to_numpy(zero_copy_only=False).astype(np.float64) for task in tasks]
        matrix = np.stack(columns)
        if not own.equals(ids):
            places = pc.call_function("index_in", [ids], pc.SetLookupOptions(own))
            matrix = matrix[:, places.fill_null(0).to_numpy(zero_copy_only=False)]
            matrix[:, places.is_null().to_numpy(zero_copy_only=False)] = np.nan
        found.append(matrix)
    return np.stack(found)


def _mean(found: Mapping[str, np.ndarray]) -> np.ndarray:
    return np.mean(list(found.values()), axis=0)


def _plain(matrix: np.ndarray) -> list[list[float | None]]:
    return [[float(value) if np.isfinite(value) else None for value in line] for line in matrix]
