"""The sections of the page, each as the plain values its part of the template shows."""

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from iprox.audits.overlap import telling_share
from iprox.report import formats
from iprox.report.charts import Chart
from iprox.report.fidelity_section import share_name
from iprox.report.length_charts import answer_length_chart, row_length_chart
from iprox.report.proxy_charts import rank_chart, tail_chart
from iprox.report.run_folder import RunFolder, Scores
from iprox.report.score_charts import (
    SHARE_KEYS,
    score_histogram,
    source_chart,
    source_shares,
    task_histogram,
)
from iprox.report.training_charts import alignment_chart, held_out_chart, warmup_chart

STAGES = {
    "data": "Data",
    "warmup": "Warm-up",
    "compress": "Compress",
    "align": "Align",
    "audit": "Audit",
    "lds": "Retrain (LDS)",
    "removal": "Retrain (removal)",
    "score": "Score",
    "refine": "Refine",
    "select": "Select",
    "finetune": "Fine-tune",
    "attribute": "Attribute",
}


@dataclass(frozen=True, slots=True)
class Figure:
    """One headline figure."""

    value: str
    name: str
    note: str


def _model_name(run: dict[str, Any]) -> str:
    return Path(str(run.get("model", "the target"))).name


def judged(folder: RunFolder) -> dict[str, Any]:
    """The audit's figures of what rows are selected by: one task, or the mean over all."""
    assert folder.audit is not None
    of_task = folder.audit.summary.get("tasks", {}).get(folder.scores.task)
    return of_task or folder.audit.summary.get("mean", {})


def summary(folder: RunFolder) -> dict[str, Any]:
    """Returns the answer in a sentence, and the headline figures."""
    run, scores, selection = folder.run, folder.scores, folder.selection
    cost = run.get("cost", {})
    tasks = scores.task or formats.listing(list(scores.tasks))
    scorer = f"{_model_name(run)} itself"
    if folder.compression is not None:
        removed = folder.compression.get("achieved_sparsity")
        scorer = f"a low-rank proxy of {_model_name(run)}"
        if removed is not None:
            scorer += f" with {formats.percent(removed, 0)} of its linear parameters removed"
    if selection is None:
        sentence = f"{scores.rows:,} rows were scored for {tasks} on {scorer}; nothing has been selected yet."
    else:
        sentence = f"{len(selection.rows):,} of {scores.rows:,} rows were selected for {tasks}, scored on {scorer}"
        spearman = None if folder.audit is None else judged(folder).get("spearman")
        if spearman is not None and np.isfinite(spearman):
            sentence += f", whose ranking agrees with the target's at Spearman {formats.decimal(spearman)}"
        sentence += "."

    figures = []
    if selection is not None:
        note = f"{formats.percent(len(selection.rows) / scores.rows)} of {formats.rows(scores.rows)}, "
        note += f"strategy “{selection.strategy}”"
        figures.append(Figure(formats.count(len(selection.rows)), "rows selected", note))
    if folder.audit is not None:
        found, sample = judged(folder), len(folder.audit.ids)
        share = telling_share(sample)
        over = f"proxy against target, {sample:,} audited rows"
        figures.append(Figure(formats.decimal(found.get("spearman")), "Spearman correlation", over))
        name, overlap = share_name(str(share)), found.get("overlap", {}).get(str(share))
        chance = f"of the target's top {formats.rows(round(share * sample))} are in the proxy's; {name} by chance"
        figures.append(Figure(formats.percent(overlap, 0), f"top {name} overlap", chance))
    score_flops, target_flops = cost.get("score_flops"), cost.get("target_score_flops")
    if folder.compression is not None and score_flops is not None and target_flops:
        note = f"of the target's FLOPs: {formats.flops(score_flops)} against {formats.flops(target_flops)}"
        note += f"; {formats.ratio(score_flops + _making_flops(run), target_flops)} with making the proxy"
        figures.append(Figure(formats.ratio(score_flops, target_flops), "scoring cost", note))
    stages = run.get("stages", {})
    total = sum(stage.get("seconds") or 0.0 for stage in stages.values())
    figures.append(Figure(formats.duration(total), "total time", f"all stages, on {run.get('device', 'unknown')}"))
    if selection is not None and len(selection.rows) and len(scores.source_names) > 1:
        top = source_shares(scores.source_codes, scores.source_names, selection.rows)[0]
        note = f"from {formats.percent(top.pool_share)} of the pool to {formats.percent(top.selected_share)}"
        name = f"points gained by {formats.shorten(top.name, 24)}"
        figures.append(Figure(formats.points(top.gain), name, note))
    return {"sentence": sentence, "figures": figures}


def score_section(folder: RunFolder) -> dict[str, Any]:
    """Returns the histogram of the aggregate with the cut, and one a task."""
    scores, selection = folder.scores, folder.selection
    chosen = np.array([], dtype=np.int64) if selection is None else selection.rows
    finite = np.isfinite(scores.influence)
    unscored = int((~finite).sum())
    note = "" if not unscored else f"{formats.rows(unscored)} without a score, never selected."
    if not finite.any():
        return {"aggregate": None, "tasks": [], "task_keys": (), "note": "No row has a score."}
    positive = formats.percent((scores.influence[finite] > 0).mean(), 0)
    caption = f"Training on a row with a positive score lowers the validation loss: {positive} of the scored rows."
    cut = None if selection is None else selection.threshold
    if folder.refined is not None:
        cut = None  # it is of the target's scores
        note = (
            f"{note} These are the proxy's scores. The target scored the best "
            f"{formats.rows(folder.refined['candidates'])} again, and the selection is among them, by its own scores."
        ).strip()
    aggregate = score_histogram(
        scores.influence,
        chosen,
        cut,
        id="chart-influence",
        title=_title(scores),
        caption=caption,
    )
    tasks = []
    if len(scores.tasks) > 1:
        tasks = [
            task_histogram(task, values, chosen, id=f"chart-task-{index}")
            for index, (task, values) in enumerate(scores.tasks.items())
            if np.isfinite(values).any()
        ]
    return {"aggregate": aggregate, "tasks": tasks, "task_keys": SHARE_KEYS, "note": note}


def _title(scores: Scores) -> str:
    if scores.task is not None:
        return f"Influence on {scores.task}, by which rows are selected"
    if scores.weights:
        named = ", ".join(f"{task} {scores.weights.get(task, 1):g}" for task in scores.tasks)
        return f"Influence, all tasks together by weight ({named})"
    return "Influence, all tasks together" if len(scores.tasks) > 1 else "Influence"


def composition_section(folder: RunFolder) -> dict[str, Any] | None:
    """Returns what the selection is made of against the pool, or None where nothing is selected."""
    scores, selection = folder.scores, folder.selection
    if selection is None or not len(selection.rows):
        return None
    named = any(name is not None for name in scores.source_names)
    shares = source_shares(scores.source_codes, scores.source_names, selection.rows) if named else []
    rows = [
        (
            s.name,
            formats.count(s.pool),
            formats.percent(s.pool_share),
            formats.count(s.selected),
            formats.percent(s.selected_share),
            formats.points(s.gain),
        )
        for s in shares[:200]
    ]
    return {
        "sources": source_chart(shares) if named else None,
        "table": rows,
        "left_out": max(0, len(shares) - len(rows)),
        "lengths": _lengths(folder),
        "profile": profile_rows(selection.profile),
        "warnings": selection.profile["warnings"] if selection.profile else [],
    }


def _lengths(folder: RunFolder) -> Chart:
    """The chart of supervised tokens, or of all tokens where an older file has no others."""
    scores, selection = folder.scores, folder.selection
    assert selection is not None
    if scores.supervised is None:
        return row_length_chart(scores.tokens, selection.rows)
    known = selection.profile["supervised"]["validation"] if selection.profile else {}
    return answer_length_chart(
        scores.supervised, selection.rows, {task: float(each["median"]) for task, each in known.items()}
    )


def profile_rows(profile: dict[str, Any] | None) -> list[tuple[str, ...]]:
    """Returns the table of selection, pool and validation sets; empty where selection.json has no profile."""
    if profile is None:
        return []
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


def asked_size(size: dict[str, float]) -> str:
    """The size of a proxy as the recipe gave it: a sparsity, a share of FLOPs, or a fidelity."""
    for name, value in size.items():
        return f"{formats.percent(value)} {name}"
    return formats.DASH


def proxy_section(folder: RunFolder) -> dict[str, Any] | None:
    """Returns the proxy's facts and layer charts, or None where the run made no proxy."""
    compression, cost = folder.compression, folder.run.get("cost", {})
    if compression is None:
        return None
    parameters, target = cost.get("proxy_parameters"), cost.get("target_parameters")
    facts = [
        ("Method", str(compression.get("method", formats.DASH))),
        ("Rank rule", str(compression.get("ranks_rule", formats.DASH))),
        ("Size asked", asked_size(compression.get("size", {}))),
        ("Sparsity achieved", formats.percent(compression.get("achieved_sparsity"), 2)),
        ("Parameters of the target", formats.parameters(target)),
        ("Parameters of the proxy", f"{formats.parameters(parameters)} ({formats.ratio(parameters, target)})"),
        ("FLOPs per token, target", formats.flops(cost.get("target_flops_per_token"))),
        ("FLOPs per token, proxy", formats.flops(cost.get("proxy_flops_per_token"))),
    ]
    layers = compression.get("layers", {})
    charts = []
    if layers:
        charts.append(rank_chart(layers))
        if any(layer.get("tail") is not None for layer in layers.values()):
            charts.append(tail_chart(layers))
    return {"facts": facts, "charts": charts}


def training_section(folder: RunFolder) -> list[Chart]:
    """Returns the training curves there are."""
    charts = []
    if folder.warmup_history:
        charts.append(warmup_chart(folder.warmup_history, folder.checkpoints or []))
    if folder.alignment is not None:
        charts.append(alignment_chart(folder.alignment.get("steps", [])))
        charts.append(held_out_chart(folder.alignment.get("held_out", []), folder.alignment.get("best_step")))
    return [chart for chart in charts if chart is not None]


def cost_section(folder: RunFolder) -> dict[str, Any]:
    """Returns the cost table, and what the proxy costs in all against scoring with the target."""
    stages = folder.run.get("stages", {})
    ordered = [name for name in STAGES if name in stages] + [name for name in stages if name not in STAGES]
    rows = []
    for name in ordered:
        stage = stages[name]
        rows.append(
            (
                STAGES.get(name, name),
                formats.duration(stage.get("seconds")),
                formats.count(stage.get("tokens")),
                formats.flops(stage.get("flops")),
                formats.size(stage.get("peak_memory_bytes")),
                "reused" if stage.get("skipped") else "run",
            )
        )
    seconds = sum(stages[n].get("seconds") or 0.0 for n in ordered)
    flops = sum(stages[n].get("flops") or 0.0 for n in ordered)
    peaks = [peak for n in ordered if (peak := stages[n].get("peak_memory_bytes")) is not None]
    total = ("Total", formats.duration(seconds), "", formats.flops(flops), formats.size(max(peaks, default=None)), "")
    return {"rows": rows, "total": total if rows else None, "sentence": _cost_sentence(folder)}


def _making_flops(run: dict[str, Any]) -> float:
    return sum(run.get("stages", {}).get(name, {}).get("flops") or 0.0 for name in ("compress", "align"))


def _cost_sentence(folder: RunFolder) -> str:
    cost = folder.run.get("cost", {})
    target, scoring = cost.get("target_score_flops"), cost.get("score_flops")
    if folder.compression is None or not target or scoring is None:
        return ""
    making = _making_flops(folder.run)
    again = cost.get("refine_flops") or 0.0
    rescored = f" Scoring the best rows again took {formats.flops(again)}." if again else ""
    return (
        f"Scoring the pool on the proxy took {formats.flops(scoring)}, {formats.ratio(scoring, target)} of what the "
        f"target would take ({formats.flops(target)}). With the {formats.flops(making)} that making the proxy took, "
        f"it is {formats.ratio(scoring + making, target)}.{rescored} The larger the pool, the less the making weighs."
    )


def warnings_section(folder: RunFolder, own: list[str]) -> list[tuple[str, str]]:
    """Returns (stage, warning) pairs: those of the run, then those met while the report was made."""
    stages: dict[str, Any] = folder.run.get("stages", {})
    found = [
        (STAGES.get(name, name), str(warning))
        for name, stage in stages.items()
        for warning in stage.get("warnings", [])
    ]
    rows = folder.run.get("inputs", {}).get("pool", {}).get("rows")
    if rows is not None and rows != folder.scores.rows:
        own = [*own, f"run.json counts {rows:,} pool rows, scores.parquet {folder.scores.rows:,}."]
    return found + [("Report", warning) for warning in own]


def _short(entry: dict[str, Any]) -> str:
    """Returns the start of a fingerprint, enough to compare by eye; run.json has all of it."""
    return str(entry.get("fingerprint") or formats.DASH)[:12]


def reproduce_section(folder: RunFolder) -> dict[str, Any]:
    """Returns the recipe, the commands that made the run and make it again, and what it ran on."""
    run = folder.run
    pool = run.get("inputs", {}).get("pool", {})
    facts = [
        ("Model", str(run.get("model", formats.DASH))),
        ("Created", formats.moment(run.get("created"))),
        ("Seed", str(run.get("seed", formats.DASH))),
        ("Device", f"{run.get('device', formats.DASH)}, {run.get('dtype', formats.DASH)}"),
        ("Git revision", str(run.get("git") or "not in a git checkout")),
        ("Pool", f"{formats.count(pool.get('rows'))} rows, fingerprint {_short(pool)}"),
    ]
    for task, entry in run.get("inputs", {}).get("validation", {}).items():
        shown = f"{formats.count(entry.get('rows'))} rows, fingerprint {_short(entry)}"
        facts.append((f"Validation {task}", shown))
    versions = {"iprox": run.get("iprox"), **run.get("versions", {})}
    facts.append(("Versions", ", ".join(f"{name} {version}" for name, version in versions.items() if version)))
    again = f"iprox run {shlex.quote(str(folder.path / 'recipe.yaml'))}" if folder.recipe else ""
    return {"command": str(run.get("command", "")), "again": again, "recipe": folder.recipe, "facts": facts}
