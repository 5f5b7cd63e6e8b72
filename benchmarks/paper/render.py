"""Write the tables and plots of docs/results.md and docs/results/ from the results in benchmarks/results/.

    python benchmarks/paper/render.py

The pages are written by hand, except for the blocks between `<!-- NAME -->` and `<!-- /NAME -->`, which this replaces.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from main_table import METHODS, mean_losses, relative_flops

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import read_results, standard_error

mpl.use("svg")
from matplotlib import pyplot as plt

ROOT = Path(__file__).resolve().parents[2]
RESULTS, DOCS = ROOT / "benchmarks/results", ROOT / "docs"
# Reproducible files: fixed ids (and no date).
mpl.rcParams.update({"svg.hashsalt": "iprox", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False})


def main() -> None:
    """Fill in every block of the pages."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    for name, (file, at, make) in BLOCKS.items():
        page, path = DOCS / at, RESULTS / file
        text = page.read_text(encoding="utf-8")
        content = make(read_results(path)) if path.is_file() else "Not measured yet."
        # Links are written relative to docs/.
        content = content.replace("](plots/", f"]({'../' * at.count('/')}plots/")
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        if not pattern.search(text):
            raise SystemExit(f"{page}: has no block {name}")
        text = pattern.sub(lambda found, content=content: f"{found[1]}{content}\n{found[2]}", text)
        page.write_text(text, encoding="utf-8")


def table(heads: list[str], rows: list[list[str]]) -> str:
    """Return a Markdown table."""
    lines = ["| " + " | ".join(row) + " |" for row in [heads, ["---"] * len(heads), *rows]]
    return "\n".join(lines)


def of_seeds(cells: dict[str, Any], name: str) -> list[Any]:
    """Return the cells of a name, one per seed."""
    return [cells[f"{name}/{seed}"] for seed in range(10) if f"{name}/{seed}" in cells]


def made_on(results: dict[str, Any]) -> str:
    """Return the machines and the versions of torch that the results were made with."""
    machines = {entry["machine"] for entry in results["machines"]}
    versions = {f"torch {entry['versions']['torch']}" for entry in results["machines"]}
    return f"{'; '.join(sorted(machines))}; {', '.join(sorted(versions))}."


def with_error(values: list[float]) -> str:
    """Return a mean over seeds, with its standard error if there are several seeds."""
    error = f" ± {standard_error(values):.3f}" if len(values) > 1 else ""
    return f"{np.mean(values):.3f}{error}" if values else "–"


# The rows of the table on the front page: method -> name on the page.
FRONT = {
    "random": "random rows",
    "sibling": "a trained sibling with 40 % of the parameters",
    "ipsvd 0.7": "**IPSVD, sparsity 0.7**",
    "target": "the target itself",
    "full pool": "no selection: the whole pool",
}


def front_rows(results: dict[str, Any]) -> str:
    """Return the five rows of the front page: test loss, what is found of the target's top 5 %, and cost."""
    cells, tasks = results["cells"], results["settings"]["tasks"]
    rows = []
    for method, name in FRONT.items():
        losses, scored = mean_losses(cells, method, tasks), of_seeds(cells, f"{method}/scores")
        found = "100%" if method == "target" else f"{found_of_top(scored):.0%}" if scored else ""
        # Costs are relative to scoring on the target with low-rank validation gradients.
        cost = "1.00" if method == "target" else f"{relative_flops(cells, method):.2f}" if scored else ""
        rows.append([name, with_error(losses), found, cost, str(len(losses))])
    heads = ["trained on the 5 % selected by", "mean test loss", "of the target's top 5 %, found", "FLOPs", "seeds"]
    return table(heads, rows)


def found_of_top(scored: list[Any]) -> float:
    """Return the share of the target's top 5 % that is in a row's top 5 %, mean over tasks and seeds."""
    return float(np.mean([[task["overlap"]["0.05"] for task in cell["fidelity"].values()] for cell in scored]))


# The points of the plot on the front page: method -> name and offset of its label.
POINTS = {
    "ipsvd 0.3": ("IPSVD, sparsity 0.3", (-6, 4)),
    "ipsvd 0.5": ("IPSVD 0.5", (6, -3)),
    "ipsvd 0.7": ("IPSVD 0.7", (6, -3)),
    "svd-llm 0.7": ("SVD-LLM 0.7", (-6, -3)),
    "svd 0.7": ("SVD 0.7", (6, -3)),
    "sibling": ("trained sibling", (-6, -3)),
    "influence scorer": ("influence scorer", (-6, -3)),
    "rds": ("RDS+", (6, -3)),
    "bm25": ("BM25", (6, -3)),
}


def front_plot(results: dict[str, Any]) -> str:
    """Return the plot of the front page: what is found of the target's top 5 %, against cost."""
    cells = results["cells"]
    figure, axes = plt.subplots(figsize=(6.2, 3.4))
    points = []
    for method, (name, offset) in POINTS.items():
        cost, found = relative_flops(cells, method), found_of_top(of_seeds(cells, f"{method}/scores"))
        points.append((name, cost, found))
        ours = method.startswith("ipsvd")
        axes.plot(cost, found, "o", color="#1565c0" if ours else "#88909a", zorder=3)
        side = "left" if offset[0] > 0 else "right"
        axes.annotate(name, (cost, found), textcoords="offset points", xytext=offset, ha=side, fontsize=8)
    ours = sorted((cost, found) for name, cost, found in points if name.startswith("IPSVD"))
    axes.plot(*zip(*ours, strict=True), color="#1565c0", linewidth=1)
    axes.axvline(1, color="#1a1e23", linewidth=0.8, linestyle="--")
    axes.text(0.99, 0.04, "scoring on the target", ha="right", fontsize=8)
    axes.plot(0, 0.05, "o", color="#88909a")
    axes.annotate("random rows", (0, 0.05), textcoords="offset points", xytext=(6, -3), fontsize=8)
    axes.set_xlabel("FLOPs, relative to scoring the pool on the target")
    axes.set_ylabel("of the target's top 5 %, found")
    axes.set_xlim(-0.05, 1.12)
    axes.set_ylim(0, 1)
    axes.yaxis.set_major_formatter("{x:.0%}")
    axes.grid(linewidth=0.4)
    return f"![{alt(points)}; random rows 0.05 at 0.00]({saved(figure, 'found-and-cost')})"


def main_rows(results: dict[str, Any]) -> str:
    """Return a plot of the losses, and tables of losses, exact matches, shares of the own source and cost."""
    cells, tasks = results["cells"], results["settings"]["tasks"]
    losses, exact, sourced, costs, points = [], [], [], [], []
    # Tasks that a source of the pool belongs to; the others' losses depend more on the seed than on the row.
    sources = next((list(cell["own_source"]) for cell in cells.values() if "own_source" in cell), [])
    parted = 0 < len(sources) < len(tasks)
    for method in METHODS:
        entries = [of_seeds(cells, f"{method}/{task}") for task in tasks]
        if not any(entries):
            continue
        seeds = str(max(len(each) for each in entries))
        means = mean_losses(cells, method, tasks)
        if means:
            points.append((method, means))
        of_part = [with_error(mean_losses(cells, method, sources))] if parted else []
        shown = [with_error([entry["after"] for entry in each]) for each in entries]
        losses.append([method, *shown, with_error(means), *of_part, seeds])
        matched = [[entry["exact_match"]["after"] for entry in each] for each in entries]
        exact.append([method, *(f"{np.mean(each):.0%}" if each else "–" for each in matched)])
        scored = of_seeds(cells, f"{method}/scores")
        if not scored:
            continue
        own = [cell["own_source"] for cell in scored if "own_source" in cell]
        if own:
            sourced.append([method, *(f"{np.mean([each[task] for each in own]):.0%}" for task in own[0])])
        runs_model = sum(scored[0]["flops"].values()) > 0
        size = f"{scored[0]['parameters'] / 1e6:.1f} M" if runs_model else ""
        costs.append([method, size, f"{relative_flops(cells, method):.2f}"])
    part = [f"mean of {', '.join(sources)}"] if parted else []
    picture = mean_loss_plot(points, f"mean-loss-{results['settings']['estimator']}")
    parts = [
        picture,
        "Test loss in nats, lower is better:",
        table(["selected by", *tasks, "mean", *part, "seeds"], losses),
        "Exact matches:",
        table(["selected by", *tasks], exact),
        "Share of the selection that comes from the task's own source:",
        table(["selected by", *sources], sourced),
        "Parameters of the scored model, and FLOPs of selecting relative to scoring the pool on the target:",
        table(["selected by", "parameters", "FLOPs"], costs),
        made_on(results),
    ]
    return "\n\n".join(parts)


def mean_loss_plot(points: list[tuple[str, list[float]]], name: str) -> str:
    """Plot rows by mean test loss, best first, one dot per seed, and return the link to the plot."""
    points = sorted(points, key=lambda point: np.mean(point[1]))
    figure, axes = plt.subplots(figsize=(6.2, 0.6 + 0.19 * len(points)))
    for height, (method, means) in enumerate(points):
        color = "#1565c0" if method.startswith("ipsvd") else "#000000" if method == "target" else "#88909a"
        axes.plot(means, [height] * len(means), "o", color=color, markersize=4, alpha=0.6)
        axes.plot(np.mean(means), height, "|", color=color, markersize=10)
    axes.set_yticks(range(len(points)), [method for method, _ in points])
    axes.invert_yaxis()
    axes.grid(axis="x", linewidth=0.4)
    axes.set_xlabel("mean test loss over the tasks (nats); one dot per seed")
    said = "; ".join(f"{method} {', '.join(f'{mean:.3f}' for mean in means)}" for method, means in points)
    return f"![Mean test loss by seed: {said}]({saved(figure, name)})"


def fidelity_rows(results: dict[str, Any]) -> str:
    """Return agreement with the target over the whole pool, and FLOPs and seconds by stage, one table each."""
    cells = results["cells"]
    rows, points, scored_by = [], [], {}
    for method in METHODS:
        scored = of_seeds(cells, f"{method}/scores")
        if not scored or method == "target":
            continue
        scored_by[method] = scored[0]
        figures = [list(cell["fidelity"].values()) for cell in scored]
        spearman = with_error([float(np.mean([task["spearman"] for task in cell])) for cell in figures])
        overlap, cost = found_of_top(scored), relative_flops(cells, method)
        points.append((method, cost, overlap))
        again = [
            f"{np.mean([list(cell['recall'][share].values()) for cell in scored]):.2f}"
            if all("recall" in cell for cell in scored)
            else "–"
            for share in ("0.1", "0.2")
        ]
        within = [cell["within_sources"] for cell in scored if "within_sources" in cell]
        inside = f"{np.mean(within):.3f}" if within else "–"
        rows.append([method, spearman, inside, f"{overlap:.2f}", *again, f"{cost:.2f}", str(len(scored))])
    figure, axes = plt.subplots(figsize=(6.2, 3.4))
    for method, cost, overlap in points:
        axes.plot(cost, overlap, "o", color="#1565c0" if method.startswith("ipsvd") else "#88909a")
        axes.annotate(method, (cost, overlap), textcoords="offset points", xytext=(5, 3), fontsize=7)
    axes.set_xlabel("FLOPs of selecting, over scoring the pool on the target")
    axes.set_ylabel("of the target's top 5 %, found")
    axes.set_ylim(0, 1)
    picture = saved(figure, "fidelity-and-cost")
    heads = ["scored on", "Spearman", "within sources", "top-5 % overlap", "best 10 % scored again", "best 20 %"]

    def by_stage(key: str, form: str) -> str:
        stages = list(dict.fromkeys(stage for cell in scored_by.values() for stage in cell[key]))
        body = [
            [method, *(format(cell[key][stage], form) if stage in cell[key] else "" for stage in stages)]
            for method, cell in scored_by.items()
        ]
        return table(["scored on", *stages], body)

    parts = [
        f"![{alt(points)}]({picture})",
        table([*heads, "FLOPs over the target's", "seeds"], rows),
        "FLOPs by stage, first seed:",
        by_stage("flops", ".2g"),
        "Seconds by stage, first seed:",
        by_stage("seconds", ".0f"),
        made_on(results),
    ]
    return "\n\n".join(parts)


def alt(points: list[tuple[str, float, float]]) -> str:
    """Return the plot in words."""
    return "Top-5 % overlap against cost: " + "; ".join(
        f"{name} {found:.2f} at {cost:.2f}" for name, cost, found in points
    )


def ablation_rows(results: dict[str, Any]) -> str:
    """Return the variants of each ablation."""
    rows = []
    for name, cell in results["cells"].items():
        ablation, variant = name.rpartition("/")[0].split("/", 1)
        seconds = f"{cell['seconds']:.0f}" if "seconds" in cell else ""
        rows.append([ablation, variant, f"{cell['spearman']:.3f}", f"{cell['overlap']:.2f}", seconds])
    heads = ["ablation", "variant", "Spearman", "top-5 % overlap", "seconds of alignment"]
    settings = results["settings"]
    return f"{table(heads, rows)}\n\n{settings['rows']:,} rows, seed {settings['seed']}. {made_on(results)}"


def why_kept(results: dict[str, Any]) -> str:
    """Return influence and loss kept by sparsity, as plots and a table."""
    cells = {name: cell for name, cell in results["cells"].items() if name.startswith("kept/")}
    if not cells:
        return "Not measured yet."
    sizes = sorted({float(name.split("/")[2]) for name in cells})
    figure, both = plt.subplots(1, 2, figsize=(7.2, 2.8))
    rows = []
    for method, color in (("ipsvd", "#1565c0"), ("svd", "#88909a")):
        found = [cells[f"kept/{method}/{size}/0"] for size in sizes if f"kept/{method}/{size}/0" in cells]
        for axes, part in zip(both, ("influence", "loss"), strict=True):
            axes.plot(sizes[: len(found)], [cell[part] for cell in found], "o-", color=color, label=method)
        rows.append([f"{method}: influence", *(f"{cell['influence']:.3f}" for cell in found)])
        rows.append([f"{method}: loss over the target's", *(f"{cell['loss']:.2f}" for cell in found)])
    both[0].set_ylabel("Spearman with the target's influence")
    both[1].set_ylabel("loss over the target's")
    for axes in both:
        axes.set_xlabel("sparsity")
    both[0].legend(frameon=False)
    picture = saved(figure, "influence-and-loss-kept")
    words = table(["sparsity", *(f"{size:g}" for size in sizes)], rows)
    return f"![Influence and loss kept, by sparsity; the numbers are below]({picture})\n\n{words}\n\n{made_on(results)}"


def why_selected(results: dict[str, Any]) -> str:
    """Return affinity and diversity of selections, one table each."""
    cells = {name: cell for name, cell in results["cells"].items() if name.startswith("selection/")}
    if not cells:
        return "Not measured yet."
    tasks = results["settings"]["tasks"]
    methods = list(dict.fromkeys(name.split("/")[1] for name in cells))
    parts = []
    for figure, name in (("affinity", "Affinity"), ("nearest", "Distance to the nearest neighbor")):
        rows = []
        for method in methods:
            of_tasks = (cells.get(f"selection/{method}/{task}/0") for task in tasks)
            rows.append([method, *(f"{cell[figure]:.2f}" if cell else "" for cell in of_tasks)])
        parts += [f"{name}:", table(["selected by", *tasks], rows)]
    return "\n\n".join([*parts, made_on(results)])


# Estimators by the names that they had when results were made.
RENAMED = {"influence-function": "kfac"}


def lds_rows(results: dict[str, Any]) -> str:
    """Return linear datamodeling scores by estimator and task."""
    rows = []
    for name, cell in results["cells"].items():
        estimator = name.rpartition("/")[0]
        estimator = RENAMED.get(estimator, estimator)
        for task, sides in cell["tasks"].items():
            shown = [
                f"{side['lds']:.2f} ({side['interval'][0]:.2f} to {side['interval'][1]:.2f})" for side in sides.values()
            ]
            rows.append([estimator, task, *shown, f"{cell['fidelity']:.2f}"])
    heads = ["estimator", "task", "LDS of the proxy", "LDS of the target", "fidelity (mean)"]
    settings = results["settings"]
    return (
        f"{table(heads, rows)}\n\n{settings['subsets']} subsets of {settings['sample'] // 2} rows. {made_on(results)}"
    )


def saved(figure: Any, name: str) -> str:
    """Save a plot and return its path relative to docs/."""
    path = DOCS / "plots" / f"{name}.svg"
    path.parent.mkdir(exist_ok=True)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
    return f"plots/{path.name}"


# Block -> results file, page under docs/, function that makes the content.
BLOCKS: dict[str, tuple[str, str, Callable[[dict[str, Any]], str]]] = {
    "found": ("paper-tracin.jsonl", "results.md", front_plot),
    "front": ("paper-tracin.jsonl", "results.md", front_rows),
    "main": ("paper-tracin.jsonl", "results/main.md", main_rows),
    "main-if": ("paper-influence-function.jsonl", "results/main.md", main_rows),
    "fidelity": ("paper-tracin.jsonl", "results/fidelity.md", fidelity_rows),
    "ablations": ("paper-ablations.jsonl", "results/ablations.md", ablation_rows),
    "kept": ("paper-why.jsonl", "results/why.md", why_kept),
    "selected": ("paper-why.jsonl", "results/why.md", why_selected),
    "lds": ("paper-lds.jsonl", "results/lds.md", lds_rows),
}

if __name__ == "__main__":
    main()
