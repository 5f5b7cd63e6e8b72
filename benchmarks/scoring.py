"""Speed of scoring: tokens per second, share of the machine's GEMM rate and peak memory, compared with peers.

Every engine scores the same pool rows against the same validation rows in the same dtype, in a separate process, one
after the other. Seconds include validation gradients, but not loading, tokenizing and the code generation of
`torch.compile`.

    python benchmarks/scoring.py                                  # the shared 17 M-parameter target
    python benchmarks/scoring.py --model random:qwen3-0.6b --examples 200 --validation-examples 8
    python benchmarks/scoring.py --engines target kronfluence bergson --bergson /path/to/venv/bin/bergson

kronfluence needs pip install 'iprox[peers]'. bergson's pinned dependencies conflict with many environments: set the
command of a separate one with --bergson. `random:qwen3-0.6b` is a model with Qwen3-0.6B's dimensions (vocabulary 8,192)
and random weights: speed does not depend on training.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3Config, set_seed

from common import RESULTS, SHARED, Results, gemm_rate, parser, settings_of, timed
from iprox.data import ChatEncoder, Encoded, Pool, collate, iter_batches
from iprox.influence.low_rank import low_rank_queries
from iprox.influence.scorer import BatchScorer
from iprox.influence.validation_gradients import mean_gradient
from iprox.models import flops
from iprox.models.compiled import compile_layers
from iprox.models.layers import influence_layers
from iprox.models.loading import load_model, load_tokenizer
from iprox.models.loss import causal_lm_losses
from iprox.models.precision import DTYPES, cast_parameters
from iprox.proxy.compress import derive_proxy
from iprox.proxy.factorize import FactorSettings
from iprox.proxy.size import Size
from iprox.settings import ESTIMATORS

QWEN3_600M = {
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 8192,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}


class Work:
    """The model and the tokenized rows of one process."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.dtype = DTYPES[arguments.dtype]
        self.model = load_model(arguments.model, dtype=self.dtype)
        encoder = ChatEncoder(load_tokenizer(arguments.model), 512)
        self.pool = encoder.encode(list(Pool(arguments.pool)))
        self.validation = encoder.encode(list(Pool(arguments.validation)))
        self.tokens = sum(len(row.input_ids) for row in self.pool)

    def batches(self, rows: list[Encoded]) -> list[Any]:
        """Return rows in length-sorted batches."""
        return list(iter_batches(rows, self.arguments.batch_tokens))


def iprox(work: Work, model: PreTrainedModel, keep: float, task_counts: Sequence[int]) -> dict[str, Any]:
    """Time our engine: validation gradients, then the pool, compiled; the pool again for each number of tasks."""
    pool, validation = work.batches(work.pool), work.batches(work.validation)
    seconds, gradient = timed(lambda: mean_gradient(model, validation))
    result: dict[str, Any] = {"query_seconds": seconds, "by_tasks": {}}
    scorers = {}
    for tasks in task_counts:
        # Tasks of equal size; the time does not depend on the values of their gradients.
        def make(tasks: int = tasks) -> BatchScorer:
            queries: dict[str, Any] = dict.fromkeys(map(str, range(tasks)), gradient)
            if keep < 1:
                queries = dict(low_rank_queries(queries, keep))
            return BatchScorer(model, queries)

        making, scorers[tasks] = timed(make)
        result["by_tasks"][tasks] = {"making_seconds": making}
    supervised = sum(row.supervised for row in work.pool)
    spent = flops.scoring_flops(model, work.tokens, supervised, work.tokens * scorers[1].contraction_flops)
    if work.arguments.compile:
        compile_layers(model)
        result["compile_seconds"], _ = timed(lambda: [scorers[1](batch) for batch in (pool[0], pool[-1])])
    for tasks, scorer in scorers.items():
        scorer(pool[len(pool) // 2])  # the first call allocates
        taken, _ = timed(lambda scorer=scorer: [scorer(batch) for batch in pool])
        result["by_tasks"][tasks] |= {"seconds": taken, "tokens_per_second": work.tokens / taken}
    one = result["by_tasks"][1]
    result |= {
        "seconds": one["seconds"] + seconds + one["making_seconds"],
        "flops": spent,
        "flops_per_second": spent / one["seconds"],
    }
    result["pool_tokens_per_second"] = one["tokens_per_second"]
    return result


def target(work: Work) -> dict[str, Any]:
    """Time our engine on the model itself, with exact scores."""
    return iprox(work, work.model, 1.0, [1])


def proxy(work: Work) -> dict[str, Any]:
    """Time our engine on a proxy at sparsity 0.7."""
    model = work.model
    cast_parameters(model, torch.float32)
    made, _ = derive_proxy(model, work.batches(work.validation[:8]), Size(0.7), FactorSettings(method="svd"))
    del work.model, model
    cast_parameters(made, work.dtype)
    return iprox(work, made, ESTIMATORS["tracin"].query_norm, work.arguments.task_counts)


def autograd(work: Work) -> dict[str, Any]:
    """Time the naive method: the gradient of every example by autograd, multiplied with the validation gradient."""
    layers = influence_layers(work.model)
    gradient = mean_gradient(work.model, work.batches(work.validation))
    parameters, query = [layer.weight for layer in layers.values()], [gradient[name] for name in layers]
    rows = work.pool[:: max(1, len(work.pool) // 32)]

    def run() -> None:
        for row in rows:
            losses = causal_lm_losses(work.model, collate([row], [0]))
            gradients = torch.autograd.grad(losses.sum(), parameters)
            sum(float((g.float() * q.weight).sum()) for g, q in zip(gradients, query, strict=True))

    seconds, _ = timed(run)
    tokens = sum(len(row.input_ids) for row in rows)
    return {"seconds": seconds, "tokens": tokens}


class Rows(Dataset):
    """Tokenized rows, longest first, for the loader of kronfluence."""

    def __init__(self, rows: list[Encoded]) -> None:
        self.rows = sorted(rows, key=lambda row: -len(row.input_ids))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Encoded:
        return self.rows[index]


def padded(rows: list[Encoded]) -> dict[str, torch.Tensor]:
    """Return rows of similar lengths as a batch."""
    batch = collate(rows, range(len(rows)))
    return {"input_ids": batch.input_ids, "labels": batch.labels}


def kronfluence(work: Work) -> dict[str, Any]:
    """Time kronfluence with the identity strategy (TracIn) and summed validation gradients."""
    import kronfluence as peer
    from kronfluence.arguments import FactorArguments, ScoreArguments
    from kronfluence.utils.dataset import DataLoaderKwargs

    layers = list(influence_layers(work.model))

    class MeanLoss(peer.Task):
        def compute_train_loss(self, batch: Any, model: Any, sample: bool = False) -> torch.Tensor:
            logits = model(input_ids=batch["input_ids"]).logits[:, :-1].float()
            labels = batch["labels"][:, 1:]
            losses = torch.nn.functional.cross_entropy(
                logits.transpose(1, 2), labels, reduction="none", ignore_index=-100
            )
            return (losses.sum(1) / (labels != -100).sum(1)).sum()

        def compute_measurement(self, batch: Any, model: Any) -> torch.Tensor:
            return self.compute_train_loss(batch, model)

        def get_influence_tracked_modules(self) -> list[str]:
            return layers

    task = MeanLoss()
    model = peer.prepare_model(work.model, task)
    with tempfile.TemporaryDirectory() as folder:
        analyzer = peer.Analyzer("speed", model, task, output_dir=folder, disable_tqdm=True)
        loader = DataLoaderKwargs(collate_fn=padded)
        analyzer.fit_all_factors(
            "factors", Rows(work.pool), factor_args=FactorArguments(strategy="identity"),
            per_device_batch_size=4, dataloader_kwargs=loader,
        )  # fmt: skip
        dtype = work.dtype
        scoring = ScoreArguments(
            aggregate_query_gradients=True, per_sample_gradient_dtype=dtype, precondition_dtype=dtype, score_dtype=dtype
        )
        seconds, _ = timed(
            lambda: analyzer.compute_pairwise_scores(
                "scores", "factors", Rows(work.validation), Rows(work.pool), score_args=scoring,
                per_device_query_batch_size=4, per_device_train_batch_size=work.arguments.peer_batch,
                dataloader_kwargs=loader,
            )
        )  # fmt: skip
    return {"seconds": seconds}


def bergson(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Time bergson's two commands, minus start-up, measured with `--help`."""
    precision = {"float32": "fp32", "bfloat16": "bf16"}[arguments.dtype]

    def run(*command: str) -> float:
        done = timed(lambda: subprocess.run([arguments.bergson, *command], capture_output=True, text=True))
        if done[1].returncode:
            raise RuntimeError(f"bergson {' '.join(command)}\n{done[1].stdout[-2000:]}{done[1].stderr[-2000:]}")
        return done[0]

    common = [
        "--model",
        str(arguments.model),
        "--precision",
        precision,
        "--projection_dim",
        "0",
        "--truncation",
        "True",
    ]
    common += [
        "--conversation_column",
        "messages",
        "--token_batch_size",
        str(arguments.peer_tokens),
        "--overwrite",
        "True",
    ]
    startup = run("build", "--help")
    build = run(
        "build", str(folder / "query"), "--dataset", str(arguments.validation), "--aggregation", "mean", *common
    )
    common = ["--index_cfg.precision" if part == "--precision" else part for part in common]
    query = ["--query_path", str(folder / "query")]
    score = run("score", str(folder / "scores"), *query, "--dataset", arguments.pool[0], *common)
    return {"wall_seconds": build + score, "startup_seconds": startup, "seconds": build + score - 2 * startup}


ENGINES: dict[str, Callable[[Work], dict[str, Any]]] = {
    "target": target, "proxy": proxy, "kronfluence": kronfluence, "autograd": autograd
}  # fmt: skip


def worker(arguments: argparse.Namespace) -> None:
    """Run one engine in this process and print its result as JSON."""
    if arguments.worker == "bergson":
        with tempfile.TemporaryDirectory() as folder:
            result = bergson(arguments, Path(folder))
        result["peak_gib"] = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
        encoder = ChatEncoder(load_tokenizer(arguments.model), 512)
        tokens = sum(len(row.input_ids) for row in encoder.encode(list(Pool(arguments.pool))))
    else:
        work = Work(arguments)
        tokens = work.tokens
        result = ENGINES[arguments.worker](work)
        result["peak_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    result.setdefault("tokens", tokens)
    result["tokens_per_second"] = result["tokens"] / result["seconds"]
    print(json.dumps(result))


def prepare(arguments: argparse.Namespace, folder: Path) -> None:
    """Write the rows of the benchmark to separate files, and the random model if it is chosen."""
    pool = Pool(arguments.pool)
    total = pool.scan().rows
    pool.write_rows(
        list(range(0, total, max(1, total // arguments.examples)))[: arguments.examples], folder / "pool.jsonl"
    )
    validation = Pool(arguments.validation)
    validation.write_rows(list(range(arguments.validation_examples)), folder / "validation.jsonl")
    arguments.pool, arguments.validation = folder / "pool.jsonl", folder / "validation.jsonl"
    if arguments.model == "random:qwen3-0.6b":
        set_seed(0)
        model = AutoModelForCausalLM.from_config(Qwen3Config(**QWEN3_600M))
        cast_parameters(model, torch.bfloat16)
        model.save_pretrained(folder / "model")
        load_tokenizer(arguments.tokenizer).save_pretrained(folder / "model")
        arguments.model = folder / "model"


def main() -> None:
    """Run every engine and print the table."""
    made = parser(__doc__, "model pool validation examples batch-tokens dtype output fresh", batch_tokens=2048)
    made.add_argument("--tokenizer", default=str(SHARED / "models/target-17m"), help="tokenizer of the random model")
    made.add_argument("--validation-examples", type=int, default=64)
    made.add_argument("--engines", nargs="+", choices=[*ENGINES, "bergson"], default=[*ENGINES, "bergson"])
    made.add_argument("--bergson", default="bergson", help="bergson's command")
    made.add_argument("--peer-batch", type=int, default=8, help="examples per batch of kronfluence")
    made.add_argument("--peer-tokens", type=int, default=2048, help="tokens per batch of bergson")
    made.add_argument("--task-counts", type=int, nargs="+", default=[1, 4, 16], help="for the proxy; 1 first")
    made.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    made.add_argument("--worker", choices=[*ENGINES, "bergson"], help=argparse.SUPPRESS)
    arguments = made.parse_args()
    if arguments.worker:
        worker(arguments)
        return
    name = Path(str(arguments.model).replace(":", "-")).name
    settings = settings_of(arguments, "worker", "engines", "bergson")
    results = Results(arguments.output or RESULTS / f"scoring-{name}.jsonl", settings, fresh=arguments.fresh)
    rate = results("GEMM", lambda: {"flops_per_second": gemm_rate(DTYPES[arguments.dtype])})["flops_per_second"]
    print(f"GEMM rate {rate / 1e12:.2f} TFLOP/s, {torch.get_num_threads()} threads, {arguments.dtype}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        prepare(arguments, Path(folder))
        for engine in arguments.engines:
            try:
                result = results(engine, lambda engine=engine: in_process(arguments, engine))
            except subprocess.CalledProcessError as error:
                print(f"{engine}: failed\n{error.stderr[-1500:]}", flush=True)
                continue
            print_engine(engine, result, rate, results.cells.get("target/0"))


def in_process(arguments: argparse.Namespace, engine: str) -> dict[str, Any]:
    """Run one engine in a separate process and return its result."""
    command = [sys.executable, __file__, "--worker", engine, "--task-counts", *map(str, arguments.task_counts)]
    for key in ("model", "pool", "validation", "dtype", "bergson", "batch_tokens", "peer_batch", "peer_tokens"):
        command += [f"--{key.replace('_', '-')}", str(getattr(arguments, key))]
    command += ["--compile" if arguments.compile else "--no-compile"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.strip().splitlines()[-1])


def print_engine(name: str, result: dict[str, Any], rate: float, ours: dict[str, Any] | None) -> None:
    """Print one line of the table."""
    line = f"{name:<12}{result['seconds']:>8.1f} s{result['tokens_per_second']:>9.0f} tokens/s"
    line += f"{result['peak_gib']:>6.1f} GiB"
    if "flops_per_second" in result:
        pool = result["pool_tokens_per_second"]
        line += f"  pool alone {pool:.0f} tokens/s, {result['flops_per_second'] / rate:.0%} of the GEMM rate"
        one = result["by_tasks"]["1"]["seconds"]
        line += "".join(f", {n} tasks {each['seconds'] / one:.2f}×" for n, each in result["by_tasks"].items())
        if "compile_seconds" in result:
            line += f", compiling {result['compile_seconds']:.0f} s"
    if ours and ours is not result:
        line += f"  target is {ours['tokens_per_second'] / result['tokens_per_second']:.1f}× as fast"
    print(line, flush=True)


if __name__ == "__main__":
    main()
