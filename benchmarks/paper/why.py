"""Why it works, where it does: what is selected, seen from the target, and what a smaller proxy still knows.

    python benchmarks/paper/why.py                 # after main_table.py, whose selections (seed 0) it looks at

1. By row of the main table and task: the affinity of the selection to the task, ‖Uᵀ V‖_F² / k, U and V the leading k
   directions of the selected rows' and of the validation examples' gradients (unit length, projected to 4,096
   dimensions), 0 to 1; and its diversity, the mean cosine distance of a selected row to its nearest neighbor.
2. By sparsity, for SVD and IPSVD: Spearman with the target's influence, and the loss on the validation sets over the
   target's.

Gradients are the original target's. Cells are kept in the results file.
"""

from __future__ import annotations

import argparse
import json
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from runs import SHARED, Results, as_rows, in_bfloat16

import iprox
from iprox.audits.fidelity import fidelity_metrics
from iprox.data import ChatEncoder, Encoded, Example, Pool, iter_batches
from iprox.data.sampling import draw_rows
from iprox.finetune import evaluate
from iprox.influence.index import GradientProjector
from iprox.models.loading import load_tokenizer
from iprox.run.folder import key_of
from iprox.scores import score_matrix

DIMENSION, DIRECTIONS, PROBE = 4096, 16, 139
SPARSITIES = (0.2, 0.4, 0.6, 0.8, 0.9)


class Why:
    """The target, its tokenizer, the pool and the validation sets."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments, self.pool = arguments, Pool(arguments.pool)
        self.total = self.pool.scan().rows
        self.tokenizer = load_tokenizer(arguments.model)
        self.encoder = ChatEncoder(self.tokenizer, 512)
        self.validation = {task: list(Pool([str(arguments.targets / f"{task}.val.jsonl")])) for task in arguments.tasks}

    @cached_property
    def projector(self) -> GradientProjector:
        """Gradients of the target, projected."""
        return GradientProjector(iprox.load(self.arguments.model, dtype=torch.bfloat16), DIMENSION)

    def features(self, examples: list[Example]) -> np.ndarray:
        """Unit gradients [N, D] of some examples; those without a supervised token left out."""
        encoded = [row for row in self.encoder.encode(examples) if row.supervised]
        found = np.zeros((len(encoded), DIMENSION), np.float32)
        for batch in iter_batches(encoded, 4096, 0):
            found[batch.indices] = self.projector(batch).float().numpy()[: len(batch.indices)]
        return found / np.linalg.norm(found, axis=1, keepdims=True).clip(1e-30)

    def selection(self, rows: list[int], task: str) -> dict[str, float]:
        """Affinity to a task and diversity of some rows of the pool."""
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
        """What proxies are made from."""
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
        """Scores [N, tasks] of the sample."""
        validation = {task: as_rows(rows) for task, rows in self.validation.items()}
        common = {"tokenizer": self.tokenizer, "max_length": 512}
        return score_matrix(iprox.score(model, self.sample, validation, **common, **options))

    def kept(self, method: Any, sparsity: float) -> dict[str, float]:
        """What a proxy of this size still has of the target's influence and loss."""
        target, rows = iprox.load(self.arguments.model), as_rows(self.pool.take(self.probe_rows))
        common = {"tokenizer": self.tokenizer, "max_length": 512}
        proxy = in_bfloat16(iprox.compress(target, rows, sparsity=sparsity, method=method, **common))
        truth, loss = self.wanted
        scores = self.scores(proxy, target=in_bfloat16(target))
        spearman = [fidelity_metrics(x, y)["spearman"] for x, y in zip(scores.T, truth.T, strict=True)]
        return {"influence": float(np.mean(spearman)), "loss": self.loss(proxy) / loss}

    def loss(self, model: Any) -> float:
        """Mean loss over the validation sets."""
        sets: list[list[Encoded]] = [self.encoder.encode(rows) for rows in self.validation.values()]
        return float(np.mean([evaluate(model, rows, 4096, 0)["loss"] for rows in sets]))


def main() -> None:
    """Compute what is missing and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(SHARED / "models/target-17m"))
    parser.add_argument("--pool", nargs="+", default=[str(SHARED / "data/pool.jsonl")])
    parser.add_argument("--targets", type=Path, default=SHARED / "data/targets", help="folder of TASK.val.jsonl")
    parser.add_argument("--tasks", nargs="+", default=["gsm8k", "code", "bbh", "summarization"])
    parser.add_argument("--selections", type=Path, default=Path(__file__).parents[1] / "results/paper-tracin.json")
    parser.add_argument("--top", type=int, default=150, help="selected rows looked at, the best of each")
    parser.add_argument("--rows", type=int, default=300, help="pool rows whose influence is compared")
    parser.add_argument("--output", type=Path, default=Path(__file__).parents[1] / "results/paper-why.json")
    parser.add_argument("--fresh", action="store_true", help="forget earlier results")
    arguments = parser.parse_args()
    kept = ("output", "fresh", "selections")
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(arguments).items() if k not in kept}
    results = Results(arguments.output, settings, fresh=arguments.fresh)
    why = Why(arguments)
    for sparsity in SPARSITIES:
        for method in ("svd", "ipsvd"):
            cell = results(f"kept/{method}/{sparsity}", lambda m=method, s=sparsity: why.kept(m, s))
            print(f"{method:<8}{sparsity:>5} influence {cell['influence']:.3f}, loss × {cell['loss']:.2f}", flush=True)
    made = json.loads(arguments.selections.read_text())["cells"]
    chosen = {name.split("/")[0]: cell["selected"] for name, cell in made.items() if name.endswith("/scores/0")}
    for task in arguments.tasks:
        drawn = draw_rows("random", 0, why.total, arguments.top)
        rows = {"random": drawn} | {
            method: [int(row) for row in selected[task].split()[: arguments.top]] for method, selected in chosen.items()
        }
        for method, some in rows.items():
            # The main table may have been made anew since.
            cell = results(f"selection/{method}/{task}", lambda r=some, t=task: why.selection(r, t), key_of(some))
            print(f"{task:<15}{method:<22}affinity {cell['affinity']:.2f}, nearest {cell['nearest']:.2f}", flush=True)


if __name__ == "__main__":
    main()
