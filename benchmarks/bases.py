"""Cost and error of EK-FAC scores by validation example in shared bases, scaled by the curvature or not.

    python benchmarks/bases.py                                                          # target-17m
    python benchmarks/bases.py --model ../models/smollm2-135m-instruct --every 3        # of every third block

Costs are FLOPs per token of contracting with one task, divided by those of a forward pass of the same layers. Scores of
each validation example are compared with those of its whole gradient; figures are means over examples and tasks.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import nn

from common import RESULTS, Results, examples_of, parser, settings_of, timed
from iprox.data import Pool, iter_batches
from iprox.data.sampling import draw_rows
from iprox.influence import shared_basis
from iprox.influence.gradients import ExampleGradient
from iprox.influence.shared_basis import shared_queries
from iprox.influence.validation_gradients import example_gradients
from iprox.kronecker.eigen import EigenBasis, kronecker_curvature, together
from iprox.models.layers import influence_layers, weight_shape
from iprox.session import Session

DAMPING = 0.1
UNSCALED = 1e9  # as the floor of scales: all are equal
WAYS = {"scaled": shared_basis.FLOOR, "not scaled": UNSCALED}
KEPT = (0.8, 0.9, 0.95)


class Bench:
    """Gradients of candidates and of validation examples, and the curvature, in some layers of a model."""

    def __init__(self, arguments: Any) -> None:
        session = Session.create(max_length=512)
        model, encoder = session.model(arguments.model), session.encoder(arguments.model)
        self.dtype = session.dtype
        blocks = {name: [part for part in name.split(".") if part.isdigit()] for name in influence_layers(model)}
        self.layers: dict[str, nn.Module] = {
            name: layer
            for name, layer in influence_layers(model).items()
            if not blocks[name] or int(blocks[name][0]) % arguments.every == arguments.every - 1
        }
        pool = Pool(arguments.pool)
        drawn = draw_rows("bases", 0, pool.scan().rows, arguments.examples + arguments.curvature_examples)

        def batches(rows: list[Any]) -> list[Any]:
            return list(iter_batches(encoder.encode(rows), 2048))

        sample = batches(pool.take(drawn[arguments.examples :]))
        self.curvature = together(kronecker_curvature(model, self.layers, sample))
        print("curvature measured", flush=True)
        self.candidates = example_gradients(model, batches(pool.take(drawn[: arguments.examples])), layers=self.layers)
        self.validation = {
            task: example_gradients(model, batches(rows[: arguments.validation_rows]), layers=self.layers)
            for task, rows in examples_of(arguments).items()
        }
        self.forward = 2.0 * sum(np.prod(weight_shape(layer)) for layer in self.layers.values())
        self.exact = {task: self.whole(examples) for task, examples in self.validation.items()}
        print("exact scores computed", flush=True)

    def whole(self, examples: list[ExampleGradient]) -> torch.Tensor:
        """Return the scores [N, V] by whole gradients, a layer at a time."""
        total = torch.zeros(len(self.candidates), len(examples), dtype=torch.float64)
        for name in self.layers:
            curvature = {name: self.curvature[name]} if name in self.curvature else {}
            total += self.scored([{name: each[name]} for each in examples], 1.0, curvature, torch.float32)[0]
        return total

    def scored(
        self, examples: list[ExampleGradient], keep: float, curvature: Mapping[str, EigenBasis], dtype: torch.dtype
    ) -> tuple[torch.Tensor, float, float]:
        """Return scores [N, V], the FLOPs per token, and the seconds of making the bases."""
        seconds, queries = timed(lambda: shared_queries(examples, keep, curvature, DAMPING, dtype))
        total = torch.zeros(len(self.candidates), len(examples), dtype=torch.float64)
        for name, query in queries.layers.items():
            for row, candidate in enumerate(self.candidates):
                h, delta = (side.mT[None].to(dtype) for side in (candidate[name].right, candidate[name].left))
                total[row] += query.contract(h, delta)[0].double()
        return total, sum(query.flops for query in queries.layers.values()), seconds

    def cell(self, floor: float, keep: float, dtype: torch.dtype) -> dict[str, float]:
        """Return the cost, the seconds and the agreement with whole gradients of one way."""
        shared_basis.FLOOR = floor
        spearman, pearson, cost, seconds = [], [], [], []
        for task, examples in self.validation.items():
            found, flops, taken = self.scored(examples, keep, self.curvature, dtype)
            cost.append(flops / self.forward)
            seconds.append(taken)
            for x, y in zip(found.T.numpy(), self.exact[task].T.numpy(), strict=True):
                spearman.append(spearmanr(x, y)[0])
                pearson.append(np.corrcoef(x, y)[0, 1])
        shared_basis.FLOOR = WAYS["scaled"]
        parts = {"cost": cost, "seconds": seconds, "spearman": spearman, "pearson": pearson}
        return {name: float(np.mean(values)) for name, values in parts.items()}


def main() -> None:
    """Measure, print and keep the table."""
    options = parser(__doc__, "model pool targets tasks examples output fresh", examples=64, tasks=["gsm8k", "science"])
    options.add_argument("--every", type=int, default=1, help="take the layers of every so many blocks (%(default)s)")
    options.add_argument("--validation-rows", type=int, default=16, help="of each task (%(default)s)")
    options.add_argument("--curvature-examples", type=int, default=64, help="(%(default)s)")
    arguments = options.parse_args()
    output = arguments.output or RESULTS / f"bases-{Path(arguments.model).name}.jsonl"
    results = Results(output, settings_of(arguments), fresh=arguments.fresh)
    made: list[Bench] = []

    def measured(floor: float, keep: float) -> dict[str, float]:
        if not made:
            made.append(Bench(arguments))
        return made[0].cell(floor, keep)

    for name, floor in WAYS.items():
        for keep in KEPT:
            found = results(f"{name}, {keep}", lambda floor=floor, keep=keep: measured(floor, keep))
            print(
                f"{name:<20} {keep:<5} cost {found['cost']:.3f}  Spearman {found['spearman']:.4f}  "
                f"Pearson {found['pearson']:.4f}  {found['seconds']:.0f} s",
                flush=True,
            )


if __name__ == "__main__":
    main()
