"""The commands of single stages, as parsers."""

from __future__ import annotations

from typing import Any

from iprox.cli.parser_options import (
    COMPUTING,
    WITHOUT_SEED,
    aggregation_options,
    command,
    compile_option,
    held_out_options,
    influence_options,
    number_or_auto,
    per_example_option,
    positive,
    query_option,
    ranked_by_options,
    reading_options,
    row_options,
    streaming_option,
    training_options,
)
from iprox.settings import DIMENSION, FinetuneSection, WarmupSection


def add_warmup(commands: Any) -> None:
    """`iprox warmup`."""
    parser = command(
        commands,
        "warmup",
        "Fine-tune a model briefly on a random share of the pool, keeping each epoch's checkpoint and learning rate.",
        "iprox warmup --model Qwen/Qwen3-4B --pool pool/*.jsonl --output warm",
        COMPUTING.keys() - {"--batch-tokens"},
    )
    parser.add_argument("--model", required=True, help="hub id or folder")
    parser.add_argument("--pool", required=True, nargs="+", metavar="FILE", help="files, globs or hf://datasets/...")
    parser.add_argument("--output", required=True, help="folder for the checkpoints")
    parser.add_argument("--fraction", type=float, help="share of the pool (default 0.05, but 500 to 10,000 examples)")
    parser.add_argument(
        "--optimizer-state", action="store_true", help="keep Adam's moments with each checkpoint, for --estimator adam"
    )
    training_options(parser, WarmupSection)
    reading_options(parser)


def add_compress(commands: Any) -> None:
    """`iprox compress`."""
    parser = command(
        commands,
        "compress",
        "Derive a low-rank proxy from a model.",
        "iprox compress --model warm/checkpoint-44 --probe pool/*.jsonl --output proxy --sparsity 0.7",
    )
    parser.add_argument("--model", required=True, help="hub id or folder")
    parser.add_argument("--probe", required=True, nargs="+", metavar="FILE", help="what moments are measured on")
    parser.add_argument("--output", required=True, help="folder for the proxy")
    size = parser.add_mutually_exclusive_group()
    size.add_argument(
        "--sparsity", type=float, help="share of the linear parameters to remove, in (0, 1) (default 0.7)"
    )
    size.add_argument("--parameters", type=positive, help="parameters of the whole proxy, embeddings included")
    size.add_argument("--flops", type=float, help="FLOPs per token as a share of the target's, in (0, 1)")
    size.add_argument(
        "--fidelity",
        type=float,
        help="take the smallest proxy whose Spearman correlation with the target's scores is at least this",
    )
    parser.add_argument(
        "--method",
        choices=("ipsvd", "svd", "svd-llm", "asvd", "fwsvd", "random", "layers", "off-the-shelf"),
        default="ipsvd",
        help="default ipsvd; the others are baselines",
    )
    parser.add_argument("--proxy-model", metavar="MODEL", help="the proxy itself, with --method off-the-shelf")
    parser.add_argument("--ranks", choices=("global", "uniform"), default="global", help="default global")
    parser.add_argument(
        "--ridge", type=number_or_auto, default="auto", help="share of the mean eigenvalue (default auto: Ledoit-Wolf)"
    )
    parser.add_argument(
        "--probe-labels",
        choices=("data", "sampled"),
        default="data",
        help="labels whose gradients count: the data's (default), or sampled from the model (true Fisher)",
    )
    parser.add_argument(
        "--probe-tokens", choices=("all", "supervised"), default="all", help="tokens that count (default all)"
    )
    parser.add_argument("--probe-size", type=positive, help="random sample of this many examples (default 512)")
    held_out_options(parser, "with --fidelity: examples that it is measured on")
    reading_options(parser)


def add_align(commands: Any) -> None:
    """`iprox align`."""
    parser = command(
        commands,
        "align",
        "Tune a proxy's factors until its gradients, or its logits only, match the target's.",
        "iprox align --model warm/checkpoint-44 --proxy proxy --data align.jsonl --output aligned",
    )
    parser.add_argument("--model", required=True, help="the proxy's target")
    parser.add_argument("--proxy", required=True, help="proxy folder")
    parser.add_argument("--data", required=True, nargs="+", metavar="FILE", help="examples to align on")
    parser.add_argument("--output", required=True, help="folder for the aligned proxy")
    parser.add_argument("--steps", type=positive, help="optimizer steps (default: 5 epochs)")
    parser.add_argument("--learning-rate", type=float, default=1e-4, help="default 1e-4")
    parser.add_argument(
        "--gradient-weight",
        type=float,
        default=1.0,
        help="weight of the gradients (default 1); 0 matches the logits only, at a third of the cost",
    )
    parser.add_argument("--kl-weight", type=float, default=0.1, help="weight of the KL of the logits (default 0.1)")
    parser.add_argument("--hidden-weight", type=float, default=0.0, help="weight of the hidden states (default 0)")
    parser.add_argument("--batch-size", type=positive, default=8, help="examples a batch (default 8)")
    parser.add_argument(
        "--accumulate",
        type=positive,
        default=1,
        help="batches an optimizer step (default 1); with --batch-size 1 every example is matched by itself",
    )
    held_out_options(parser, "keep the factors most faithful on these examples")
    reading_options(parser)


def add_score(commands: Any) -> None:
    """`iprox score`."""
    parser = command(
        commands,
        "score",
        "Score a pool against validation tasks, on a proxy or on any causal language model.",
        "iprox score --model aligned --pool pool/*.jsonl --validation gsm8k=gsm8k.val.jsonl --output scores",
    )
    parser.add_argument(
        "--model", required=True, nargs="+", help="model or proxy folder; several are checkpoints of TracIn"
    )
    parser.add_argument(
        "--learning-rates",
        type=float,
        nargs="+",
        help="learning rate of each checkpoint (default: from the checkpoints.json beside them)",
    )
    parser.add_argument("--target", help="target of a proxy, for its validation gradients (default: the one it names)")
    parser.add_argument("--pool", required=True, nargs="+", metavar="FILE")
    parser.add_argument("--validation", required=True, nargs="+", metavar="TASK=FILE")
    parser.add_argument("--output", required=True, help="folder for scores.parquet")
    influence_options(parser)
    per_example_option(parser)
    compile_option(parser)
    streaming_option(parser)
    reading_options(parser)


def add_index(commands: Any) -> None:
    """`iprox index`."""
    parser = command(
        commands,
        "index",
        "Keep a pool's gradients, randomly projected, to score it against later tasks without reading it again.",
        "iprox index --model aligned --pool pool/*.jsonl --output index",
    )
    parser.add_argument("--model", required=True, help="model or proxy folder")
    parser.add_argument("--pool", required=True, nargs="+", metavar="FILE")
    parser.add_argument("--output", required=True, help="folder for the index")
    parser.add_argument(
        "--dimension", type=positive, default=DIMENSION, help=f"numbers an example, 2 bytes each (default {DIMENSION})"
    )
    parser.add_argument(
        "--estimator",
        choices=("tracin", "less"),
        default="tracin",
        help="what is projected: gradients (tracin, default), or the steps of the warm-up's optimizer (less)",
    )
    parser.add_argument("--target", help="with less, the target of a proxy (default: the one it names)")
    compile_option(parser)
    streaming_option(parser)
    reading_options(parser)


def add_query(commands: Any) -> None:
    """`iprox query`."""
    parser = command(
        commands,
        "query",
        "Score a pool against validation tasks by its index, at the speed of the disk.",
        "iprox query --index index --validation code=code.val.jsonl --output scores",
        WITHOUT_SEED,
    )
    parser.add_argument(
        "--index", required=True, nargs="+", metavar="INDEX_DIR", help="several are checkpoints of TracIn"
    )
    parser.add_argument("--model", nargs="+", help="the model of each index, where it is no longer where it was")
    parser.add_argument("--target", help="target of a proxy, for its validation gradients (default: the one it names)")
    parser.add_argument(
        "--learning-rates",
        type=float,
        nargs="+",
        help="learning rate of each index (default: from the checkpoints.json beside its model)",
    )
    parser.add_argument("--validation", required=True, nargs="+", metavar="TASK=FILE")
    parser.add_argument("--output", required=True, help="folder for scores.parquet")
    query_option(parser)
    aggregation_options(parser)
    per_example_option(parser)
    reading_options(parser)


def add_audit(commands: Any) -> None:
    """`iprox audit`."""
    parser = command(
        commands,
        "audit",
        "Score a sample on the target itself and say how faithfully the proxy ranks it.",
        "iprox audit --model warm/checkpoint-44 --proxy aligned --pool pool/*.jsonl --validation gsm8k=val.jsonl "
        "--output audit\n  iprox audit ... --lds 50     # and do the scores predict what training does?\n"
        "  iprox audit ... --removal    # and what is the ranking worth?",
    )
    parser.add_argument("--model", required=True, help="the proxy's target")
    parser.add_argument("--proxy", required=True, help="proxy folder")
    parser.add_argument("--pool", required=True, nargs="+", metavar="FILE")
    parser.add_argument("--validation", required=True, nargs="+", metavar="TASK=FILE")
    parser.add_argument("--sample", type=positive, default=500, help="examples to compare (default 500)")
    parser.add_argument("--output", required=True, help="folder for audit.json")
    parser.add_argument(
        "--lds",
        type=positive,
        metavar="SUBSETS",
        help="retrain on so many random halves of the sample, and say how well the scores foretold what came of it",
    )
    parser.add_argument(
        "--removal",
        action="store_true",
        help="retrain without the top 5 %% of the sample and without random rows, and say how far the losses differ",
    )
    parser.add_argument(
        "--learning-rate",
        type=float,
        metavar="RATE",
        help="learning rate of each training of --lds and --removal (default 0.1 over the model's hidden size)",
    )
    influence_options(parser)
    reading_options(parser)


def add_refine(commands: Any) -> None:
    """`iprox refine`."""
    parser = command(
        commands,
        "refine",
        "Have the target score a proxy's best rows again, as the proxy was scored, and leave only these a score.",
        "iprox refine --scores scores --pool pool/*.jsonl --model warm/checkpoint-44 --validation gsm8k=val.jsonl "
        "--output refined",
    )
    parser.add_argument("--scores", required=True, help="scores.parquet of the proxy, or its folder")
    parser.add_argument("--pool", required=True, nargs="+", metavar="FILE", help="the pool that was scored")
    parser.add_argument("--model", required=True, help="the proxy's target")
    parser.add_argument("--validation", required=True, nargs="+", metavar="TASK=FILE", help="those of the scores")
    parser.add_argument("--output", required=True, help="folder for scores.parquet and refine.json")
    parser.add_argument("--candidates", type=float, default=0.2, help="share of the pool to score again (default 0.2)")
    ranked_by_options(parser)
    reading_options(parser)


def add_select(commands: Any) -> None:
    """`iprox select`."""
    parser = command(
        commands,
        "select",
        "Write the best rows of the pool, byte for byte, best first.",
        "iprox select --scores scores --pool pool/*.jsonl --output selected.jsonl --fraction 0.05\n  "
        "iprox select --scores scores --pool pool/*.jsonl --output for-gsm8k.jsonl --count 10000 --task gsm8k",
        computing=(),
    )
    parser.add_argument("--scores", required=True, help="scores.parquet or its folder")
    parser.add_argument("--pool", required=True, nargs="+", metavar="FILE", help="the pool that was scored")
    parser.add_argument("--output", required=True, help="file to write, *.jsonl")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--fraction", type=float, help="share of the pool (default 0.05, without --threshold)")
    size.add_argument("--count", type=int, help="number of rows")
    size.add_argument("--tokens", type=int, help="number of tokens of all rows")
    ranked_by_options(parser)
    parser.add_argument(
        "--threshold",
        type=float,
        help="lowest score to choose; alone it takes all rows above it, else it may leave fewer",
    )
    parser.add_argument(
        "--source-cap",
        nargs="+",
        default=[],
        metavar="SHARE",
        help="largest share of the selection: 0.3 of any source, or SOURCE=0.3 ...",
    )
    parser.add_argument("--source-floor", nargs="+", default=[], metavar="SOURCE=SHARE", help="least share, by source")
    parser.add_argument(
        "--deduplicate",
        type=float,
        metavar="SIMILARITY",
        help="keep the better of two rows whose words are this similar, 0 to 1, e.g. 0.8",
    )
    row_options(parser)


def add_finetune(commands: Any) -> None:
    """`iprox finetune`."""
    parser = command(
        commands,
        "finetune",
        "Fine-tune a model on a selection, with the loss on test sets before and after.",
        "iprox finetune --model Qwen/Qwen3-4B --data selected.jsonl --output tuned --validation gsm8k=gsm8k.test.jsonl",
    )
    parser.add_argument("--model", required=True, help="hub id or folder")
    parser.add_argument("--data", required=True, nargs="+", metavar="FILE", help="the selection")
    parser.add_argument("--output", required=True, help="folder; the model is in its sub-folder model")
    parser.add_argument("--validation", nargs="+", default=[], metavar="TASK=FILE", help="sets to measure the loss on")
    training_options(parser, FinetuneSection)
    reading_options(parser)
