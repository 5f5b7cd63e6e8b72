"""What the selection of a model that is no language model holds and trains: shared by vision.py and speech.py."""

from __future__ import annotations

import copy
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
from matplotlib import pyplot
from torch import nn
from torch.utils.data import DataLoader, Subset

import iprox
from common import RESULTS, Results, parser, settings_of

PLOTS = Path(__file__).resolve().parents[1] / "docs/plots"
COLORS = ("#2a6fbb", "#c44e52", "#b8b8b8", "#dd8452")
mpl.use("svg")
mpl.rcParams.update({"svg.hashsalt": "iprox", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False})


def arguments_of(name: str, description: str | None, count: int) -> Namespace:
    """Return the arguments of a script."""
    made = parser(description, "seeds output fresh", output=RESULTS / f"{name}.jsonl")
    made.add_argument("--count", type=int, default=count, help="number of examples to select (%(default)s)")
    made.add_argument("--sparsity", type=float, default=0.5, help="sparsity of the proxy (%(default)s)")
    return made.parse_args()


def measure(
    arguments: Namespace,
    models: Mapping[str, Callable[[], nn.Module]],
    data: Callable[[int], tuple[Mapping[str, Any], np.ndarray]],
    losses: Callable[[nn.Module, Any], torch.Tensor],
    train: Callable[[nn.Module, Any, int], nn.Module],
    epochs: int,
    warm: int = 3,
) -> Results:
    """Measure, for each model and seed, what the selection holds, the proxy's fidelity, and accuracies after training.

    Args:
        arguments: those of the script.
        models: functions that make a new model, by name.
        data: function of the seed that returns data sets "pool", "validation" and "test", and the kinds of the pool.
        losses: losses of a batch [B].
        train: function of a model, a data set and a number of passes over it.
        epochs: passes over a selection.
        warm: passes over the pool before it is scored.
    """
    results = Results(arguments.output, settings_of(arguments), fresh=arguments.fresh)
    for name, make in models.items():
        for seed in range(arguments.seeds):
            entry = results(
                name,
                lambda make=make, seed=seed: _measured(arguments, make, seed, data, losses, train, epochs, warm),
                seed,
            )
            print(name, seed, entry, flush=True)
    return results


def _measured(
    arguments: Namespace, make: Callable[[], nn.Module], seed: int, data: Any, losses: Any, train: Any, *passes: int
) -> dict[str, Any]:
    epochs, warm = passes
    torch.manual_seed(seed)
    sets, kinds = data(seed)
    pool, task = sets["pool"], {"task": sets["validation"]}
    start = make()
    model = train(copy.deepcopy(start), pool, warm)
    proxy = iprox.compress(model, pool, sparsity=arguments.sparsity, loss_fn=losses, progress=False)
    scores = iprox.score(proxy, pool, task, target=model, loss_fn=losses, progress=False)
    chosen = iprox.select(scores, count=arguments.count)
    report = iprox.audit(model, proxy, pool, task, loss_fn=losses, progress=False)
    draw = np.random.default_rng(seed)
    rows = {
        "selected": chosen,
        "random": draw.choice(len(pool), arguments.count, replace=False),
        "random good": draw.choice(np.flatnonzero(kinds == "good"), arguments.count, replace=False),
        "whole pool": np.arange(len(pool)),
    }
    accuracy = {}
    for name, taken in rows.items():
        torch.manual_seed(seed)
        # The whole pool takes as many steps, not as many passes.
        as_many = max(1, epochs * arguments.count // len(taken))
        trained = train(copy.deepcopy(start), Subset(pool, taken.tolist()), as_many)
        accuracy[name] = accuracy_of(trained, sets["test"])
    return {
        "pool": shares(kinds),
        "selected": shares(kinds[chosen]),
        "spearman": report.mean["spearman"],
        "overlap": report.mean["overlap"]["0.05"],
        "accuracy": accuracy,
    }


@torch.no_grad()
def accuracy_of(model: nn.Module, data: Any) -> float:
    """Return the share of examples whose class is the one with the largest logit."""
    model.eval()
    right = []
    for x, y in DataLoader(data, 64):
        output = model(x)
        right.append(getattr(output, "logits", output).argmax(1) == y)
    return torch.cat(right).float().mean().item()


def shares(kinds: np.ndarray) -> dict[str, float]:
    """Return the share of each kind."""
    return {str(kind): float((kinds == kind).mean()) for kind in np.unique(kinds)}


def draw(results: Results, models: Sequence[str], kinds: Sequence[str], name: str) -> None:
    """Draw what pool and selection hold, and the accuracies, to docs/plots/NAME.svg, and print a table."""
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(7.5, 2.8), width_ratios=(1, 1.4))
    cells = {model: [cell for key, cell in results.cells.items() if key.startswith(f"{model}/")] for model in models}
    bars = [("pool", [cell["pool"] for cell in cells[models[0]]])]
    bars += [(f"selected by\n{model}", [cell["selected"] for cell in cells[model]]) for model in models]
    base = np.zeros(len(bars))
    for kind, color in zip(kinds, COLORS, strict=False):
        heights = np.array([np.mean([found.get(kind, 0.0) for found in each]) for _, each in bars])
        left.bar([label for label, _ in bars], heights, bottom=base, color=color, label=kind, width=0.6)
        base += heights
    left.set_ylabel("share of the examples")
    left.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, 1.25), ncol=2)
    trained = list(cells[models[0]][0]["accuracy"])
    for place, model in enumerate(models):
        found = np.array([[cell["accuracy"][by] for by in trained] for cell in cells[model]])
        x = np.arange(len(trained)) + (place - (len(models) - 1) / 2) * 0.35
        right.bar(x, found.mean(0), width=0.33, color=COLORS[place], alpha=0.5, label=model)
        for row in found:
            right.plot(x, row, ".", color=COLORS[place], markersize=4)
    right.set_xticks(np.arange(len(trained)), [name.replace(" ", "\n") for name in trained])
    right.set_ylabel("accuracy on the task's test set")
    right.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, 1.25), ncol=2)
    figure.savefig(PLOTS / f"{name}.svg", bbox_inches="tight", metadata={"Date": None})
    for model in models:
        every = cells[model]

        def over(*path: str, every: list[Any] = every) -> str:
            numbers = [_at(cell, path) for cell in every]
            return f"{np.mean(numbers):.3f} ({min(numbers):.3f} to {max(numbers):.3f})"

        print(f"{model}: Spearman {over('spearman')}, top 5 % {over('overlap')}")
        for kind in kinds:
            print(f"  {kind}: pool {over('pool', kind)}, selected {over('selected', kind)}")
        for by in trained:
            print(f"  accuracy, {by}: {over('accuracy', by)}")


def _at(cell: Any, path: Sequence[str]) -> float:
    for key in path:
        cell = cell.get(key, 0.0)
    return cell
