"""What a person sees while a command works: stage headings, progress with rate and ETA, warnings."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Protocol

from rich.console import Console, ConsoleOptions, ConsoleRenderable, RenderHook, RenderResult
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.segment import Segment
from rich.text import Text

# Seconds between the lines of a stage in a log file.
LOG_INTERVAL = 60.0


# What a terminal obeys, or that turns the order of what it shows: all controls but tabs and line ends, in ASCII and
# beyond, and Unicode's marks of direction.
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def printable(text: str) -> str:
    """Return a text that a terminal shows and does not obey: names, sources and templates come from others' files.

    Control characters become escapes as Python writes them (`\\x1b`).
    """
    return _CONTROLS.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


class _Printable(RenderHook):
    """Makes all that a console prints `printable`; its own colors stay, which it adds afterwards."""

    def process_renderables(self, renderables: list[ConsoleRenderable]) -> list[ConsoleRenderable]:
        return [_Escaped(renderable) for renderable in renderables]


class _Escaped:
    def __init__(self, renderable: ConsoleRenderable) -> None:
        self.renderable = renderable

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for segment in console.render(self.renderable, options):
            yield segment if segment.control else Segment(printable(segment.text), segment.style)


def make_console(*, stderr: bool = False) -> Console:
    """Return a console, on standard output or standard error, that prints what others wrote as `printable`."""
    console = Console(file=sys.stderr if stderr else None, highlight=False)
    console.push_render_hook(_Printable())
    return console


def say_plainly(*lines: str) -> None:
    """Print lines as they are, for people and scripts, on standard output."""
    print(*map(printable, lines), sep="\n")


class Advance(Protocol):
    """Moves a progress bar on."""

    def __call__(self, count: int, /, *, earlier: bool = False) -> None:
        """By so many more; `earlier` ones an earlier start has done, which count for no rate and no time left."""


class _RateColumn(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:,.1f} {task.fields['unit']}/s", style="progress.data.speed")


class Reporter:
    """Tells a person what happens, on standard error, so that standard output stays for results.

    Args:
        quiet: say nothing but warnings and errors.
    """

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet
        self.console = make_console(stderr=True)
        self.warnings: list[str] = []
        self._shown: set[str] = set()

    def say(self, message: str) -> None:
        """One line of news."""
        if not self.quiet:
            self.console.print(message, markup=False, soft_wrap=True)

    def warn(self, message: str) -> None:
        """A warning: shown once, even when quiet, and kept for `run.json` with every stage it concerns."""
        if message not in self.warnings:
            self.warnings.append(message)
        if message in self._shown:
            return
        self._shown.add(message)
        self.console.print(f"warning: {message}", style="yellow", markup=False, soft_wrap=True)

    def take_warnings(self) -> list[str]:
        """The warnings since the last call."""
        taken, self.warnings = self.warnings, []
        return taken

    @contextmanager
    def bar(self, description: str, total: int | None, unit: str) -> Iterator[Advance]:
        """A progress bar with count, rate, elapsed time and ETA; yields a function to advance it by n.

        A total of None is not known yet: count and rate only.
        """
        if self.quiet:
            yield _nowhere
            return
        description = printable(description)  # a bar that moves goes past the console's hook
        if not self.console.is_terminal:
            with self._lines(description, total, unit) as advance:
                yield advance
            return
        columns = (
            SpinnerColumn(finished_text="[green]✓"),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            _RateColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self.console) as progress:
            task = progress.add_task(f"{description:<9}", total=total, unit=unit)

            def advance(count: int, /, *, earlier: bool = False) -> None:
                if earlier:  # forgets what the rate is measured on
                    progress.reset(task, completed=int(progress.tasks[task].completed) + count)
                else:
                    progress.update(task, advance=count)

            yield advance

    @contextmanager
    def _lines(self, description: str, total: int | None, unit: str) -> Iterator[Advance]:
        """Progress for a log file: a line at the start, one a minute, one at the end."""
        started = last = time.monotonic()
        done = before = 0

        def state() -> str:
            seconds = time.monotonic() - started
            rate = (done - before) / seconds if seconds > 0 else 0.0
            count = f"{done:,}" if total is None else f"{done:,}/{total:,}"
            return f"{description}: {count} {unit}, {rate:,.1f} {unit}/s, {timedelta(seconds=round(seconds))}"

        def advance(count: int, /, *, earlier: bool = False) -> None:
            nonlocal done, before, last
            done += count
            before += count * earlier
            now = time.monotonic()
            if now - last < LOG_INTERVAL or done == before or (total is not None and done >= total):
                return
            last = now
            if total is None:
                self.say(state())
            else:
                left = timedelta(seconds=round((now - started) / (done - before) * (total - done)))
                self.say(f"{state()}, about {left} left")

        self.say(description if total is None else f"{description}: {total:,} {unit}")
        yield advance
        self.say(f"{state()}, done")


def _nowhere(_count: int, /, *, earlier: bool = False) -> None:
    """Moves no bar: the reporter is quiet."""
