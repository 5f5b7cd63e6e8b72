"""Why it works: affinity and diversity of selections, and influence and loss kept by smaller proxies.

    python benchmarks/paper/why.py --selections runs/paper-tracin-KEY/seed-0      # made by main_table.py, in its --work

1. By row of the main table and task: the affinity of the selection to the task, ‖Uᵀ V‖_F² / k from 0 to 1, with U and V
   the leading k directions of the gradients of the selected rows and of the validation examples (unit length, projected
   to 4,096 dimensions); and its diversity, the mean cosine distance of a selected row to its nearest neighbor.
2. By sparsity, for SVD and IPSVD: the Spearman correlation with the target's influence, and the loss on the validation
   sets divided by the target's.

Gradients are the original target's. Cells are kept in the results file.
"""

from __future__ import annotations

import argparse
import sys
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

import iprox
from iprox.data import ChatEncoder, Encoded, Example, Pool, iter_batches
from iprox.data.sampling import draw_rows
from iprox.finetune import evaluate
from iprox.influence.index import GradientProjector
from iprox.models.loading import load_tokenizer
from iprox.records import key_of, read_json
from iprox.scores import score_matrix

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import RESULTS, Results, agreement, as_rows, examples_of, in_bfloat16, parser, settings_of

DIMENSION, DIRECTIONS, PROBE = 4096, 16, 139
SPARSITIES = (0.2, 0.4, 0.6, 0.8, 0.9)


class Why:
    """The target, its tokenizer, the pool and the validation sets."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments, self.pool = arguments, Pool(arguments.pool)
        self.total = self.pool.scan().rows
        self.tokenizer = load_tokenizer(arguments.model)
        self.encoder = ChatEncoder(self.tokenizer, 512)
        self.validation = examples_of(arguments)

    @cached_property
    def projector(self) -> GradientProjector:
        """Projected gradients of the target."""
        return GradientProjector(iprox.load(self.arguments.model, dtype=torch.bfloat16), DIMENSION)

    def features(self, examples: list[Example]) -> np.ndarray:
        """Return unit gradients [N, D] of some examples, without those that have no supervised token."""
        encoded = [row for row in self.encoder.encode(examples) if row.supervised]
        found = np.zeros((len(encoded), DIMENSION), np.float32)
        for batch in iter_batches(encoded, 4096):
            found[batch.indices] = self.projector(batch)[0].float().numpy()[: len(batch.indices)]
        return found / np.linalg.norm(found, axis=1, keepdims=True).clip(1e-30)

    def selection(self, rows: list[int], task: str) -> dict[str, float]:
        """Return the affinity to a task and the diversity of some rows of the pool."""
        chosen, wanted = self.features(self.pool.take(rows)), self.features(self.validation[task])
        U, V = (np.linalg.svd(part, full_matrices=False)[2][:DIRECTIONS] for part in (chosen, wanted))
        alike = chosen @ chosen.T
        np.fill_diagonal(alike, -np.inf)
        return {
            "affinity": float(np.square(U @ V.T).sum() / DIRECTIONS),
            "nearest": float((1 - alike.max(1)).mean()),
        }

    @cached_property
    def probe_rows(self) -> list[int]:
        """The rows that proxies are made from."""
        return draw_rows("probe", 0, self.total, PROBE)

    @cached_property
    def sample(self) -> list[dict[str, Any]]:
        """The rows whose influence is compared, none of them in the probe."""
        return as_rows(self.pool.take(draw_rows("sample", 0, self.total, self.arguments.rows, self.probe_rows)))

    @cached_property
    def wanted(self) -> tuple[np.ndarray, float]:
        """The target's own scores of the sample [N, tasks], and its loss."""
        target = iprox.load(self.arguments.model, dtype=torch.bfloat16)
        return self.scores(target), self.loss(target)

    def scores(self, model: Any, **options: Any) -> np.ndarray:
        """Return the raw TracIn scores [N, tasks] of the sample."""
        validation = {task: as_rows(rows) for task, rows in self.validation.items()}
        common = {"tokenizer": self.tokenizer, "max_length": 512, "progress": False, "per_example": False}
        common |= {"estimator": "tracin", "normalize": "none"}
        return score_matrix(iprox.score(model, self.sample, validation, **common, **options))

    def kept(self, method: Any, sparsity: float) -> dict[str, float]:
        """Return how much of the target's influence and loss a proxy of this size keeps."""
        target, rows = iprox.load(self.arguments.model), as_rows(self.pool.take(self.probe_rows))
        common = {"tokenizer": self.tokenizer, "max_length": 512, "progress": False}
        proxy = in_bfloat16(iprox.compress(target, rows, sparsity=sparsity, method=method, **common))
        truth, loss = self.wanted
        scores = self.scores(proxy, target=in_bfloat16(target))
        spearman = agreement(scores, truth, self.arguments.tasks)["spearman"]
        return {"influence": spearman, "loss": self.loss(proxy) / loss}

    def loss(self, model: Any) -> float:
        """Return the mean loss over the validation sets."""
        sets: list[list[Encoded]] = [self.encoder.encode(rows) for rows in self.validation.values()]
        return float(np.mean([evaluate(model, rows, 4096)["loss"] for rows in sets]))


def main() -> None:
    """Compute what is missing and print it."""
    made = parser(
        __doc__,
        "model pool targets tasks output fresh",
        tasks=["gsm8k", "code", "bbh", "summarization"],
        output=RESULTS / "paper-why.jsonl",
    )
    made.add_argument("--selections", type=Path, required=True, help="folder of a seed in main_table.py's --work")
    made.add_argument("--top", type=int, default=150, help="number of best selected rows to analyze")
    made.add_argument("--rows", type=int, default=300, help="pool rows whose influence is compared")
    arguments = made.parse_args()
    results = Results(arguments.output, settings_of(arguments, "selections"), fresh=arguments.fresh)
    why = Why(arguments)
    for sparsity in SPARSITIES:
        for method in ("svd", "ipsvd"):
            cell = results(f"kept/{method}/{sparsity}", lambda m=method, s=sparsity: why.kept(m, s))
            print(f"{method:<8}{sparsity:>5} influence {cell['influence']:.3f}, loss × {cell['loss']:.2f}", flush=True)
    files = map(read_json, sorted(arguments.selections.glob("*/selected.json")))
    chosen = {entry["method"]: entry["rows"] for entry in files}
    for task in arguments.tasks:
        rows = {"random": draw_rows("random", 0, why.total, arguments.top)}
        rows |= {method: selected[task][: arguments.top] for method, selected in chosen.items()}
        for method, some in rows.items():
            # The main table may have been computed again since.
            cell = results(f"selection/{method}/{task}", lambda r=some, t=task: why.selection(r, t), of=key_of(some))
            print(f"{task:<15}{method:<22}affinity {cell['affinity']:.2f}, nearest {cell['nearest']:.2f}", flush=True)


if __name__ == "__main__":
    main()
