"""How faithful is a gradient index, and how fast? Scores by projected gradients beside exact scores of the same model.

For several dimensions D: Spearman's correlation of scores through D numbers an example with the exact scores, mean and
least over the tasks, and tokens per second of projecting beside those of scoring. `summed` is what iprox does: layers
share the D numbers. `by layer` sets D/layers numbers of each layer side by side.

    python benchmarks/index.py
    python benchmarks/index.py --examples 2000 --dimensions 8192 65536 --output benchmarks/results/index-target-17m.json
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from scipy.stats import spearmanr

from iprox.data import ChatEncoder, Encoded, Pool, iter_batches
from iprox.data.sampling import draw_rows
from iprox.engine.stream import WINDOW
from iprox.influence.gradients import ModelGradient
from iprox.influence.index import GradientIndex, GradientProjector, WindowProjector, write_index
from iprox.influence.projection import LayerProjection
from iprox.influence.scorer import BatchScorer
from iprox.influence.validation_gradients import mean_gradient
from iprox.models.layers import has_bias, influence_layers, weight_shape
from iprox.models.loading import load_model, load_tokenizer
from iprox.models.loss import causal_lm_losses
from iprox.models.observe import frozen, watched_backward
from iprox.models.precision import resolve_device, resolve_dtype
from iprox.run.folder import environment, write_json
from iprox.scores import score_matrix

SHARED = Path(__file__).resolve().parents[2] / "shared"


class ByLayer:
    """The alternative: each layer keeps numbers of its own."""

    def __init__(self, model: torch.nn.Module, dimension: int) -> None:
        self.model, self.layers = model, influence_layers(model)
        side = max(1, math.isqrt(dimension // len(self.layers)))
        weight = next(model.parameters())
        self.projections = {
            name: LayerProjection.of(f"0/{name}", weight_shape(layer), side * side, weight)
            for name, layer in self.layers.items()
        }

    def __call__(self, batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Features of a batch, and its losses."""
        parts: dict[str, torch.Tensor] = {}

        def sink(name: str, h: torch.Tensor, delta: torch.Tensor) -> None:
            parts[name] = self.projections[name].of_tokens(h, delta, has_bias(self.layers[name])).flatten(1)

        with frozen(self.model):
            losses = watched_backward(self.model, self.layers, lambda: causal_lm_losses(self.model, batch), sink)
        return torch.cat([parts[name] for name in self.projections], dim=1), losses

    def project(self, gradient: ModelGradient) -> torch.Tensor:
        """Features of a validation gradient."""
        parts = [each.of_gradient(gradient[name]).flatten() for name, each in self.projections.items()]
        return torch.cat(parts)[None]


def over_pool(run: Callable, encoded: list[Encoded], batch_tokens: int, device: torch.device) -> np.ndarray:
    """What `run` makes of every row, float32 [N, columns]."""
    out: np.ndarray | None = None
    for batch in iter_batches(encoded, batch_tokens, 0):
        numbers = run(batch.to(device))[0].float().cpu().numpy()
        out = np.zeros((len(encoded), numbers.shape[1]), np.float32) if out is None else out
        out[batch.indices] = numbers
    assert out is not None
    return out


def agreement(scores: np.ndarray, exact: np.ndarray) -> list[float]:
    """Spearman's correlation of each task."""
    return [float(spearmanr(a, b).statistic) for a, b in zip(scores.T, exact.T, strict=True)]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(SHARED / "models/target-17m"))
    parser.add_argument("--pool", default=str(SHARED / "data/pool.jsonl"))
    parser.add_argument("--validation", default=str(SHARED / "data/targets"), help="folder of TASK.val.jsonl")
    parser.add_argument("--examples", type=int, default=1000)
    parser.add_argument("--dimensions", type=int, nargs="+", default=[1024, 4096, 8192, 16384])
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--batch-tokens", type=int, default=4096)
    parser.add_argument("--output", help="JSON file")
    arguments = parser.parse_args()

    device = resolve_device(arguments.device)
    dtype = resolve_dtype(arguments.dtype, device)
    model = load_model(arguments.model, dtype=dtype, device=device)
    encoder = ChatEncoder(load_tokenizer(arguments.model), 2048)
    pool = Pool([arguments.pool])
    rows = draw_rows("benchmark", 0, pool.scan().rows, arguments.examples)
    examples = pool.take(rows)
    encoded = encoder.encode(examples)
    tokens = sum(len(row.input_ids) for row in encoded)
    queries: dict[str, ModelGradient] = {}
    for file in sorted(Path(arguments.validation).glob("*.val.jsonl")):
        batches = [b.to(device) for b in iter_batches(encoder.encode(list(Pool([str(file)]))), 4096, 0)]
        queries[file.name.split(".")[0]] = mean_gradient(model, batches)[0]
    print(f"{arguments.model}: {len(encoded)} rows, {tokens:,} tokens, {len(queries)} tasks, {dtype}")

    # The reference's own time is taken without the norms, which only the cosine needs.
    exact, seconds = {}, {}
    for normalize in ("none", "cosine"):
        scorer = BatchScorer(model, queries, normalize=normalize)
        run = lambda batch, scorer=scorer: scorer(batch)[0]  # noqa: E731
        over_pool(run, encoded[:64], arguments.batch_tokens, device)
        started = time.perf_counter()
        exact[normalize] = over_pool(run, encoded, arguments.batch_tokens, device)
        seconds[normalize] = time.perf_counter() - started
    print(f"scoring: {tokens / seconds['none']:,.0f} tokens/s\n")
    print("      D layers     tokens/s of scoring  Spearman  least  cosine  least")
    measured = []
    for dimension in arguments.dimensions:
        for kind, projector in (
            ("summed", GradientProjector(model, dimension)),
            ("by layer", ByLayer(model, dimension)),
        ):
            over_pool(projector, encoded[:64], arguments.batch_tokens, device)
            started = time.perf_counter()
            features = over_pool(projector, encoded, arguments.batch_tokens, device)
            taken = time.perf_counter() - started
            meets = torch.cat([projector.project(query) for query in queries.values()]).float().cpu().numpy()
            scores = features @ meets.T
            dot = agreement(scores, exact["none"])
            cosine = agreement(scores / np.linalg.norm(features, axis=1)[:, None], exact["cosine"])
            rate = tokens / taken
            print(
                f"{dimension:>7} {kind:<9} {rate:>9,.0f} {seconds['none'] / taken:>9.2f}x {np.mean(dot):>9.3f} "
                f"{min(dot):>6.2f} {np.mean(cosine):>7.3f} {min(cosine):>6.2f}"
            )
            measured.append(
                {"dimension": dimension, "layers": kind, "tokens_per_second": rate, "dot": dot, "cosine": cosine}
            )

    dimension = arguments.dimensions[-1]
    with tempfile.TemporaryDirectory() as folder:
        projector = GradientProjector(model, dimension)
        make = lambda: WindowProjector(projector, encoder, 0, arguments.batch_tokens)  # noqa: E731
        write_index(make, examples, Path(folder) / "index", {"dimension": dimension}, window=WINDOW)
        index = GradientIndex.open(Path(folder) / "index")
        started = time.perf_counter()
        (table,) = [table for table, _ in index.scores(queries, projector)]
        taken = time.perf_counter() - started
    stored = agreement(score_matrix(table), exact["none"])
    print(
        f"\nquery of {len(queries)} tasks, D {dimension}, from disk in half precision: "
        f"{len(encoded) / taken:,.0f} rows/s, Spearman {np.mean(stored):.3f}"
    )
    if arguments.output:
        result = {
            "rows": len(encoded),
            "tokens": tokens,
            "tasks": list(queries),
            "dtype": str(dtype),
            "scoring_tokens_per_second": tokens / seconds["none"],
            "projected": measured,
            "query": {"dimension": dimension, "rows_per_second": len(encoded) / taken, "dot": stored},
        }
        write_json(Path(arguments.output), {**environment(), **result})


if __name__ == "__main__":
    main()
