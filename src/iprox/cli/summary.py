"""Print the results of commands, or return them as plain data for `--json`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from rich.table import Table

from iprox.audits.agreement import telling_share
from iprox.progress import make_console
from iprox.records import read_json
from iprox.report import formats
from iprox.run.folder import RunFolder
from iprox.settings import AGAIN

console = make_console()


def table_of(*heads: str) -> Table:
    """Return a table without lines whose columns, but the first, are aligned to the right."""
    table = Table(box=None, pad_edge=False)
    for place, head in enumerate(heads):
        table.add_column(head, justify="right" if place else "left")
    return table


def run_summary(folder: RunFolder) -> dict[str, Any]:
    """Return the result of a run as plain data."""
    record = read_json(folder.run)
    done = record["stages"]
    summary: dict[str, Any] = {
        "output": str(folder.path),
        "stages": {name: entry["seconds"] for name, entry in done.items()},
        "warnings": [warning for entry in done.values() for warning in entry["warnings"]],
    }
    if "select" in done:
        summary["selected"] = {"rows": done["select"]["count"], "of": record["inputs"]["pool"]["rows"]}
        summary["selected"]["file"] = str(folder.selected)
    if "audit" in done:
        task = done.get("select", {}).get("task")
        found = read_json(folder.audit / "audit.json")["tasks"][task] if task else done["audit"]["fidelity"]
        names = ("spearman", "kendall", "overlap", "refined", "intervals")  # runs of earlier versions lack `refined`
        summary["fidelity"] = {name: found[name] for name in names if name in found}
    cost = record.get("cost", {})
    if cost.get("target_score_flops"):  # 0 for scorers that run no model
        spent = cost["construction_flops"] + cost["score_flops"] + cost.get("refine_flops", 0.0)
        summary["relative_cost"] = spent / cost["target_score_flops"]
    if "finetune" in done:
        summary["test"] = done["finetune"]["test"]
    if "evaluate" in done:
        summary["lm_eval"] = done["evaluate"]["lm_eval"]
    if "report" in done:
        summary["report"] = str(folder.report)
    return summary


def print_run(folder: RunFolder) -> None:
    """Print what was selected, the proxy's fidelity, the cost, and the path of the report."""
    record = read_json(folder.run)
    done = record["stages"]
    table = table_of("stage", "time", "tokens", "FLOPs", "peak memory")
    for name, entry in done.items():
        label = f"{name} (done before)" if entry["skipped"] else name
        table.add_row(
            label,
            formats.duration(entry["seconds"]),
            formats.count(entry["tokens"]) if entry["tokens"] else "",
            formats.flops(entry["flops"]) if entry["flops"] else "",
            formats.size(entry["peak_memory_bytes"]),
        )
    console.print()
    console.print(table)
    console.print()
    summary = run_summary(folder)
    lines: list[tuple[str, str]] = []
    if "selected" in summary:
        lines.append(("selected", _selected(folder, record)))
    if "fidelity" in summary:
        fidelity, audited = summary["fidelity"], done["audit"]["examples"]
        share = telling_share(audited)
        kind = f" ({done['audit']['score']})" if "score" in done["audit"] else ""  # runs of earlier versions lack it
        again = fidelity.get("refined", {}).get(str(share)) if "refine" in done else None
        lines.append(
            (
                "fidelity",
                f"Spearman {fidelity['spearman']:.2f}{_interval(fidelity)} with the target's own scores{kind}, "
                f"{fidelity['overlap'][str(share)]:.0%} of the target's top {share:.0%} found"
                + (f", {again:.0%} among {AGAIN} times as many rows" if again is not None else "")
                + f" ({audited} rows audited)",
            )
        )
    if "refine" in done:
        lines.append(("refined", f"the best {done['refine']['candidates']:,} rows scored again on the target"))
    if "relative_cost" in summary:
        cost = record["cost"]
        text = f"{summary['relative_cost']:.0%} of the FLOPs of scoring on the target"
        if cost["construction_flops"]:
            text += f", including making the proxy ({cost['score_flops'] / cost['target_score_flops']:.0%} without)"
        lines.append(("cost", text))
    for task, losses in summary.get("test", {}).items():
        lines.append(("test loss", f"{task}: {losses['before']:.3f} before, {losses['after']:.3f} after fine-tuning"))
    lines += [("benchmark", text) for text in benchmark_lines(summary.get("lm_eval", {}))]
    if "report" in summary:
        lines.append(("report", summary["report"]))
    for name, text in lines:
        console.print(f"[bold]{name:<10}[/bold]", end="")
        console.print(text, markup=False, soft_wrap=True)


def benchmark_lines(changes: dict[str, Any]) -> list[str]:
    """Return the metrics of benchmarks before and after fine-tuning, one line each."""
    return [
        f"{task} {metric.removesuffix(',none')}: {values['before']:.3f} before, {values['after']:.3f} after fine-tuning"
        for task, metrics in changes.items()
        for metric, values in metrics.items()
    ]


def _selected(folder: RunFolder, record: dict[str, Any]) -> str:
    chosen = read_json(folder.selection)
    table = pq.read_table(folder.scores, columns=["source"])
    counts: dict[str, int] = {}
    for source in table["source"].take(chosen["rows"]).to_pylist():
        if source is not None:
            counts[source] = counts.get(source, 0) + 1
    text = f"{chosen['count']:,} of {record['inputs']['pool']['rows']:,} rows → {folder.selected}"
    if counts:
        top = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
        share = ", ".join(f"{name} {count / chosen['count']:.0%}" for name, count in top[:5])
        text += f"\n{'':<10}{share}{', ...' if len(top) > 5 else ''}"
    return text


def print_plan(plan: dict[str, Any]) -> None:
    """Print a plan as a table."""
    table = table_of("stage", "tokens", "FLOPs", "memory", "time")
    for name, stage in plan["stages"].items():
        table.add_row(
            name,
            formats.count(stage["tokens"]),
            formats.flops(stage["flops"]),
            formats.size(stage["memory_bytes"]),
            formats.duration(stage["seconds"]),
        )
    console.print(table)
    parameters = plan["parameters"]
    console.print(
        f"\n{plan['rows']:,} rows of {plan['tokens_per_row']:.0f} tokens, {plan['supervised_per_row']:.0f} supervised; "
        f"parameters: target {formats.parameters(parameters['target'])}, "
        f"proxy {formats.parameters(parameters['proxy'])}",
        soft_wrap=True,
    )
    console.print(
        f"matrix products run at {formats.flops(plan['gemm_rate'])}/s; about {formats.duration(plan['total_seconds'])} "
        f"in all; making and scoring the proxy costs {plan['relative_score_cost']:.0%} of scoring on the target",
        soft_wrap=True,
    )


def print_fidelity(audit: dict[str, Any]) -> None:
    """Print an audit as a table."""
    table = table_of("task", "Spearman", "Kendall", "top 1 %", "top 5 %", "top 10 %")
    for task, entry in [*audit["tasks"].items(), ("mean", audit["mean"])]:
        overlaps = [f"{entry['overlap'][share]:.0%}" for share in ("0.01", "0.05", "0.1")]
        table.add_row(task, f"{entry['spearman']:.3f}{_interval(entry)}", f"{entry['kendall']:.3f}", *overlaps)
    console.print(table)


def print_lds(found: dict[str, Any]) -> None:
    """Print linear datamodeling scores as a table."""
    table = table_of("task", "LDS, proxy", "LDS, target")
    for task, entry in found["tasks"].items():
        table.add_row(task, *(f"{side['lds']:.3f} ({_bounds(side['interval'])})" for side in entry.values()))
    console.print(table)


def print_removal(found: dict[str, Any]) -> None:
    """Print a removal test as a table."""
    table = table_of("task", "ranking", "without top", "without random", "difference")
    for task, entry in [*found["tasks"].items(), ("mean", found["mean"])]:
        for side in ("proxy", "target"):
            effect = entry[side]
            error = f"{effect['difference']:+.4f} ± {effect['standard_error']:.4f}"
            table.add_row(task, side, f"{effect['top']:+.4f}", f"{effect['random']:+.4f}", error)
    console.print(table)


def _interval(fidelity: dict[str, Any]) -> str:
    """Return the confidence interval of the Spearman correlation in parentheses."""
    return f" ({_bounds(fidelity['intervals']['spearman'])})"


def _bounds(interval: list[float]) -> str:
    low, high = interval
    return f"{low:.2f} to {high:.2f}"


def print_test_losses(record: dict[str, Any]) -> None:
    """Print test losses before and after fine-tuning, and the path of the model."""
    for task, losses in record["test"].items():
        console.print(f"{task}: test loss {losses['before']:.4f} before, {losses['after']:.4f} after", markup=False)
    console.print(f"model: {Path(record['output']) / 'model'}", markup=False, soft_wrap=True)
