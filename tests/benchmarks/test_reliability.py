"""What the benchmark of reliability takes for right and for wrong."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
from reliability import Tried, problem, state


def test_one_line_that_names_the_row_is_right():
    assert problem(Tried(2, "", "read\niprox: pool: a row is bad:\n  a.jsonl:2: no text\n", 1.0), 2, "a.jsonl:2") == ""
    assert problem(Tried(0, "done", "score: 3 rows\n", 1.0), 0, "") == ""


@pytest.mark.parametrize(
    ("tried", "wrong"),
    [
        (Tried(None, "", "read\n", 99.0), "did not end"),
        (Tried(2, "", "Traceback (most recent call last):\niprox: x\n", 1.0), "traceback"),
        (Tried(2, "", "iprox: x (a fault of iprox, please report it)\n", 1.0), "traceback"),
        (Tried(2, "", "iprox: \x1b[31mx\n", 1.0), "escape"),
        (Tried(1, "", "iprox: a.jsonl:2\n", 1.0), "exit code 1"),
        (Tried(2, "", "iprox: a.jsonl:2\niprox: more\n", 1.0), "2 lines"),
        (Tried(2, "", "", 1.0), "0 lines"),
        (Tried(2, "", "iprox: a.jsonl\n", 1.0), "does not name"),
    ],
)
def test_what_is_wrong_is_named(tried, wrong):
    assert wrong in problem(tried, 2, "a.jsonl:2")


def test_a_changed_file_is_seen(tmp_path):
    (tmp_path / "a").write_text("one")
    before = state(tmp_path)
    (tmp_path / "a").write_text("other")
    assert state(tmp_path) != before
