"""Going on with a run: what is skipped, what is done again, and that the bytes are those of a run without a stop."""

import json
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml
from safetensors.torch import load_file, save_file

from iprox.cli import main
from iprox.data.sampling import draw_rows
from iprox.engine import shards
from iprox.files import FolderLock
from iprox.influence import index
from iprox.influence.estimators import ekfac
from iprox.kronecker.eigen import kronecker_curvature
from iprox.stages import alignment, compression, indexing, scoring

CHEAP = ["--set", "warmup=false", "proxy=false", "audit=false"]


def test_a_moved_run_folder_is_done_already(copied, finished):
    assert copied.run() == 0
    assert copied.done() == []
    assert copied.result() == finished.result()


@pytest.mark.parametrize(
    ("change", "said", "again"),
    [
        # The few rows that are attributed here stay the same.
        ("select.fraction=0.2", "select.fraction 0.1 → 0.2", ["select", "report"]),
        (
            "influence.per_example=true",
            "influence.per_example off → on",
            ["audit", "score", "select", "attribute", "report"],
        ),
        (
            "proxy.sparsity=0.6",
            "proxy.sparsity 0.5 → 0.6",
            ["compress", "align", "audit", "score", "select", "attribute", "report"],
        ),
        ("audit=false", "audit on → off", ["report"]),
    ],
)
def test_a_changed_setting_is_said_and_redoes_what_depends_on_it(copied, capfd, change, said, again):
    assert main(["run", str(copied.recipe), "--set", change]) == 0
    assert copied.done() == again
    lines = capfd.readouterr().err.splitlines()
    assert f"settings changed since the last start: {said}" in lines
    assert [
        line.split(":")[0] for line in lines if "done again, because its inputs or settings have changed" in line
    ] == again


def test_a_recipe_of_an_earlier_start_that_cannot_be_read_or_lacks_keys_is_no_fault(copied, capfd):
    recipe = copied.output / "recipe.yaml"
    whole = yaml.safe_load(recipe.read_text())
    del whole["data"]["columns"]  # as a version wrote it that did not know the key
    for text in ("{1: 2, model: m}", "[", yaml.safe_dump(whole)):
        recipe.write_text(text)
        assert main(["run", str(copied.recipe)]) == 0
        assert copied.done() == []
        changed = [line for line in capfd.readouterr().err.splitlines() if line.startswith("settings changed")]
        assert len(changed) == (text[0] == "{")


def test_other_columns_are_another_run(copied, capfd):
    assert copied.run("--set", "data.columns.task=source") == 2
    assert "holds another run (pool, validation, data.columns differ)" in capfd.readouterr().err


def test_a_stage_done_by_another_version_is_said(copied, capfd):
    record = copied.record()
    record["stages"]["score"]["iprox"] = "0.0.1"
    (copied.output / "run.json").write_text(json.dumps(record))
    assert main(["run", str(copied.recipe)]) == 0
    err = capfd.readouterr().err
    assert "✓ score: done already by iprox 0.0.1, not " in err
    assert "settings changed" not in err
    assert err.count("done already by") == 1


@pytest.mark.parametrize(
    ("output", "again"),
    [
        ("selection.json", ["select"]),
        ("audit/audit.parquet", ["audit"]),
        ("scores.parquet", ["score"]),
        ("aligned/alignment.json", ["align"]),
        ("report.html", ["report"]),
    ],
)
def test_a_deleted_output_is_made_again(copied, finished, output, again):
    (copied.output / output).unlink()
    assert copied.run() == 0
    assert copied.done() == again
    assert copied.result() == finished.result()


def test_a_stage_switched_off_and_on_again_is_still_done(copied, finished):
    assert copied.run("--set", "audit=false") == 0
    assert "audit" not in copied.record()["stages"]
    assert copied.run() == 0
    assert copied.done() == ["report"]
    assert copied.result() == finished.result()


def test_stop_after_an_early_stage_forgets_nothing(copied, finished):
    assert copied.run("--stop-after", "warmup") == 0
    assert list(copied.record()["stages"]) == ["data", "warmup"]
    assert copied.run() == 0
    assert copied.done() == []
    assert copied.result() == finished.result()


def test_stop_after_leaves_the_rest_undone(place):
    assert place.run(*CHEAP, "influence.estimator=length", "--stop-after", "score") == 0
    assert list(place.record()["stages"]) == ["data", "score"]
    assert not (place.output / "selected.jsonl").exists()


def test_stop_after_data_only_reads(place):
    assert place.run("--stop-after", "data") == 0
    assert sorted(file.name for file in place.output.iterdir()) == ["recipe.yaml", "run.json"]


def test_the_resolved_recipe_interrupted_between_stages_gives_the_same_bytes_from_anywhere(
    place, finished, tmp_path, monkeypatch, capfd
):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    command = ["run", str(finished.output / "recipe.yaml"), "--quiet", "--set", f"output={place.output}"]
    with monkeypatch.context() as patch:
        patch.setattr(alignment, "align_proxy", interrupt)
        assert main(command) == 130
    assert "interrupted" in capfd.readouterr().err
    assert list(place.record()["stages"]) == ["data", "warmup", "curvature", "compress"]
    assert main(command) == 0
    assert place.done() == ["align", "audit", "score", "select", "attribute", "report"]
    assert place.result() == finished.result()


def test_the_curvature_is_measured_once_and_its_files_go_with_the_end_of_the_run(copied, finished, monkeypatch):
    assert not (copied.output / "curvature").exists()
    measured = []

    def counted(*arguments, **options):
        measured.append(options["corrected"])
        return kronecker_curvature(*arguments, **options)

    monkeypatch.setattr(ekfac, "kronecker_curvature", counted)
    shutil.rmtree(copied.output)
    assert copied.run("--stop-after", "score") == 0
    assert measured == [True]
    assert (copied.output / "curvature/0/layers.json").is_file()
    assert copied.run() == 0
    assert measured == [True]
    assert not (copied.output / "curvature").exists()
    assert copied.result() == finished.result()
    # What is done again after the end measures it once more, for all stages.
    assert copied.run("--set", "influence.damping=0.2") == 0
    assert {"audit", "score"} <= set(copied.done())
    assert measured == [True, True]
    assert not (copied.output / "curvature").exists()


def test_killed_while_scoring_goes_on_after_the_last_shard(copied, finished, monkeypatch):
    monkeypatch.setattr(scoring, "WINDOW", 100)
    (copied.output / "scores.parquet").unlink()
    write, written = shards.write_parts, []

    def write_one(path, parts):
        if written:
            raise KeyboardInterrupt
        written.append(path)
        return write(path, parts)

    with monkeypatch.context() as patch:
        patch.setattr(shards, "write_parts", write_one)
        assert copied.run() == 130
    kept = list((copied.output / "scores.parquet.shards").rglob("*.parquet"))
    assert kept == written

    def write_rest(path, parts):
        assert path not in kept
        return write(path, parts)

    with monkeypatch.context() as patch:
        patch.setattr(shards, "write_parts", write_rest)
        assert copied.run("--stop-after", "select") == 0
    resumed = copied.result()
    (copied.output / "scores.parquet").unlink()
    assert copied.run("--stop-after", "select") == 0
    assert copied.result() == resumed
    assert not (copied.output / "scores.parquet.shards").exists()


def test_refine_killed_while_scoring_goes_on_after_the_last_shard_to_the_same_bytes(finished, tmp_path, monkeypatch):
    monkeypatch.setattr(scoring, "WINDOW", 100)
    checkpoints = json.loads((finished.output / "warmup/checkpoints.json").read_text())
    command = ["refine", "--scores", str(finished.output), "--pool", str(finished.pool), "--candidates=0.8", "--quiet"]
    command += ["--model", str(finished.output / "warmup" / checkpoints[-1]["path"]), "--validation"]
    command += [f"{task}={finished.path / task}.jsonl" for task in ("arithmetic", "spelling")]
    assert main([*command, "--output", str(tmp_path / "whole")]) == 0
    write, written = shards.write_parts, []

    def write_one(path, parts):
        if written:
            raise KeyboardInterrupt
        written.append(path)
        return write(path, parts)

    with monkeypatch.context() as patch:
        patch.setattr(shards, "write_parts", write_one)
        assert main([*command, "--output", str(tmp_path / "resumed")]) == 130
    assert list((tmp_path / "resumed").rglob("*.parquet")) == written

    def write_rest(path, parts):
        assert path not in written
        return write(path, parts)

    with monkeypatch.context() as patch:
        patch.setattr(shards, "write_parts", write_rest)
        assert main([*command, "--output", str(tmp_path / "resumed")]) == 0
    for name in ("scores.parquet", "refine.json"):
        assert (tmp_path / "resumed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert sorted(file.name for file in (tmp_path / "resumed").iterdir()) == [
        "refine.json",
        "run.json",
        "scores.parquet",
    ]


def test_a_command_killed_while_it_merges_shards_goes_on(finished, tmp_path, monkeypatch):
    """Killed outright, so that nothing is tidied away: the merged file is half written, or whole beside its shards."""
    options = [
        "--model",
        str(finished.output / "aligned"),
        "--pool",
        str(finished.pool),
        "--set=data.max_length=48",
        "--estimator=tracin",
        "--quiet",
    ]
    options += ["--validation", f"spelling={finished.path / 'spelling.jsonl'}"]
    assert main(["score", *options, "--output", str(tmp_path / "whole")]) == 0

    def stop(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shards, "merge_shards", stop)
        assert main(["score", *options, "--output", str(tmp_path / "killed")]) == 130
    for left in ("scores.parquet.partial", "scores.parquet"):
        folder = shutil.copytree(tmp_path / "killed", tmp_path / f"{left}-left")
        (folder / left).write_bytes(b"half")
        assert main(["score", *options, "--output", str(folder)]) == 0
        assert (folder / "scores.parquet").read_bytes() == (tmp_path / "whole/scores.parquet").read_bytes()
        assert sorted(file.name for file in folder.iterdir()) == ["run.json", "scores.parquet"]


def test_a_row_that_the_template_refuses_stops_a_run_that_goes_on_without_it(place, refused):
    """It is met while scoring, after other work, and none of that is done again."""
    template = place.path / "strict.jinja"
    own = Path(yaml.safe_load(place.recipe.read_text())["model"]) / "chat_template.jinja"
    strict = "{% for m in messages if 'forbidden' in m.content %}{{ raise_exception('not this one') }}{% endfor %}"
    template.write_text(strict + own.read_text())
    row = next(row for row in range(199, 0, -1) if row not in draw_rows("warmup", 0, 200, 12))
    lines = place.pool.read_text().splitlines()
    changed = json.loads(lines[row])
    changed["messages"][0]["content"] += " forbidden"
    lines[row] = json.dumps(changed)
    place.pool.write_text("\n".join(lines) + "\n")
    options = ["proxy=false", "audit=false", "influence.estimator=tracin", f"data.chat_template={template}"]
    said = refused("run", place.recipe, "--quiet", "--set", *options)
    assert (
        f"pool.jsonl:{row + 1}: the chat template {template} refuses this row: not this one (--set data.on_bad_row=skip"
        in said
    )
    assert place.run("--set", *options, "data.on_bad_row=skip") == 0
    assert place.done() == ["score", "select", "attribute", "report"]
    influence = pq.read_table(place.output / "scores.parquet")["influence"]
    assert [number for number, value in enumerate(influence.to_pylist()) if value is None] == [row]
    assert "or the chat template refuses them" in place.record()["stages"]["score"]["warnings"][0]


@pytest.mark.parametrize("command", ["score", "index"])
def test_a_template_file_changed_between_two_starts_is_another_template(place, tmp_path, monkeypatch, command):
    """What an interrupted start has left was read by the other one: all of it is made again."""
    monkeypatch.setattr(scoring, "WINDOW", 25)
    monkeypatch.setattr(indexing, "WINDOW", 25)
    place.pool.write_bytes(b"".join(place.pool.read_bytes().splitlines(keepends=True)[:50]))
    model = yaml.safe_load(place.recipe.read_text())["model"]
    own = (Path(model) / "chat_template.jinja").read_text()
    template = tmp_path / "mine.jinja"
    options = ["--model", model, "--pool", str(place.pool), "--set=data.max_length=48", "--quiet"]
    options += [f"--set=data.chat_template={template}"]
    if command == "score":
        options += ["--estimator=length", "--validation", f"spelling={place.path / 'spelling.jsonl'}"]
    module, name = (shards, "write_parts") if command == "score" else (index, "replacing")
    write, written = getattr(module, name), []

    def write_one(*arguments):
        if written:
            raise KeyboardInterrupt
        written.append(arguments)
        return write(*arguments)

    template.write_text(own)
    with monkeypatch.context() as patch:
        patch.setattr(module, name, write_one)
        assert main([command, *options, "--output", str(tmp_path / "resumed")]) == 130
    template.write_text("{{ 'so ' }}" + own)
    assert main([command, *options, "--output", str(tmp_path / "resumed")]) == 0
    assert main([command, *options, "--output", str(tmp_path / "whole")]) == 0
    files = ["scores.parquet"] if command == "score" else ["000000.arrow", "000001.arrow", "index.json"]
    for file in files:
        assert (tmp_path / "resumed" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


def test_validation_rows_that_the_template_refuses_are_said(finished, tmp_path):
    own = Path(yaml.safe_load(finished.recipe.read_text())["model"]) / "chat_template.jinja"
    strict = "{% for m in messages if 'forbidden' in m.content %}{{ raise_exception('not this one') }}{% endfor %}"
    (tmp_path / "strict.jinja").write_text(strict + own.read_text())
    lines = (finished.path / "spelling.jsonl").read_text().splitlines()
    changed = json.loads(lines[2])
    changed["messages"][0]["content"] += " forbidden"
    (tmp_path / "spelling.jsonl").write_text("\n".join([*lines[:2], json.dumps(changed), *lines[3:]]) + "\n")
    options = [
        "--model",
        str(finished.output / "aligned"),
        "--pool",
        str(finished.pool),
        "--set=data.max_length=48",
        "--estimator=tracin",
        "--quiet",
    ]
    options += ["--set", f"data.chat_template={tmp_path / 'strict.jinja'}", "--set=data.on_bad_row=skip"]
    options += ["--validation", f"spelling={tmp_path / 'spelling.jsonl'}", "--output", str(tmp_path / "scores")]
    assert main(["score", *options]) == 0
    warnings = json.loads((tmp_path / "scores/run.json").read_text())["stages"]["score"]["warnings"]
    (said,) = [text for text in warnings if "were cut" not in text]
    assert said.startswith(f"validation task 'spelling': 1 of {len(lines)} examples have no supervised token, or the")


def test_a_stage_stopped_half_way_is_not_taken_for_the_earlier_one(copied, monkeypatch):
    """Sparsity changed, stopped after the proxy was replaced, sparsity changed back: the proxy must be made again."""
    make = compression.compress

    def make_and_stop(*arguments, **settings):
        make(*arguments, **settings)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(compression, "compress", make_and_stop)
        assert copied.run("--set", "proxy.sparsity=0.8") == 130
    assert copied.run("--stop-after", "compress") == 0
    assert copied.done() == ["compress"]
    made = json.loads((copied.output / "proxy/compression.json").read_text())
    assert made["size"] == {"sparsity": 0.5}


def test_fresh_starts_anew(copied, finished):
    assert copied.run("--fresh", *CHEAP, "--stop-after", "data") == 0
    assert sorted(file.name for file in copied.output.iterdir()) == ["recipe.yaml", "run.json"]


def test_the_resolved_recipe_is_absolute_and_whole(finished, monkeypatch):
    resolved = yaml.safe_load((finished.output / "recipe.yaml").read_text())
    assert resolved["data"]["pool"] == [str(finished.pool)]
    assert resolved["output"] == str(finished.output)
    assert resolved["seed"] == 0
    assert resolved["influence"]["estimator"] == "ekfac"


def warnings_of_drawing(place):
    said = ("are also used by", "are left in the pool")
    stages = {name: [text for text in entry["warnings"] if any(each in text for each in said)]
              for name, entry in place.record()["stages"].items()}  # fmt: skip
    return {name: warnings for name, warnings in stages.items() if warnings}


def test_warnings_of_drawing_rows_belong_to_their_stage(copied):
    assert copied.run("--set", "audit.sample=90") == 0
    warned = warnings_of_drawing(copied)
    assert list(warned) == ["audit"]
    assert "24 of its 64" in warned["audit"][0]
    assert copied.run("--set", "audit.sample=90", "select.fraction=0.2") == 0
    assert warnings_of_drawing(copied) == warned


def test_seed_changes_every_draw(place):
    assert place.run("--set", "seed=1", "--stop-after", "data") == 0
    assert place.record()["seed"] == 1
    assert draw_rows("audit", 0, 1000, 20) != draw_rows("audit", 1, 1000, 20)


def test_an_off_the_shelf_proxy_is_known_by_what_it_is_not_by_where(place, model, tmp_path):
    first, moved = tmp_path / "small", tmp_path / "moved"
    shutil.copytree(model, first)
    options = ["warmup=false", "audit=false", "influence.estimator=tracin", "--stop-after", "select"]

    def run(proxy):
        return place.run("--set", f"proxy={{method: off-the-shelf, model: {proxy}}}", *options)

    assert run(first) == 0
    before = place.result()
    first.rename(moved)
    assert run(moved) == 0
    assert place.done() == []
    weights = load_file(moved / "model.safetensors")
    weights["model.layers.0.mlp.down_proj.weight"] = weights["model.layers.0.mlp.down_proj.weight"] * 3
    save_file(weights, moved / "model.safetensors", metadata={"format": "pt"})
    assert run(moved) == 0
    assert place.done()[:2] == ["compress", "score"]
    assert place.result()["scores.parquet"] != before["scores.parquet"]


def test_two_starts_do_not_work_in_one_folder(copied, finished, capfd):
    """As a second start beside the first does, or a second rank of torchrun."""
    held = FolderLock(copied.output)
    assert copied.run() == 2
    assert "another iprox process is writing there" in capfd.readouterr().err
    held.release()
    assert copied.run() == 0
    assert copied.result() == finished.result()


def test_several_processes_of_torchrun_are_refused_where_nothing_is_trained(place, monkeypatch, refused):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "iprox report runs as one process" in refused("report", place.output)
    assert not place.output.exists()


def test_an_off_the_shelf_proxy_with_another_tokenizer_is_refused(place, model, tmp_path, capfd):
    other = tmp_path / "other"
    shutil.copytree(model, other)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    first, second = list(vocabulary)[40:42]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    proxy = f"proxy={{method: off-the-shelf, model: {other}}}"
    assert place.run("--set", "warmup=false", "audit=false", proxy) == 2
    assert "its tokenizer differs from the target's" in capfd.readouterr().err


def test_a_report_of_scores_that_another_recipe_made_is_refused(copied, refused):
    assert copied.run("--set", "proxy.sparsity=0.6", "--stop-after", "data") == 0
    said = refused("report", copied.output, "--quiet")
    assert "its scores belong to an earlier recipe" in said
    assert copied.run() == 0
    assert "score" not in copied.done()
