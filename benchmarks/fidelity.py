"""Fidelity of each kind of proxy by size: Spearman correlation and top-5 % overlap with the target's scores.

Every method gets the same warmed target, probe, size and pool examples (which warm-up, probe and alignment do not use).
Proxies are made with `iprox.compress` and `iprox.align`, and scored with `iprox.score`. Finished cells are kept, so an
interrupted benchmark resumes.

    python benchmarks/fidelity.py                                             # the whole table: hours on two cores
    python benchmarks/fidelity.py --examples 400 --seeds 1 --sparsities 0.7   # quicker
    python benchmarks/fidelity.py --queries target --seeds 1 --methods ipsvd 'ipsvd, aligned' 'ipsvd, aligned by logits'
    python benchmarks/fidelity.py --queries target --seeds 1 --sparsities 0.7 --estimator ekfac \
        --methods ipsvd 'ipsvd, aligned by gradients'

Scores are those at the warm-up's last checkpoint, raw unless `--normalize cosine` is given. `query` is the model that
validation gradients are taken on: the target (iprox's default), or the proxy (as in the paper, and the only way for
proxies that are not factorized).
"""

from __future__ import annotations

import argparse
import functools
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel

import iprox
from common import RESULTS, Results, as_rows, examples_of, parser, settings_of, timed, warmed
from iprox.audits.fidelity import fidelity_metrics
from iprox.data import Pool
from iprox.data.sampling import draw_rows
from iprox.models import flops
from iprox.models.loading import load_tokenizer
from iprox.models.precision import DTYPES, cast_parameters
from iprox.scores import score_matrix

# name -> arguments of `iprox.compress`
FACTORIZED: dict[str, dict[str, Any]] = {
    "ipsvd": {},
    "ipsvd, uniform ranks": {"ranks": "uniform"},
    **{name: {"method": name} for name in ("svd-llm", "asvd", "fwsvd", "svd")},
    "random": {"method": "random", "ranks": "uniform"},
}
# name -> arguments of `iprox.align`, applied to the proxy of ipsvd
ALIGNED: dict[str, dict[str, float]] = {
    "ipsvd, aligned": {"gradient_weight": 1.0},
    "ipsvd, aligned by gradients": {"gradient_weight": 1.0, "kl_weight": 0.0},
    "ipsvd, aligned by logits": {"kl_weight": 1.0},
    "ipsvd, aligned by logits and hidden states": {"kl_weight": 1.0, "hidden_weight": 1.0},
}
METHODS = (*FACTORIZED, *ALIGNED, "layers", "off-the-shelf")


class Setting:
    """The warmed target, its scores and the rows for each purpose, for all cells of one seed."""

    def __init__(self, arguments: argparse.Namespace, seed: int) -> None:
        self.arguments, self.seed, self.pool = arguments, seed, Pool(arguments.pool)
        total, used = self.pool.scan().rows, []
        self.rows: dict[str, list[dict[str, Any]]] = {}
        curved = arguments.curvature_examples if arguments.estimator == "ekfac" else 0
        sizes = {"warmup": round(0.05 * total), "probe": arguments.probe_size, "sample": arguments.examples}
        for name, size in {**sizes, "align": arguments.align_size, "curvature": curved}.items():
            drawn = draw_rows(name, seed, total, size, used) if size else []
            self.rows[name], used = as_rows(self.pool.take(drawn)), [*used, *drawn]
        self.validation = {task: as_rows(rows) for task, rows in examples_of(arguments).items()}
        self.common = {"tokenizer": load_tokenizer(arguments.model), "max_length": 512, "progress": False}

    def warmed(self, model: str) -> PreTrainedModel:
        """Return a model after its warm-up, in float32."""
        arguments = self.arguments
        options = {"seed": self.seed, "learning_rate": arguments.learning_rate}
        return iprox.load(warmed(model, self.pool, arguments.work, **options)[-1][0])

    @cached_property
    def target(self) -> PreTrainedModel:
        """The target, which proxies are made from."""
        return self.warmed(self.arguments.model)

    @cached_property
    def scored_target(self) -> PreTrainedModel:
        """The target in the dtype of scoring."""
        return self.in_dtype(self.warmed(self.arguments.model))

    @cached_property
    def truth(self) -> np.ndarray:
        """The target's own scores [N, tasks], with whole validation gradients."""
        return self.scores(self.scored_target, query_norm=1.0)

    def in_dtype(self, model: PreTrainedModel) -> PreTrainedModel:
        """Cast a model in place to the dtype of scoring."""
        cast_parameters(model, DTYPES[self.arguments.dtype])
        return model

    def scores(self, model: PreTrainedModel, **options: Any) -> np.ndarray:
        """Return the scores [N, tasks] of the sample."""
        if self.rows["curvature"]:
            options["curvature_sample"] = self.rows["curvature"]
        table = iprox.score(
            model,
            self.rows["sample"],
            self.validation,
            estimator=self.arguments.estimator,
            normalize=self.arguments.normalize,
            per_example=False,
            batch_tokens=self.arguments.batch_tokens,
            seed=self.seed,
            **options,
            **self.common,
        )
        return score_matrix(table)

    def proxy(self, method: str, sparsity: float | None) -> tuple[PreTrainedModel, dict[str, Any]]:
        """Return a proxy, and the seconds to make it."""
        probe = self.rows["probe"]
        if method == "off-the-shelf":
            return self.warmed(self.arguments.sibling), {}
        settings = {"method": "layers"} if method == "layers" else FACTORIZED.get(method, {})
        options = {**settings, **self.common, "sparsity": sparsity, "seed": self.seed}
        seconds, proxy = timed(lambda: iprox.compress(self.target, probe, **options))
        made = {"stage1_seconds": seconds}
        if method in ALIGNED:
            epochs, rows = self.arguments.align_epochs, self.rows["align"]
            options = {**ALIGNED[method], **self.common, "epochs": epochs, "seed": self.seed}
            history = iprox.align(proxy, self.target, rows, **options)
            made |= {"align_seconds": history.seconds, "align_tokens": history.tokens}
        return proxy, made

    def cell(self, method: str, sparsity: float | None, query: str) -> dict[str, Any]:
        """Make a proxy and compare its scores with the target's."""
        proxy, made = self.proxy(method, sparsity)
        scores = self.scores(self.in_dtype(proxy), target=self.scored_target if query == "target" else None)
        tasks = self.arguments.tasks
        cost, whole = (flops.forward_flops(model) + flops.head_flops(model) for model in (proxy, self.target))
        return {
            "achieved_sparsity": 1 - flops.linear_parameters(proxy) / flops.linear_parameters(self.target),
            "relative_flops": cost / whole,
            **made,
            "fidelity": {task: fidelity_metrics(scores[:, i], self.truth[:, i]) for i, task in enumerate(tasks)},
        }


def main() -> None:
    """Compute what is missing and print the table."""
    options = "model sibling pool targets tasks examples seeds learning-rate batch-tokens dtype work output fresh"
    made = parser(__doc__, options, examples=2000, work=Path("runs/fidelity"))
    made.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    made.add_argument("--queries", nargs="+", choices=("target", "proxy"), default=["target", "proxy"])
    made.add_argument("--sparsities", type=float, nargs="+", default=[0.3, 0.5, 0.7, 0.85])
    made.add_argument("--probe-size", type=int, default=139)
    made.add_argument("--align-size", type=int, default=139, help="rows to align on: by default 1 %% of the pool")
    made.add_argument("--align-epochs", type=int, default=5)
    made.add_argument("--estimator", choices=("tracin", "ekfac"), default="tracin")
    made.add_argument("--normalize", choices=("none", "cosine"), default="none")
    made.add_argument("--curvature-examples", type=int, default=256, help="pool rows to measure curvature on")
    arguments = made.parse_args()
    name = "fidelity" if arguments.estimator == "tracin" else f"fidelity-{arguments.estimator}"
    settings = settings_of(arguments, "methods", "queries", "sparsities")
    results = Results(arguments.output or RESULTS / f"{name}.jsonl", settings, fresh=arguments.fresh)
    cells: dict[tuple[float, str, str], list[dict[str, Any]]] = {}
    for seed in range(arguments.seeds):
        setting = Setting(arguments, seed)
        for method in arguments.methods:
            for sparsity in [None] if method == "off-the-shelf" else arguments.sparsities:
                for query in arguments.queries if method in (*FACTORIZED, *ALIGNED) else ["proxy"]:
                    work = functools.partial(setting.cell, method, sparsity, query)
                    found = results(f"{method}/{sparsity}/{query}", work, seed)
                    cells.setdefault((sparsity or 0.0, method, query), []).append(found)
                    print_row(sparsity, method, query, [found])
    print(f"{'sparsity':>8} {'method':<22}{'query':<8}{'kept':>6}{'FLOPs':>7}{'Spearman':>16}{'top-5 %':>16}  by task")
    for (sparsity, method, query), entries in sorted(cells.items()):
        print_row(sparsity, method, query, entries)


def print_row(sparsity: float | None, method: str, query: str, entries: list[dict[str, Any]]) -> None:
    """Print the mean over tasks, then mean and standard deviation over seeds."""
    spearman = np.array([[task["spearman"] for task in entry["fidelity"].values()] for entry in entries])
    overlap = np.array([[task["overlap"]["0.05"] for task in entry["fidelity"].values()] for entry in entries])
    print(
        f"{sparsity or '':>8} {method:<22}{query:<8}{1 - entries[0]['achieved_sparsity']:>6.2f}"
        f"{entries[0]['relative_flops']:>7.2f}"
        f"{spearman.mean():>9.3f} ± {spearman.mean(1).std():.3f}"
        f"{overlap.mean():>9.2f} ± {overlap.mean(1).std():.2f}"
        f"  {' '.join(f'{value:.2f}' for value in spearman.mean(0))}",
        flush=True,
    )


if __name__ == "__main__":
    main()
