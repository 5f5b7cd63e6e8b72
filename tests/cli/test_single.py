"""Folders of single commands: nothing of the user's or of an earlier start is lost, whatever fails."""

import json

import pytest
import yaml

from iprox.cli import main
from iprox.run import steps


@pytest.fixture
def command(place):
    """`iprox score` without gradients, which takes a second."""
    model = yaml.safe_load(place.recipe.read_text())["model"]
    files = ["--model", model, "--pool", str(place.pool), "--validation", f"spelling={place.path / 'spelling.jsonl'}"]
    return ["score", *files, "--estimator=length", "--set=data.max_length=48", "--quiet"]


def test_a_second_start_that_fails_leaves_the_result(command, tmp_path, monkeypatch, capfd):
    output = tmp_path / "scores"
    assert main([*command, "--output", str(output)]) == 0
    (output / "mine.txt").write_text("mine")
    before = {file.name: file.read_bytes() for file in output.iterdir()}

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(steps, "_engine", interrupted)
        assert main([*command, "--output", str(output)]) == 130
    assert {file.name: file.read_bytes() for file in output.iterdir()} == before
    assert main([*command, "--output", str(output)]) == 0  # done already
    assert main([*command, "--output", str(output), "--set=data.max_length=40"]) == 2
    assert "exists already and has another result (reading differ" in capfd.readouterr().err
    assert (output / "scores.parquet").read_bytes() == before["scores.parquet"]


def test_the_working_directory_a_link_and_a_neighbor_named_partial(command, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert main([*command, "--output", "."]) == 0
    assert (tmp_path / "here/scores.parquet").is_file()
    (tmp_path / "far").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "far")
    (tmp_path / "link.partial").mkdir()
    (tmp_path / "link.partial/mine.txt").write_text("mine")
    assert main([*command, "--output", str(tmp_path / "link")]) == 0
    assert (tmp_path / "far/scores.parquet").is_file()
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "link.partial/mine.txt").read_text() == "mine"


def test_a_proxy_is_made_in_a_linked_folder_and_keeps_its_record(place, tmp_path):
    model = yaml.safe_load(place.recipe.read_text())["model"]
    (tmp_path / "far").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "far")
    (tmp_path / "far.partial").mkdir()
    files = ["--model", model, "--pool", str(place.pool), "--output", str(tmp_path / "link")]
    assert main(["compress", *files, "--sparsity=0.5", "--method=svd", "--set=data.max_length=48", "--quiet"]) == 0
    assert {"model.safetensors", "config.json", "compression.json", "run.json"} <= {
        file.name for file in (tmp_path / "far").iterdir()
    }
    assert not list((tmp_path / "far").glob("*.partial"))
    assert (tmp_path / "far.partial").is_dir()


def test_an_edited_template_is_another_result(place, tmp_path, capfd):
    model = yaml.safe_load(place.recipe.read_text())["model"]
    template = tmp_path / "mine.jinja"
    template.write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    files = ["--model", model, "--pool", str(place.pool), "--output", str(tmp_path / "proxy"), "--method=svd"]
    options = ["--sparsity=0.5", f"--set=data.chat_template={template}", "--set=data.max_length=48", "--quiet"]
    assert main(["compress", *files, *options]) == 0
    template.write_text("{% for m in messages %}{{ m.content }} {% endfor %}")
    assert main(["compress", *files, *options]) == 2
    assert "has another result" in capfd.readouterr().err


def test_a_section_that_the_command_is_about_cannot_be_off(place, refused):
    files = ["--model=m", "--pool", place.pool, "--output", place.path / "p"]
    assert "proxy is false" in refused("compress", *files, "--set", "proxy=false")
    assert "does not read proxy.align.epochs" in refused("compress", *files, "--set", "proxy.align.epochs=2")
    assert "does not read select.fraction" in refused(
        "refine", *files, "--scores=s", "--validation", "t=v", "--set", "select.fraction=0.5"
    )


def test_a_selection_is_not_tested_on_itself(place, refused):
    model = yaml.safe_load(place.recipe.read_text())["model"]
    files = ["--model", model, "--selection", place.pool, "--test", f"t={place.pool}", "--output", place.path / "t"]
    assert "is part of both the selection and the test set of t" in refused("finetune", *files)
    assert not (place.path / "t").exists()


def test_what_an_unfinished_command_left_is_taken_over(command, tmp_path):
    output = tmp_path / "scores"
    output.mkdir()
    (output / "run.json").write_text(json.dumps({"identity": {"command": "iprox score"}, "stages": {}}))
    assert main([*command, "--output", str(output)]) == 0
    assert (output / "scores.parquet").is_file()
