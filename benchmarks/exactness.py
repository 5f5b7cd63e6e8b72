"""Errors of `iprox score` compared with float64 autograd, one example at a time.

Some pool examples are scored on the model itself (no proxy) in float32 and bfloat16, and compared with dot products of
per-example gradients from autograd in float64.

    python benchmarks/exactness.py
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from scipy import stats

from common import RESULTS, Results, parser, scores_in, settings_of
from iprox.data import ChatEncoder, Encoded, Pool, iter_batches
from iprox.data.sampling import draw_rows
from iprox.models.layers import influence_layers
from iprox.models.loading import load_model, load_tokenizer
from iprox.models.loss import causal_lm_losses


class Comparison:
    """Some rows of the pool, and their exact scores."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments, self.pool = arguments, Pool(arguments.pool)
        self.rows = draw_rows("exactness", 0, self.pool.scan().rows, arguments.examples)

    @cached_property
    def exact(self) -> np.ndarray:
        """Dot products of float64 autograd gradients [N]."""
        encoder = ChatEncoder(load_tokenizer(self.arguments.model), 512)
        model = load_model(self.arguments.model, dtype=torch.float64)
        weights = [p for layer in influence_layers(model).values() for p in layer.parameters()]

        def gradient(row: Encoded) -> torch.Tensor:
            (batch,) = iter_batches([row], 1)
            return torch.cat([g.flatten() for g in torch.autograd.grad(causal_lm_losses(model, batch).sum(), weights)])

        validation = encoder.encode(list(Pool([self.arguments.validation])))
        query = sum(map(gradient, validation)) / len(validation)
        return np.array([(gradient(row) @ query).item() for row in encoder.encode(self.pool.take(self.rows))])

    def errors(self, dtype: str) -> dict[str, float]:
        """Return how far the scores of `iprox score` are from the exact ones."""
        with tempfile.TemporaryDirectory() as temporary:
            sample, output = Path(temporary) / "sample.jsonl", Path(temporary) / "scores"
            self.pool.write_rows(self.rows, sample)
            command = [sys.executable, "-m", "iprox.cli", "score", "--model", self.arguments.model]
            command += ["--pool", str(sample), "--validation", f"task={self.arguments.validation}"]
            influence = {"estimator": "tracin", "normalize": "none", "query_norm": 1}
            settings = {f"influence.{key}": value for key, value in influence.items()}
            settings |= {"dtype": dtype, "data.max_length": 512}
            command += [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
            subprocess.run([*command, "--output", str(output), "--quiet"], check=True)
            scores = scores_in(output)[:, 0]
        return {
            "largest relative error": float(np.max(np.abs(scores - self.exact) / np.abs(self.exact))),
            "relative error of the vector": float(np.linalg.norm(scores - self.exact) / np.linalg.norm(self.exact)),
            "spearman": float(stats.spearmanr(scores, self.exact)[0]),
        }


def main() -> None:
    """Compare both dtypes and print the errors."""
    options = "model pool validation examples output fresh"
    arguments = parser(__doc__, options, examples=50, output=RESULTS / "exactness.jsonl").parse_args()
    results, comparison = (
        Results(arguments.output, settings_of(arguments), fresh=arguments.fresh),
        Comparison(arguments),
    )
    for dtype in ("float32", "bfloat16"):
        print(dtype, results(dtype, lambda dtype=dtype: comparison.errors(dtype)), flush=True)


if __name__ == "__main__":
    main()
