"""A whole `iprox run`: what it leaves and what it says."""

import html
import json
import os
import re
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from iprox.cli import main
from iprox.cli.summary import run_summary
from iprox.run.folder import RunFolder

STAGES = ["data", "warmup", "curvature", "compress", "align", "audit", "score", "select", "attribute", "report"]
SMALL = ["--set", "proxy=false", "warmup=false", "audit=false", "influence.estimator=tracin"]


def test_files_of_the_run_folder(finished):
    expected = [
        "aligned/alignment.json",
        "audit/audit.json",
        "audit/audit.parquet",
        "proxy/compression.json",
        "recipe.yaml",
        "report.html",
        "run.json",
        "scores.parquet",
        "selected.jsonl",
        "selection.json",
        "warmup/checkpoints.json",
        "warmup/history.json",
    ]
    for name in expected:
        assert (finished.output / name).stat().st_size > 0, name
    for folder in ("proxy", "aligned", *(f"warmup/{entry['path']}" for entry in checkpoints(finished))):
        assert (finished.output / folder / "model.safetensors").is_file()
        assert (finished.output / folder / "tokenizer.json").is_file()
    assert not list(finished.output.rglob("*.partial"))
    assert not list(finished.output.rglob("*.bin"))


def checkpoints(place):
    return json.loads((place.output / "warmup/checkpoints.json").read_text())


def test_each_epoch_of_the_warm_up_is_a_checkpoint_with_its_learning_rate(finished):
    history = json.loads((finished.output / "warmup/history.json").read_text())
    assert [entry["epoch"] for entry in checkpoints(finished)] == [1.0, 2.0]
    for entry in checkpoints(finished):
        steps = [step for step in history if entry["epoch"] - 1 < step["epoch"] <= entry["epoch"]]
        assert entry["learning_rate"] == pytest.approx(sum(step["learning_rate"] for step in steps) / len(steps))
        assert entry["step"] == steps[-1]["step"]


def test_scores_have_one_row_a_pool_row_in_order(finished):
    table = pq.read_table(finished.output / "scores.parquet")
    schema = {field.name: field.type for field in table.schema}
    for task in ("arithmetic", "spelling"):
        assert schema.pop(f"examples/{task}") == pa.list_(pa.float64(), 8)
    assert schema == {
        "id": pa.string(),
        "source": pa.string(),
        "tokens": pa.int32(),
        "supervised": pa.int32(),
        "influence/arithmetic": pa.float64(),
        "influence/spelling": pa.float64(),
        "influence": pa.float64(),
    }
    rows = [json.loads(line) for line in finished.pool.read_text().splitlines()]
    assert table["source"].to_pylist() == [row["source"] for row in rows]
    assert len(set(table["id"].to_pylist())) == len(rows)
    assert table["influence"].null_count == 0


def test_selected_rows_are_bytes_of_the_pool_best_first(finished):
    selection = json.loads((finished.output / "selection.json").read_text())
    lines = finished.pool.read_bytes().splitlines(keepends=True)
    selected = (finished.output / "selected.jsonl").read_bytes().splitlines(keepends=True)
    assert selected == [lines[row] for row in selection["rows"]]
    scores = pq.read_table(finished.output / "scores.parquet")
    own = np.stack(scores["examples/arithmetic"].to_pylist())[:, 0]
    mean = scores["influence/arithmetic"].to_numpy()
    assert selection["rows"][0] == (own / own.std() + mean / mean.std()).argmax()
    assert len(set(selection["rows"])) == 20
    assert selection["threshold"] is None  # turns end at no score


def test_the_fidelity_told_is_of_the_task_selected_by(copied):
    assert copied.run("--set", "select.task=spelling") == 0
    audit = json.loads((copied.output / "audit/audit.json").read_text())
    of_task = audit["tasks"]["spelling"]
    assert of_task["spearman"] != audit["mean"]["spearman"]
    told = run_summary(RunFolder(copied.output))["fidelity"]
    assert told == {name: of_task[name] for name in ("spearman", "kendall", "overlap", "refined", "intervals")}
    report = html.unescape((copied.output / "report.html").read_text())
    assert f"agrees with the target's at Spearman {of_task['spearman']:.2f}" in report


def test_run_json_says_what_every_stage_cost(finished):
    record = finished.record()
    assert list(record["stages"]) == STAGES
    for name, entry in record["stages"].items():
        assert entry["seconds"] > 0, name
        assert entry["peak_memory_bytes"] > 0, name
        assert entry["skipped"] is False, name
        # Four steps need not raise the fidelity, and then that is said; most rows are longer than 48 tokens.
        said = ("did not raise the fidelity", "were cut") if name in ("align", "score") else ()
        assert [text for text in entry["warnings"] if not any(each in text for each in said)] == [], name
        assert isinstance(entry["tokens"], int), name
        assert isinstance(entry["flops"], float), name
    for name in ("warmup", "curvature", "compress", "align", "audit", "score"):
        assert record["stages"][name]["tokens"] > 0
        assert record["stages"][name]["flops"] > 0
    assert record["inputs"]["pool"]["rows"] == 200
    assert set(record["inputs"]["validation"]) == {"arithmetic", "spelling"}
    assert record["versions"]["torch"]
    assert record["seed"] == 0
    assert record["command"].startswith("iprox run ")


def test_cost_counts_the_making_of_the_proxy(finished):
    record = finished.record()
    cost, done = record["cost"], record["stages"]
    assert cost["score_flops"] == done["curvature"]["flops"] + done["score"]["flops"]
    assert cost["construction_flops"] == done["compress"]["flops"] + done["align"]["flops"]
    assert cost["proxy_parameters"] < cost["target_parameters"]
    # Every linear layer is halved; the head and what candidates are contracted with are the same in both.
    validation = done["curvature"]["flops"] + done["score"]["query_flops"]
    assert 0.4 < (cost["score_flops"] - validation) / (cost["target_score_flops"] - validation) < 0.9


def test_score_tokens_are_those_of_the_scores_file(finished):
    tokens = pq.read_table(finished.output / "scores.parquet")["tokens"].to_pylist()
    assert finished.record()["stages"]["score"]["tokens"] == sum(tokens)


def test_json_is_one_line_on_standard_output(place):
    """In a process of its own, so that nothing else is said while packages are imported either."""
    command = [sys.executable, "-m", "iprox.cli", "run", str(place.recipe), "--json", "--quiet", *SMALL]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"warning: \d+ examples \(\d+\.\d% of the rows\) were longer than 48 tokens .*\n", done.stderr)
    (line,) = done.stdout.splitlines()
    summary = json.loads(line)
    assert summary["selected"] == {"rows": 20, "of": 200, "file": str(place.output / "selected.jsonl")}
    assert summary["relative_cost"] == pytest.approx(1.0)
    assert summary["report"] == str(place.output / "report.html")


def test_progress_goes_to_standard_error_and_the_summary_to_standard_output(copied, capfd):
    (copied.output / "scores.parquet").unlink()
    assert main(["run", str(copied.recipe)]) == 0
    done = capfd.readouterr()
    progress = done.err.splitlines()
    assert progress[1].startswith("read: 200 rows, ")
    assert progress[2] == "✓ warmup: done already"
    assert "score: 200 rows" in progress
    assert any(line.startswith("score: 200/200 rows, ") and line.endswith("done") for line in progress)
    assert "\x1b" not in done.err + done.out
    said = {line.split()[0]: line for line in done.out.splitlines() if line.strip()}
    assert "20 of 200 rows" in said["selected"]
    assert str(copied.output / "selected.jsonl") in said["selected"]
    assert "Spearman" in said["fidelity"]
    assert "of the FLOPs of scoring on the target" in said["cost"]
    assert said["report"].endswith(str(copied.output / "report.html"))


def test_quiet_says_nothing_on_standard_error_but_sums_up(copied, capfd):
    assert copied.run() == 0
    said = capfd.readouterr()
    assert said.err == ""
    assert "20 of 200 rows" in said.out


def test_report_alone_writes_the_page_again(copied, capfd):
    (copied.output / "report.html").unlink()
    assert main(["report", str(copied.output)]) == 0
    assert capfd.readouterr().out.strip() == str(copied.output / "report.html")
    assert "<html" in (copied.output / "report.html").read_text()
