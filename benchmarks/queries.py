"""Cost and error of low-rank validation gradients, truncated over all layers together or layer by layer.

    python benchmarks/queries.py                                        # the shared target, 5 tasks, 300 pool rows
    python benchmarks/queries.py --model runs/mine/warmup/checkpoint-44
    python benchmarks/queries.py --estimator ekfac                      # gradients divided by the curvature (EK-FAC)

Costs are FLOPs of contracting with all tasks, divided by those of a forward pass of the linear layers. Scores are
compared with those of exact gradients on the same model, raw and cosine; figures are means over tasks.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
import torch

from common import RESULTS, Results, agreement, examples_of, parser, settings_of
from iprox.data import ChatEncoder, Pool, iter_batches
from iprox.data.sampling import draw_rows
from iprox.influence.estimators.base import Inputs
from iprox.influence.estimators.ekfac import KroneckerInfluence
from iprox.influence.gradients import ModelGradient, TruncatedGradient
from iprox.influence.low_rank import low_rank_queries
from iprox.influence.scorer import BatchScorer
from iprox.influence.validation_gradients import mean_gradient
from iprox.models import flops
from iprox.models.loading import load_model, load_tokenizer
from iprox.models.precision import DTYPES, cast_parameters
from iprox.settings import InfluenceSection

TOGETHER, ALONE = "all layers together", "each layer by itself"
KEPT = {
    "tracin": {TOGETHER: (0.5, 0.7, 0.8, 0.85, 0.9, 0.95), ALONE: (0.7, 0.8, 0.9, 0.95)},
    "ekfac": {TOGETHER: (0.7, 0.8, 0.9, 0.95, 0.98, 0.99)},
}


def each_by_itself(gradients: dict[str, ModelGradient], keep: float) -> dict[str, TruncatedGradient]:
    """Return gradients in which every layer is truncated to the rank that keeps the share of its norm."""
    found: dict[str, TruncatedGradient] = {task: {} for task in gradients}
    for name in next(iter(gradients.values())):
        cut = low_rank_queries({task: {name: gradient[name]} for task, gradient in gradients.items()}, keep)
        for task, layer in cut.items():
            found[task] |= layer
    return found


def validation_gradients(model: Any, encoder: ChatEncoder, arguments: argparse.Namespace) -> dict[str, ModelGradient]:
    """Return the mean gradient of each task's validation examples."""
    encoded = {task: encoder.encode(examples) for task, examples in examples_of(arguments).items()}
    return {task: mean_gradient(model, iter_batches(rows, 4096)) for task, rows in encoded.items()}


def main() -> None:
    """Measure, print and keep the table."""
    made = parser(__doc__, "model pool targets tasks examples dtype output fresh", examples=300)
    made.add_argument("--estimator", choices=sorted(KEPT), default="tracin")
    made.add_argument("--curvature-examples", type=int, default=256, help="pool rows to measure curvature on")
    arguments = made.parse_args()
    name = "queries" if arguments.estimator == "tracin" else f"queries-{arguments.estimator}"
    output = arguments.output or RESULTS / f"{name}.jsonl"
    results = Results(output, settings_of(arguments), fresh=arguments.fresh)
    pool, encoder = Pool(arguments.pool), ChatEncoder(load_tokenizer(arguments.model), 512)
    rows = draw_rows("queries", 0, pool.scan().rows, arguments.examples)
    candidates = list(iter_batches(encoder.encode(pool.take(rows)), 4096))
    model = load_model(arguments.model, dtype=torch.float32)
    gradients = validation_gradients(model, encoder, arguments)
    if arguments.estimator == "ekfac":
        measured = draw_rows("curvature", 0, pool.scan().rows, arguments.curvature_examples, rows)
        sample = list(iter_batches(encoder.encode(pool.take(measured)), 4096))
        inputs = Inputs(settings=InfluenceSection(estimator="ekfac"), model=model, validation={}, sample=sample)
        gradients = KroneckerInfluence(corrected=True).precondition(gradients, inputs)
    cast_parameters(model, DTYPES[arguments.dtype])
    forward = flops.forward_flops(model)

    def scores(queries: Any, **options: Any) -> tuple[np.ndarray, float]:
        scorer = BatchScorer(model, queries, **options)
        found = torch.cat([scorer(batch)[0] for batch in candidates]).double().numpy()
        return found, scorer.contraction_flops / forward

    whole, most = scores(gradients)
    cosine, _ = scores(gradients, normalize="cosine")

    def cut(by: str, keep: float) -> dict[str, Any]:
        raw, cost = scores((low_rank_queries if by == TOGETHER else each_by_itself)(gradients, keep))
        found = {"raw": raw, "cosine": raw * cosine / whole}
        truth = {"raw": whole, "cosine": cosine}
        return {"cost": cost, **{kind: agreement(found[kind], truth[kind], arguments.tasks) for kind in found}}

    print(f"whole gradients: {results('whole', lambda: {'cost': most})['cost']:.3f} of a forward pass")
    for by, shares in KEPT[arguments.estimator].items():
        for keep in shares:
            entry = results(f"{by}/{keep}", lambda by=by, keep=keep: cut(by, keep))
            kinds = (
                "{0} {spearman:.4f} (least {least:.4f}), {overlap:.2f}".format(kind, **entry[kind])
                for kind in ("raw", "cosine")
            )
            print(f"{by:<21} keep {keep:<6} cost {entry['cost']:.3f}  {'  '.join(kinds)}", flush=True)


if __name__ == "__main__":
    main()
