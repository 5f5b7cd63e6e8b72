"""The entry point: parse the command line, act, print, and return the exit code."""

from __future__ import annotations

import io
import json
import logging
import os
import shlex
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

from cyclopts import CycloptsError, MissingArgumentError
from rich.console import Console

from iprox.cli.parser import Request, build_app
from iprox.distributed import TRAINING, dismiss, follow, processes, rank
from iprox.errors import InputError, one_line, system_refusal
from iprox.models.cpu.threads import spin_briefly
from iprox.progress import printable
from iprox.quickstart import quickstart_recipe
from iprox.recipe import load_recipe

DONE, OUR_FAULT, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130
# Fewest columns that text is laid out in.
NARROWEST = 20


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line.

    Returns:
        The exit code: 0 done, 2 bad input or usage, 1 a fault of iprox, 130 interrupted.
    """
    given = list(sys.argv[1:] if argv is None else argv)
    _print_anywhere()
    app = build_app()
    if not given:
        app.help_print(console=Console(stderr=True))
        return BAD_INPUT
    request: Request | None = None
    before = _end_like_interrupt()
    spin_briefly()
    try:
        request = app(given, exit_on_error=False, print_error=False, result_action="return_value")
        if isinstance(request, Request):
            action = _action_of(request, shlex.join(["iprox", *given]))
            if rank() > 0:
                follow()
                return DONE
            try:
                result = action(request)
            finally:
                dismiss()
            if request.json:
                _print_json(result)
    except MissingArgumentError as error:
        missing = error.argument.name if error.argument else "an argument"
        return _refuse(f"{missing} is missing; iprox {' '.join(error.command_chain or ())} --help shows what is needed")
    except CycloptsError as error:
        return _refuse(one_line(error))
    except (InputError, FloatingPointError) as error:
        return _refuse(str(error))
    except KeyboardInterrupt:
        resumes = isinstance(request, Request) and request.command.resumes
        again = "the same command (without --fresh)" if request and "fresh" in request.inputs else "the same command"
        kept = f"{again} resumes from here" if resumes else "nothing is kept"
        print(f"iprox: interrupted; {kept}", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        return _failed(error, request)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return DONE


def _print_anywhere() -> None:
    """Let text be printed where characters are missing, and at a width of 0, at which rich never ends."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    width = os.environ.get("COLUMNS", "")
    if width.isdecimal() and int(width) < NARROWEST:
        os.environ["COLUMNS"] = str(NARROWEST)


def _end_like_interrupt() -> dict[int, Any]:
    """Make SIGTERM and SIGHUP end a command as Ctrl-C does, and return the handlers they had.

    A signal that is ignored, as SIGHUP is under nohup, stays ignored. Only the main thread can handle signals.
    """
    if threading.current_thread() is not threading.main_thread():
        return {}
    signals = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    return {
        number: signal.signal(number, signal.default_int_handler)
        for number in signals
        if signal.getsignal(number) is signal.SIG_DFL
    }


def _action_of(request: Request, line: str) -> Callable[[Request], Any]:
    """Return the function that does a command. Its recipe is checked before anything heavy is imported."""
    request.line = line
    if processes() > 1 and request.command.name not in TRAINING:
        raise InputError(
            f"iprox {request.command.name} runs as one process, but torchrun or accelerate has started several; start "
            "it without them, and set `ray_workers: N` to score on N GPUs"
        )
    if request.command.name == "quickstart":
        request.recipe = quickstart_recipe(request.inputs["output"], request.overrides)
    elif "*" in request.command.reads:
        request.recipe = load_recipe(request.inputs["recipe"], request.overrides)
    _quieten_libraries(request.quiet)
    module, _, function = request.command.action.partition(":")
    return getattr(import_module(module), function)


def _print_json(result: Any) -> None:
    # In ASCII, as U+0080 to U+009F control terminals, and not every terminal has other characters.
    try:
        print(json.dumps(result).replace("\x7f", "\\u007f"), flush=True)
    except OSError as error:  # closed, or a pipe that nobody reads
        sys.stdout = None  # or Python complains again at its end
        why = error.strerror or one_line(error)
        raise InputError(f"standard output: {why.lower()}; the results are in the output folder") from error


def _failed(error: Exception, request: Request | None) -> int:
    """Report an exception: one line if the machine or the input caused it, a traceback if it is a fault of iprox."""
    from iprox.models.precision import out_of_memory  # imports torch

    output = request.output if isinstance(request, Request) else None
    refusal = system_refusal(error, output)
    if refusal is None and out_of_memory(error):
        refusal = f"not enough memory ({one_line(error)}); close other programs, or use smaller batches"
    if refusal is not None:
        return _refuse(refusal)
    print(printable(traceback.format_exc()), end="", file=sys.stderr)
    fault = f"iprox: {type(error).__name__}: {error} (a fault of iprox, please report it)"
    print(printable(fault), file=sys.stderr)
    return OUR_FAULT


def _refuse(message: str) -> int:
    print(printable(f"iprox: {message}"), file=sys.stderr)
    return BAD_INPUT


def _quieten_libraries(quiet: bool) -> None:
    """Silence progress bars and warnings of libraries, but not their errors. Importing them takes seconds."""
    from huggingface_hub.utils import enable_progress_bars
    from transformers.utils import logging as transformers_logging

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")  # datasets is imported only where it is needed
    transformers_logging.disable_progress_bar()
    if not quiet:
        enable_progress_bars()  # of the hub, which transformers disabled too: downloads are long
    transformers_logging.set_verbosity_error()
    for name in ("iprox", "trl", "bitsandbytes"):  # iprox logs for users of its API; the command line reports itself
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|trl|accelerate)\b")
    warnings.filterwarnings("ignore", category=UserWarning, module=r"(torch|transformers|trl|accelerate|peft)\b")
