"""What do sketched norms cost, and what do they lose? Cosine scores by the number of random signs a layer.

    python benchmarks/norms.py                                # the shared target, 5 tasks, 500 pool rows
    python benchmarks/norms.py --model runs/mine/proxy        # norms of a proxy's gradients

The norm of a candidate's gradient is what the cosine needs of it beside its contraction with the tasks. Costs are FLOPs
of the norms, over a forward pass of the linear layers. Agreement is with the cosine of exact norms on the same model,
means over tasks; errors are of the norms themselves, relative.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from iprox.data import ChatEncoder, Pool, iter_batches
from iprox.data.sampling import draw_rows
from iprox.influence.low_rank import low_rank_queries
from iprox.influence.scorer import BatchScorer
from iprox.models import flops
from iprox.models.compiled import compiled
from iprox.models.loading import load_model, load_tokenizer
from iprox.models.precision import DTYPES
from iprox.run.folder import environment, write_json
from queries import agreement, options, validation_gradients

SKETCHES = (0, 4, 8, 16, 32, 64)


def main() -> None:
    """Measure, print and keep the table."""
    parser = options(__doc__, 500)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results/norms.json")
    arguments = parser.parse_args()
    pool, encoder = Pool(arguments.pool), ChatEncoder(load_tokenizer(arguments.model), 512)
    rows = encoder.encode(pool.take(draw_rows("norms", 0, pool.scan().rows, arguments.examples)))
    rows = [row for row in rows if row.supervised]
    candidates, lengths = list(iter_batches(rows, 4096, 0)), [len(row.input_ids) for row in rows]
    model = load_model(arguments.model, dtype=DTYPES[arguments.dtype])
    queries = low_rank_queries(validation_gradients(model, encoder, arguments), 0.9)
    forward = flops.forward_flops(model)

    def scores(**how: Any) -> tuple[np.ndarray, float, float]:
        """Scores, FLOPs a token of the norms over a forward pass, and tokens a second, at the second time."""
        scorer = BatchScorer(model, queries, **how)
        with compiled(model):
            for _ in range(2):
                started = time.perf_counter()
                found = torch.cat([scorer(batch)[0] for batch in candidates]).double().numpy()
                rate = sum(lengths) / (time.perf_counter() - started)
        return found, scorer.norm_flops(lengths) / sum(lengths) / forward, rate

    raw, _, without = scores()
    print(f"no norms: {without:.0f} tokens a second")
    found, exact = [], raw
    for sketch in SKETCHES:
        cosine, cost, rate = scores(normalize="cosine", norm_sketch=sketch)
        exact = cosine if sketch == 0 else exact
        errors = (exact / cosine)[:, 0] - 1  # of the norms, as both have the same dot products
        entry = {"sketch": sketch, "cost": cost, "tokens_per_second": rate, **agreement(cosine, exact)}
        entry |= {"mean_error": float(errors.mean()), "spread": float(errors.std()), "most": float(abs(errors).max())}
        found.append(entry)
        print(
            f"{sketch:>3} signs  cost {cost:.3f}  {rate:5.0f} tokens/s  Spearman {entry['spearman']:.5f} "
            f"(least {entry['least']:.5f}), top 5 % {entry['overlap']:.3f}  norms {entry['mean_error']:+.3f} "
            f"± {entry['spread']:.3f}, at most {entry['most']:.3f}",
            flush=True,
        )
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(arguments).items()}
    write_json(arguments.output, {**environment(), "settings": settings, "without": without, "found": found})


if __name__ == "__main__":
    main()
