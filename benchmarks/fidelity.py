"""How faithfully does each kind of proxy rank data? Spearman and top-5 % overlap with the target's scores, by size.

Every method is given the same warmed target, the same probe, the same pool examples (none of them used for warm-up,
probe or alignment) and the same size. Cells are cached in the work folder, so a stopped benchmark goes on where it was.

    python benchmarks/fidelity.py                                       # the whole table: hours on two cores
    python benchmarks/fidelity.py --examples 400 --seeds 1 --sparsities 0.7   # quicker
    python benchmarks/fidelity.py --queries target --seeds 1 --methods ipsvd 'ipsvd, aligned' 'ipsvd, aligned by logits'
    python benchmarks/fidelity.py --queries target --seeds 1 --sparsities 0.7 --estimator ekfac \
        --methods ipsvd 'ipsvd, aligned by gradients'

Scores are raw, at the warm-up's last checkpoint: TracIn, or with --estimator an influence function. `query` says where
validation gradients are taken: on the target (iprox's default), or on the proxy (the paper's way, and the only one for
proxies that are not factorized).
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from iprox.audits.fidelity import fidelity_metrics
from iprox.data import Batch, ChatEncoder, Encoded, Pool, example_batches, iter_batches
from iprox.data.sampling import draw_rows
from iprox.influence.estimators.base import Inputs
from iprox.influence.estimators.ekfac import KroneckerInfluence
from iprox.influence.gradients import ModelGradient
from iprox.influence.low_rank import low_rank_queries
from iprox.influence.scorer import BatchScorer
from iprox.influence.validation_gradients import mean_gradient
from iprox.models import flops
from iprox.models.compiled import compiled
from iprox.models.layers import compressible_layers, dense_weight, low_rank_layers, weight_shape
from iprox.models.loading import load_model, load_tokenizer
from iprox.models.loss import causal_lm_losses
from iprox.models.precision import cast_parameters, resolve_dtype
from iprox.progress import Reporter
from iprox.proxy import baselines, budget
from iprox.proxy.align import AlignSettings, align
from iprox.proxy.align_loss import Objective
from iprox.proxy.factorize import with_factors
from iprox.proxy.methods import RootCache, weigh_layer
from iprox.proxy.moments import Moments, collect_moments
from iprox.proxy.norms import refit_norms
from iprox.proxy.spectra import SpectrumStore
from iprox.run.folder import environment, key_of, write_json
from iprox.session import Session
from iprox.settings import ESTIMATORS, InfluenceSection, WarmupSection
from iprox.stages.training import warm_up

SHARED = Path(__file__).resolve().parents[2] / "shared"

# name -> (method of weighing, rank rule, ridge)
FACTORIZED: dict[str, tuple[Any, Any, Any]] = {
    "ipsvd": ("ipsvd", "global", "auto"),
    "ipsvd, norms as they were": ("ipsvd", "global", "auto"),
    "ipsvd, uniform ranks": ("ipsvd", "uniform", "auto"),
    "ipsvd, ridge 0.01": ("ipsvd", "global", 1e-2),
    "ipsvd, ridge 1": ("ipsvd", "global", 1.0),
    "svd-llm": ("svd-llm", "global", "auto"),
    "asvd": ("asvd", "global", "auto"),
    "fwsvd": ("fwsvd", "global", "auto"),
    "svd": ("svd", "global", "auto"),
    "random": ("random", "uniform", "auto"),
}
# Stage 2 on top of the first: what of `iprox.proxy.align_loss.Objective` differs from its defaults.
ALIGNED: dict[str, dict[str, float]] = {
    "ipsvd, aligned": {},
    "ipsvd, aligned by gradients": {"kl_weight": 0.0},
    "ipsvd, aligned by logits": {"gradient_weight": 0.0, "kl_weight": 1.0},
    "ipsvd, aligned by logits and hidden states": {"gradient_weight": 0.0, "kl_weight": 1.0, "hidden_weight": 1.0},
}
FACTORIZED.update(dict.fromkeys(ALIGNED, FACTORIZED["ipsvd"]))
METHODS = (*FACTORIZED, "layers", "off-the-shelf")


@dataclass
class Setting:
    """What all cells of one seed share."""

    target: PreTrainedModel
    encoder: ChatEncoder
    validation: dict[str, list[Encoded]]
    sample: list[Encoded]
    probe: list[Batch]
    alignment: list[Batch]
    queries: dict[str, ModelGradient]
    target_scores: np.ndarray
    batch_tokens: int
    dtype: torch.dtype
    curvature_sample: list[Batch]

    def scores(self, model: PreTrainedModel, queries: dict[str, ModelGradient], keep: float) -> np.ndarray:
        """Scores [N, tasks] of the sample on a model."""
        met = queries if keep == 1 else low_rank_queries(queries, keep)
        scorer = BatchScorer(model, met)
        scores = np.full((len(self.sample), len(queries)), np.nan)
        with compiled(model):
            for batch in iter_batches(self.sample, self.batch_tokens, 0):
                scores[batch.indices] = scorer(batch)[0].double().numpy()
        return scores

    def own_queries(self, model: PreTrainedModel) -> dict[str, ModelGradient]:
        """Validation gradients taken on a model itself, divided by its curvature for an influence function."""
        queries = {
            task: mean_gradient(model, iter_batches(rows, self.batch_tokens, 0))[0]
            for task, rows in self.validation.items()
        }
        if not self.curvature_sample:
            return queries
        inputs = Inputs(
            settings=InfluenceSection(estimator="ekfac"), model=model, validation={}, sample=self.curvature_sample
        )
        return KroneckerInfluence("ekfac", corrected=True).precondition(queries, inputs)


def main() -> None:
    """Run the benchmark and print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(SHARED / "models/target-17m"))
    parser.add_argument("--sibling", default=str(SHARED / "models/sibling-7m"), help="the off-the-shelf proxy")
    parser.add_argument("--pool", nargs="+", default=[str(SHARED / "data/pool.jsonl")])
    parser.add_argument("--targets", type=Path, default=SHARED / "data/targets", help="folder of TASK.val.jsonl")
    parser.add_argument("--tasks", nargs="+", default=["gsm8k", "code", "summarization", "science", "bbh"])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--queries", nargs="+", choices=("target", "proxy"), default=["target", "proxy"])
    parser.add_argument("--sparsities", type=float, nargs="+", default=[0.3, 0.5, 0.7, 0.85])
    parser.add_argument("--examples", type=int, default=2000)
    parser.add_argument("--probe-size", type=int, default=139)
    parser.add_argument("--align-size", type=int, default=139, help="rows to align on: by default 1 %% of the pool")
    parser.add_argument("--align-epochs", type=int, default=5)
    parser.add_argument("--estimator", choices=("tracin", "ekfac"), default="tracin")
    parser.add_argument("--curvature-examples", type=int, default=256, help="of the pool, for an influence function")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--learning-rate", type=float, default=3e-4, help="of the warm-up: 5 %% of the pool, 2 epochs")
    parser.add_argument("--batch-tokens", type=int, default=4096)
    parser.add_argument("--dtype", default="auto", help="of scoring; moments and factors are made in float32")
    parser.add_argument("--work", type=Path, default=Path("runs/fidelity"))
    parser.add_argument("--output", type=Path, help="default: results/fidelity.json, or fidelity-ESTIMATOR.json")
    parser.add_argument("--fresh", action="store_true")
    arguments = parser.parse_args()
    name = "fidelity" if arguments.estimator == "tracin" else f"fidelity-{arguments.estimator}"
    arguments.output = arguments.output or Path(__file__).parent / f"results/{name}.json"
    if arguments.fresh:
        shutil.rmtree(arguments.work, ignore_errors=True)
    rows = list(itertools.chain.from_iterable(run_seed(arguments, seed) for seed in range(arguments.seeds)))
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(arguments).items()}
    write_json(arguments.output, {**environment(), "settings": settings, "cells": rows})
    print_table(rows)


def made_of(arguments: argparse.Namespace) -> str:
    """A short key of what every cell depends on, so that none is taken for one of other models or data."""
    kept = ("model", "sibling", "pool", "targets", "tasks", "learning_rate", "dtype", "batch_tokens")
    return key_of({name: str(getattr(arguments, name, None)) for name in kept})[:6]


def cell_name(arguments: argparse.Namespace, method: str, sparsity: float | None, query: str) -> str:
    """The file of one cell."""
    alignment = f"-{arguments.align_size}x{arguments.align_epochs}" if method in ALIGNED else ""
    return f"{method.replace(' ', '-')}-{sparsity}-{query}{alignment}.json"


def run_seed(arguments: argparse.Namespace, seed: int) -> list[dict[str, Any]]:
    """All cells of one seed; those on disk are read."""
    estimator = "" if arguments.estimator == "tracin" else f"-{arguments.estimator}-{arguments.curvature_examples}"
    sizes = f"examples-{arguments.examples}-probe-{arguments.probe_size}"
    folder = arguments.work / f"seed-{seed}-{sizes}{estimator}-{made_of(arguments)}"
    cells: list[dict[str, Any]] = []
    missing: list[tuple[str, float | None, str]] = []
    for method in arguments.methods:
        for sparsity in [None] if method == "off-the-shelf" else arguments.sparsities:
            for query in arguments.queries if method in FACTORIZED else ["proxy"]:
                cell = folder / cell_name(arguments, method, sparsity, query)
                if cell.is_file():
                    cells.append(json.loads(cell.read_text()))
                else:
                    missing.append((method, sparsity, query))
    if not missing:
        return cells
    setting = prepare(arguments, seed)
    layers = compressible_layers(setting.target)
    started = time.perf_counter()
    moments, _ = collect_moments(setting.target, layers, setting.probe)
    seconds = {"moments": time.perf_counter() - started}
    made: tuple[tuple[Any, Any, Any], SpectrumStore, dict[str, budget.LayerSpectrum]] | None = None
    for method, sparsity, query in missing:
        if method in FACTORIZED and (made is None or made[0] != FACTORIZED[method]):
            started = time.perf_counter()
            made = (FACTORIZED[method], *weigh(setting.target, moments, method, seed))
            seconds["svd"] = time.perf_counter() - started
        proxy = make_proxy(arguments, setting, made, method, sparsity, seed)
        aligned = None
        if method in ALIGNED:
            steps = arguments.align_epochs * len(setting.alignment)
            tuned = AlignSettings(steps, seed=seed)
            objective = Objective(**ALIGNED[method])
            aligned = align(proxy, setting.target, setting.alignment, tuned, objective)
        cast_parameters(proxy, setting.dtype)
        queries = setting.queries if query == "target" else setting.own_queries(proxy)
        scores = setting.scores(proxy, queries, ESTIMATORS["tracin"].query_norm)
        fidelity = {
            task: fidelity_metrics(scores[:, i], setting.target_scores[:, i]) for i, task in enumerate(arguments.tasks)
        }
        head = flops.head_flops(setting.target)
        entry = {
            "method": method,
            "estimator": arguments.estimator,
            "sparsity": sparsity,
            "query": query,
            "seed": seed,
            "achieved_sparsity": 1 - flops.linear_parameters(proxy) / flops.linear_parameters(setting.target),
            "relative_flops": (flops.forward_flops(proxy) + flops.head_flops(proxy))
            / (flops.forward_flops(setting.target) + head),
            "stage1_seconds": sum(seconds.values()) if method in FACTORIZED else None,
            "align_seconds": aligned and aligned.seconds,
            "align_tokens": aligned and aligned.tokens,
            "fidelity": fidelity,
        }
        write_json(folder / cell_name(arguments, method, sparsity, query), entry)
        cells.append(entry)
        print_table([entry])
    return cells


def prepare(arguments: argparse.Namespace, seed: int) -> Setting:
    """Warm the target, draw the probe and the sample, score the sample on the target (exactly)."""
    pool = Pool(arguments.pool)
    total = pool.scan().rows
    warm_rows = draw_rows("warmup", seed, total, round(0.05 * total))
    probe_rows = draw_rows("probe", seed, total, arguments.probe_size, warm_rows)
    sample_rows = draw_rows("sample", seed, total, arguments.examples, [*warm_rows, *probe_rows])
    align_rows = draw_rows("align", seed, total, arguments.align_size, [*warm_rows, *probe_rows, *sample_rows])
    used = [*warm_rows, *probe_rows, *sample_rows, *align_rows]
    curved = 0 if arguments.estimator == "tracin" else arguments.curvature_examples
    curvature_rows = draw_rows("curvature", seed, total, curved, used) if curved else []
    path = warmed(arguments, arguments.model, "target", seed)
    encoder = ChatEncoder(load_tokenizer(path), 512)
    target = load_model(path)
    probe = list(iter_batches(encoder.encode(pool.take(probe_rows)), arguments.batch_tokens, 0))
    validation = {
        task: encoder.encode(list(Pool([str(arguments.targets / f"{task}.val.jsonl")]))) for task in arguments.tasks
    }
    sample = encoder.encode(pool.take(sample_rows))
    alignment = list(example_batches(encoder.encode(pool.take(align_rows)), 8, 0, arguments.batch_tokens // 4))
    dtype = resolve_dtype(arguments.dtype, torch.device("cpu"))
    curvature_sample = list(iter_batches(encoder.encode(pool.take(curvature_rows)), arguments.batch_tokens, 0))
    setting = Setting(
        target,
        encoder,
        validation,
        sample,
        probe,
        alignment,
        {},
        np.empty(0),
        arguments.batch_tokens,
        dtype,
        curvature_sample,
    )
    scored = load_model(path, dtype=dtype)
    setting.queries = setting.own_queries(scored)
    # What proxies are compared with is exact: whole gradients.
    setting.target_scores = setting.scores(scored, setting.queries, 1.0)
    return setting


def warmed(arguments: argparse.Namespace, model: str, name: str, seed: int) -> Path:
    """The last checkpoint of a model's warm-up on 5 % of the pool; cached."""
    folder = arguments.work / f"warm-{name}-{seed}-{made_of(arguments)}"
    listing = folder / "checkpoints.json"
    if not listing.is_file():
        pool = Pool(arguments.pool)
        total = pool.scan().rows
        rows = draw_rows("warmup", seed, total, round(0.05 * total))
        session = Session.create(max_length=512, seed=seed, reporter=Reporter())
        settings = WarmupSection(fraction=0.05, epochs=2, learning_rate=arguments.learning_rate, batch_size=16)
        warm_up(session, model, pool.take(rows), folder, settings)
    return folder / json.loads(listing.read_text())[-1]["path"]


def weigh(
    target: PreTrainedModel, moments: dict[str, Moments], method: str, seed: int
) -> tuple[SpectrumStore, dict[str, budget.LayerSpectrum]]:
    """Spectra of all layers by one method: cut to any size afterwards."""
    weighing, _, ridge = FACTORIZED[method]
    store, spectra, roots = SpectrumStore(), {}, RootCache()
    generator = torch.Generator().manual_seed(seed)
    for name, layer in compressible_layers(target).items():
        weighed = weigh_layer(weighing, dense_weight(layer).detach(), moments[name], ridge, roots, generator)
        shape = weight_shape(layer)
        store.put(name, weighed.spectrum.cut(budget.largest_rank(shape)))
        spectra[name] = budget.LayerSpectrum(shape, weighed.comparable.numpy())
    return store, spectra


def make_proxy(
    arguments: argparse.Namespace, setting: Setting, made: Any, method: str, sparsity: float | None, seed: int
) -> PreTrainedModel:
    """One proxy."""
    if method == "off-the-shelf":
        return load_model(warmed(arguments, arguments.sibling, "sibling", seed))
    assert sparsity is not None
    allowed = (1 - sparsity) * flops.linear_parameters(setting.target)
    if method == "layers":
        return baselines.first_layers(setting.target, allowed)[0]
    _, store, spectra = made
    ranks = budget.RULES[FACTORIZED[method][1]](spectra, allowed)
    proxy = with_factors(setting.target, compressible_layers(setting.target), store, ranks)
    assert low_rank_layers(proxy)
    if method.startswith("ipsvd") and method != "ipsvd, norms as they were":
        refit_norms(proxy, setting.target, setting.probe, causal_lm_losses)
    return proxy


def print_table(rows: list[dict[str, Any]]) -> None:
    """Mean over tasks, then mean and standard deviation over seeds."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["sparsity"] or 0, row["method"], row["query"]), []).append(row)
    head = f"{'sparsity':>8} {'method':<22}{'query':<8}{'kept':>6}{'FLOPs':>7}"
    print(f"{head}{'Spearman':>16}{'top-5 %':>16}  by task")
    for (sparsity, method, query), entries in sorted(groups.items()):
        tasks = list(entries[0]["fidelity"])
        spearman = np.array([[entry["fidelity"][task]["spearman"] for task in tasks] for entry in entries])
        overlap = np.array([[entry["fidelity"][task]["overlap"]["0.05"] for task in tasks] for entry in entries])
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
