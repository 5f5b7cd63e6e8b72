"""The command line: parse, call, print, exit codes (design 4)."""

from __future__ import annotations

import argparse
import errno
import json
import logging
import os
import shlex
import sys
import traceback
import warnings
from collections.abc import Sequence
from typing import Any

import datasets
import shtab
from huggingface_hub.utils import enable_progress_bars
from transformers.utils import logging as transformers_logging

from iprox import commands as run_commands
from iprox import index_commands, stage_commands
from iprox.errors import InputError
from iprox.influence.index import DIMENSION
from iprox.recipe import GRADIENT_FREE

DONE, OUR_FAULT, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130

# Commands that go on where they stopped; the others start anew.
RESUMABLE = ("run", "quickstart", "align", "score", "index", "refine")

# Where a command's function is; the others are in `stage_commands`.
MODULES = {
    **dict.fromkeys(("quickstart", "run", "plan", "report", "doctor"), run_commands),
    **dict.fromkeys(("index", "query"), index_commands),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command. Returns the exit code: 0 done, 2 bad input or usage, 1 a fault of ours, 130 interrupted.

    Raises:
        SystemExit: what argparse raises, for `--help` (0) and usage errors (2).
    """
    given = list(sys.argv[1:] if argv is None else argv)
    parser = build_parser()
    arguments = parser.parse_args(given)
    if arguments.command is None:
        parser.print_help(sys.stderr)
        return BAD_INPUT
    arguments.started_as = shlex.join(["iprox", *given])
    try:
        _quieten_libraries(arguments.quiet)
        result = arguments.run(arguments)
    except (InputError, FloatingPointError) as error:
        return _refuse(str(error))
    except KeyboardInterrupt:
        resumes = "the same command (without --fresh) goes on from here"
        print(
            f"iprox: interrupted; {resumes if arguments.command in RESUMABLE else 'nothing is kept'}", file=sys.stderr
        )
        return INTERRUPTED
    except PermissionError as error:
        return _refuse(f"{error.filename or 'output'}: permission denied; choose another place or change its rights")
    except Exception as error:
        if _disk_is_full(error):
            place = getattr(error, "filename", None) or getattr(arguments, "output", None) or "the output folder"
            return _refuse(f"{place}: no space left on the disk; free some and run the same command")
        traceback.print_exc()
        print(f"iprox: {type(error).__name__}: {error} (a fault of iprox, please report it)", file=sys.stderr)
        return OUR_FAULT
    if arguments.json:
        print(json.dumps(result, ensure_ascii=False))
    return DONE


def _refuse(message: str) -> int:
    print(f"iprox: {message}", file=sys.stderr)
    return BAD_INPUT


def _disk_is_full(error: Exception) -> bool:
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    # safetensors and Arrow raise errors of their own that only quote the system's.
    return os.strerror(errno.ENOSPC) in str(error)


def _quieten_libraries(quiet: bool) -> None:
    """Our own progress is enough; errors of the libraries still come through."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    datasets.disable_progress_bars()
    transformers_logging.disable_progress_bar()
    if not quiet:
        enable_progress_bars()  # of the hub, which transformers switched off with its own: gigabytes are worth a bar
    transformers_logging.set_verbosity_error()
    for name in ("iprox", "trl"):  # what iprox logs for users of its API, the command line reports itself
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|trl|accelerate)\b")
    warnings.filterwarnings("ignore", category=UserWarning, module=r"(torch|transformers|trl|accelerate)\b")


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    from iprox import __version__

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
    parser.add_argument("--version", action="version", version=f"iprox {__version__}")
    # Without a command, the help says more than "COMMAND is required".
    parser.set_defaults(command=None)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    for add in (
        _add_quickstart,
        _add_run,
        _add_plan,
        _add_warmup,
        _add_compress,
        _add_align,
        _add_score,
        _add_index,
        _add_query,
        _add_audit,
        _add_refine,
        _add_select,
        _add_finetune,
        _add_report,
        _add_doctor,
        _add_export,
        _add_push,
    ):
        add(commands)
    return parser


def _command(commands: Any, name: str, summary: str, example: str) -> argparse.ArgumentParser:
    """One command, with the options that every command has."""
    parser = commands.add_parser(
        name,
        help=summary,
        description=summary,
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    module = MODULES.get(name, stage_commands)
    parser.set_defaults(command=name, run=getattr(module, name))
    common = parser.add_argument_group("options of every command")
    common.add_argument("--seed", type=int, default=None, help="seed of every draw and order (default 0)")
    common.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16"),
        default=None,
        help="of the products; auto is bfloat16 where the device has it natively (default auto)",
    )
    common.add_argument("--device", default=None, help="cpu, cuda, cuda:1, mps or auto (default auto)")
    common.add_argument(
        "--batch-tokens", type=_positive, default=None, help="largest rows × longest row (default 4096)"
    )
    common.add_argument("--max-length", type=_positive, default=None, help="longest example in tokens (default 2048)")
    common.add_argument("--quiet", action="store_true", help="no progress; warnings and errors only")
    common.add_argument("--json", action="store_true", help="one machine-readable line on standard output at the end")
    return parser


def _streaming_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--num-proc",
        type=int,
        default=None,
        metavar="N",
        help="processes that tokenise ahead (default: none on a CPU, up to 4 on an accelerator)",
    )


def _reading_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--chat-template", help="instead of the tokenizer's own: chatml, or a Jinja file")
    parser.add_argument(
        "--on-bad-row", choices=("stop", "skip"), default="stop", help="bad rows: stop (default) or leave them out"
    )
    parser.add_argument("--trust-remote-code", action="store_true", help="let a model's own code run (off by default)")


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {value}")
    return value


def _number_or_auto(text: str) -> float | str:
    return text if text == "auto" else float(text)


def _add_quickstart(commands: Any) -> None:
    parser = _command(
        commands,
        "quickstart",
        "Run the whole pipeline on a bundled model and pool, in under two minutes on two cores.",
        "iprox quickstart --output runs/quickstart",
    )
    parser.add_argument("--output", default="runs/quickstart", help="run folder (default runs/quickstart)")
    parser.add_argument("--fresh", action="store_true", help="replace what an earlier run left there")


def _add_run(commands: Any) -> None:
    parser = _command(
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


def _add_plan(commands: Any) -> None:
    parser = _command(
        commands,
        "plan",
        "Say what a recipe would cost, stage by stage: tokens, FLOPs, memory, time. Runs nothing.",
        "iprox plan recipe.yaml",
    )
    parser.add_argument("recipe", metavar="RECIPE.yaml")
    parser.add_argument("--set", dest="overrides", action="extend", nargs="+", default=[], metavar="KEY=VALUE")
    parser.add_argument("--tflops", type=float, help="GEMM rate to assume in TFLOP/s (default: measured here)")


def _add_warmup(commands: Any) -> None:
    parser = _command(
        commands,
        "warmup",
        "Fine-tune a model briefly on a random share of the pool, keeping each epoch's checkpoint and learning rate.",
        "iprox warmup --model Qwen/Qwen3-4B --pool pool/*.jsonl --output warm --fraction 0.05",
    )
    parser.add_argument("--model", required=True, help="hub id or folder")
    parser.add_argument("--pool", required=True, nargs="+", metavar="FILE", help="files, globs or hf://datasets/...")
    parser.add_argument("--output", required=True, help="folder for the checkpoints")
    parser.add_argument("--fraction", type=float, default=0.05, help="share of the pool (default 0.05)")
    parser.add_argument(
        "--optimizer-state", action="store_true", help="keep Adam's moments with each checkpoint, for --estimator adam"
    )
    _training_options(parser)
    _reading_options(parser)


def _training_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--epochs", type=_positive, default=4, help="default 4")
    parser.add_argument("--learning-rate", type=float, default=2e-5, help="peak (default 2e-5)")
    parser.add_argument("--batch-size", type=_positive, default=16, help="examples an optimiser step (default 16)")


def _add_compress(commands: Any) -> None:
    parser = _command(
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
    size.add_argument("--parameters", type=_positive, help="parameters of the whole proxy, embeddings included")
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
        "--ridge", type=_number_or_auto, default="auto", help="share of the mean eigenvalue (default auto: Ledoit-Wolf)"
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
    parser.add_argument("--probe-size", type=_positive, help="random sample of this many examples (default 512)")
    _held_out_options(parser, "with --fidelity: examples that it is measured on")
    _reading_options(parser)


def _held_out_options(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument("--held-out", nargs="+", default=[], metavar="FILE", help=what)
    parser.add_argument(
        "--validation", nargs="+", default=[], metavar="TASK=FILE", help="with --held-out: what fidelity is for"
    )


def _add_align(commands: Any) -> None:
    parser = _command(
        commands,
        "align",
        "Tune a proxy's factors until its gradients match the target's.",
        "iprox align --model warm/checkpoint-44 --proxy proxy --data align.jsonl --output aligned",
    )
    parser.add_argument("--model", required=True, help="the proxy's target")
    parser.add_argument("--proxy", required=True, help="proxy folder")
    parser.add_argument("--data", required=True, nargs="+", metavar="FILE", help="examples to align on")
    parser.add_argument("--output", required=True, help="folder for the aligned proxy")
    parser.add_argument("--steps", type=_positive, help="optimiser steps (default: 5 epochs)")
    parser.add_argument("--learning-rate", type=float, default=1e-4, help="default 1e-4")
    parser.add_argument(
        "--gradient-weight",
        type=float,
        default=1.0,
        help="of the gradient part (default 1); 0 matches the logits only, at a third of the cost",
    )
    parser.add_argument("--kl-weight", type=float, default=0.1, help="weight of the KL anchor (default 0.1)")
    parser.add_argument("--hidden-weight", type=float, default=0.0, help="weight of the hidden states (default 0)")
    parser.add_argument("--temperature", type=float, default=2.0, help="of the KL anchor (default 2)")
    parser.add_argument(
        "--distance", choices=("cosine", "frobenius"), default="cosine", help="of gradients (default cosine)"
    )
    parser.add_argument("--batch-size", type=_positive, default=8, help="examples a batch (default 8)")
    parser.add_argument(
        "--accumulate",
        type=_positive,
        default=1,
        help="batches an optimiser step (default 1); with --batch-size 1 every example's own gradient is matched",
    )
    _held_out_options(parser, "keep the factors most faithful on these examples")
    _reading_options(parser)


def _add_score(commands: Any) -> None:
    parser = _command(
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
    _influence_options(parser)
    _streaming_option(parser)
    _reading_options(parser)


def _add_index(commands: Any) -> None:
    parser = _command(
        commands,
        "index",
        "Keep a pool's gradients, randomly projected, to score it against later tasks without reading it again.",
        "iprox index --model aligned --pool pool/*.jsonl --output index",
    )
    parser.add_argument("--model", required=True, help="model or proxy folder")
    parser.add_argument("--pool", required=True, nargs="+", metavar="FILE")
    parser.add_argument("--output", required=True, help="folder for the index")
    parser.add_argument(
        "--dimension", type=_positive, default=DIMENSION, help=f"numbers an example, 2 bytes each (default {DIMENSION})"
    )
    parser.add_argument(
        "--estimator",
        choices=("tracin", "adam"),
        default="tracin",
        help="what is projected: gradients (tracin, default), or the steps of the warm-up's optimizer (adam, LESS)",
    )
    parser.add_argument("--target", help="with adam, the target of a proxy (default: the one it names)")
    _gradient_option(parser)
    _compile_option(parser)
    _streaming_option(parser)
    _reading_options(parser)


def _add_query(commands: Any) -> None:
    parser = _command(
        commands,
        "query",
        "Score a pool against validation tasks by its index, at the speed of the disk.",
        "iprox query --index index --validation code=code.val.jsonl --output scores",
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
    _query_option(parser)
    _aggregation_options(parser)
    _reading_options(parser)


def _influence_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--estimator",
        choices=("tracin", "adam", "influence-function", "datainf", *GRADIENT_FREE),
        default="tracin",
        help="tracin (default); adam, of the steps that the warm-up's optimizer would take (LESS); influence-function "
        "and datainf divide by the curvature of the loss; random, length, perplexity, rds (hidden states) and bm25 "
        "(words) take no gradients, to compare with",
    )
    parser.add_argument(
        "--curvature", choices=("ek-fac", "k-fac"), default=None, help="of influence-function; default ek-fac"
    )
    parser.add_argument(
        "--curvature-examples", type=int, default=None, help="of the pool, to measure curvature on (default 512)"
    )
    parser.add_argument(
        "--damping", type=float, default=None, help="as a share of the curvature's mean eigenvalue (default 0.1)"
    )
    _gradient_option(parser)
    _query_option(parser)
    parser.add_argument(
        "--query-norm",
        type=float,
        default=None,
        help="share of the validation gradients' norm kept when they are made low-rank; 1 is exact (default 0.95 on a "
        "proxy, 1 on a model itself)",
    )
    _aggregation_options(parser)
    _compile_option(parser)


def _gradient_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--gradient",
        choices=("factors", "weight"),
        default=None,
        help="of a proxy: those of its layers as if dense (weight, default), or of its factors",
    )


def _query_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--query",
        choices=("target", "proxy"),
        default="target",
        help="where a proxy's validation gradients are taken: on its target (default; a few examples, more faithful) "
        "or on the proxy itself",
    )


def _aggregation_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--normalise", choices=("none", "cosine"), default="none", help="default none")
    parser.add_argument(
        "--aggregate",
        choices=("standardised", "mean", "max"),
        default="standardised",
        help="how several tasks make one score: the mean of scores divided by their standard deviations (default), or "
        "mean or max of the scores as they are",
    )
    parser.add_argument(
        "--over-examples",
        choices=("mean", "max"),
        default="mean",
        help="how a task's validation examples make one score (default mean); max costs a column an example",
    )
    parser.add_argument(
        "--per-example", action="store_true", help="keep the scores by validation example, as examples/TASK"
    )


def _compile_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="run the model compiled (default: where the pool is large enough to repay it)",
    )


def _add_select(commands: Any) -> None:
    parser = _command(
        commands,
        "select",
        "Write the best rows of the pool, byte for byte, best first.",
        "iprox select --scores scores --pool pool/*.jsonl --output selected.jsonl --fraction 0.05",
    )
    parser.add_argument("--scores", required=True, help="scores.parquet or its folder")
    parser.add_argument("--pool", required=True, nargs="+", metavar="FILE", help="the pool that was scored")
    parser.add_argument("--output", required=True, help="file to write")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--fraction", type=float, help="share of the pool (default 0.05)")
    size.add_argument("--count", type=int, help="number of rows")
    size.add_argument("--tokens", type=int, help="number of tokens of all rows")
    parser.add_argument(
        "--strategy",
        choices=("top", "round-robin", "balanced", "diverse", "sample"),
        default="top",
        help="top: the highest influence; round-robin: the tasks take turns; balanced: the task served least takes "
        "next; diverse: good rows with unlike gradients; sample: drawn, good rows more often (default top)",
    )
    parser.add_argument("--threshold", type=float, help="lowest influence to choose; may leave fewer rows")
    parser.add_argument(
        "--temperature", type=float, default=1.0, help="of sample, in standard deviations of the score (default 1)"
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
    parser.add_argument("--control-length", action="store_true", help="compare rows with those of their length only")
    parser.add_argument("--features", metavar="INDEX", help="index of the pool's gradients, for --strategy diverse")
    _reading_options(parser)


def _add_audit(commands: Any) -> None:
    parser = _command(
        commands,
        "audit",
        "Score a sample on the target itself and say how faithfully the proxy ranks it.",
        "iprox audit --model warm/checkpoint-44 --proxy aligned --pool pool/*.jsonl --validation gsm8k=val.jsonl "
        "--output audit",
    )
    parser.add_argument("--model", required=True, help="the proxy's target")
    parser.add_argument("--proxy", required=True, help="proxy folder")
    parser.add_argument("--pool", required=True, nargs="+", metavar="FILE")
    parser.add_argument("--validation", required=True, nargs="+", metavar="TASK=FILE")
    parser.add_argument("--sample", type=_positive, default=500, help="examples to compare (default 500)")
    parser.add_argument("--output", required=True, help="folder for audit.json")
    parser.add_argument(
        "--lds",
        type=_positive,
        metavar="SUBSETS",
        help="retrain on so many random halves of the sample, and say how well the scores foretold what came of it",
    )
    parser.add_argument(
        "--lds-learning-rate", type=float, default=2e-5, metavar="RATE", help="of each training (default 2e-5)"
    )
    _influence_options(parser)
    _reading_options(parser)


def _add_refine(commands: Any) -> None:
    parser = _command(
        commands,
        "refine",
        "Correct a proxy's scores by an audit, and have the target score the best ones again.",
        "iprox refine --scores scores --audit audit --pool pool/*.jsonl --output refined\n  iprox refine --scores "
        "scores --audit audit --pool pool/*.jsonl --output refined --recall 0.9 \\\n    --fraction 0.05 --model "
        "warm/checkpoint-44 --validation gsm8k=val.jsonl",
    )
    parser.add_argument("--scores", required=True, help="scores.parquet of the proxy, or its folder")
    parser.add_argument("--audit", required=True, help="folder of the proxy's audit")
    parser.add_argument("--pool", required=True, nargs="+", metavar="FILE", help="the pool that was scored")
    parser.add_argument("--output", required=True, help="folder for scores.parquet and refine.json")
    parser.add_argument(
        "--correct",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="take out what the proxy gets wrong by source and length, where that helps (default)",
    )
    parser.add_argument(
        "--recall",
        type=float,
        metavar="SHARE",
        help="have the target score as many of the best rows again as it takes to find this part of its own best",
    )
    parser.add_argument("--model", help="with --recall: the target")
    parser.add_argument("--validation", nargs="+", default=[], metavar="TASK=FILE", help="with --recall")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--fraction", type=float, help="with --recall: share of the pool to be selected (default 0.05)")
    size.add_argument("--count", type=int, help="with --recall: number of rows to be selected")
    parser.add_argument(
        "--strategy",
        choices=("top", "round-robin", "balanced"),
        default="top",
        help="with --recall: how rows will be selected: by all tasks together (top, default) or by each",
    )
    _influence_options(parser)
    _reading_options(parser)


def _add_finetune(commands: Any) -> None:
    parser = _command(
        commands,
        "finetune",
        "Fine-tune a model on a selection, with the loss on test sets before and after.",
        "iprox finetune --model Qwen/Qwen3-4B --data selected.jsonl --output tuned --validation gsm8k=gsm8k.test.jsonl",
    )
    parser.add_argument("--model", required=True, help="hub id or folder")
    parser.add_argument("--data", required=True, nargs="+", metavar="FILE", help="the selection")
    parser.add_argument("--output", required=True, help="folder; the model is in its sub-folder model")
    parser.add_argument("--validation", nargs="+", default=[], metavar="TASK=FILE", help="sets to measure the loss on")
    _training_options(parser)
    _reading_options(parser)


def _add_report(commands: Any) -> None:
    parser = _command(commands, "report", "Write report.html of a run folder anew.", "iprox report runs/quickstart")
    parser.add_argument("run_dir", metavar="RUN_DIR")


def _add_doctor(commands: Any) -> None:
    _command(
        commands,
        "doctor",
        "Say what this machine can do: device, number format, speed, memory, optional packages.",
        "iprox doctor --device cuda:0",
    )


def _add_export(commands: Any) -> None:
    parser = _command(
        commands,
        "export",
        "Multiply a proxy's factors out: a plain checkpoint that loads without iprox. Or make an index one of FAISS.",
        "iprox export runs/quickstart/aligned --output dense-proxy\n  iprox export index --output pool.faiss",
    )
    parser.add_argument("source", metavar="PROXY_DIR|INDEX_DIR")
    parser.add_argument("--output", required=True, help="folder for the dense checkpoint, or FAISS file")


def _add_push(commands: Any) -> None:
    parser = _command(
        commands,
        "push",
        "Upload a proxy, with its model card, to the Hugging Face Hub.",
        "iprox push runs/quickstart/aligned me/qwen3-4b-proxy --private",
    )
    parser.add_argument("proxy", metavar="PROXY_DIR")
    parser.add_argument("repo", metavar="OWNER/NAME", help="repository on the Hub; made if it is not there")
    parser.add_argument("--private", action="store_true", help="make the repository private")
    parser.add_argument("--revision", help="branch to push to; made if it is not there")


if __name__ == "__main__":
    sys.exit(main())
