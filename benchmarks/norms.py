"""Cost and error of sketched norms, by the number of random signs per layer.

    python benchmarks/norms.py                                # the shared target, 5 tasks, 500 pool rows
    python benchmarks/norms.py --model runs/mine/proxy        # norms of a proxy's gradients

The cosine needs the norm of each candidate's gradient. Costs are FLOPs of the norms divided by those of a forward pass
of the linear layers. Scores are compared with the cosine of exact norms on the same model, as means over tasks; errors
are relative errors of the norms.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch

from common import RESULTS, Results, agreement, parser, settings_of
from iprox.data import ChatEncoder, Pool, iter_batches
from iprox.data.sampling import draw_rows
from iprox.influence.low_rank import low_rank_queries
from iprox.influence.scorer import BatchScorer
from iprox.models import flops
from iprox.models.compiled import compiled
from iprox.models.loading import load_model, load_tokenizer
from iprox.models.precision import DTYPES
from queries import validation_gradients

SKETCHES = (4, 8, 16, 32, 64)


def main() -> None:
    """Measure, print and keep the table."""
    options = "model pool targets tasks examples dtype output fresh"
    arguments = parser(__doc__, options, examples=500, output=RESULTS / "norms.jsonl").parse_args()
    results = Results(arguments.output, settings_of(arguments), fresh=arguments.fresh)
    pool, encoder = Pool(arguments.pool), ChatEncoder(load_tokenizer(arguments.model), 512)
    rows = encoder.encode(pool.take(draw_rows("norms", 0, pool.scan().rows, arguments.examples)))
    rows = [row for row in rows if row.supervised]
    candidates, lengths = list(iter_batches(rows, 4096)), [len(row.input_ids) for row in rows]
    model = load_model(arguments.model, dtype=DTYPES[arguments.dtype])
    queries = low_rank_queries(validation_gradients(model, encoder, arguments), 0.9)
    forward = flops.forward_flops(model)

    def scores(**how: Any) -> tuple[np.ndarray, dict[str, float]]:
        """Return scores, and the cost of the norms and tokens per second of a second pass."""
        scorer = BatchScorer(model, queries, **how)
        with compiled(model):
            for _ in range(2):
                started = time.perf_counter()
                found = torch.cat([scorer(batch)[0] for batch in candidates]).double().numpy()
                rate = sum(lengths) / (time.perf_counter() - started)
        return found, {"cost": scorer.norm_flops(lengths) / sum(lengths) / forward, "tokens_per_second": rate}

    def compared(sketch: int, exact: np.ndarray) -> dict[str, Any]:
        cosine, cost = scores(normalize="cosine", norm_sketch=sketch)
        errors = (exact / cosine)[:, 0] - 1  # of the norms, as both have the same dot products
        spread = {"mean_error": float(errors.mean()), "spread": float(errors.std()), "most": float(abs(errors).max())}
        return {**cost, **agreement(cosine, exact, arguments.tasks), **spread}

    print("no norms:", results("no norms", lambda: scores()[1]))
    exact, cost = scores(normalize="cosine", norm_sketch=0)
    print("exact norms:", results("exact", lambda: cost))
    for sketch in SKETCHES:
        entry = results(f"{sketch} signs", lambda sketch=sketch: compared(sketch, exact))
        print(
            f"{sketch:>3} signs  cost {entry['cost']:.3f}  {entry['tokens_per_second']:5.0f} tokens/s  "
            f"Spearman {entry['spearman']:.5f} (least {entry['least']:.5f}), top 5 % {entry['overlap']:.3f}  "
            f"norms {entry['mean_error']:+.3f} ± {entry['spread']:.3f}, at most {entry['most']:.3f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
