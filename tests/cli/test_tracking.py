"""Runs that are tracked; each service's own package says what it was told."""

import json
import os
import subprocess
import sys

import pytest

from iprox import tracking
from iprox.errors import InputError


def test_tensorboard_has_training_alignment_and_stages(place):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    assert place.run("--set", "tracking=tensorboard") == 0

    def scalars(folder):
        found = accumulator.EventAccumulator(str(place.output / "tensorboard" / folder))
        found.Reload()
        return {name: [(event.step, event.value) for event in found.Scalars(name)] for name in found.Tags()["scalars"]}

    training = scalars("warm-up")
    assert len(training["train/loss"]) > 1
    stages = scalars("stages")
    record = place.record()["stages"]
    assert [step for step, _ in stages["align/loss"]] == list(range(1, record["align"]["steps"] + 1))
    assert stages["align/held_out/fidelity"][0][0] == 0
    ((_, spearman),) = stages["audit/fidelity/spearman"]
    assert spearman == pytest.approx(record["audit"]["fidelity"]["spearman"])
    assert stages["score/seconds"][0][1] > 0


def test_wandb_is_told_offline_too(place, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(place.path))
    assert place.run("--set", "tracking=wandb", "proxy.align=false", "audit=false") == 0
    assert list((place.path / "wandb").glob("offline-run-*/*.wandb"))


def test_trackio_has_training_and_stages_in_one_run(place, monkeypatch, capfd):
    pytest.importorskip("trackio")
    script = f"""
import json, trackio
from iprox.cli import main
assert main(["run", {str(place.recipe)!r}, "--json", "--set", "tracking=trackio", "proxy.align=false"]) == 0
from trackio.sqlite_storage import SQLiteStorage
(run,) = trackio.Api().runs("iprox")
print(json.dumps([run.name, sorted(set().union(*SQLiteStorage.get_logs("iprox", run.name)))]))
"""
    env = {**os.environ, "TRACKIO_DIR": str(place.path / "trackio"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, check=True)
    summary, (name, metrics) = map(json.loads, done.stdout.splitlines())
    assert summary["output"] == str(place.output)
    assert name == place.output.name
    assert {"train/loss", "audit/fidelity/spearman", "score/seconds"} <= set(metrics)


def test_mlflow_has_metrics(place, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{place.path}/mlflow.db")
    pytest.importorskip("sqlalchemy")
    assert place.run("--set", "tracking=mlflow", "proxy.align=false") == 0
    (run,) = mlflow.search_runs(output_format="list")
    assert run.data.metrics["audit/fidelity/spearman"] == pytest.approx(
        place.record()["stages"]["audit"]["fidelity"]["spearman"]
    )


def test_a_service_that_is_not_installed_is_refused_before_any_work(place, monkeypatch, capfd):
    monkeypatch.setattr(tracking, "find_spec", lambda name: None)
    assert place.run("--set", "tracking=wandb") == 2
    assert "pip install wandb" in capfd.readouterr().err
    assert not place.output.exists()


def test_a_service_that_fails_is_given_up_with_a_warning(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    warned = []
    with tracking.Tracker("tensorboard", tmp_path, {}, warned.append) as tracker:
        monkeypatch.setattr(tracker, "_send", lambda *given: 1 / 0)
        for _ in range(3):
            tracker.stage("score", {"seconds": 1.0})
    assert warned == ["tracking: tensorboard failed, so nothing more is logged: division by zero"]


def test_a_service_that_cannot_be_started_is_refused(tmp_path):
    pytest.importorskip("tensorboard")
    (tmp_path / "tensorboard").write_text("a file where its folder should be")
    with pytest.raises(InputError, match="tensorboard cannot be started"):
        tracking.Tracker("tensorboard", tmp_path, {})


def test_numbers_are_found_by_path():
    entry = {"a": 1, "b": {"c": 0.5, "d": "text", "e": [1]}, "flag": True, "none": None}
    assert dict(tracking.numbers(entry, "s")) == {"s/a": 1.0, "s/b/c": 0.5}


def test_a_service_that_fails_at_the_end_fails_no_run(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    warned = []
    with tracking.Tracker("tensorboard", tmp_path, {}, warned.append) as tracker:
        monkeypatch.setattr(tracker._writer, "close", lambda: 1 / 0)
    assert len(warned) == 1
    assert not tracker.__exit__(KeyboardInterrupt, None, None)  # an interruption stays one
