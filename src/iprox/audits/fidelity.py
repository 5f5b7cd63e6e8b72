"""Fidelity: agreement of a proxy's scores with its target's on the same sample."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from iprox.aggregation import equal_scores
from iprox.audits.agreement import (
    FEWEST,
    OVERLAP_AT,
    bootstrap_intervals,
    by_group,
    by_length,
    disagreements,
    spearman,
    top_overlap,
)
from iprox.errors import InputError
from iprox.scores import score_matrix, task_names
from iprox.settings import AGAIN

if TYPE_CHECKING:
    import plotly.graph_objects as go


@dataclass(frozen=True, slots=True)
class AuditReport:
    """Fidelity by task and on average.

    Attributes:
        sample: number of examples compared.
        tasks: by task, `spearman` and `kendall` (-1 to 1), `overlap` (fraction of the target's top k % that is in the
            proxy's top k %, by k as a fraction), `refined` (the same for three times as many of the proxy's rows, which
            `refine` scores again by default), `intervals` (95 % bounds of each) and `disagreements` (the rows whose
            ranks differ most; rank 0 is the best, 1 the worst).
        mean: `spearman`, `kendall`, `overlap`, `refined` and `intervals`, averaged over tasks.
        by_source: `rows` and the mean `spearman` within each source of ten rows or more.
        by_length: the same for fifths of the rows by length, with the range of `tokens`.
        scores: the scores compared: `id`, `source`, `tokens`, `proxy/<task>`, `target/<task>`.
    """

    sample: int
    tasks: dict[str, dict[str, Any]]
    mean: dict[str, Any]
    by_source: dict[str, dict[str, Any]]
    by_length: list[dict[str, Any]]
    scores: pa.Table

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON, without the scores."""
        names = ("sample", "tasks", "mean", "by_source", "by_length")
        return {name: getattr(self, name) for name in names}

    def _repr_html_(self) -> str:
        """Return the table that a notebook shows: one line per task, and the mean."""
        from iprox.report.formats import html_table

        shares = sorted(self.mean["overlap"], key=float)
        heads = ["task", "Spearman (95 %)", "Kendall", *(f"top {100 * float(share):g} %" for share in shares)]
        rows = []
        for name, entry in (*self.tasks.items(), ("mean", self.mean)):
            low, high = entry["intervals"]["spearman"]
            cells = [f"{entry['spearman']:.3f} ({low:.2f} to {high:.2f})", f"{entry['kendall']:.3f}"]
            rows.append([name, *cells, *(f"{entry['overlap'][share]:.0%}" for share in shares)])
        return html_table(f"Proxy against target on {self.sample:,} rows", heads, rows)

    def plot(self, task: str | None = None) -> go.Figure:
        """Return proxy scores against target scores as a Plotly figure.

        Args:
            task: task to draw; None draws all.

        Raises:
            KeyError: there is no such task.
        """
        # Imported here so that an audit does not import Plotly.
        import plotly.graph_objects as go
        from plotly.subplots import make_subplots

        names = list(self.tasks) if task is None else [task]
        titles = [f"{escape(name)}: Spearman {self.tasks[name]['spearman']:.2f}" for name in names]
        figure = make_subplots(1, len(names), subplot_titles=titles)
        for column, name in enumerate(names, start=1):
            x, y = (self.scores[f"{side}/{name}"].to_numpy(zero_copy_only=False) for side in ("target", "proxy"))
            dots = go.Scatter(x=x, y=y, mode="markers", text=[escape(id) for id in self.scores["id"].to_pylist()])
            figure.add_trace(dots, 1, column)
        figure.update_xaxes(title="target score").update_yaxes(title="proxy score")
        return figure.update_layout(showlegend=False)


def compare_scores(proxy: pa.Table, target: pa.Table) -> AuditReport:
    """Compare two scores tables of the same examples in the same order. Rows without a score are left out.

    Raises:
        InputError: the tables have different examples or tasks, fewer than 10 rows have scores, or all scores of one
            side are equal.
    """
    if proxy["id"].to_pylist() != target["id"].to_pylist():
        raise InputError("the scores of proxy and target are not for the same examples in the same order")
    tasks = task_names(proxy)
    if tasks != task_names(target):
        raise InputError(f"the proxy was scored on {tasks}, the target on {task_names(target)}")
    on_proxy, on_target = score_matrix(proxy), score_matrix(target)
    (both,) = np.nonzero(np.isfinite(on_proxy).all(1) & np.isfinite(on_target).all(1))
    if len(both) < FEWEST:
        raise InputError(f"only {len(both)} examples have both scores; an audit needs at least {FEWEST}")
    x, y = on_proxy[both].T, on_target[both].T
    for number, task in enumerate(tasks):
        _refuse_equal(task, x[number], y[number])

    def figures(rows: np.ndarray) -> dict[tuple[str | None, str], float]:
        """Return every figure by task and name; the mean over tasks has the task None."""
        each = [_figures(x[number][rows], y[number][rows]) for number in range(len(tasks))]
        named = {(task, name): value for task, entry in zip(tasks, each, strict=True) for name, value in entry.items()}
        return {**named, **{(None, name): float(np.mean([entry[name] for entry in each])) for name in each[0]}}

    def mean_spearman(rows: np.ndarray) -> float:
        return float(np.mean([spearman(x[number][rows], y[number][rows]) for number in range(len(tasks))]))

    measured = figures(np.arange(len(both)))
    bounds = bootstrap_intervals(figures, len(both))

    def entry(task: str | None) -> dict[str, Any]:
        own, intervals = (
            _nested({name: value for (of, name), value in found.items() if of == task}) for found in (measured, bounds)
        )
        return {**own, "intervals": intervals}

    ids = proxy["id"].take(pa.array(both)).to_pylist()
    fidelity: dict[str, dict[str, Any]] = {}
    for number, task in enumerate(tasks):
        apart = [{"id": ids[found.pop("position")], **found} for found in disagreements(x[number], y[number])]
        fidelity[task] = {**entry(task), "disagreements": apart}
    columns: dict[str, Any] = {name: proxy[name] for name in ("id", "source", "tokens")}
    for number, task in enumerate(tasks):
        columns[f"proxy/{task}"], columns[f"target/{task}"] = on_proxy[:, number], on_target[:, number]
    sources = proxy["source"].take(pa.array(both)).to_pylist()
    tokens = proxy["tokens"].to_numpy(zero_copy_only=False)[both]
    return AuditReport(
        len(both),
        fidelity,
        entry(None),
        by_group(mean_spearman, sources),
        by_length(mean_spearman, tokens),
        pa.table(columns),
    )


def _refuse_equal(task: str, proxy: np.ndarray, target: np.ndarray) -> None:
    """Refuse scores that are all equal, because they rank nothing."""
    for name, scores in (("target", target), ("proxy", proxy)):
        if equal_scores(scores):
            what = "warmup.learning_rate" if name == "target" else "proxy.align.learning_rate or proxy.sparsity"
            raise InputError(
                f"the {name}'s scores of the {len(scores)} audited rows for {task} are all equal ({scores[0]:.6g}), so "
                f"the fidelity is not a number: the {name} has probably collapsed; look at its training losses, and "
                f"lower {what}"
            )


def fidelity_metrics(proxy: np.ndarray, target: np.ndarray) -> dict[str, Any]:
    """Return Spearman, Kendall and top-k overlaps of two score vectors [N]."""
    return _nested(_figures(proxy, target))


def _figures(proxy: np.ndarray, target: np.ndarray) -> dict[str, float]:
    from scipy import stats

    kendall: Any = stats.kendalltau(proxy, target)
    return {
        "spearman": spearman(proxy, target),
        "kendall": float(kendall.statistic),
        **{f"overlap/{share}": top_overlap(proxy, target, share) for share in OVERLAP_AT},
        **{f"refined/{share}": top_overlap(proxy, target, share, AGAIN) for share in OVERLAP_AT},
    }


def _nested(figures: Mapping[str, Any]) -> dict[str, Any]:
    """Return figures with the overlaps, and those that refining gives, in mappings of their own."""
    tops = {kind: {str(share): figures[f"{kind}/{share}"] for share in OVERLAP_AT} for kind in ("overlap", "refined")}
    return {"spearman": figures["spearman"], "kendall": figures["kendall"], **tops}
