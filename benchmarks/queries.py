"""What do low-rank validation gradients cost, and what do they lose? Cut over all layers together, and each by itself.

    python benchmarks/queries.py                                        # the shared target, 5 tasks, 300 pool rows
    python benchmarks/queries.py --model runs/mine/warmup/checkpoint-44
    python benchmarks/queries.py --estimator ekfac         # gradients divided by the curvature (EK-FAC)

Costs are FLOPs of contracting with all tasks, over a forward pass of the linear layers. Agreement is with the scores of
whole gradients on the same model, raw and cosine, means over tasks.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import stats

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
from iprox.run.folder import environment, write_json
from iprox.settings import InfluenceSection

SHARED = Path(__file__).resolve().parents[2] / "shared"
KEPT = {
    "tracin": {"all layers together": (0.5, 0.7, 0.8, 0.85, 0.9, 0.95), "each layer by itself": (0.7, 0.8, 0.9, 0.95)},
    "ekfac": {"all layers together": (0.7, 0.8, 0.9, 0.95, 0.98, 0.99)},
}


def agreement(scores: np.ndarray, whole: np.ndarray) -> dict[str, float]:
    """Spearman and top-5 % overlap of columns of scores [N, tasks], means over tasks, and the least Spearman."""
    count = round(0.05 * len(scores))
    columns = list(zip(scores.T, whole.T, strict=True))
    spearman = [stats.spearmanr(found, wanted)[0] for found, wanted in columns]
    shared = [np.isin(np.argsort(-found)[:count], np.argsort(-wanted)[:count]).mean() for found, wanted in columns]
    return {"spearman": float(np.mean(spearman)), "least": float(min(spearman)), "overlap": float(np.mean(shared))}


def each_by_itself(gradients: dict[str, ModelGradient], keep: float) -> dict[str, TruncatedGradient]:
    """Every layer cut to what keeps the share of its own norm."""
    found: dict[str, TruncatedGradient] = {task: {} for task in gradients}
    for name in next(iter(gradients.values())):
        cut = low_rank_queries({task: {name: gradient[name]} for task, gradient in gradients.items()}, keep)
        for task, layer in cut.items():
            found[task] |= layer
    return found


def options(description: str | None, examples: int) -> argparse.ArgumentParser:
    """The options of what is scored."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(SHARED / "models/target-17m"))
    parser.add_argument("--pool", nargs="+", default=[str(SHARED / "data/pool.jsonl")])
    parser.add_argument("--targets", type=Path, default=SHARED / "data/targets", help="folder of TASK.val.jsonl")
    parser.add_argument("--tasks", nargs="+", default=["gsm8k", "code", "summarization", "science", "bbh"])
    parser.add_argument("--examples", type=int, default=examples)
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="bfloat16", help="of scoring")
    return parser


def validation_gradients(model: Any, encoder: ChatEncoder, arguments: argparse.Namespace) -> dict[str, ModelGradient]:
    """The mean gradient of each task's validation examples."""
    return {
        task: mean_gradient(
            model, iter_batches(encoder.encode(list(Pool([str(arguments.targets / f"{task}.val.jsonl")]))), 4096, 0)
        )[0]
        for task in arguments.tasks
    }


def main() -> None:
    """Measure, print and keep the table."""
    parser = options(__doc__, 300)
    parser.add_argument("--estimator", choices=sorted(KEPT), default="tracin")
    parser.add_argument("--curvature-examples", type=int, default=256, help="of the pool, for an influence function")
    parser.add_argument("--output", type=Path, help="default: results/queries.json, or queries-ESTIMATOR.json")
    arguments = parser.parse_args()
    name = "queries" if arguments.estimator == "tracin" else f"queries-{arguments.estimator}"
    arguments.output = arguments.output or Path(__file__).parent / f"results/{name}.json"
    pool, encoder = Pool(arguments.pool), ChatEncoder(load_tokenizer(arguments.model), 512)
    rows = draw_rows("queries", 0, pool.scan().rows, arguments.examples)
    candidates = list(iter_batches(encoder.encode(pool.take(rows)), 4096, 0))
    model = load_model(arguments.model, dtype=torch.float32)
    gradients = validation_gradients(model, encoder, arguments)
    if arguments.estimator == "ekfac":
        measured = draw_rows("curvature", 0, pool.scan().rows, arguments.curvature_examples, rows)
        sample = list(iter_batches(encoder.encode(pool.take(measured)), 4096, 0))
        inputs = Inputs(settings=InfluenceSection(estimator="ekfac"), model=model, validation={}, sample=sample)
        gradients = KroneckerInfluence("ekfac", corrected=True).precondition(gradients, inputs)
    cast_parameters(model, DTYPES[arguments.dtype])

    def scores(queries: Any, **options: Any) -> tuple[np.ndarray, float]:
        scorer = BatchScorer(model, queries, **options)
        return torch.cat([scorer(batch)[0] for batch in candidates]).double().numpy(), scorer.contraction_flops

    whole, most = scores(gradients)
    cosine, _ = scores(gradients, normalize="cosine")
    lengths, forward = cosine / whole, flops.forward_flops(model)
    print(f"whole gradients: {most / forward:.3f} of a forward pass")
    found = []
    for by, shares in KEPT[arguments.estimator].items():
        for keep in shares:
            cut = low_rank_queries(gradients, keep) if by == "all layers together" else each_by_itself(gradients, keep)
            raw, spent = scores(cut)
            entry = {"by": by, "keep": keep, "cost": spent / forward, "raw": agreement(raw, whole)}
            entry["cosine"] = agreement(raw * lengths, cosine)
            found.append(entry)
            print(
                f"{by:<21} keep {keep:<6} cost {entry['cost']:.3f}  "
                + "  ".join(
                    "{0} {spearman:.4f} (least {least:.4f}), {overlap:.2f}".format(kind, **entry[kind])
                    for kind in ("raw", "cosine")
                ),
                flush=True,
            )
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(arguments).items()}
    write_json(arguments.output, {**environment(), "settings": settings, "whole": most / forward, "found": found})


if __name__ == "__main__":
    main()
