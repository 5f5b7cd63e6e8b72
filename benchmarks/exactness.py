"""Are the scores what they claim to be? `iprox score` against float64 autograd, one example at a time.

Scores some pool examples on the model itself (no proxy) in float32 and bfloat16, and compares them with dot products
of per-example gradients that autograd computes in float64.

    python benchmarks/exactness.py
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from scipy import stats

from iprox.data import ChatEncoder, Encoded, Pool, iter_batches
from iprox.data.sampling import draw_rows
from iprox.models.layers import influence_layers
from iprox.models.loading import load_model, load_tokenizer
from iprox.models.loss import causal_lm_losses
from iprox.run.folder import environment, write_json
from iprox.scores import read_scores, score_matrix

SHARED = Path(__file__).resolve().parents[2] / "shared"


def autograd_gradient(model: torch.nn.Module, row: Encoded) -> torch.Tensor:
    """The gradient of one example's loss over all compressible weights, flat, float64."""
    weights = [p for layer in influence_layers(model).values() for p in layer.parameters()]
    (batch,) = iter_batches([row], 1, 0)
    return torch.cat([g.flatten() for g in torch.autograd.grad(causal_lm_losses(model, batch).sum(), weights)])


def main() -> None:
    """Run the comparison and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(SHARED / "models/target-17m"))
    parser.add_argument("--pool", default=str(SHARED / "data/pool.jsonl"))
    parser.add_argument("--validation", default=str(SHARED / "data/targets/gsm8k.val.jsonl"))
    parser.add_argument("--examples", type=int, default=50)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results/exactness.json")
    arguments = parser.parse_args()

    pool = Pool([arguments.pool])
    rows = draw_rows("exactness", 0, pool.scan().rows, arguments.examples)
    encoder = ChatEncoder(load_tokenizer(arguments.model), 512)
    model = load_model(arguments.model, dtype=torch.float64)
    validation = encoder.encode(list(Pool([arguments.validation])))
    query = sum(autograd_gradient(model, row) for row in validation) / len(validation)
    exact = np.array([(autograd_gradient(model, row) @ query).item() for row in encoder.encode(pool.take(rows))])

    result: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        sample = Path(temporary) / "sample.jsonl"
        pool.write_rows(rows, sample)
        for dtype in ("float32", "bfloat16"):
            output = Path(temporary) / dtype
            command = [sys.executable, "-m", "iprox.cli", "score", "--model", arguments.model, "--pool", str(sample)]
            command += ["--validation", f"task={arguments.validation}", "--output", str(output), "--quiet"]
            subprocess.run([*command, "--dtype", dtype, "--max-length", "512"], check=True)
            scores = score_matrix(read_scores(output))[:, 0]
            result[dtype] = {
                "largest relative error": float(np.max(np.abs(scores - exact) / np.abs(exact))),
                "relative error of the vector": float(np.linalg.norm(scores - exact) / np.linalg.norm(exact)),
                "spearman": float(stats.spearmanr(scores, exact)[0]),
            }
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(arguments).items()}
    write_json(arguments.output, {**environment(), "settings": settings, "result": result})
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
