"""The section on the proxy's fidelity, as the plain values its part of the template shows."""

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from iprox.report import formats
from iprox.report.fidelity_charts import FIDELITY_KEYS, calibration_chart, fidelity_chart, overlap_chart
from iprox.report.run_folder import Audit, RunFolder

MOST_DISAGREEMENTS = 12


def share_name(share: str) -> str:
    """A share as audit.json has it, in per cent."""
    return f"{100 * float(share):g} %"


def fidelity_section(folder: RunFolder) -> dict[str, Any] | None:
    """Returns scatter charts and the table of agreement, or None where the audit was off."""
    audit = folder.audit
    if audit is None:
        return None
    shares = sorted({s for task in audit.summary["tasks"].values() for s in task.get("overlap", {})}, key=float)

    def row(name: str, values: dict[str, Any]) -> tuple[str, ...]:
        overlap, bounds = values.get("overlap", {}), values.get("intervals", {})
        agreement = (_with_interval(values.get(key), bounds.get(key)) for key in ("spearman", "kendall"))
        return (name, *agreement, *(formats.percent(overlap.get(share), 0) for share in shares))

    sources = dict(zip(audit.ids, audit.sources, strict=True))
    charts = []
    for index, (task, values) in enumerate(audit.summary["tasks"].items()):
        chart = fidelity_chart(
            task,
            audit.proxy[task],
            audit.target[task],
            audit.ids,
            audit.sources,
            id=f"chart-fidelity-{index}",
            caption=f"Spearman {formats.decimal(values.get('spearman'))}.",
        )
        if chart is not None:
            charts.append(chart)
    mean = audit.summary.get("mean", {})
    return {
        "charts": charts,
        "keys": FIDELITY_KEYS,
        "heads": ["Task", "Spearman", "Kendall", *(f"Top {share_name(s)} overlap" for s in shares)],
        "rows": [row(task, values) for task, values in audit.summary["tasks"].items()],
        "mean": row("Mean", mean) if len(audit.summary["tasks"]) > 1 and mean else None,
        "sample": formats.count(len(audit.ids)),
        "whole": [c for c in (overlap_chart(mean), calibration_chart(audit.summary["tasks"])) if c is not None],
        "by_source": [
            (name, formats.count(entry["rows"]), formats.decimal(entry["spearman"]))
            for name, entry in audit.summary.get("by_source", {}).items()
        ],
        "by_length": [
            (f"{first:,} to {last:,} tokens", formats.count(entry["rows"]), formats.decimal(entry["spearman"]))
            for entry in audit.summary.get("by_length", [])
            for first, last in [entry["tokens"]]
        ],
        "disagreements": [
            (
                entry["id"],
                sources.get(entry["id"]) or "(no source)",
                task,
                f"top {formats.percent(entry['proxy'], 0)}",
                f"top {formats.percent(entry['target'], 0)}",
            )
            for task, entry in disagreements(audit)
        ],
        "lds": None if audit.lds is None else _lds(audit.lds),
        "removal": None if audit.removal is None else _removal(audit.removal),
    }


def _lds(measured: dict[str, Any]) -> dict[str, Any]:
    """How far the scores foretold what retraining did, by task."""
    rows = [
        (task, *(_with_interval(values[side]["lds"], values[side]["interval"]) for side in ("proxy", "target")))
        for task, values in measured["tasks"].items()
    ]
    if len(rows) > 1:
        rows.append(("Mean", *(formats.decimal(measured["mean"][side]) for side in ("proxy", "target"))))
    return {
        "rows": rows,
        "subsets": formats.count(measured["subsets"]),
        "size": formats.count(round(measured["fraction"] * measured["rows"])),
    }


def _removal(measured: dict[str, Any]) -> dict[str, Any]:
    """What leaving out the top rows of each ranking did to the validation losses, by task."""
    entries = list(measured["tasks"].items())
    if len(entries) > 1:
        entries.append(("Mean", measured["mean"]))
    return {
        "rows": [
            (
                task,
                side,
                *(formats.decimal(values[side][key], 4) for key in ("top", "random")),
                _with_error(values[side]),
            )
            for task, values in entries
            for side in ("proxy", "target")
        ],
        "removed": formats.count(measured["removed"]),
        "of": formats.count(measured["rows"]),
        "repeats": formats.count(measured["repeats"]),
    }


def _with_error(effect: dict[str, float]) -> str:
    """A difference and its standard error: `0.0312 ± 0.0051`."""
    return f"{formats.decimal(effect['difference'], 4)} ± {formats.decimal(effect['standard_error'], 4)}"


def _with_interval(value: float | None, bounds: list[float] | None) -> str:
    """A figure and the interval it lies in: `0.81 (0.76 to 0.85)`."""
    if bounds is None:
        return formats.decimal(value)
    return f"{formats.decimal(value)} ({formats.decimal(bounds[0])} to {formats.decimal(bounds[1])})"


def disagreements(audit: Audit) -> list[tuple[str, dict[str, Any]]]:
    """The rows that proxy and target place furthest apart, over all tasks: (task, entry of audit.json)."""
    found = [
        (abs(entry["proxy"] - entry["target"]), task, entry)
        for task, values in audit.summary["tasks"].items()
        for entry in values.get("disagreements", [])
    ]
    found.sort(key=lambda item: -item[0])
    return [(task, entry) for _, task, entry in found[:MOST_DISAGREEMENTS]]


def disagreeing_rows(folder: RunFolder) -> list[int]:
    """Row numbers of the disagreements, the largest first, each once."""
    if folder.audit is None:
        return []
    ids = list(dict.fromkeys(entry["id"] for _, entry in disagreements(folder.audit)))
    wanted = pa.array(ids, folder.scores.ids.type)
    found = pc.is_in(folder.scores.ids, wanted)  # pyright: ignore[reportAttributeAccessIssue]
    (among,) = np.nonzero(found.to_numpy())
    rows = {folder.scores.id(row): row for row in among.tolist()}
    return [rows[id] for id in ids if id in rows]
