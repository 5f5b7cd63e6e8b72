"""Comparison of any number of scores of the same pool: how alike they rank it, and how much their tops share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from iprox.data import GENERATED_ID
from iprox.errors import InputError
from iprox.scores import AGGREGATE, TASK_PREFIX, scores_metadata, task_names
from iprox.settings import NAMED_SHARE

if TYPE_CHECKING:
    import plotly.graph_objects as go

FEWEST = 10


@dataclass(frozen=True, slots=True)
class Comparison:
    """How K scores of the same rows agree, two and two.

    Attributes:
        names: of the scores, K.
        tasks: those that all have.
        rows: rows that all have a score of; ranks are among them.
        left_out: by name, how many rows that the first has are there without a score or not at all.
        share: of the rows that a top is.
        spearman: by task, and under `influence` of the column that selection goes by, the rank correlations, float64
            [K, K]; NaN where one side is constant.
        overlap: by task and under `influence` the share of one top that is in the other, float64 [K, K]; NaN likewise.
    """

    names: list[str]
    tasks: list[str]
    rows: int
    left_out: dict[str, int]
    share: float
    spearman: dict[str, np.ndarray]
    overlap: dict[str, np.ndarray]

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON, where what is not known is null."""
        found = {
            column: {"spearman": _plain(self.spearman[column]), "overlap": _plain(self.overlap[column])}
            for column in self.spearman
        }
        of_all = found.pop(AGGREGATE)
        counted = {"names": self.names, "rows": self.rows, "left_out": self.left_out, "share": self.share}
        return {**counted, "tasks": found, AGGREGATE: of_all}

    def head(self) -> list[str]:
        """The columns of `lines`: tasks, all of them together where there are several, and the shared top."""
        together = [AGGREGATE] if len(self.tasks) > 1 else []
        return [*self.tasks, *together, f"top {100 * self.share:g} % shared"]

    def lines(self) -> dict[str, list[str]]:
        """Of each but the first, as text: Spearman with the first by column, and how much of its top it shares.

        The top is that of `influence`, as a selection of that share would be.
        """
        columns = self.head()[:-1]
        return {
            name: [
                *(_text(self.spearman[column][0, place], "{:.3f}") for column in columns),
                _text(self.overlap[AGGREGATE][0, place], "{:.0%}"),
            ]
            for place, name in enumerate(self.names)
            if place
        }

    def describe(self) -> str:
        """What the lines are of, with what was left out."""
        lacking = ", ".join(f"{name} lacks {count:,}" for name, count in self.left_out.items() if count)
        return f"Spearman with {self.names[0]} on {self.rows:,} rows{f' ({lacking})' if lacking else ''}"

    def __str__(self) -> str:
        """The lines under their heads."""
        texts = [["", *self.head()], *([name, *cells] for name, cells in self.lines().items())]
        widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
        rows = ("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in texts)
        return "\n".join([self.describe(), *rows])

    def _repr_html_(self) -> str:
        """Return the table that a notebook shows: each compared with the first."""
        head = "".join(f"<th>{escape(text)}</th>" for text in ("", *self.head()))
        body = "".join(
            f"<tr><th>{escape(name)}</th>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"
            for name, cells in self.lines().items()
        )
        caption = f"<caption>{escape(self.describe())}</caption>"
        return f"<table>{caption}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"

    def plot(self, task: str = AGGREGATE) -> go.Figure:
        """Heat maps of rank correlations and shared tops, as a Plotly figure.

        Args:
            task: the one to draw; `influence`, which selection goes by, unless one is named.

        Raises:
            InputError: there is no such task.
        """
        import plotly.graph_objects as go
        from plotly.subplots import make_subplots

        if task not in self.spearman:
            raise InputError(f"no task {task!r}; there are {', '.join(self.spearman)}")
        names = [escape(name) for name in self.names]
        figure = make_subplots(1, 2, subplot_titles=["Spearman", self.head()[-1]])
        for column, found in enumerate((self.spearman, self.overlap), start=1):
            values = found[task]
            lowest = min(0.0, float(np.min(values, initial=0.0, where=np.isfinite(values))))
            heat = go.Heatmap(z=values, x=names, y=names, zmin=lowest, zmax=1.0, colorscale="Blues")
            heat.update(texttemplate="%{z:.2f}", showscale=False)
            figure.add_trace(heat, 1, column)
            figure.update_yaxes(autorange="reversed", row=1, col=column)
        return figure


def compare(scores: Mapping[str, pa.Table], *, share: float = NAMED_SHARE) -> Comparison:
    """Compare scores of the same pool: of several proxies, estimators or seeds, with the first or two and two.

    Rows are matched by id, so they may be in any order; those that one lacks, or has no score of, are left out of all.

    Args:
        scores: two or more scores tables by name, from `iprox.score`, or `scores.parquet`.
        share: of the rows that a top is, in (0, 1).

    Raises:
        InputError: fewer than two tables, no task or fewer than 10 rows in common, an id twice in a table, ids made
            from row numbers of different pools, or a share out of range.
    """
    if not isinstance(scores, Mapping) or not all(isinstance(each, pa.Table) for each in scores.values()):
        raise InputError('compare takes scores tables by name: {"target": scores, "proxy": others}')
    if len(scores) < 2:
        raise InputError("a comparison needs two scores or more")
    if not 0 < share < 1:
        raise InputError(f"share must be above 0 and below 1, not {share}")
    names, tables = list(scores), list(scores.values())
    tasks = [task for task in task_names(tables[0]) if all(TASK_PREFIX + task in each.column_names for each in tables)]
    if not tasks:
        listed = "; ".join(f"{name} has {', '.join(task_names(each))}" for name, each in scores.items())
        raise InputError(f"no task is in all of the scores: {listed}")
    _refuse_other_pools(names, tables)
    values = _matched(names, tables, [*(TASK_PREFIX + task for task in tasks), AGGREGATE])
    known = np.all(np.isfinite(values), axis=1)
    left_out = {name: int((~each).sum()) for name, each in zip(names, list(known), strict=True)}
    kept = np.all(known, axis=0)
    if kept.sum() < FEWEST:
        one, other = (str(table["id"][0]) if table.num_rows else "none" for table in tables[:2])
        raise InputError(
            f"only {kept.sum()} rows have all of the scores, and a comparison needs at least {FEWEST}; ids are such as "
            f"{one} in {names[0]} and {other} in {names[1]}"
        )
    from scipy import stats

    spearman, overlap = {}, {}
    count = max(1, round(share * int(kept.sum())))
    for number, column in enumerate([*tasks, AGGREGATE]):
        of_column = values[:, number, kept]
        with np.errstate(invalid="ignore", divide="ignore"):
            spearman[column] = np.corrcoef(stats.rankdata(of_column, axis=1))
        tops = np.zeros(of_column.shape, dtype=np.float32)
        np.put_along_axis(tops, np.argsort(-of_column, axis=1, kind="stable")[:, :count], 1.0, axis=1)
        tops[np.ptp(of_column, axis=1) == 0] = np.nan  # equal scores have no top
        overlap[column] = (tops @ tops.T / count).astype(np.float64)
    return Comparison(names, tasks, int(kept.sum()), left_out, share, spearman, overlap)


def _refuse_other_pools(names: list[str], tables: list[pa.Table]) -> None:
    """Refuse to match rows of different pools by ids that only say a file's name and a row's number."""
    pools: list[tuple[str, str]] = []
    for name, table in zip(names, tables, strict=True):
        made_by: Any = scores_metadata(table)
        pool = made_by.get("pool") or (made_by.get("inputs") or {}).get("pool")
        if isinstance(pool, str) and table.num_rows and GENERATED_ID.search(str(table["id"][0])):
            pools.append((name, pool))
    for name, pool in pools:
        if pool != pools[0][1]:
            raise InputError(
                f"{pools[0][0]} and {name} are of different pools, whose rows have no id of their own to be matched by "
                f"(such as {tables[names.index(name)]['id'][0]}); give rows an id, or score the same files"
            )


def _matched(names: list[str], tables: list[pa.Table], columns: list[str]) -> np.ndarray:
    """Scores [K, columns, N] of the first table's rows, NaN where another lacks the row."""
    ids = tables[0]["id"].combine_chunks().cast(pa.large_string())
    found = []
    for name, table in zip(names, tables, strict=True):
        own = table["id"].combine_chunks().cast(pa.large_string())
        if len(own.unique()) < len(own):
            raise InputError(f"{name}: an id is there twice, so rows cannot be matched")
        matrix = np.stack([table[column].to_numpy(zero_copy_only=False).astype(np.float64) for column in columns])
        if not own.equals(ids):
            places = pc.call_function("index_in", [ids], pc.SetLookupOptions(own))
            matrix = matrix[:, places.fill_null(0).to_numpy(zero_copy_only=False)]
            matrix[:, places.is_null().to_numpy(zero_copy_only=False)] = np.nan
        found.append(matrix)
    return np.stack(found)


def _text(value: float, form: str) -> str:
    return form.format(value) if np.isfinite(value) else "equal scores"


def _plain(matrix: np.ndarray) -> list[list[float | None]]:
    return [[float(value) if np.isfinite(value) else None for value in line] for line in matrix]
