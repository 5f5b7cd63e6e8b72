"""Columns of other names than those that iprox knows."""

import json

import pytest

from iprox.data import Pool
from iprox.errors import InputError
from iprox.progress import Reporter
from iprox.session import Session

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
        assert pool.scan().unmet == ()
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


def test_a_column_that_no_row_has_is_refused():
    session = Session.create(reporter=Reporter(quiet=True))
    pool = Pool(DOLLY, columns={**NAMED, "source": "categry"})
    assert pool.scan().unmet == ("categry",)
    with pytest.raises(InputError, match="pool: no row has the column 'categry' that columns names"):
        session.read(pool)


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"ouput": "response"}, "no column is read as 'ouput'; there are messages, conversations, instruction, input"),
        ({"output": ""}, "output names no column"),
    ],
)
def test_what_names_nothing_is_refused(columns, said):
    with pytest.raises(InputError, match=said):
        Pool(DOLLY, columns=columns)


def test_a_row_of_no_known_format_is_told_of_columns():
    with pytest.raises(InputError, match=r"it has 'instruction', 'context', .*--columns output=response reads yours"):
        Pool(DOLLY).scan()
