"""Time of stage 1 and its memory beyond the model: moments, spectra, ranks, factors and norms.

    python benchmarks/stage1.py                                       # the shared 17 M-parameter target
    python benchmarks/stage1.py --model random:qwen2-7b --layers 2    # layers of Qwen2-7B's dimensions, random weights

Each model runs in a separate process. Memory beyond the model is the peak of the process minus its memory after the
model was made: an upper bound of what stage 1 needs, including the proxy.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen2Config, set_seed

from common import RESULTS, SHARED, Results, parser, settings_of
from iprox.data import ChatEncoder, Pool, iter_batches
from iprox.data.sampling import draw_rows
from iprox.models.loading import load_model, load_tokenizer
from iprox.models.precision import DTYPES, cast_parameters
from iprox.proxy.compress import derive_proxy
from iprox.proxy.factorize import FactorSettings
from iprox.proxy.size import Size

QWEN2_7B = {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 8192,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}


def resident_gib() -> float:
    """Return the resident memory of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**30


def make_model(arguments: argparse.Namespace) -> PreTrainedModel:
    """Return the model to compress."""
    dtype = DTYPES[arguments.dtype]
    if arguments.model != "random:qwen2-7b":
        return load_model(arguments.model, dtype=dtype)
    set_seed(0)
    torch.set_default_dtype(dtype)  # created in this dtype, so that no wider copy counts towards the peak
    try:
        return AutoModelForCausalLM.from_config(Qwen2Config(num_hidden_layers=arguments.layers, **QWEN2_7B))
    finally:
        torch.set_default_dtype(torch.float32)


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure stage 1 in this process."""
    tokenizer = load_tokenizer(arguments.tokenizer)
    pool = Pool(arguments.pool)
    rows = draw_rows("probe", 0, pool.scan().rows, arguments.probe_size)
    encoded = ChatEncoder(tokenizer, 512).encode(pool.take(rows))
    probe = list(iter_batches(encoded, arguments.batch_tokens))
    model = make_model(arguments)
    cast_parameters(model, DTYPES[arguments.dtype])
    before = resident_gib()
    started = time.perf_counter()
    _, report = derive_proxy(model, probe, Size(arguments.sparsity), FactorSettings())
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {
        "model": str(arguments.model),
        "layers": len(report.layers),
        "parameters": sum(p.numel() for p in model.parameters()),
        "probe_tokens": report.probe_tokens,
        "passes": report.passes,
        "seconds": seconds,
        "model_gib": before,
        "beyond_gib": peak - before,
        "sparsity": report.achieved_sparsity,
    }


def main() -> None:
    """Measure in a separate process, print and keep the result."""
    made = parser(__doc__, "model pool batch-tokens dtype output fresh", dtype="float32")
    made.add_argument("--layers", type=int, default=2, help="decoder layers of the random model")
    made.add_argument("--tokenizer", default=str(SHARED / "models/target-17m"), help="tokenizer of the random model")
    made.add_argument("--probe-size", type=int, default=139)
    made.add_argument("--sparsity", type=float, default=0.7)
    made.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = made.parse_args()
    if arguments.worker:
        print(json.dumps(measure(arguments)))
        return

    def work() -> dict[str, Any]:
        command = [sys.executable, __file__, *sys.argv[1:], "--worker"]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        return {**json.loads(done.stdout.splitlines()[-1]), "threads": torch.get_num_threads()}

    name = Path(str(arguments.model).replace(":", "-")).name
    settings = settings_of(arguments, "worker")
    results = Results(arguments.output or RESULTS / f"stage1-{name}.jsonl", settings, fresh=arguments.fresh)
    result = results("stage 1", work)
    print(
        f"{result['model']}: {result['layers']} linear layers, {result['probe_tokens']} probe tokens read "
        f"{result['passes']} times: {result['seconds']:.0f} s; model {result['model_gib']:.2f} GiB, "
        f"beyond it {result['beyond_gib']:.2f} GiB"
    )


if __name__ == "__main__":
    main()
