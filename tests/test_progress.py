"""What a person sees of a stage in progress."""

import io

import pytest
from rich.console import Console

from iprox import progress
from iprox.progress import Reporter


@pytest.fixture
def clock(monkeypatch):
    """Time that passes when it is told to."""

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
