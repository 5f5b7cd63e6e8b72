"""What a person sees while a command works: stage headings, progress with rate and ETA, warnings."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Protocol

from rich.console import Console
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
from rich.text import Text

# Seconds between the lines of a stage in a log file.
LOG_INTERVAL = 60.0


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
        self.console = Console(file=sys.stderr, highlight=False)
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
