"""What a person sees of a stage in progress."""

import io
import re

import pytest
from rich.console import Console
from rich.table import Table

from iprox import progress
from iprox.progress import Reporter, make_console, printable, say_plainly


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test sets."""

    class Clock:
        now = 0.0

    monkeypatch.setattr(progress.time, "monotonic", lambda: Clock.now)
    return Clock


def test_what_an_earlier_start_did_counts_for_no_rate_and_no_time_left(clock):
    reporter = Reporter()
    reporter.console = Console(file=io.StringIO(), width=120)
    with reporter.bar("score", 1000, "rows") as advance:
        advance(600, earlier=True)
        clock.now = 100.0
        advance(100)
        clock.now = 200.0
        advance(300)
    first, middle, last = reporter.console.file.getvalue().splitlines()
    assert first == "score: 1,000 rows"
    assert middle == "score: 700/1,000 rows, 1.0 rows/s, 0:01:40, about 0:05:00 left"
    assert last == "score: 1,000/1,000 rows, 2.0 rows/s, 0:03:20, done"


def test_set_up_time_enters_neither_the_rate_nor_the_time_left(clock):
    reporter = Reporter()
    reporter.console = Console(file=io.StringIO(), width=120)
    with reporter.bar("align", 10, "steps") as advance:
        for clock.now in (500.0, 520.0, 540.0, 580.0):  # compiling takes 480 s of the first step
            advance(1)
    first, *lines, last = reporter.console.file.getvalue().splitlines()
    assert first == "align: 10 steps"
    assert lines == [
        "align: 1/10 steps, 0:08:20",
        "align: 4/10 steps, 26.7 s/step, 0:09:40, about 0:02:40 left",
    ]
    assert last == "align: 4/10 steps, 26.7 s/step, 0:09:40, done"


def test_slow_steps_have_a_rate_on_a_terminal(clock):
    reporter = Reporter()
    reporter.console = Console(
        file=io.StringIO(), width=120, force_terminal=True, legacy_windows=False, get_time=lambda: clock.now
    )
    with reporter.bar("align", 10, "steps") as advance:
        for clock.now in (500.0, 545.0, 590.0):
            advance(1)
    assert "45.0 s/step" in reporter.console.file.getvalue()


def test_on_a_terminal_the_rate_is_of_this_start(clock):
    reporter = Reporter()
    reporter.console = Console(
        file=io.StringIO(), width=120, force_terminal=True, legacy_windows=False, get_time=lambda: clock.now
    )
    with reporter.bar("score", 1000, "rows") as advance:
        advance(900, earlier=True)
        for _ in range(20):
            clock.now += 1.0
            advance(5)
    shown = reporter.console.file.getvalue()
    assert "1000/1000" in shown
    assert "5.0 rows/s" in shown


HOSTILE = "a\x1b]0;owned\x07\x1b[2J\x9b31m\x08\r\x7f\u202eb"
SHOWN = r"a\x1b]0;owned\x07\x1b[2J\x9b31m\x08\r\x7f\u202eb"


def test_texts_of_others_are_shown_and_not_obeyed():
    assert printable(HOSTILE) == SHOWN
    assert printable("tab\t, line\nend, é 中 🙂 \u200f") == "tab\t, line\nend, é 中 🙂 \u200f"


@pytest.mark.parametrize("terminal", [False, True])
def test_no_console_passes_on_what_a_terminal_obeys(monkeypatch, terminal):
    out = io.StringIO()
    hostile = HOSTILE.translate(dict.fromkeys(map(ord, "\x07\x08\r")))  # which rich takes out itself
    shown = printable(hostile)
    reporter = Reporter()
    consoles = (reporter.console, make_console())
    for console in consoles:
        console.file, console._force_terminal, console.width = out, terminal, 200
    reporter.say(f"say {hostile}")
    reporter.warn(f"warn {hostile}")
    table = Table("source", box=None)
    table.add_row(hostile)
    consoles[1].print(table)
    consoles[1].print(f"[bold]{'name':<10}[/bold]", end="")
    consoles[1].print(hostile, markup=False, soft_wrap=True)
    with reporter.bar(hostile, 3, "rows") as advance:
        advance(3)
    said = out.getvalue()
    assert said.count(shown) >= 5
    own = re.sub(r"\x1b\[[0-9;?]*[mhlKAG]", "", said) if terminal else said  # colors, and the bar's own moves
    assert not re.search(r"[\x07\x08\x7f\x9b\u202e]|\x1b", own)
    assert ("\x1b[?25l" in said) == terminal  # what the console itself tells a terminal goes through


def test_lines_for_scripts_are_plain_too(capsys):
    say_plainly("one", HOSTILE)
    assert capsys.readouterr().out == f"one\n{SHOWN}\n"
