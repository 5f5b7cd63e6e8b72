"""Report to the user on standard error while a command works: stage headings, progress with rate and ETA, warnings."""

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

# Seconds between the progress lines of a stage in a log file.
LOG_INTERVAL = 60.0
# Seconds over which rich measures a rate. Its default, 30, gives no rate and no ETA for slower steps.
RATE_PERIOD = 3600.0

# Characters that control a terminal or change the direction of its text: all control characters but tabs and line ends,
# and Unicode's direction marks.
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def printable(text: str) -> str:
    """Return a text whose control characters are escaped as in Python (`\\x1b`), so that it cannot control a terminal.

    Names, sources and templates in messages come from files of other people.
    """
    return _CONTROLS.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


class _Printable(RenderHook):
    """Makes all text that a console prints `printable`; the colors, which the console adds later, stay."""

    def process_renderables(self, renderables: list[ConsoleRenderable]) -> list[ConsoleRenderable]:
        return [_Escaped(renderable) for renderable in renderables]


class _Escaped:
    def __init__(self, renderable: ConsoleRenderable) -> None:
        self.renderable = renderable

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for segment in console.render(self.renderable, options):
            yield segment if segment.control else Segment(printable(segment.text), segment.style)


def make_console(*, stderr: bool = False) -> Console:
    """Return a console, on standard output or standard error, that makes all text `printable`."""
    console = Console(file=sys.stderr if stderr else None, highlight=False)
    console.push_render_hook(_Printable())
    return console


def say_plainly(*lines: str) -> None:
    """Print lines without markup on standard output, for people and scripts."""
    print(*map(printable, lines), sep="\n")


class Advance(Protocol):
    """Function that moves a progress bar."""

    def __call__(self, count: int, /, *, earlier: bool = False) -> None:
        """Add a count; `earlier` ones were done before a resume and do not enter the rate."""


class Pace:
    """The rate of a stage and the time that it still takes.

    The time before the first report is not in the rate: it is set-up, such as loading and compiling.

    Args:
        total: number to reach; None if it is not known.
    """

    def __init__(self, total: int | None) -> None:
        self.total = total
        self.done = self.before = self._timed = 0
        self._since: float | None = None

    def add(self, now: float, count: int, earlier: bool = False) -> None:
        """Add a count at a time in seconds; `earlier` ones were done before a resume."""
        self.done += count
        self.before += count * earlier
        if self._since is None or earlier:
            self._since, self._timed = now, 0
        else:
            self._timed += count

    def rate(self, now: float) -> float | None:
        """Return the number per second; None until two reports have come."""
        since = self._since
        return self._timed / (now - since) if since is not None and self._timed and now > since else None

    def left(self, now: float) -> float | None:
        """Return the seconds that are left, if that can be said."""
        rate = self.rate(now)
        return None if rate is None or self.total is None else (self.total - self.done) / rate


def _rate_in_words(rate: float, unit: str) -> str:
    """Return a rate such as `3.0 rows/s`; below one per second, `4.0 s/row`."""
    if rate >= 1:
        return f"{rate:,.1f} {unit}/s"
    return f"{1 / rate:,.1f} s/{'batch' if unit == 'batches' else unit.removesuffix('s')}"


class _RateColumn(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(_rate_in_words(speed, task.fields["unit"]) if speed else "", style="progress.data.speed")


class Reporter:
    """Reports on standard error, so that standard output holds only results.

    Args:
        quiet: whether to report nothing but warnings.
    """

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet
        self.console = make_console(stderr=True)
        self.warnings: list[str] = []
        self._shown: set[str] = set()

    def say(self, message: str) -> None:
        """Print one line, unless quiet."""
        if not self.quiet:
            self.console.print(message, markup=False, soft_wrap=True)

    def warn(self, message: str) -> None:
        """Print a warning once, even when quiet, and keep it for `run.json` in every stage that it concerns."""
        if message not in self.warnings:
            self.warnings.append(message)
        if message in self._shown:
            return
        self._shown.add(message)
        self.console.print(f"warning: {message}", style="yellow", markup=False, soft_wrap=True)

    def take_warnings(self) -> list[str]:
        """Return the warnings since the last call."""
        taken, self.warnings = self.warnings, []
        return taken

    @contextmanager
    def bar(self, description: str, total: int | None, unit: str) -> Iterator[Advance]:
        """Show a progress bar with count, rate, elapsed time and ETA; yield the function that advances it.

        Without a total there is no ETA.
        """
        if self.quiet:
            yield _nowhere
            return
        description = printable(description)  # the text of a moving bar does not pass the console's hook
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
        with Progress(*columns, console=self.console, speed_estimate_period=RATE_PERIOD) as progress:
            task = progress.add_task(f"{description:<9}", total=total, unit=unit)

            def advance(count: int, /, *, earlier: bool = False) -> None:
                if earlier:  # clears the samples of the rate
                    progress.reset(task, completed=int(progress.tasks[task].completed) + count)
                else:
                    progress.update(task, advance=count)

            yield advance

    @contextmanager
    def _lines(self, description: str, total: int | None, unit: str) -> Iterator[Advance]:
        """Print progress for a log file: one line at the start, one per minute, one at the end.

        Neither rich nor tqdm prints lines: without a terminal rich shows only the finished bar, and tqdm rewrites one
        line with carriage returns and counts set-up time in its rate.
        """
        started = last = time.monotonic()
        pace = Pace(total)

        def say(end: str = "") -> None:
            now = time.monotonic()
            line = f"{description}: {pace.done:,}{'' if total is None else f'/{total:,}'} {unit}"
            rate, left = pace.rate(now), pace.left(now)
            if rate is not None:
                line += f", {_rate_in_words(rate, unit)}"
            if left is not None and not end:
                end = f", about {timedelta(seconds=round(left))} left"
            self.say(f"{line}, {timedelta(seconds=round(now - started))}{end}")

        def advance(count: int, /, *, earlier: bool = False) -> None:
            nonlocal last
            now = time.monotonic()
            pace.add(now, count, earlier)
            if now - last >= LOG_INTERVAL and pace.done > pace.before and (total is None or pace.done < total):
                last = now
                say()

        self.say(description if total is None else f"{description}: {total:,} {unit}")
        yield advance
        say(", done")


def _nowhere(_count: int, /, *, earlier: bool = False) -> None:
    """Do nothing, as the reporter is quiet."""
