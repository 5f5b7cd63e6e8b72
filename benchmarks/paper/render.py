"""Write the tables and plots of docs/results.md from the results in benchmarks/results/.

    python benchmarks/paper/render.py

The page is written by hand but for what stands between `<!-- NAME -->` and `<!-- /NAME -->`, which this replaces.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from main_table import METHODS, mean_losses, relative_flops, standard_error

mpl.use("svg")
from matplotlib import pyplot as plt

ROOT = Path(__file__).resolve().parents[2]
RESULTS, DOCS = ROOT / "benchmarks/results", ROOT / "docs"
# The same file for the same numbers: no date, and ids that do not change.
mpl.rcParams.update({"svg.hashsalt": "iprox", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False})


def main() -> None:
    """Fill in every block of the page."""
    page = DOCS / "results.md"
    text = page.read_text(encoding="utf-8")
    for name, (file, make) in BLOCKS.items():
        path = RESULTS / file
        content = make(json.loads(path.read_text())) if path.is_file() else "Not measured yet."
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        if not pattern.search(text):
            raise SystemExit(f"{page}: has no block {name}")
        text = pattern.sub(lambda found, content=content: f"{found[1]}{content}\n{found[2]}", text)
    page.write_text(text, encoding="utf-8")


def table(heads: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(row) + " |" for row in [heads, ["---"] * len(heads), *rows]]
    return "\n".join(lines)


def of_seeds(cells: dict[str, Any], name: str) -> list[Any]:
    """The cells of that name, one a seed."""
    return [cells[f"{name}/{seed}"] for seed in range(10) if f"{name}/{seed}" in cells]


def made_on(results: dict[str, Any]) -> str:
    """On which machines, with which versions."""
    machines = {entry["machine"] for entry in results["machines"]}
    versions = {f"torch {entry['versions']['torch']}" for entry in results["machines"]}
    return f"{'; '.join(sorted(machines))}; {', '.join(sorted(versions))}."


def with_error(values: list[float]) -> str:
    """A mean over seeds with its standard error, where there are several."""
    error = f" ± {standard_error(values):.3f}" if len(values) > 1 else ""
    return f"{np.mean(values):.3f}{error}" if values else "–"


def main_rows(results: dict[str, Any]) -> str:
    """Test losses by row and task, exact matches, and what selecting cost; and the mean losses as a plot."""
    cells, tasks = results["cells"], results["settings"]["tasks"]
    rows, points = [], []
    # Tasks that a source of the pool is of; the others' losses hang on the seed more than on the row.
    sources = next((list(cell["own_source"]) for cell in cells.values() if "own_source" in cell), [])
    parted = 0 < len(sources) < len(tasks)
    for method in METHODS:
        entries = [of_seeds(cells, f"{method}/{task}") for task in tasks]
        if not any(entries):
            continue
        losses = [[entry["after"] for entry in each] for each in entries]
        seeds = max(len(each) for each in losses)
        shown = [with_error(each) for each in losses]
        exact = [
            f"{np.mean([entry['exact_match']['after'] for entry in each]):.0%}" if each else "–" for each in entries
        ]
        scored = of_seeds(cells, f"{method}/scores")
        runs_model = bool(scored) and sum(scored[0]["flops"].values()) > 0
        size = f"{scored[0]['parameters'] / 1e6:.1f} M" if runs_model else ""
        cost = f"{relative_flops(cells, method):.2f}" if scored else ""
        means = mean_losses(cells, method, tasks)
        if means:
            points.append((method, means))
        own = [cell["own_source"] for cell in scored if "own_source" in cell]
        pure = ", ".join(f"{np.mean([each[task] for each in own]):.0%}" for task in own[0]) if own else ""
        of_part = [with_error(mean_losses(cells, method, sources))] if parted else []
        rows.append([method, *shown, with_error(means), *of_part, ", ".join(exact), pure, size, cost, str(seeds)])
    part = [f"mean of {', '.join(sources)}"] if parted else []
    heads = ["selected by", *tasks, "mean", *part, f"exact match ({', '.join(tasks)})"]
    heads += [f"of the task's own source ({', '.join(sources)})", "parameters", "FLOPs", "seeds"]
    picture = mean_loss_plot(points, f"mean-loss-{results['settings']['estimator']}")
    return f"{picture}\n\n{table(heads, rows)}\n\n{made_on(results)}"


def mean_loss_plot(points: list[tuple[str, list[float]]], name: str) -> str:
    """Rows by mean test loss, best first, a dot a seed."""
    points = sorted(points, key=lambda point: np.mean(point[1]))
    figure, axes = plt.subplots(figsize=(6.2, 0.6 + 0.19 * len(points)))
    for height, (method, means) in enumerate(points):
        color = "#1565c0" if method.startswith("ipsvd") else "#000000" if method == "target" else "#88909a"
        axes.plot(means, [height] * len(means), "o", color=color, markersize=4, alpha=0.6)
        axes.plot(np.mean(means), height, "|", color=color, markersize=10)
    axes.set_yticks(range(len(points)), [method for method, _ in points])
    axes.invert_yaxis()
    axes.grid(axis="x", linewidth=0.4)
    axes.set_xlabel("mean test loss over the tasks (nats); a dot a seed")
    said = "; ".join(f"{method} {', '.join(f'{mean:.3f}' for mean in means)}" for method, means in points)
    return f"![Mean test loss by seed: {said}]({saved(figure, name)})"


def fidelity_rows(results: dict[str, Any]) -> str:
    """Agreement with the target over the whole pool, and cost by stage."""
    cells = results["cells"]
    rows, points = [], []
    for method in METHODS:
        scored = of_seeds(cells, f"{method}/scores")
        if not scored or method == "target":
            continue
        figures = [list(cell["fidelity"].values()) for cell in scored]
        spearman = with_error([float(np.mean([task["spearman"] for task in cell])) for cell in figures])
        overlap = float(np.mean([[task["overlap"]["0.05"] for task in cell] for cell in figures]))
        cost = relative_flops(cells, method)
        points.append((method, cost, overlap))
        flops = ", ".join(f"{stage} {value:.2g}" for stage, value in scored[0]["flops"].items())
        seconds = ", ".join(f"{stage} {value:.0f}" for stage, value in scored[0]["seconds"].items())
        again = [
            f"{np.mean([list(cell['recall'][share].values()) for cell in scored]):.2f}"
            if all("recall" in cell for cell in scored)
            else "–"
            for share in ("0.1", "0.2")
        ]
        within = [cell["within_sources"] for cell in scored if "within_sources" in cell]
        inside = f"{np.mean(within):.3f}" if within else "–"
        row = [method, spearman, inside, f"{overlap:.2f}", *again, f"{cost:.2f}", flops, seconds]
        rows.append([*row, str(len(scored))])
    figure, axes = plt.subplots(figsize=(6.2, 3.4))
    for method, cost, overlap in points:
        axes.plot(cost, overlap, "o", color="#1565c0" if method.startswith("ipsvd") else "#88909a")
        axes.annotate(method, (cost, overlap), textcoords="offset points", xytext=(5, 3), fontsize=7)
    axes.set_xlabel("FLOPs of selecting, over scoring the pool on the target")
    axes.set_ylabel("of the target's top 5 %, found")
    axes.set_ylim(0, 1)
    picture = saved(figure, "fidelity-and-cost")
    heads = [
        "scored on",
        "Spearman",
        "within sources",
        "top-5 % overlap",
        "best 10 % scored again",
        "best 20 %",
        "FLOPs over the target's",
        "FLOPs by stage",
        "seconds",
        "seeds",
    ]
    return f"![{alt(points)}]({picture})\n\n{table(heads, rows)}\n\n{made_on(results)}"


def alt(points: list[tuple[str, float, float]]) -> str:
    """The plot in words."""
    return "Top-5 % overlap against cost: " + "; ".join(
        f"{name} {found:.2f} at {cost:.2f}" for name, cost, found in points
    )


def ablation_rows(results: dict[str, Any]) -> str:
    """Each ablation's variants."""
    rows = []
    for name, cell in results["cells"].items():
        ablation, variant = name.split("/", 1)
        seconds = f"{cell['seconds']:.0f}" if "seconds" in cell else ""
        rows.append([ablation, variant, f"{cell['spearman']:.3f}", f"{cell['overlap']:.2f}", seconds])
    heads = ["ablation", "variant", "Spearman", "top-5 % overlap", "seconds of alignment"]
    settings = results["settings"]
    return f"{table(heads, rows)}\n\n{settings['rows']:,} rows, seed {settings['seed']}. {made_on(results)}"


def why_kept(results: dict[str, Any]) -> str:
    """Influence and loss kept by sparsity, as plots."""
    cells = {name: cell for name, cell in results["cells"].items() if name.startswith("kept/")}
    if not cells:
        return "Not measured yet."
    sizes = sorted({float(name.split("/")[2]) for name in cells})
    figure, both = plt.subplots(1, 2, figsize=(7.2, 2.8))
    rows = []
    for method, color in (("ipsvd", "#1565c0"), ("svd", "#88909a")):
        found = [cells[f"kept/{method}/{size}"] for size in sizes if f"kept/{method}/{size}" in cells]
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
    """Affinity and diversity of selections."""
    cells = {name: cell for name, cell in results["cells"].items() if name.startswith("selection/")}
    if not cells:
        return "Not measured yet."
    tasks = results["settings"]["tasks"]
    methods = list(dict.fromkeys(name.split("/")[1] for name in cells))
    rows = []
    for method in methods:
        of_tasks = (cells.get(f"selection/{method}/{task}") for task in tasks)
        shown = (f"{cell['affinity']:.2f}, {cell['nearest']:.2f}" if cell else "" for cell in of_tasks)
        rows.append([method, *shown])
    return f"{table(['affinity, nearest neighbor', *tasks], rows)}\n\n{made_on(results)}"


def lds_rows(results: dict[str, Any]) -> str:
    """Linear datamodeling scores by estimator and task."""
    rows = []
    for estimator, cell in results["cells"].items():
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
    """Save a plot beside the page, and where it is from there."""
    path = DOCS / "plots" / f"{name}.svg"
    path.parent.mkdir(exist_ok=True)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
    return f"plots/{path.name}"


BLOCKS: dict[str, tuple[str, Callable[[dict[str, Any]], str]]] = {
    "main": ("paper-tracin.json", main_rows),
    "main-if": ("paper-kfac.json", main_rows),
    "fidelity": ("paper-tracin.json", fidelity_rows),
    "ablations": ("paper-ablations.json", ablation_rows),
    "kept": ("paper-why.json", why_kept),
    "selected": ("paper-why.json", why_selected),
    "lds": ("paper-lds.json", lds_rows),
}

if __name__ == "__main__":
    main()
