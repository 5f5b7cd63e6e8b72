"""Columns of other names than those that iprox knows."""

import json

import pytest

from iprox.data import Pool
from iprox.data.formats import Columns
from iprox.errors import InputError
from iprox.progress import Reporter
from iprox.recipe import parse_settings
from iprox.session import Session
from iprox.settings import DataSection

DOLLY = [
    {"instruction": f"Q{i}", "context": "" if i % 2 else f"C{i}", "response": f"A{i}", "category": f"kind {i % 3}"}
    for i in range(6)
]
NAMED = {"input": "context", "output": "response", "source": "category"}


def test_columns_are_read_under_the_names_that_iprox_knows(tmp_path):
    file = tmp_path / "dolly.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in DOLLY))
    for given in (DOLLY, [str(file)]):
        pool = Pool(given, columns=NAMED)
        assert [[turn["content"] for turn in each.messages] for each in pool] == [
            ["Q0\n\nC0", "A0"], ["Q1", "A1"], ["Q2\n\nC2", "A2"], ["Q3", "A3"], ["Q4\n\nC4", "A4"], ["Q5", "A5"],
        ]  # fmt: skip
        assert pool.scan().sources == {"kind 0": 2, "kind 1": 2, "kind 2": 2}
        assert pool.columns.missing == []
    out = tmp_path / "out.jsonl"
    pool.write_rows([4, 1], out)
    assert out.read_bytes().splitlines() == [json.dumps(DOLLY[row]).encode() for row in (4, 1)]  # as they were


def test_the_same_rows_read_otherwise_are_another_pool():
    prints = {Pool(DOLLY, columns=columns).scan().fingerprint for columns in (NAMED, {**NAMED, "task": "category"})}
    assert len(prints) == 2


def test_rows_of_several_kinds_go_together():
    pool = Pool([*DOLLY, {"text": "plain"}, {"prompt": "P", "completion": "C"}], columns=NAMED)
    assert [each.text for each in pool][6:] == ["plain", None]
    assert pool.scan().rows == 8


def test_columns_can_be_swapped_and_are_moved_not_copied():
    rows = [{"instruction": "Be short.", "input": "What is water?", "output": "Wet."}]
    (example,) = Pool(rows, columns={"system": "instruction", "instruction": "input"})
    assert [turn["content"] for turn in example.messages] == ["Be short.", "What is water?", "Wet."]
    (example,) = Pool([{**rows[0], "prompt": "P"}], columns={"completion": "output"})
    assert (example.prompt, example.completion) == ("P", "Wet.")
    (example,) = Pool([{"text": "T", "kind": "k"}], columns={"source": "kind", "task": "kind"})
    assert (example.source, example.task) == ("k", "k")


def test_an_empty_column_does_not_hide_a_filled_one():
    rows = [
        {"instruction": "Q", "output": "A", "response": None, "source": "s", "category": None},
        {"instruction": "Q", "output": None, "response": "B", "source": None, "category": "c"},
    ]
    pool = Pool(rows, columns={"output": "response", "source": "category"})
    assert [(each.messages[-1]["content"], each.source) for each in pool] == [("A", "s"), ("B", "c")]


def test_a_column_that_no_row_has_is_said_with_the_nearest():
    session = Session.create(reporter=Reporter(quiet=True))
    pool = Pool(DOLLY, columns={**NAMED, "source": "categry"})
    session.read(pool)
    said = "pool: no row has the column 'categry' to read as source; did you mean 'category'?"
    assert session.reporter.take_warnings() == [said]
    here, there = Pool([{"text": "T", "kind": "k"}]), Pool(DOLLY)
    for pool in (here, there):
        pool.columns = Columns({"input": "context", "output": "response", "source": "knid"})
    session.read(here, {"validation": there})
    assert "column 'knid' to read as source; did you mean 'kind'?" in session.reporter.take_warnings()[0]
    # One that a set which it is judged by has is no mistake.
    session.read(Pool([{"text": "T"}], columns=NAMED), {"validation": Pool(DOLLY, columns=NAMED)})
    assert [text for text in session.reporter.take_warnings() if "column" in text] == []
    with pytest.raises(InputError, match="all 6 rows are bad, no row has the column 'respons' to read as output; did"):
        Pool(DOLLY, columns={"input": "context", "output": "respons"}).scan()


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"ouput": "response"}, "iprox has no column 'ouput'; known are messages, conversations, instruction, input"),
        ({"tols": ""}, "'tols' is a column that iprox does not read anyway; did you mean tools="),
        ({"weight": "w"}, "iprox has no column 'weight'"),
        ({"response": "output"}, "iprox has no column 'response'; did you mean output=response?"),
    ],
)
def test_what_names_nothing_is_refused(columns, said):
    with pytest.raises(InputError, match=said):
        Pool(DOLLY, columns=columns)


def test_a_row_of_no_known_format_is_told_of_columns():
    with pytest.raises(InputError, match=r"'instruction', 'context', .*name your .*--set data.columns.output=response"):
        Pool(DOLLY).scan()


@pytest.mark.parametrize("empty", ["", None])
def test_a_column_is_left_unread_as_if_no_row_had_it(tmp_path, empty):
    file = tmp_path / "pool.jsonl"
    row = {
        "instruction": "Q",
        "output": "A",
        "source": ["a", "b"],
        "tools": "now()",
        "weight": 0.5,
        "images": ["a.png"],
    }
    file.write_text(json.dumps(row) + "\n")
    pool = Pool(file, columns=dict.fromkeys(("source", "tools", "weight", "images"), empty))
    (example,) = pool
    assert (example.source, example.rendering, example.messages[1]["content"]) == (None, {}, "A")
    assert pool.columns.named["source"] == ""
    pool.write_rows([0], tmp_path / "out.jsonl")
    assert json.loads((tmp_path / "out.jsonl").read_text()) == row  # all columns are kept
    (example,) = Pool([{"instruction": "Q", "output": "", "text": "T"}], columns={"output": empty})
    assert example.text == "T"
    (example,) = Pool([{"text": "", "body": "T"}], columns={"text": "body", "id": empty})
    assert example.text == "T"


def test_a_column_left_unread_that_no_row_has_is_said():
    session = Session.create(reporter=Reporter(quiet=True))
    session.read(Pool([{"text": "T", "sources": "s"}], columns={"source": ""}))
    said = "pool: no row has the column 'source' to leave unread; did you mean 'sources'?"
    assert session.reporter.take_warnings() == [said]


def test_what_a_row_is_read_as_instead_is_warned_of_once(recwarn):
    session = Session.create(reporter=Reporter(quiet=True))
    session.read(Pool([{"messages": None, "text": f"T{i}"} for i in range(3)]))
    assert session.reporter.take_warnings() == ["rows whose messages is empty are read as text"]


def test_columns_are_left_unread_by_the_command_line_and_the_recipe():
    overrides = ["data.columns.source=", "data.columns.output=response"]
    settings = parse_settings({}, overrides, {})
    assert settings.data.columns == {"source": "", "output": "response"}
    data = DataSection(pool=["a"], validation={"t": "b"}, columns={"source": None, "output": "response"})
    assert data.model_dump(mode="json", exclude_none=True)["columns"] == {"source": "", "output": "response"}
