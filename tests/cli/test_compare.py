"""`iprox compare`: scores of several runs beside the first."""

import json
import shutil

import pyarrow.parquet as pq
import pytest
from scipy import stats

from iprox.cli import main
from iprox.report import formats


@pytest.fixture(scope="module")
def other(finished, tmp_path_factory):
    """Scores of the same pool by another estimator."""
    folder = tmp_path_factory.mktemp("compared") / "length"
    options = [
        "--model",
        str(finished.output / "aligned"),
        "--pool",
        str(finished.pool),
        "--set=data.max_length=48",
        "--quiet",
    ]
    validation = [f"{task}={finished.path / task}.jsonl" for task in ("spelling", "arithmetic")]
    assert main(["score", *options, "--validation", *validation, "--estimator", "length", "--output", str(folder)]) == 0
    return folder


def test_a_table_for_people_and_every_pair_for_machines(finished, other, capsys):
    assert main(["compare", str(finished.output), f"by length={other}"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("Spearman with run on 200 rows\n")
    head, first, second = said.splitlines()[1:]
    assert head.split() == ["arithmetic", "spelling", "influence", "top", "5", "%", "shared", "FLOPs"]
    done = finished.record()["stages"]
    cost = sum(done[name]["flops"] for name in ("curvature", "compress", "align", "score"))
    assert first.split() == ["run", *formats.flops(cost).split()]
    assert second.endswith(formats.flops(0.0))
    tables = [pq.read_table(folder / "scores.parquet") for folder in (finished.output, other)]
    expected = [
        stats.spearmanr(*(each[column].to_numpy() for each in tables))[0]
        for column in ("influence/arithmetic", "influence/spelling", "influence")
    ]
    assert second.split()[:5] == ["by", "length", *(f"{value:.3f}" for value in expected)]

    assert main(["compare", "--json", "--share", "0.1", f"one={finished.output}", f"two={other}"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["names"], found["rows"], found["share"]) == (["one", "two"], 200, 0.1)
    assert found["tasks"]["spelling"]["spearman"][1][0] == pytest.approx(expected[1])
    assert found["flops"] == {"one": cost, "two": 0.0}


@pytest.mark.parametrize(
    "broken", ["{bro", "[]", '{"stages": {"score": {"flops": null}}}', '{"stages": {"score": {}}}']
)
def test_names_and_a_run_json_of_something_else_are_no_fault(finished, tmp_path, capsys, broken):
    folders = [tmp_path / name for name in ("lr=1e-5", "[b]")]
    for folder in folders:
        folder.mkdir()
        shutil.copy(finished.output / "scores.parquet", folder)
        (folder / "run.json").write_text(broken)
    assert main(["compare", *map(str, folders)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[2:]] == ["lr=1e-5", "[b]"]
    assert "FLOPs" not in lines[1]


def test_without_costs_and_with_one_task_no_column_is_empty(finished, tmp_path, capsys):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        table = pq.read_table(finished.output / "scores.parquet").drop_columns(["influence/spelling"])
        pq.write_table(table, tmp_path / name / "scores.parquet")
    assert main(["compare", str(tmp_path / "a"), str(tmp_path / "b/scores.parquet")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["arithmetic", "top", "5", "%", "shared"]
    assert lines[3].split() == ["b", "1.000", "100%"]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["run"], "two or more scores"),
        (["run", "run"], "two scores are called"),
        (["x=run", "x=copy"], "two scores are called x; give them different names: NAME=x"),
        (["run", "nowhere"], "no such scores file"),
    ],
)
def test_what_cannot_be_compared_is_one_line(finished, tmp_path, monkeypatch, capsys, given, said):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(finished.output, "run", ignore=shutil.ignore_patterns("warmup", "proxy", "aligned"))
    shutil.copytree("run", "copy")
    assert main(["compare", *given]) == 2
    err = capsys.readouterr().err
    assert said in err
    assert len(err.splitlines()) == 1
