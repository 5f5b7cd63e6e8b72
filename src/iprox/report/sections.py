"""The sections of the page, each as the plain values that its part of the template shows."""

import shlex
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from iprox.audits.agreement import telling_share
from iprox.report import formats
from iprox.report.charts.audit import FIDELITY_KEYS, fidelity_chart
from iprox.report.charts.base import Chart
from iprox.report.charts.proxy import rank_chart, tail_chart
from iprox.report.charts.scores import (
    SHARE_KEYS,
    answer_length_chart,
    score_histogram,
    source_chart,
    source_counts,
    task_histogram,
)
from iprox.report.charts.training import alignment_chart, held_out_chart, warmup_chart
from iprox.report.finished_run import Audit, FinishedRun, Scores
from iprox.settings import AGAIN

STAGES = {
    "data": "Data",
    "warmup": "Warm-up",
    "curvature": "Curvature",
    "compress": "Compress",
    "align": "Align",
    "audit": "Audit",
    "lds": "Retrain (LDS)",
    "removal": "Retrain (removal)",
    "score": "Score",
    "refine": "Refine",
    "select": "Select",
    "finetune": "Fine-tune",
    "evaluate": "Benchmarks",
    "attribute": "Attribute",
}
MOST_DISAGREEMENTS = 12
# Sources in the table of shares; the page says how many more there are.
MOST_SOURCES = 200


class Figure(NamedTuple):
    """A headline figure."""

    value: str
    name: str
    note: str


def share_name(share: str) -> str:
    """Return a share, spelled as in audit.json, in per cent."""
    return f"{100 * float(share):g} %"


def _judged(run: FinishedRun) -> dict[str, Any]:
    """Return the audit's figures for the scores that rows are selected by: those of one task, or the mean over all."""
    if run.audit is None:
        return {}
    return run.audit.summary.get("tasks", {}).get(run.scores.task) or run.audit.summary.get("mean", {})


def summary(run: FinishedRun) -> dict[str, Any]:
    """Return the result of the run in a sentence, and the headline figures."""
    record, scores, selection = run.record, run.scores, run.selection
    cost, stages = record.get("cost", {}), record.get("stages", {})
    tasks = scores.task or formats.listing(list(scores.tasks))
    model = Path(str(record.get("model", "the target"))).name
    judged, figures = _judged(run), []
    scorer = f"{model} itself"
    if run.compression is not None and run.compression.get("method") == "target":
        scorer = f"a proxy of {model} that keeps its weights and compares fewer gradients"
    elif run.compression is not None:
        removed = run.compression.get("achieved_sparsity")
        without = "" if removed is None else f" with {formats.percent(removed, 0)} of its linear parameters removed"
        scorer = f"a low-rank proxy of {model}{without}"
    if selection is None:
        sentence = f"{scores.rows:,} rows were scored for {tasks} on {scorer}; nothing has been selected yet."
    else:
        sentence = f"{len(selection.rows):,} of {scores.rows:,} rows were selected for {tasks}, scored on {scorer}"
        if np.isfinite(judged.get("spearman") or np.nan):
            sentence += f", whose ranking agrees with the target's at Spearman {formats.decimal(judged['spearman'])}"
        sentence += "."
        share = formats.percent(len(selection.rows) / scores.rows)
        note = f"{share} of {formats.rows(scores.rows)}, strategy “{selection.strategy}”"
        figures.append(Figure(formats.count(len(selection.rows)), "rows selected", note))
    if run.audit is not None:
        sample = len(run.audit.ids)
        share = telling_share(sample)
        over = f"proxy against target, {sample:,} audited rows; 1 is the same ranking"
        figures.append(Figure(formats.decimal(judged.get("spearman")), "Spearman correlation", over))
        name, overlap = share_name(str(share)), judged.get("overlap", {}).get(str(share))
        note = f"of the target's best {formats.rows(round(share * sample))} are among the proxy's; {name} by chance"
        figures.append(Figure(formats.percent(overlap, 0), f"top {name} overlap", note))
        refined = judged.get("refined", {}).get(str(share))
        if refined is not None and "refine" in stages:
            note = f"of the same rows are among {AGAIN} times as many of the proxy's; by default these are scored again"
            figures.append(Figure(formats.percent(refined, 0), f"top {name} within refine's reach", note))
    score_flops, target_flops = cost.get("score_flops"), cost.get("target_score_flops")
    if run.compression is not None and score_flops is not None and target_flops:
        note = f"of the target's FLOPs: {formats.flops(score_flops)} against {formats.flops(target_flops)}; "
        again = cost.get("refine_flops", 0.0)
        whole = formats.ratio(score_flops + _making_flops(record) + again, target_flops)
        note += f"{whole} including making the proxy{' and scoring its best rows again' if again else ''}"
        figures.append(Figure(formats.ratio(score_flops, target_flops), "scoring cost", note))
    total = sum(stage.get("seconds") or 0.0 for stage in stages.values())
    figures.append(Figure(formats.duration(total), "total time", f"all stages, on {record.get('device', 'unknown')}"))
    if selection is not None and len(selection.rows) and len(scores.source_names) > 1:
        top = source_counts(scores.source_codes, scores.source_names, selection.rows)[0]
        note = f"from {formats.percent(top.pool_share)} of the pool to {formats.percent(top.selected_share)}"
        name = f"points gained by {formats.shorten(top.name, 24)}"
        figures.append(Figure(formats.points(top.gain), name, note))
    return {"sentence": sentence, "figures": figures}


def score_section(run: FinishedRun) -> dict[str, Any]:
    """Return the histogram of the scores that rows are selected by, and one histogram per task."""
    scores, selection = run.scores, run.selection
    finite = np.isfinite(scores.influence)
    if not finite.any():
        return {"aggregate": None, "tasks": [], "task_keys": (), "note": "No row has a score."}
    chosen = np.array([], dtype=np.int64) if selection is None else selection.rows
    cut = None if selection is None else selection.threshold
    notes = []
    if not finite.all():
        notes.append(f"{formats.rows(int((~finite).sum()))} without a score; they cannot be selected.")
    if run.refined is not None:
        cut = None  # a score of the target, and the chart shows the proxy's
        notes.append(
            "These are the proxy's scores. The target scored the best "
            f"{formats.rows(run.refined['candidates'])} again, and the selection was made among them by its scores."
        )
    positive = formats.percent((scores.influence[finite] > 0).mean(), 0)
    caption = f"Training on a row with a positive score lowers the validation loss: {positive} of the scored rows."
    tasks = [
        task_histogram(task, values, chosen, id=f"chart-task-{index}")
        for index, (task, values) in enumerate(scores.tasks.items())
        if len(scores.tasks) > 1 and np.isfinite(values).any()
    ]
    return {
        "aggregate": score_histogram(scores.influence, chosen, cut, title=_title(scores), caption=caption),
        "tasks": tasks,
        "task_keys": SHARE_KEYS,
        "note": " ".join(notes),
    }


def _title(scores: Scores) -> str:
    if scores.task is not None:
        return f"Influence on {scores.task}, by which rows are selected"
    if scores.weights:
        named = ", ".join(f"{task} {scores.weights.get(task, 1):g}" for task in scores.tasks)
        return f"Influence, all tasks together by weight ({named})"
    return "Influence, all tasks together" if len(scores.tasks) > 1 else "Influence"


def composition_section(run: FinishedRun) -> dict[str, Any] | None:
    """Return the make-up of the selection next to that of the pool, or None if nothing is selected."""
    scores, selection = run.scores, run.selection
    if selection is None or not len(selection.rows):
        return None
    named = any(name is not None for name in scores.source_names)
    counts = source_counts(scores.source_codes, scores.source_names, selection.rows) if named else []
    validation = selection.profile["supervised"]["validation"]
    medians = {task: float(each["median"]) for task, each in validation.items()}
    return {
        "sources": source_chart(counts) if named else None,
        "table": [
            (
                *(each.name, formats.count(each.pool), formats.percent(each.pool_share)),
                *(formats.count(each.selected), formats.percent(each.selected_share), formats.points(each.gain)),
            )
            for each in counts[:MOST_SOURCES]
        ],
        "left_out": max(0, len(counts) - MOST_SOURCES),
        "lengths": answer_length_chart(scores.supervised, selection.rows, medians),
        "profile": _profile_rows(selection.profile),
        "warnings": selection.profile["warnings"],
    }


def _profile_rows(profile: dict[str, Any]) -> list[tuple[str, ...]]:
    """Return the table of selection, pool and validation sets."""
    lengths, duplicates = profile["supervised"], profile["near_duplicates"]

    def row(name: str, of: dict[str, float] | None, sources: str = formats.DASH, same: str = formats.DASH) -> Any:
        if of is None:
            return (name, formats.DASH, formats.DASH, sources, same)
        spread = f"{formats.count(of['low'])} to {formats.count(of['high'])}"
        return (name, formats.count(of["median"]), spread, sources, same)

    def shares(of: str) -> str:
        named = [(each["source"] or "(no source)", each[of]) for each in profile["sources"][:3]]
        return ", ".join(f"{formats.shorten(name, 18)} {formats.percent(share, 0)}" for name, share in named)

    same = formats.percent(duplicates["share"], 0)
    if duplicates["share"] is not None and duplicates["compared"] < profile["rows"]:
        same += f" of {formats.rows(duplicates['compared'])} drawn"
    return [
        row("Selection", lengths["selection"], shares("selection"), same),
        row("Pool", lengths["pool"], shares("pool")),
        *(row(f"Validation, {task}", each) for task, each in lengths["validation"].items()),
    ]


def fidelity_section(run: FinishedRun) -> dict[str, Any] | None:
    """Return the audit's charts and tables, or None if the audit was off."""
    audit = run.audit
    if audit is None:
        return None
    tasks, mean = audit.summary["tasks"], audit.summary.get("mean", {})
    shares = sorted({share for task in tasks.values() for share in task.get("overlap", {})}, key=float)

    def row(name: str, values: dict[str, Any]) -> tuple[str, ...]:
        overlap, bounds = values.get("overlap", {}), values.get("intervals", {})
        agreement = (_with_interval(values.get(key), bounds.get(key)) for key in ("spearman", "kendall"))
        return (name, *agreement, *(formats.percent(overlap.get(share), 0) for share in shares))

    sources = dict(zip(audit.ids, audit.sources, strict=True))
    scatters = (
        fidelity_chart(
            *(task, audit.proxy[task], audit.target[task], audit.ids, audit.sources),
            spearman=values.get("spearman"),
            id=f"chart-fidelity-{index}",
        )
        for index, (task, values) in enumerate(tasks.items())
    )
    return {
        "charts": [chart for chart in scatters if chart is not None],
        "keys": FIDELITY_KEYS,
        "heads": ["Task", "Spearman", "Kendall", *(f"Top {share_name(share)} overlap" for share in shares)],
        "rows": [row(task, values) for task, values in tasks.items()],
        "mean": row("Mean", mean) if len(tasks) > 1 and mean else None,
        "sample": formats.count(len(audit.ids)),
        "by_source": [
            (name, formats.count(entry["rows"]), formats.decimal(entry["spearman"]))
            for name, entry in audit.summary.get("by_source", {}).items()
        ],
        "by_length": [
            (
                f"{entry['tokens'][0]:,} to {entry['tokens'][1]:,} tokens",
                *(formats.count(entry["rows"]), formats.decimal(entry["spearman"])),
            )
            for entry in audit.summary.get("by_length", [])
        ],
        "disagreements": [
            (
                *(entry["id"], sources.get(entry["id"]) or "(no source)", task),
                *(f"top {formats.percent(entry[side], 0)}" for side in ("proxy", "target")),
            )
            for task, entry in _disagreements(audit)
        ],
        "lds": None if audit.lds is None else _lds(audit.lds),
        "removal": None if audit.removal is None else _removal(audit.removal),
    }


def _lds(measured: dict[str, Any]) -> dict[str, Any]:
    """Return the linear datamodeling scores by task."""
    rows = [
        (task, *(_with_interval(values[side]["lds"], values[side]["interval"]) for side in ("proxy", "target")))
        for task, values in measured["tasks"].items()
    ]
    if len(rows) > 1:
        rows.append(("Mean", *(formats.decimal(measured["mean"][side]) for side in ("proxy", "target"))))
    size = formats.count(round(measured["fraction"] * measured["rows"]))
    return {"rows": rows, "subsets": formats.count(measured["subsets"]), "size": size}


def _removal(measured: dict[str, Any]) -> dict[str, Any]:
    """Return how the validation losses rose without the top rows of each ranking, by task."""
    entries = list(measured["tasks"].items())
    if len(entries) > 1:
        entries.append(("Mean", measured["mean"]))
    rows = []
    for task, values in entries:
        for side in ("proxy", "target"):
            top, random, difference, error = (
                formats.decimal(values[side][key], 4) for key in ("top", "random", "difference", "standard_error")
            )
            rows.append((task, side, top, random, f"{difference} ± {error}"))
    return {
        "rows": rows,
        "removed": formats.count(measured["removed"]),
        "of": formats.count(measured["rows"]),
        "repeats": formats.count(measured["repeats"]),
    }


def _with_interval(value: float | None, bounds: list[float] | None) -> str:
    """Return a figure with its interval: `0.81 (0.76 to 0.85)`."""
    interval = "" if bounds is None else f" ({formats.decimal(bounds[0])} to {formats.decimal(bounds[1])})"
    return formats.decimal(value) + interval


def _disagreements(audit: Audit) -> list[tuple[str, dict[str, Any]]]:
    """Return the rows that proxy and target place furthest apart, over all tasks: (task, entry of audit.json)."""
    found = [
        (task, entry) for task, values in audit.summary["tasks"].items() for entry in values.get("disagreements", [])
    ]
    return sorted(found, key=lambda item: -abs(item[1]["proxy"] - item[1]["target"]))[:MOST_DISAGREEMENTS]


def disagreeing_rows(run: FinishedRun) -> list[int]:
    """Return the row numbers of the disagreements, the largest first."""
    if run.audit is None:
        return []
    ids = list(dict.fromkeys(entry["id"] for _, entry in _disagreements(run.audit)))
    wanted = pa.array(ids, run.scores.ids.type)
    found = pc.is_in(run.scores.ids, wanted)  # pyright: ignore[reportAttributeAccessIssue]
    (among,) = np.nonzero(found.to_numpy())
    rows = {run.scores.id(row): row for row in among.tolist()}
    return [rows[id] for id in ids if id in rows]


def proxy_section(run: FinishedRun) -> dict[str, Any] | None:
    """Return the proxy's facts and layer charts, or None if the run made no proxy."""
    compression, cost = run.compression, run.record.get("cost", {})
    if compression is None:
        return None
    parameters, target = cost.get("proxy_parameters"), cost.get("target_parameters")
    asked = [
        f"{formats.parameters(value) if name == 'parameters' else formats.percent(value)} {name}"
        for name, value in compression.get("size", {}).items()
    ]
    facts = [
        ("Method", str(compression.get("method", formats.DASH))),
        ("Rank rule", str(compression.get("ranks_rule", formats.DASH))),
        ("Size asked for", ", ".join(asked) or formats.DASH),
        ("Sparsity achieved", formats.percent(compression.get("achieved_sparsity"), 2)),
        ("Parameters of the target", formats.parameters(target)),
        ("Parameters of the proxy", f"{formats.parameters(parameters)} ({formats.ratio(parameters, target)})"),
        ("FLOPs per token, target", formats.flops(cost.get("target_flops_per_token"))),
        ("FLOPs per token, proxy", formats.flops(cost.get("proxy_flops_per_token"))),
    ]
    layers = compression.get("layers", {})
    drawn = [rank_chart(layers)] if layers else []
    if any(layer.get("tail") is not None for layer in layers.values()):
        drawn.append(tail_chart(layers))
    return {"facts": facts, "charts": drawn}


def training_section(run: FinishedRun) -> list[Chart]:
    """Return the training curves of the run."""
    drawn = []
    if run.warmup_history:
        drawn.append(warmup_chart(run.warmup_history, run.checkpoints or []))
    if run.alignment is not None:
        drawn.append(alignment_chart(run.alignment.get("steps", [])))
        drawn.append(held_out_chart(run.alignment.get("held_out", []), run.alignment.get("best_step")))
    return [chart for chart in drawn if chart is not None]


def tuned_section(run: FinishedRun) -> list[tuple[str, ...]]:
    """Return test losses and benchmarks before and after fine-tuning: task, measure, before, after, change."""
    stages = run.record.get("stages", {})
    found: list[tuple[str, str, dict[str, Any]]] = []
    for task, values in stages.get("finetune", {}).get("test", {}).items():
        found += [(task, "loss", values), (task, "exact match", values["exact_match"])]
    for task, metrics in stages.get("evaluate", {}).get("lm_eval", {}).items():
        found += [(task, metric.removesuffix(",none"), values) for metric, values in metrics.items()]
    return [
        (
            *(task, measure),
            *(
                formats.decimal(values[when], 4) + ("" if error is None else f" ± {formats.decimal(error, 4)}")
                for when, error in zip(("before", "after"), values.get("stderr", (None, None)), strict=True)
            ),
            formats.signed(values["after"] - values["before"], 4),
        )
        for task, measure, values in found
    ]


def cost_section(run: FinishedRun) -> dict[str, Any]:
    """Return the cost by stage, and the cost of the proxy relative to scoring on the target."""
    stages = run.record.get("stages", {})
    ordered = {name: stages[name] for name in [*STAGES, *stages] if name in stages}
    rows = [
        (
            STAGES.get(name, name),
            formats.duration(stage.get("seconds")),
            formats.count(stage.get("tokens")),
            formats.flops(stage.get("flops")),
            formats.size(stage.get("peak_memory_bytes")),
            "reused" if stage.get("skipped") else "run",
        )
        for name, stage in ordered.items()
    ]
    seconds, flops = (sum(stage.get(key) or 0.0 for stage in ordered.values()) for key in ("seconds", "flops"))
    peak = max((stage.get("peak_memory_bytes") or 0 for stage in ordered.values()), default=0) or None
    total = ("Total", formats.duration(seconds), "", formats.flops(flops), formats.size(peak), "")
    return {"rows": rows, "total": total if rows else None, "sentence": _cost_sentence(run)}


def _making_flops(record: dict[str, Any]) -> float:
    return sum(record.get("stages", {}).get(name, {}).get("flops") or 0.0 for name in ("compress", "align"))


def _cost_sentence(run: FinishedRun) -> str:
    cost = run.record.get("cost", {})
    target, scoring = cost.get("target_score_flops"), cost.get("score_flops")
    if run.compression is None or not target or scoring is None:
        return ""
    making, again = _making_flops(run.record), cost.get("refine_flops")
    rescored = f" Scoring the best rows again took {formats.flops(again)}." if again else ""
    return (
        f"Scoring the pool on the proxy took {formats.flops(scoring)}, {formats.ratio(scoring, target)} of the "
        f"{formats.flops(target)} that scoring it on the target would take. Making the proxy took "
        f"{formats.flops(making)}; including it the ratio is {formats.ratio(scoring + making, target)}.{rescored} "
        "The larger the pool, the less the cost of making the proxy matters."
    )


def warnings_section(run: FinishedRun, own: list[str]) -> list[tuple[str, str]]:
    """Return (stage, warning) pairs: the warnings of the run, then those of the report itself."""
    stages: dict[str, Any] = run.record.get("stages", {})
    found = [
        (STAGES.get(name, name), str(each)) for name, stage in stages.items() for each in stage.get("warnings", [])
    ]
    rows = run.record.get("inputs", {}).get("pool", {}).get("rows")
    if rows is not None and rows != run.scores.rows:
        own = [*own, f"run.json counts {rows:,} pool rows, scores.parquet {run.scores.rows:,}."]
    return found + [("Report", warning) for warning in own]


def reproduce_section(run: FinishedRun) -> dict[str, Any]:
    """Return the recipe, the command that made the run, the command that repeats it, and the machine and versions."""
    record, inputs = run.record, run.record.get("inputs", {})

    def described(data: dict[str, Any]) -> str:
        # The start of a fingerprint is enough to compare by eye; run.json has all of it.
        return (
            f"{formats.count(data.get('rows'))} rows, fingerprint {str(data.get('fingerprint') or formats.DASH)[:12]}"
        )

    versions = {"iprox": record.get("iprox"), **record.get("versions", {})}
    facts = [
        ("Model", str(record.get("model", formats.DASH))),
        ("Created", formats.moment(record.get("created"))),
        ("Seed", str(record.get("seed", formats.DASH))),
        ("Device", f"{record.get('device', formats.DASH)}, {record.get('dtype', formats.DASH)}"),
        ("Git revision", str(record.get("git") or "not in a git checkout")),
        ("Pool", described(inputs.get("pool", {}))),
        *((f"Validation {task}", described(entry)) for task, entry in inputs.get("validation", {}).items()),
        ("Versions", ", ".join(f"{name} {version}" for name, version in versions.items() if version)),
    ]
    again = f"iprox run {shlex.quote(str(run.path / 'recipe.yaml'))}" if run.recipe else ""
    return {"command": str(record.get("command", "")), "again": again, "recipe": run.recipe, "facts": facts}
