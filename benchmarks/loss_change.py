"""Agreement of two scores of one model: TracIn, and the change of a candidate's loss under a small low-rank step.

The step is along the mean validation gradient, truncated to some rank in every layer: a LoRA adapter, so that a server
that returns the log-probabilities of prompts could score by forward passes only. Its size is ‖step‖ / ‖weights‖, over
all layers. The adapter is a branch y = Wh + B(Ah) of the dtype that the model runs in, as a server has it.

    python benchmarks/loss_change.py                                   # the shared 17 M-parameter target
    python benchmarks/loss_change.py --model quickstart                # the bundled model and its data
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr

from common import RESULTS, Results, parser, settings_of
from iprox.data import ChatEncoder, Encoded, Pool, iter_batches
from iprox.influence.scorer import BatchScorer
from iprox.influence.validation_gradients import mean_gradient
from iprox.models.layers import influence_layers
from iprox.models.loading import load_model, load_tokenizer
from iprox.models.loss import causal_lm_losses
from iprox.models.precision import DTYPES

SIZES = (1e-4, 1e-3, 3e-3, 1e-2)


def scored(rows: list[Encoded], score: Callable[[Any], Any]) -> np.ndarray:
    """Return a number per row, from a function of batches."""
    found = np.zeros(len(rows))
    for batch in iter_batches(rows, 4096):
        found[batch.indices] = score(batch).double().cpu().numpy()
    return found


def measure(arguments: Any) -> dict[str, dict[str, float]]:
    """Return the Spearman correlations with TracIn, of one step and of two opposite ones, by the size of the step."""
    model, encoder = load_model(arguments.model), ChatEncoder(load_tokenizer(arguments.model), 512)
    rows = [row for row in encoder.encode(list(Pool(arguments.pool))) if row.supervised and len(row.input_ids) < 160]
    rows = [rows[place] for place in np.random.default_rng(0).permutation(len(rows))[: arguments.examples]]
    few = [row for row in encoder.encode(list(Pool(arguments.validation))) if row.supervised][: arguments.few]
    gradient = mean_gradient(model, list(iter_batches(few, 4096)))
    tracin = BatchScorer(model, {"task": gradient}, normalize=arguments.normalize)
    exact = scored(rows, lambda batch: tracin(batch)[0][:, 0])
    weights = sum(float(layer.weight.detach().square().sum()) for layer in influence_layers(model).values()) ** 0.5

    dtype, scale = DTYPES[arguments.dtype], [0.0]
    model = load_model(arguments.model, dtype=dtype)
    squares = 0.0
    for name, layer in influence_layers(model).items():
        left, values, right = torch.linalg.svd(gradient[name].weight, full_matrices=False)
        values, kept = values[: arguments.rank], slice(arguments.rank)
        squares += float(values.square().sum())
        up, down = (left[:, kept] * values.sqrt()).to(dtype), (values.sqrt()[:, None] * right[kept]).to(dtype)
        layer.register_forward_hook(partial(branch, scale, up, down))

    def losses(step: float) -> np.ndarray:
        scale[0] = step
        with torch.no_grad():
            return scored(rows, lambda batch: causal_lm_losses(model, batch))

    start, found = losses(0.0), {}
    for size in SIZES:
        step = size * weights / squares**0.5
        below, above = losses(-step), losses(step)
        found[str(size)] = {
            "one": float(spearmanr(start - below, exact)[0]),
            "two": float(spearmanr(above - below, exact)[0]),
        }
    return found


def branch(
    scale: list[float], up: torch.Tensor, down: torch.Tensor, _layer: Any, inputs: Any, output: torch.Tensor
) -> torch.Tensor:
    """Add the adapter's part to a layer's output."""
    return output + scale[0] * ((inputs[0] @ down.mT) @ up.mT) if scale[0] else output


def main() -> None:
    """Measure and print."""
    options = "model pool validation examples dtype output fresh"
    made = parser(__doc__, options, examples=40, dtype="float32", output=RESULTS / "loss-change.jsonl")
    made.add_argument("--few", type=int, default=6, help="validation examples (%(default)s)")
    made.add_argument("--rank", type=int, default=16, help="rank of the step (%(default)s)")
    made.add_argument("--normalize", choices=("none", "cosine"), default="none", help="TracIn's (%(default)s)")
    arguments = made.parse_args()
    if arguments.model == "quickstart":
        folder = files("iprox.quickstart")
        arguments.model, arguments.pool = str(folder / "model"), [str(folder / "data/pool.jsonl")]
        arguments.validation = str(folder / "data/arithmetic.val.jsonl")
    settings = settings_of(arguments, "model", "pool", "validation", "dtype", "normalize", "rank")
    results = Results(arguments.output, settings, fresh=arguments.fresh)
    model = Path(arguments.model).resolve().parent.name + "/" + Path(arguments.model).name
    cell = f"{model}/{arguments.dtype}/rank {arguments.rank}/{arguments.normalize}"
    for size, found in results(cell, lambda: measure(arguments)).items():
        print(f"step {size}: Spearman {found['one']:.4f}, of two opposite steps {found['two']:.4f}")


if __name__ == "__main__":
    main()
