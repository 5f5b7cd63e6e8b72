"""Retraining without the top rows, through the stage, a recipe and the command."""

import json
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from iprox.cli import main
from iprox.data import Pool
from iprox.session import Session
from iprox.settings import AuditSection
from iprox.stages import retraining

SIDES = ("proxy", "target")


def checkpoint(place):
    listed = json.loads((place.output / "warmup/checkpoints.json").read_text())
    return str(place.output / "warmup" / listed[-1]["path"])


def test_without_the_rows_that_teach_a_task_its_loss_rises_more(finished, tmp_path, monkeypatch):
    """The proxy ranks the rows of arithmetic first, for arithmetic; the target ranks them last."""
    monkeypatch.setattr(retraining, "REMOVED_FRACTION", 3 / 7)
    monkeypatch.setattr(retraining, "BATCH_SIZE", 4)
    pool = list(Pool([str(finished.pool)]))
    few = [example for example in pool if example.source == "arithmetic"][:15]
    teaching = [replace(each, id=f"{each.id}, {again}") for again in range(3) for each in few]
    examples = teaching + [example for example in pool if example.source != "arithmetic"][:60]
    scores = np.arange(len(examples), dtype=float)
    table = {"id": [example.id for example in examples], "proxy/arithmetic": -scores, "target/arithmetic": scores}
    pq.write_table(pa.table(table), tmp_path / "audit.parquet")
    settings = AuditSection(removal=3, learning_rate=1e-2)
    validation = {"arithmetic": Pool([str(finished.path / "arithmetic.jsonl")])}
    session = Session.create(max_length=48)
    trained = retraining.Retraining(session, checkpoint(finished), examples, validation, tmp_path, settings, "removal")
    record = retraining.measure_removal(trained)
    found = json.loads((tmp_path / "removal.json").read_text())
    assert (found["rows"], found["removed"]) == (105, 45)
    proxy, target = (found["tasks"]["arithmetic"][side] for side in SIDES)
    assert proxy["difference"] > 4 * proxy["standard_error"]
    assert proxy["top"] > 0
    assert target["difference"] < proxy["difference"] / 2
    for side in (proxy, target):
        assert side["supervised"]["random"] == pytest.approx(side["supervised"]["top"], rel=0.2)
    assert record["removal"] == found["mean"]
    assert record["flops"] > 0


def test_each_repeat_compares_the_same_order_with_and_without_the_rows(finished, tmp_path, monkeypatch):
    """Training is replaced by the sum of what is left, so that every figure can be reckoned by hand."""
    monkeypatch.setattr(retraining, "REMOVED_FRACTION", 0.1)
    examples = list(Pool([str(finished.pool)]))[:40]
    session, model = Session.create(max_length=48), checkpoint(finished)
    encoded = session.encoder(model).encode(examples)
    place = {tuple(row.input_ids.tolist()): number for number, row in enumerate(encoded)}
    worth = np.random.default_rng(0).exponential(size=(40, 2))
    seeds = []

    def falling(session, model, rows, held, settings, seed):
        seeds.append(seed)
        left = [place[tuple(row.input_ids.tolist())] for row in rows]
        return (10 * seed - worth[left].sum(0)).tolist()

    monkeypatch.setattr(retraining, "validation_losses", falling)
    tasks = ("arithmetic", "spelling")
    columns = {f"{side}/{task}": worth[:, column] for side in SIDES for column, task in enumerate(tasks)}
    columns["proxy/spelling"] = np.where(np.arange(40) == 7, np.nan, worth[::-1, 1])
    pq.write_table(pa.table({"id": [example.id for example in examples], **columns}), tmp_path / "audit.parquet")
    validation = {task: Pool([str(finished.path / f"{task}.jsonl")]) for task in tasks}

    def measure(repeats):
        given = (session, model, examples, validation, tmp_path, AuditSection(removal=repeats))
        retraining.measure_removal(retraining.Retraining(*given, "removal"))

    measure(4)
    found = json.loads((tmp_path / "removal.json").read_text())
    assert (found["rows"], found["removed"]) == (39, 4)  # one has no score
    kept = np.delete(np.arange(40), 7)
    for column, task in enumerate(tasks):
        for side in SIDES:
            entry, scores = found["tasks"][task][side], columns[f"{side}/{task}"][kept]
            top = kept[np.argsort(-scores)[:4]]
            assert entry["top"] == pytest.approx(worth[top, column].sum())  # order of training cancels
            assert entry["difference"] == pytest.approx(entry["top"] - entry["random"])
            assert entry["supervised"]["top"] == sum(encoded[row].supervised for row in top)
        assert found["tasks"][task]["loss"] == pytest.approx(15 - worth[kept, column].sum())
    means = [found["tasks"][task]["target"]["difference"] for task in tasks]
    assert found["mean"]["target"]["difference"] == pytest.approx(np.mean(means))
    assert len(seeds) < 4 * 9  # both sides rank arithmetic alike, which is trained once
    # More repeats cost only those.
    before = len(seeds)
    measure(5)
    assert set(seeds[before:]) == {4}


def test_a_recipe_retrains_without_the_top_rows(copied, capfd):
    options = ["audit.removal=2", "audit.learning_rate=1e-3"]
    assert main(["plan", str(copied.recipe), "--quiet", "--json", "--tflops", "1", "--set", *options]) == 0
    planned = json.loads(capfd.readouterr().out)["stages"]["removal"]
    assert copied.run("--set", *options) == 0
    assert copied.done() == ["removal", "report"]
    stage = copied.record()["stages"]["removal"]
    found = json.loads((copied.output / "audit/removal.json").read_text())
    assert stage["removal"] == found["mean"]
    assert 0.3 * planned["flops"] < stage["flops"] < 1.2 * planned["flops"]  # where sides agree, trained once
    assert (found["removed"], found["repeats"], list(found["tasks"])) == (2, 2, ["arithmetic", "spelling"])
    assert "Removal test" in (copied.output / "report.html").read_text()
    assert copied.run("--set", *options) == 0
    assert copied.done() == []


def test_the_command_retrains_without_the_top_rows(finished, tmp_path, capfd):
    files = ["--pool", str(finished.pool), "--validation", f"spelling={finished.path / 'spelling.jsonl'}"]
    models = ["--model", checkpoint(finished), "--proxy", str(finished.output / "aligned")]
    output = ["--output", str(tmp_path / "audit"), "--set=data.max_length=48", "--sample=20", "--quiet"]
    output.append(finished.few_curved)
    assert main(["audit", *models, *files, *output, "--removal=3", "--set=audit.learning_rate=1e-3"]) == 0
    printed = capfd.readouterr().out
    assert "without top" in printed
    found = json.loads((tmp_path / "audit/removal.json").read_text())
    assert f"{found['tasks']['spelling']['proxy']['difference']:+.4f}" in printed
    assert (found["learning_rate"], found["fraction"], found["repeats"]) == (1e-3, 0.05, 3)
    stage = json.loads((tmp_path / "audit/run.json").read_text())["stages"]["removal"]
    assert stage["removal"] == found["mean"]
