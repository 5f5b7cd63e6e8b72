"""The parser of the command line."""

from __future__ import annotations

import argparse
from importlib.metadata import version
from typing import Any

import shtab

from iprox.cli.parser_options import WITHOUT_SEED, above_zero, command
from iprox.cli.stage_parsers import (
    add_align,
    add_audit,
    add_compress,
    add_finetune,
    add_index,
    add_query,
    add_refine,
    add_score,
    add_select,
    add_warmup,
)
from iprox.settings import NAMED_SHARE


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="iprox",
        description="Select the training data that helps your task, with influence scored on a low-rank proxy of your "
        "own model.",
        epilog="Start with:  iprox quickstart\nHelp of a command:  iprox COMMAND --help",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    shtab.add_argument_to(
        parser, "--print-completion", help="print a script of completions for this shell, to be sourced by it"
    )
    parser.add_argument("--version", action="version", version=f"iprox {version('iprox')}")
    # Without a command, the help says more than "COMMAND is required".
    parser.set_defaults(command=None)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    for add in (
        add_quickstart,
        add_run,
        add_plan,
        add_warmup,
        add_compress,
        add_align,
        add_score,
        add_index,
        add_query,
        add_audit,
        add_refine,
        add_select,
        add_finetune,
        add_compare,
        add_report,
        add_doctor,
        add_export,
        add_push,
    ):
        add(commands)
    return parser


def add_quickstart(commands: Any) -> None:
    """`iprox quickstart`."""
    parser = command(
        commands,
        "quickstart",
        "Run the whole pipeline on a bundled model and pool, in under two minutes on two cores.",
        "iprox quickstart --output runs/quickstart",
    )
    parser.add_argument("--output", default="runs/quickstart", help="run folder (default runs/quickstart)")
    parser.add_argument("--fresh", action="store_true", help="replace what an earlier run left there")


def add_run(commands: Any) -> None:
    """`iprox run`."""
    parser = command(
        commands,
        "run",
        "Run a recipe, or go on with it where it stopped.",
        "iprox run recipe.yaml --set proxy.sparsity=0.5 --stop-after score",
    )
    parser.add_argument("recipe", metavar="RECIPE.yaml")
    parser.add_argument(
        "--set",
        dest="overrides",
        action="extend",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="change a key of the recipe, e.g. proxy.sparsity=0.5",
    )
    parser.add_argument("--fresh", action="store_true", help="replace what an earlier run left in the output folder")
    parser.add_argument("--stop-after", metavar="STAGE", help="last stage to do (data, warmup, compress, align, ...)")


def add_plan(commands: Any) -> None:
    """`iprox plan`."""
    parser = command(
        commands,
        "plan",
        "Say what a recipe would cost, stage by stage: tokens, FLOPs, memory, time. Runs nothing.",
        "iprox plan recipe.yaml",
        WITHOUT_SEED,
    )
    parser.add_argument("recipe", metavar="RECIPE.yaml")
    parser.add_argument("--set", dest="overrides", action="extend", nargs="+", default=[], metavar="KEY=VALUE")
    parser.add_argument("--tflops", type=above_zero, help="GEMM rate to assume in TFLOP/s (default: measured here)")


def add_compare(commands: Any) -> None:
    """`iprox compare`."""
    parser = command(
        commands,
        "compare",
        "Say how alike several scores rank the same pool: of proxies, estimators, seeds or runs, beside the first.",
        "iprox compare runs/target runs/ipsvd runs/sibling\n  "
        "iprox compare target=a/scores.parquet proxy=b/scores.parquet --share 0.1",
        computing=(),
    )
    parser.add_argument(
        "scores",
        nargs="+",
        metavar="[NAME=]SCORES",
        help="scores.parquet, or a folder that holds it, such as a run's; the first is what the others are beside",
    )
    parser.add_argument(
        "--share", type=float, default=NAMED_SHARE, help=f"fraction of rows counted as the top ({NAMED_SHARE})"
    )


def add_report(commands: Any) -> None:
    """`iprox report`."""
    parser = command(
        commands, "report", "Write report.html of a run folder anew.", "iprox report runs/quickstart", computing=()
    )
    parser.add_argument("run_dir", metavar="RUN_DIR")


def add_doctor(commands: Any) -> None:
    """`iprox doctor`."""
    command(
        commands,
        "doctor",
        "Say what this machine can do: device, number format, speed, memory, optional packages.",
        "iprox doctor --device cuda:0",
        computing=("--device",),
    )


def add_export(commands: Any) -> None:
    """`iprox export`."""
    parser = command(
        commands,
        "export",
        "Multiply a proxy's factors out: a plain checkpoint that loads without iprox. Or make an index one of FAISS.",
        "iprox export runs/quickstart/aligned --output dense-proxy\n  iprox export index --output pool.faiss",
        computing=("--dtype", "--device"),
    )
    parser.add_argument("source", metavar="PROXY_DIR|INDEX_DIR")
    parser.add_argument("--output", required=True, help="folder for the dense checkpoint, or FAISS file")


def add_push(commands: Any) -> None:
    """`iprox push`."""
    parser = command(
        commands,
        "push",
        "Upload a proxy, with its model card, to the Hugging Face Hub.",
        "iprox push runs/quickstart/aligned me/qwen3-4b-proxy --private",
        computing=(),
    )
    parser.add_argument("proxy", metavar="PROXY_DIR")
    parser.add_argument("repo", metavar="OWNER/NAME", help="repository on the Hub; made if it is not there")
    parser.add_argument("--private", action="store_true", help="make the repository private")
    parser.add_argument("--revision", help="branch to push to; made if it is not there")
