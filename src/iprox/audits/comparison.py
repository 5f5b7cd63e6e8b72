"""Comparison of several scores of the same pool: rank correlations and shared tops."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from iprox.audits.agreement import FEWEST, rank_correlations
from iprox.data import GENERATED_ID
from iprox.errors import InputError
from iprox.scores import AGGREGATE, TASK_PREFIX, scores_metadata, task_names
from iprox.settings import NAMED_SHARE

if TYPE_CHECKING:
    import plotly.graph_objects as go


@dataclass(frozen=True, slots=True)
class Comparison:
    """Pairwise agreement of K scores of the same rows.

    Attributes:
        names: names of the K scores.
        tasks: tasks that all of them have.
        rows: number of rows that have all scores; only these are ranked.
        left_out: by name, number of the first table's rows without a score.
        share: fraction of rows counted as the top.
        spearman: rank correlations, float64 [K, K], by task and for the aggregate `influence`; NaN if one side is
            constant.
        overlap: fraction of one top that is in the other, in the same form.
    """

    names: list[str]
    tasks: list[str]
    rows: int
    left_out: dict[str, int]
    share: float
    spearman: dict[str, np.ndarray]
    overlap: dict[str, np.ndarray]

    def as_dict(self) -> dict[str, Any]:
        """Return plain data for JSON; NaN becomes null."""
        found = {
            column: {"spearman": _plain(self.spearman[column]), "overlap": _plain(self.overlap[column])}
            for column in self.spearman
        }
        of_all = found.pop(AGGREGATE)
        counted = {"names": self.names, "rows": self.rows, "left_out": self.left_out, "share": self.share}
        return {**counted, "tasks": found, AGGREGATE: of_all}

    def head(self) -> list[str]:
        """Return the column heads of `lines`: tasks, the aggregate if there are several, and the shared top."""
        together = [AGGREGATE] if len(self.tasks) > 1 else []
        return [*self.tasks, *together, f"top {100 * self.share:g} % shared"]

    def lines(self) -> dict[str, list[str]]:
        """Return the correlations of each score with the first, and its share of the first's top, as text."""
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
        """Return a caption for the lines."""
        lacking = ", ".join(f"{name} lacks {count:,}" for name, count in self.left_out.items() if count)
        return f"Spearman with {self.names[0]} on {self.rows:,} rows{f' ({lacking})' if lacking else ''}"

    def __str__(self) -> str:
        """Return the comparison as a text table."""
        texts = [["", *self.head()], *([name, *cells] for name, cells in self.lines().items())]
        widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
        rows = ("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in texts)
        return "\n".join([self.describe(), *rows])

    def _repr_html_(self) -> str:
        """Return the comparison as an HTML table, for notebooks."""
        from iprox.report.formats import html_table

        return html_table(self.describe(), ["", *self.head()], [[name, *cells] for name, cells in self.lines().items()])

    def plot(self, task: str = AGGREGATE) -> go.Figure:
        """Return heat maps of rank correlations and shared tops as a Plotly figure.

        Args:
            task: task to draw; by default the aggregate `influence`, which selection uses.

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
    """Compare several scores of the same pool, such as those of different proxies, estimators or seeds.

    Rows are matched by id, so tables may have different orders. A row without a score in one table is left out of all.

    Args:
        scores: two or more scores tables by name, from `iprox.score` or `scores.parquet`.
        share: fraction of rows counted as the top, in (0, 1).

    Raises:
        InputError: there are fewer than two tables, no common task, fewer than 10 common rows, a repeated id, ids made
            from row numbers of different pools, or `share` is out of range.
    """
    if not isinstance(scores, Mapping) or not all(isinstance(each, pa.Table) for each in scores.values()):
        raise InputError('compare takes scores tables by name: {"target": scores, "proxy": others}')
    if len(scores) < 2:
        raise InputError("a comparison needs two or more scores")
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
    spearman, overlap = {}, {}
    count = max(1, round(share * int(kept.sum())))
    for number, column in enumerate([*tasks, AGGREGATE]):
        of_column = values[:, number, kept]
        spearman[column] = rank_correlations(of_column)
        tops = np.zeros(of_column.shape, dtype=np.float32)
        np.put_along_axis(tops, np.argsort(-of_column, axis=1, kind="stable")[:, :count], 1.0, axis=1)
        tops[np.ptp(of_column, axis=1) == 0] = np.nan  # equal scores have no top
        overlap[column] = (tops @ tops.T / count).astype(np.float64)
    return Comparison(names, tasks, int(kept.sum()), left_out, share, spearman, overlap)


def _refuse_other_pools(names: list[str], tables: list[pa.Table]) -> None:
    """Refuse to match rows of different pools by ids that only have the file's name and the row's number."""
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
    """Return the scores [K, columns, N] of the first table's rows; NaN if another table lacks the row."""
    ids = tables[0]["id"].combine_chunks().cast(pa.large_string())
    found = []
    for name, table in zip(names, tables, strict=True):
        own = table["id"].combine_chunks().cast(pa.large_string())
        if len(own.unique()) < len(own):
            raise InputError(f"{name}: an id occurs twice, so rows cannot be matched")
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
