"""Fidelity and speed of a gradient index, compared with exact scores of the same model.

For several dimensions D: Spearman correlation of scores from D numbers per example with exact scores (mean and minimum
over tasks), and tokens per second of projecting and of scoring. With `summed`, as in iprox, all layers share the D
numbers; with `by layer`, each layer has D / number of layers.

    python benchmarks/index.py
    python benchmarks/index.py --examples 2000 --dimensions 8192 65536 --output index-2000.jsonl
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common import RESULTS, Results, agreement, examples_of, parser, settings_of, timed
from iprox.data import ChatEncoder, Encoded, Pool, iter_batches
from iprox.data.sampling import draw_rows
from iprox.engine.stream import WindowWorker
from iprox.engine.windows import WINDOW
from iprox.influence.gradients import ModelGradient
from iprox.influence.index import GradientIndex, GradientProjector, write_index
from iprox.influence.projection import LayerProjection
from iprox.influence.scorer import BatchScorer
from iprox.influence.validation_gradients import mean_gradient
from iprox.models.layers import has_bias, influence_layers, weight_shape
from iprox.models.loading import load_model, load_tokenizer
from iprox.models.loss import causal_lm_losses
from iprox.models.observe import frozen, watched_backward
from iprox.models.precision import resolve_device, resolve_dtype
from iprox.scores import score_matrix


class ByLayer:
    """A projector with separate numbers for each layer."""

    def __init__(self, model: torch.nn.Module, dimension: int) -> None:
        self.model, self.layers = model, influence_layers(model)
        side = max(1, math.isqrt(dimension // len(self.layers)))
        weight = next(model.parameters())
        self.projections = {
            name: LayerProjection.of(f"0/{name}", weight_shape(layer), side * side, weight)
            for name, layer in self.layers.items()
        }

    def __call__(self, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the features of a batch, and its losses."""
        parts: dict[str, torch.Tensor] = {}

        def sink(name: str, h: torch.Tensor, delta: torch.Tensor) -> None:
            parts[name] = self.projections[name].of_tokens(h, delta, has_bias(self.layers[name])).flatten(1)

        with frozen(self.model):
            losses = watched_backward(self.model, self.layers, lambda: causal_lm_losses(self.model, batch), sink)
        return torch.cat([parts[name] for name in self.projections], dim=1), losses

    def project(self, gradient: ModelGradient) -> torch.Tensor:
        """Return the features of a validation gradient."""
        parts = [each.of_gradient(gradient[name]).flatten() for name, each in self.projections.items()]
        return torch.cat(parts)[None]


def over_pool(run: Callable, encoded: list[Encoded], batch_tokens: int, device: torch.device) -> np.ndarray:
    """Return the results of `run` for every row, float32 [N, columns]."""
    out: np.ndarray | None = None
    for batch in iter_batches(encoded, batch_tokens):
        numbers = run(batch.to(device))[0].float().cpu().numpy()
        out = np.zeros((len(encoded), numbers.shape[1]), np.float32) if out is None else out
        out[batch.indices] = numbers
    assert out is not None
    return out


def main() -> None:
    """Measure and print."""
    options = "model pool targets tasks examples batch-tokens output fresh"
    tasks = ["bbh", "code", "gsm8k", "science", "sentiment", "summarization"]
    made = parser(__doc__, options, tasks=tasks, output=RESULTS / "index-target-17m.jsonl")
    made.add_argument("--dimensions", type=int, nargs="+", default=[1024, 4096, 8192, 16384])
    made.add_argument("--dtype", default="auto")
    made.add_argument("--device", default="auto")
    arguments = made.parse_args()
    results = Results(arguments.output, settings_of(arguments, "dimensions"), fresh=arguments.fresh)

    device = resolve_device(arguments.device)
    dtype = resolve_dtype(arguments.dtype, device)
    model = load_model(arguments.model, dtype=dtype, device=device)
    encoder = ChatEncoder(load_tokenizer(arguments.model), 2048)
    pool = Pool(arguments.pool)
    examples = pool.take(draw_rows("benchmark", 0, pool.scan().rows, arguments.examples))
    encoded = encoder.encode(examples)
    tokens = sum(len(row.input_ids) for row in encoded)
    queries: dict[str, ModelGradient] = {}
    for task, validation in examples_of(arguments).items():
        batches = [batch.to(device) for batch in iter_batches(encoder.encode(validation), 4096)]
        queries[task] = mean_gradient(model, batches)
    print(f"{arguments.model}: {len(encoded)} rows, {tokens:,} tokens, {len(queries)} tasks, {dtype}")

    def over(run: Callable) -> tuple[np.ndarray, float]:
        """Return the results of `run` for every row, and tokens per second after a warm-up."""
        over_pool(run, encoded[:64], arguments.batch_tokens, device)
        seconds, found = timed(lambda: over_pool(run, encoded, arguments.batch_tokens, device))
        return found, tokens / seconds

    # Scoring is timed without the norms, which only the cosine needs.
    exact, rates = {}, {}
    for normalize in ("none", "cosine"):
        scorer = BatchScorer(model, queries, normalize=normalize)
        exact[normalize], rates[normalize] = over(scorer)
    known = results("scoring", lambda: {"rows": len(encoded), "tokens": tokens, "tokens_per_second": rates["none"]})
    print(f"scoring: {known['tokens_per_second']:,.0f} tokens/s\n")
    print("      D layers     tokens/s of scoring  Spearman  least  cosine  least")

    def projected(kind: type, dimension: int) -> dict[str, Any]:
        projector = kind(model, dimension)
        features, rate = over(projector)
        projections = torch.cat([projector.project(query) for query in queries.values()]).float().cpu().numpy()
        scores = features @ projections.T
        cosine = scores / np.linalg.norm(features, axis=1)[:, None]
        return {
            "tokens_per_second": rate,
            "dot": agreement(scores, exact["none"], arguments.tasks),
            "cosine": agreement(cosine, exact["cosine"], arguments.tasks),
        }

    for dimension in arguments.dimensions:
        for name, kind in (("summed", GradientProjector), ("by layer", ByLayer)):
            entry = results(f"{name}/{dimension}", lambda k=kind, d=dimension: projected(k, d))
            rate, dot, cosine = entry["tokens_per_second"], entry["dot"], entry["cosine"]
            print(
                f"{dimension:>7} {name:<9} {rate:>9,.0f} {rate / known['tokens_per_second']:>9.2f}x "
                f"{dot['spearman']:>9.3f} {dot['least']:>6.2f} {cosine['spearman']:>7.3f} {cosine['least']:>6.2f}"
            )

    def queried(dimension: int) -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as folder:
            projector = GradientProjector(model, dimension)
            make = lambda: WindowWorker(projector, encoder, arguments.batch_tokens)  # noqa: E731
            write_index(make, examples, Path(folder) / "index", {"dimension": dimension}, window=WINDOW)
            index = GradientIndex.open(Path(folder) / "index")
            seconds, ((table, _),) = timed(lambda: list(index.scores(queries, projector)))
        dot = agreement(score_matrix(table), exact["none"], arguments.tasks)
        return {"rows_per_second": len(encoded) / seconds, "dot": dot}

    dimension = arguments.dimensions[-1]
    entry = results(f"query/{dimension}", lambda: queried(dimension))
    print(
        f"\nquery of {len(queries)} tasks, D {dimension}, from disk in half precision: "
        f"{entry['rows_per_second']:,.0f} rows/s, Spearman {entry['dot']['spearman']:.3f}"
    )


if __name__ == "__main__":
    main()
