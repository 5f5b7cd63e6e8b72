"""The command line: parse, call, print, exit codes."""

from __future__ import annotations

import json
import logging
import os
import re
import shlex
import sys
import traceback
import warnings
from collections.abc import Sequence
from importlib import import_module

from iprox.cli.parser import build_parser
from iprox.cli.recipes import check_recipe
from iprox.errors import InputError, one_line, system_refusal
from iprox.progress import printable

DONE, OUR_FAULT, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130

# Commands that go on where they stopped; the others start anew.
RESUMABLE = ("run", "quickstart", "align", "score", "index", "refine")


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
        check_recipe(arguments)
        _quieten_libraries(arguments.quiet)
        result = getattr(import_module(arguments.module), arguments.command)(arguments)
        if arguments.json:
            # JSON escapes the controls of ASCII, and U+0080 to U+009F are as good as some of them to a terminal.
            line = json.dumps(result, ensure_ascii=False)
            print(re.sub("[\x7f-\x9f]", lambda found: f"\\u{ord(found[0]):04x}", line), flush=True)
    except (InputError, FloatingPointError) as error:
        return _refuse(str(error))
    except KeyboardInterrupt:
        retrains = getattr(arguments, "lds", None) or getattr(arguments, "removal", None)
        resumable = arguments.command in RESUMABLE or retrains
        kept = "the same command (without --fresh) goes on from here" if resumable else "nothing is kept"
        print(f"iprox: interrupted; {kept}", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        from iprox.models.precision import out_of_memory  # imports torch

        refusal = system_refusal(error, getattr(arguments, "output", None))
        if refusal is None and out_of_memory(error):
            refusal = f"not enough memory ({one_line(error)}); close other programs, or give less at once"
        if refusal is not None:
            return _refuse(refusal)
        print(printable(traceback.format_exc()), end="", file=sys.stderr)
        fault = f"iprox: {type(error).__name__}: {error} (a fault of iprox, please report it)"
        print(printable(fault), file=sys.stderr)
        return OUR_FAULT
    return DONE


def _refuse(message: str) -> int:
    print(printable(f"iprox: {message}"), file=sys.stderr)
    return BAD_INPUT


def _quieten_libraries(quiet: bool) -> None:
    """Our own progress is enough; errors of the libraries still come through. Imports them, which takes seconds."""
    import datasets
    from huggingface_hub.utils import enable_progress_bars
    from transformers.utils import logging as transformers_logging

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    datasets.disable_progress_bars()
    transformers_logging.disable_progress_bar()
    if not quiet:
        enable_progress_bars()  # of the hub, which transformers switched off with its own: gigabytes are worth a bar
    transformers_logging.set_verbosity_error()
    for name in ("iprox", "trl"):  # what iprox logs for users of its API, the command line reports itself
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|trl|accelerate)\b")
    warnings.filterwarnings("ignore", category=UserWarning, module=r"(torch|transformers|trl|accelerate|peft)\b")
