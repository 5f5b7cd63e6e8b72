"""The results files of the benchmarks: kept, continued, and refused with other settings."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
from common import RESULTS, Results, parser, read_results, settings_of


def test_cells_are_kept_and_not_computed_again(tmp_path):
    file = tmp_path / "new/results.jsonl"
    results = Results(file, {"rows": 3})
    assert results("a", lambda: {"loss": 0.5}, seed=1) == {"loss": 0.5}
    again = Results(file, {"rows": 3})
    assert again("a", lambda: 1 / 0, seed=1) == {"loss": 0.5}
    again("a", lambda: {"loss": 0.25}, seed=2)
    settings, *cells = map(json.loads, file.read_text().splitlines())
    assert settings == {"settings": {"rows": 3}}
    assert [(cell["cell"], cell["seed"], cell["metrics"]["loss"]) for cell in cells] == [("a", 1, 0.5), ("a", 2, 0.25)]
    assert all(cell["revision"] and cell["machine"] for cell in cells)
    assert list(read_results(file)["cells"]) == ["a/1", "a/2"]


def test_a_cell_of_something_else_is_computed_again_and_the_last_one_counts(tmp_path):
    results = Results(tmp_path / "r.jsonl", {})
    results("a", lambda: {"loss": 1.0}, of="old")
    assert results("a", lambda: {"loss": 2.0}, of="new")["loss"] == 2.0
    assert Results(tmp_path / "r.jsonl", {}).cells["a/0"] == {"loss": 2.0, "of": "new"}


def test_other_settings_are_refused_unless_fresh(tmp_path):
    file = tmp_path / "r.jsonl"
    Results(file, {"rows": 3})("a", dict)
    with pytest.raises(SystemExit, match="made with other settings"):
        Results(file, {"rows": 4})
    assert Results(file, {"rows": 4}, fresh=True).cells == {}


def test_options_have_their_defaults_and_folders_are_no_settings(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["x", "--examples", "7"])
    arguments = parser("doc", "tasks examples work output fresh", tasks=["a"], work=Path("w")).parse_args()
    assert settings_of(arguments) == {"tasks": ["a"], "examples": 7}


# benchmarks/defaults.py keeps a format of its own.
FILES = [file for file in sorted(RESULTS.glob("*.jsonl")) if not file.stem.startswith("defaults")]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_the_results_in_the_repository_can_be_read(file):
    found = read_results(file)
    assert found["settings"]
    assert found["cells"]
