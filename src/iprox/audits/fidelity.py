"""Fidelity: agreement of proxy scores with target scores on the same sample."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from iprox.aggregation import equal_scores
from iprox.audits.breakdown import by_group, by_length, calibration, disagreements
from iprox.audits.intervals import bootstrap_intervals
from iprox.audits.overlap import OVERLAP_AT, top_overlap
from iprox.audits.spearman import spearman
from iprox.errors import InputError
from iprox.scores import score_matrix, task_names

if TYPE_CHECKING:
    import plotly.graph_objects as go

# The share that a calibration looks at.
TOP = 0.05


@dataclass(frozen=True, slots=True)
class AuditReport:
    """Fidelity by task and on average.

    Attributes:
        sample: examples compared.
        tasks: by task `spearman`, `kendall` (-1 to 1), `overlap` (share of the target's top k % that the proxy
            also puts in its top k %, by k as a fraction), `intervals` (the bounds of each at 95 %), `calibration`
            (what the target thinks of each tenth of the proxy's ranking) and `disagreements` (the rows whose places
            are furthest apart, 0 the best and 1 the worst).
        mean: `spearman`, `kendall`, `overlap` and `intervals`, averaged over tasks.
        by_source: by source of ten rows or more, `rows` and the mean `spearman` within it.
        by_length: the same by fifths of length, with the range of `tokens`.
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
        # The charts depend on no other room; they are imported here, so that an audit does not import Plotly.
        from iprox.report.charts import fidelity_chart, figures

        ids, sources = self.scores["id"].to_pylist(), self.scores["source"].to_pylist()
        drawn = []
        for name in self.tasks if task is None else [task]:
            proxy, target = (
                self.scores[f"{side}/{name}"].to_numpy(zero_copy_only=False) for side in ("proxy", "target")
            )
            chart = fidelity_chart(name, proxy, target, ids, sources, spearman=self.tasks[name]["spearman"])
            drawn += [] if chart is None else [chart]
        return figures(drawn)


def compare_scores(proxy: pa.Table, target: pa.Table) -> AuditReport:
    """Compare two scores tables of the same examples, in the same order.

    Rows without a score are left out.

    Raises:
        InputError: the tables are of different examples or tasks, fewer than 10 rows have scores, or one side's are all
            equal.
    """
    if proxy["id"].to_pylist() != target["id"].to_pylist():
        raise InputError("the proxy's and the target's scores are not of the same examples in the same order")
    tasks = task_names(proxy)
    if tasks != task_names(target):
        raise InputError(f"the proxy was scored on {tasks}, the target on {task_names(target)}")
    on_proxy, on_target = score_matrix(proxy), score_matrix(target)
    (both,) = np.nonzero(np.isfinite(on_proxy).all(1) & np.isfinite(on_target).all(1))
    if len(both) < 10:
        raise InputError(f"only {len(both)} examples have both scores; an audit needs at least 10")
    x, y = on_proxy[both].T, on_target[both].T
    for number, task in enumerate(tasks):
        _refuse_equal(task, x[number], y[number])

    def figures(rows: np.ndarray) -> dict[tuple[str | None, str], float]:
        """Every figure by task and name; the mean over tasks is of no task."""
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
        fidelity[task] = {**entry(task), "calibration": calibration(x[number], y[number], TOP), "disagreements": apart}
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
    """Refuse scores of a task that rank nothing: rank correlations with them are no numbers, and their tops are ties.

    Raises:
        InputError: those of the proxy or of the target are all equal.
    """
    for name, scores in (("target", target), ("proxy", proxy)):
        if equal_scores(scores):
            what = "warmup.learning_rate" if name == "target" else "proxy.align.learning_rate or proxy.sparsity"
            raise InputError(
                f"the {name}'s scores of the {len(scores)} audited rows for {task} are all equal ({scores[0]:.6g}), so "
                f"the fidelity is not a number: the {name} has probably collapsed; look at its training losses, and "
                f"lower {what}"
            )


def fidelity_metrics(proxy: np.ndarray, target: np.ndarray) -> dict[str, Any]:
    """Spearman, Kendall and top-k overlap of two score vectors [N]."""
    return _nested(_figures(proxy, target))


def _figures(proxy: np.ndarray, target: np.ndarray) -> dict[str, float]:
    from scipy import stats

    kendall: Any = stats.kendalltau(proxy, target)
    return {
        "spearman": spearman(proxy, target),
        "kendall": float(kendall.statistic),
        **{f"overlap/{share}": top_overlap(proxy, target, share) for share in OVERLAP_AT},
    }


def _nested(figures: Mapping[str, Any]) -> dict[str, Any]:
    """The overlaps by share in a mapping of their own."""
    overlap = {name.removeprefix("overlap/"): value for name, value in figures.items() if name.startswith("overlap/")}
    return {"spearman": figures["spearman"], "kendall": figures["kendall"], "overlap": overlap}
