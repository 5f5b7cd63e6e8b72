"""Options that several commands share."""

from __future__ import annotations

import argparse
from collections.abc import Collection
from typing import Any, get_args

from iprox.settings import ESTIMATORS, SelectSection, TrainingSection

# Where a command's function is; the others are in `stage_commands`. They import torch, so parsing does not import them.
MODULES = {
    **dict.fromkeys(("quickstart", "run", "plan", "report", "doctor"), "run_commands"),
    **dict.fromkeys(("index", "query"), "index_commands"),
    "compare": "compare_command",
}


def streaming_option(parser: argparse.ArgumentParser) -> None:
    """Of commands that read a pool as a stream."""
    parser.add_argument(
        "--num-proc",
        type=not_negative,
        default=None,
        metavar="N",
        help="processes that tokenize ahead (default: none on a CPU, up to 4 on an accelerator)",
    )


def reading_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of how examples and models are read."""
    row_options(parser)
    parser.add_argument("--chat-template", help="instead of the tokenizer's own: chatml, or a Jinja file")
    parser.add_argument("--trust-remote-code", action="store_true", help="let a model's own code run (off by default)")


def row_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of how rows are read."""
    parser.add_argument(
        "--on-bad-row", choices=("stop", "skip"), default="stop", help="bad rows: stop (default) or leave them out"
    )
    parser.add_argument(
        "--columns",
        nargs="+",
        default=[],
        metavar="NAME=YOURS",
        help="columns of your names and what they are read as: input=context output=response source=category; "
        "source= leaves one unread",
    )


def positive(text: str) -> int:
    """A whole number, 1 or more."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {value}")
    return value


def above_zero(text: str) -> float:
    """A number above 0."""
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be above 0, not {text}")
    return value


def not_negative(text: str) -> int:
    """A whole number, 0 or more."""
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"must be at least 0, not {value}")
    return value


def seed(text: str) -> int:
    """What every library's generator takes."""
    value = not_negative(text)
    if value >= 2**32:
        raise argparse.ArgumentTypeError(f"must be below 2**32, not {value}")
    return value


def number_or_auto(text: str) -> float | str:
    """A number, or the word."""
    return text if text == "auto" else float(text)


# How a command computes, option by option. A command has those that change its result.
COMPUTING: dict[str, dict[str, Any]] = {
    "--seed": {"type": seed, "help": "seed of every draw and order (default 0)"},
    "--dtype": {
        "choices": ("auto", "float32", "bfloat16"),
        "help": "of the products; auto is bfloat16 where the device has it natively (default auto)",
    },
    "--device": {"help": "cpu, cuda, cuda:1 or auto (default auto)"},
    "--batch-tokens": {"type": positive, "help": "largest rows × longest row (default 4096)"},
    "--max-length": {"type": positive, "help": "longest example in tokens (default 2048)"},
}

WITHOUT_SEED = COMPUTING.keys() - {"--seed"}


def command(
    commands: Any, name: str, summary: str, example: str, computing: Collection[str] = COMPUTING.keys()
) -> argparse.ArgumentParser:
    """Add one command, with the options that every command has and those of `COMPUTING` that it names."""
    parser = commands.add_parser(
        name,
        help=summary,
        description=summary,
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(command=name, module=f"iprox.cli.{MODULES.get(name, 'stage_commands')}")
    common = parser.add_argument_group("common options")
    for option, how in COMPUTING.items():
        if option in computing:
            common.add_argument(option, default=None, **how)
    common.add_argument("--quiet", action="store_true", help="no progress; warnings and errors only")
    common.add_argument("--json", action="store_true", help="one machine-readable line on standard output at the end")
    return parser


def training_options(parser: argparse.ArgumentParser, section: type[TrainingSection]) -> None:
    """Add the options of a fine-tuning, with the defaults of its section."""
    epochs = section.model_fields["epochs"].default
    parser.add_argument("--epochs", type=positive, default=epochs, help=f"default {epochs}")
    parser.add_argument(
        "--learning-rate",
        type=float,
        help="peak (default 0.1 over the model's hidden size, 2.4e-5 at 4,096; with --lora ten times that)",
    )
    parser.add_argument("--batch-size", type=positive, default=16, help="examples a batch (default 16)")
    parser.add_argument("--accumulate", type=positive, default=1, help="batches an optimizer step (default 1)")
    parser.add_argument(
        "--lora",
        type=positive,
        nargs="?",
        const=16,
        default=None,
        metavar="RANK",
        help="train LoRA adapters of this rank (16 if none is given) with dropout 0.05, instead of all weights; "
        "needs PEFT",
    )
    parser.add_argument("--lora-alpha", type=above_zero, default=None, help="of --lora: scale (default twice the rank)")


def held_out_options(parser: argparse.ArgumentParser, what: str) -> None:
    """Rows that fidelity is measured on while a proxy is made."""
    parser.add_argument("--held-out", nargs="+", default=[], metavar="FILE", help=what)
    parser.add_argument(
        "--validation", nargs="+", default=[], metavar="TASK=FILE", help="with --held-out: what fidelity is for"
    )


def influence_options(parser: argparse.ArgumentParser) -> None:
    """What is scored, and how."""
    parser.add_argument(
        "--estimator",
        choices=tuple(ESTIMATORS),
        help="ekfac (default), kfac and datainf divide by the curvature of the loss; tracin does not; less scores the "
        "steps that the warm-up's optimizer would take; random, length, perplexity, rds (hidden states) and bm25 "
        "(words) are baselines without gradients",
    )
    parser.add_argument(
        "--curvature-examples", type=int, default=None, help="of the pool, to measure curvature on (default 256)"
    )
    parser.add_argument(
        "--damping", type=float, default=None, help="as a share of the curvature's mean eigenvalue (default 0.1)"
    )
    query_option(parser)
    parser.add_argument(
        "--query-norm",
        type=float,
        default=None,
        help="share of the validation gradients' norm kept when they are made low-rank; 1 is exact (default 0.9; "
        "without scores by validation example 0.98 on a proxy with influence functions, and 1 on a model itself)",
    )
    aggregation_options(parser)


def ranked_by_options(parser: argparse.ArgumentParser) -> None:
    """Add how rows are ranked, and by the scores of which tasks."""
    strategy = SelectSection.model_fields["strategy"]
    parser.add_argument(
        "--strategy",
        choices=get_args(strategy.annotation),
        default=strategy.default,
        help="round-robin (default): validation examples take turns, each chooses the row that is best for it; top: "
        "the highest influence on all together",
    )
    tasks = parser.add_mutually_exclusive_group()
    tasks.add_argument("--task", help="choose by the scores of this task alone (default: all tasks together)")
    tasks.add_argument(
        "--weights",
        nargs="+",
        default=[],
        metavar="TASK=WEIGHT",
        help="how much each task counts, 1 where it is not named: gsm8k=2 code=0.5",
    )


def query_option(parser: argparse.ArgumentParser) -> None:
    """Of validation gradients."""
    parser.add_argument(
        "--query",
        choices=("target", "proxy"),
        default="target",
        help="where a proxy's validation gradients are taken: on its target (default; a few examples, more faithful) "
        "or on the proxy itself",
    )


def aggregation_options(parser: argparse.ArgumentParser) -> None:
    """How many scores become one."""
    parser.add_argument(
        "--normalize", choices=("none", "cosine"), help="cosine (default), or none: gradients as they are"
    )


def per_example_option(parser: argparse.ArgumentParser) -> None:
    """Add the option of commands that write scores."""
    parser.add_argument(
        "--per-example",
        action=argparse.BooleanOptionalAction,
        help="keep the scores by validation example, by which examples take turns to choose (default: where there are "
        "any)",
    )


def compile_option(parser: argparse.ArgumentParser) -> None:
    """Whether the model runs compiled."""
    parser.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="run the model compiled (default: where the pool is large enough to repay it)",
    )
