"""Fidelity: agreement of proxy scores with target scores on the same sample."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from scipy import stats

from iprox.errors import InputError
from iprox.influence.scores import TASK_PREFIX, task_names

OVERLAP_AT = (0.01, 0.05, 0.1)


@dataclass(frozen=True, slots=True)
class AuditReport:
    """Fidelity by task and on average.

    Attributes:
        sample: examples compared.
        tasks: by task `spearman`, `kendall` (-1 to 1) and `overlap` (share of the target's top k % that the proxy
            also puts in its top k %, by k as a fraction).
        mean: the same, averaged over tasks.
        scores: the scores compared: `id`, `source`, `proxy/<task>`, `target/<task>`.
    """

    sample: int
    tasks: dict[str, dict[str, Any]]
    mean: dict[str, Any]
    scores: pa.Table

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON, without the scores."""
        return {"sample": self.sample, "tasks": self.tasks, "mean": self.mean}


def compare_scores(proxy: pa.Table, target: pa.Table) -> AuditReport:
    """Compare two scores tables of the same examples, in the same order.

    Rows without a score are left out.

    Raises:
        InputError: the tables are of different examples or tasks, or fewer than 10 rows have scores.
    """
    if proxy["id"].to_pylist() != target["id"].to_pylist():
        raise InputError("the proxy's and the target's scores are not of the same examples in the same order")
    tasks = task_names(proxy)
    if tasks != task_names(target):
        raise InputError(f"the proxy was scored on {tasks}, the target on {task_names(target)}")
    columns: dict[str, Any] = {"id": proxy["id"], "source": proxy["source"]}
    fidelity: dict[str, dict[str, Any]] = {}
    sample = 0
    for task in tasks:
        x = proxy[TASK_PREFIX + task].to_numpy(zero_copy_only=False).astype(np.float64)
        y = target[TASK_PREFIX + task].to_numpy(zero_copy_only=False).astype(np.float64)
        columns[f"proxy/{task}"], columns[f"target/{task}"] = x, y
        both = np.isfinite(x) & np.isfinite(y)
        sample = int(both.sum())
        if sample < 10:
            raise InputError(f"only {sample} examples have both scores; an audit needs at least 10")
        fidelity[task] = fidelity_metrics(x[both], y[both])
    mean = {
        "spearman": float(np.mean([fidelity[task]["spearman"] for task in tasks])),
        "kendall": float(np.mean([fidelity[task]["kendall"] for task in tasks])),
        "overlap": {
            key: float(np.mean([fidelity[task]["overlap"][key] for task in tasks]))
            for key in fidelity[tasks[0]]["overlap"]
        },
    }
    return AuditReport(sample, fidelity, mean, pa.table(columns))


def fidelity_metrics(proxy: np.ndarray, target: np.ndarray) -> dict[str, Any]:
    """Spearman, Kendall and top-k overlap of two score vectors [N]."""
    spearman: Any = stats.spearmanr(proxy, target)
    kendall: Any = stats.kendalltau(proxy, target)
    return {
        "spearman": float(spearman.statistic),
        "kendall": float(kendall.statistic),
        "overlap": {str(share): top_overlap(proxy, target, share) for share in OVERLAP_AT},
    }


def top_overlap(proxy: np.ndarray, target: np.ndarray, share: float) -> float:
    """Share of the target's top `share` that the proxy also ranks in its own top `share`, 0 to 1."""
    count = max(1, round(share * len(target)))
    chosen = np.argsort(-proxy, kind="stable")[:count]
    wanted = np.argsort(-target, kind="stable")[:count]
    return len(np.intersect1d(chosen, wanted)) / count
