"""Bad input: one clear line on standard error, exit code 2, nothing half-made left behind."""

import errno
import json
import os
import re
import shutil
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from huggingface_hub import get_session
from huggingface_hub.errors import HTTPError
from safetensors.torch import load_file, save_file

from iprox.cli import main
from iprox.data import Pool
from iprox.errors import InputError
from iprox.models import loading, weight_files
from iprox.report import page
from iprox.run import folder as run_folder

OFF = ["--set", "warmup=false", "proxy=false", "audit=false"]
BY_LENGTH = [*OFF, "influence.estimator=length"]  # where scores are beside the point


def rows(place):
    return [json.loads(line) for line in place.pool.read_text().splitlines()]


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


@pytest.fixture
def run(place, refused):
    """Run the recipe, which must be refused in one line and leave no run behind."""

    def call(*arguments, lines=1):
        before = place.files()
        said = refused("run", place.recipe, "--quiet", *arguments)
        assert len(said.splitlines()) == lines, said
        assert place.files() == before
        return said

    return call


def test_missing_pool(place, run):
    place.pool.rename(place.path / "pol.jsonl")
    assert "pool: there is no file" in (said := run())
    assert "pol.jsonl" in said


def test_empty_pool(place, run):
    place.pool.write_text("")
    assert "pool: no examples in" in run()


def test_bad_rows_stop_and_are_listed(place, run):
    place.pool.write_text('{"text": ""}\nnot json\n' + place.pool.read_text() + '{"no": "format"}\n')
    said = run(lines=4)
    assert "3 of 203 rows are bad" in said
    assert "--set data.on_bad_row=skip" in said
    for row in (1, 2, 203):
        assert f"pool.jsonl:{row}: " in said


def test_duplicate_ids(place, run):
    write(place.pool, [{**row, "id": "same"} for row in rows(place)[:3]])
    said = run()
    assert "pool.jsonl:1 and pool.jsonl:2 have the same id 'same'" in said


def test_empty_validation(place, run):
    (place.path / "spelling.jsonl").write_text("")
    assert "spelling: no examples in" in run()


def test_template_that_marks_no_assistant_token(place, run):
    template = place.path / "template.jinja"
    template.write_text("{% for m in messages %}{{ m.content }}{% endfor %}{% generation %}{% endgeneration %}")
    said = run("--set", f"data.chat_template={template}", lines=2)
    assert "arithmetic.jsonl:1: the chat template marks no assistant token" in said


def test_no_such_model(place, run):
    assert f"{place.path / 'nothing'}: no such model folder" in run("--set", f"model={place.path / 'nothing'}")


LOADERS = (loading.load_config, loading.load_model, loading.load_tokenizer, loading.checkpoint_fingerprint)


@pytest.mark.parametrize("name", ["o/aligned", "aligned"])
def test_a_folder_that_is_not_there_is_said_before_the_hub_is(monkeypatch, tmp_path, name):
    monkeypatch.chdir(tmp_path)

    def unreachable(*_args, **_kwargs):
        raise OSError("We couldn't connect to 'https://huggingface.co' to load the files")

    monkeypatch.setattr(weight_files, "get_hf_file_metadata", lambda _: None)
    monkeypatch.setattr(loading.PretrainedConfig, "get_config_dict", unreachable)
    monkeypatch.setattr(loading.AutoTokenizer, "from_pretrained", unreachable)
    monkeypatch.setattr(loading, "cached_file", unreachable)
    for load in LOADERS:
        with pytest.raises(InputError, match=f"^{name}: no such folder here, and on the hub: .* We"):
            load(name)


@pytest.mark.parametrize("name", ["o/aligned", "aligned"])
def test_a_hub_that_cannot_be_reached_is_asked_once(monkeypatch, tmp_path, name):
    """huggingface_hub itself asks six times, and waits 23 seconds in all."""
    monkeypatch.chdir(tmp_path)
    asked = []

    def unreachable(_client, **request):
        asked.append(request["url"])
        raise HTTPError("Name or service not known")

    monkeypatch.setattr(type(get_session()), "request", unreachable)
    monkeypatch.setattr(weight_files.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(weight_files.constants, "HF_HUB_CACHE", str(tmp_path))
    for load in LOADERS:
        with pytest.raises(InputError, match=f"^{name}: no such folder here, and the Hub cannot be reached"):
            load(name)
    assert asked == [f"{weight_files.constants.ENDPOINT}/{name}/resolve/main/config.json"] * len(LOADERS)


def test_a_model_in_the_cache_needs_no_hub(monkeypatch, tmp_path):
    snapshot = tmp_path / "models--o--known/snapshots/0"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    monkeypatch.setattr(weight_files.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(weight_files, "get_hf_file_metadata", lambda _: pytest.fail("the Hub was asked"))
    weight_files.check_reachable("o/known")


@pytest.mark.parametrize("json_asked", [False, True])
def test_what_a_terminal_obeys_does_not_reach_it(monkeypatch, capsys, tmp_path, json_asked):
    pool = tmp_path / "\x1b[31mred\x9b.jsonl"
    assert (
        main(["score", "--model", "m", "--validation", "v=v", "--output", str(tmp_path / "o"), "--pool", str(pool)])
        == 2
    )
    said = capsys.readouterr()
    assert r"\x1b[31mred\x9b.jsonl" in said.err
    monkeypatch.setattr(page, "build_report", lambda folder: folder / "\x1b[31m\x9b")
    assert main(["report", "run", *(["--json"] if json_asked else [])]) == 0
    monkeypatch.setattr(page, "build_report", lambda _: {}["\x1b[31m" + "\x9b"])
    assert main(["report", "run"]) == 1
    said = capsys.readouterr()
    assert not re.search("[\x1b\x9b]", said.out + said.err)
    if json_asked:
        assert json.loads(said.out) == {"report": "run/\x1b[31m\x9b"}


@pytest.fixture
def broken(place, model):
    """A copy of the model to break, named in the recipe."""
    folder = place.path / "broken"
    shutil.copytree(model, folder)
    place.set(model=str(folder))
    return folder


def test_model_without_config(broken, run):
    (broken / "config.json").unlink()
    assert f"{broken}: no config.json in it" in run()


def test_model_with_pickled_weights_only(broken, run):
    (broken / "model.safetensors").rename(broken / "pytorch_model.bin")
    said = run()
    assert "pickled weights only (pytorch_model.bin)" in said
    assert "save_pretrained" in said


def test_tokenizer_without_chat_template(broken, run, place):
    (broken / "chat_template.jinja").unlink()
    assert "--set data.chat_template=chatml" in run()
    assert place.run(*BY_LENGTH, "data.chat_template=chatml", "--stop-after", "score") == 0
    assert "ChatML" in place.record()["stages"]["data"]["labels"]


def test_nan_weights_are_named(broken, place, refused):
    weights = load_file(broken / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    for stage in ("warmup", "compress", "score"):
        off = [] if stage == "warmup" else ["--set", "warmup=false"] if stage == "compress" else OFF
        said = refused("run", place.recipe, "--quiet", "--fresh", *off)
        assert "model.layers.1.mlp.up_proj.weight has NaN or infinity" in said
        assert len(said.splitlines()) == 1
        assert sorted(file.name for file in place.output.iterdir() if not file.is_dir()) == ["recipe.yaml", "run.json"]


def test_model_without_compressible_layer(place, run, monkeypatch):
    monkeypatch.setattr(loading.AutoModelForCausalLM, "from_config", lambda *_, **__: torch.nn.Embedding(3, 3))
    assert "has no linear layer to compress" in run()


@pytest.mark.parametrize("sparsity", ["0", "1", "-0.5", "1.5", "most"])
def test_sparsity_out_of_range(run, sparsity):
    assert "proxy.sparsity: " in run("--set", f"proxy.sparsity={sparsity}")


def test_unknown_stage(run):
    assert 'Choose from: "data", "warmup", "curvature", "compress"' in run("--stop-after", "scoring")


def test_unknown_device(run):
    assert "device cuda" in run("--set", "device=cuda")
    assert "device nonsense" in run("--set", "device=nonsense")


def test_more_selected_than_scored(place, refused):
    said = refused("run", place.recipe, "--quiet", *OFF, "select.count=500", "select.fraction=null")
    assert "500 rows are to be selected, but the pool has only 200; ask for fewer" in said
    assert not place.output.exists()


def test_a_floor_of_an_unknown_source_is_told_before_anything_is_scored(place, refused):
    said = refused("run", place.recipe, "--quiet", *OFF, "select.source_floor={arithmetics: 0.5}")
    assert "the floor of the source 'arithmetics': the pool has no such source; did you mean 'arithmetic'?" in said
    assert not place.output.exists()


def test_a_task_to_select_by_that_is_not_validated(place, refused):
    said = refused("run", place.recipe, "--quiet", *OFF, "select.task=maths")
    assert "select.task 'maths' is none of data.validation: arithmetic, spelling" in said
    said = refused("run", place.recipe, "--quiet", *OFF, "select.weights={maths: 2}")
    assert "select.weights 'maths' is none of data.validation: arithmetic, spelling" in said
    both = ["select.task=spelling", "select.weights={spelling: 2}"]
    assert "weights are for several tasks" in refused("run", place.recipe, "--quiet", *OFF, *both)


def test_a_selection_named_as_another_format(finished, tmp_path, refused):
    said = refused(
        "select", "--scores", finished.output, "--pool", finished.pool, "--output", tmp_path / "chosen.parquet"
    )
    assert "a selection is written as JSON lines; name it chosen.jsonl" in said
    assert not list(tmp_path.iterdir())


def test_output_of_another_run(copied, refused):
    write(copied.pool, rows(copied)[:-1])
    before = (copied.output / "run.json").read_bytes()
    said = refused("run", copied.recipe, "--quiet")
    assert f"{copied.output}: holds another run (pool differ); choose another output, or --fresh" in said
    assert (copied.output / "run.json").read_bytes() == before


@pytest.mark.parametrize("fresh", [[], ["--fresh"]])
def test_foreign_folder_is_left_alone(place, refused, fresh):
    place.output.mkdir()
    for name in ("recipe.yaml", "thesis.tex"):
        (place.output / name).write_text("years of work")
    said = refused("run", place.recipe, "--quiet", *fresh)
    assert f"{place.output}: is not empty and has no run.json" in said
    assert sorted(file.name for file in place.output.iterdir()) == ["recipe.yaml", "thesis.tex"]


def test_output_that_is_a_file(place, run):
    place.output.write_text("x")
    assert f"{place.output}: is a file" in run()


def test_a_full_disk(place, refused, monkeypatch):
    real = os.replace

    def full(source, target):
        if str(target).endswith("scores.parquet"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        said = refused("run", place.recipe, "--quiet", *BY_LENGTH)
    place_said, _, reason = said.partition(": no space left on the disk; free some")
    assert place_said == f"iprox: {place.output / 'scores.parquet'}"
    assert reason
    assert not list(place.output.rglob("*.partial"))
    assert not (place.output / "scores.parquet").exists()
    assert place.run(*BY_LENGTH) == 0


def test_a_disk_full_from_the_start(place, refused, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(run_folder.os, "replace", full)
        assert "no space left on the disk" in refused("run", place.recipe, "--quiet", *OFF)
    assert list(place.output.iterdir()) == []
    assert place.run(*OFF, "--stop-after", "data") == 0


def test_not_enough_memory_says_what_to_halve(place, refused, monkeypatch):
    def out_of_memory(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr("iprox.stages.scoring.score_to_file", out_of_memory)
    said = refused("run", place.recipe, "--quiet", *OFF)
    assert "not enough memory on cpu" in said
    assert "batch_tokens=512" in said
    assert len(said.splitlines()) == 1


def single(place, command, *arguments):
    tasks = [f"{task}={place.path / task}.jsonl" for task in ("arithmetic", "spelling")]
    inputs = {
        "compress": ["--pool", place.pool],
        "align": ["--pool", place.pool],
        "audit": ["--pool", place.pool, "--validation", *tasks],
        "score": ["--pool", place.pool, "--validation", *tasks],
        "finetune": ["--selection", place.pool],
        "warmup": ["--pool", place.pool],
    }
    return [command, *inputs[command], "--quiet", "--set=data.max_length=48", *arguments]


@pytest.mark.parametrize("command", ["align", "audit"])
def test_a_proxy_with_another_target(finished, model, tmp_path, refused, command):
    options = ["--model", model, "--proxy", finished.output / "proxy", "--output", tmp_path / "out"]
    said = refused(*single(finished, command, *options))
    assert f"{finished.output / 'proxy'}: is a proxy of " in said
    assert f"not of {model}" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["align", "audit"])
def test_a_model_offered_as_proxy(finished, model, tmp_path, refused, command):
    options = ["--model", model, "--proxy", model, "--output", tmp_path / "out"]
    assert f"{model}: is not an iprox proxy" in refused(*single(finished, command, *options))
    assert not (tmp_path / "out").exists()


def test_exporting_a_model_that_is_no_proxy(model, tmp_path, refused):
    assert "is not an iprox proxy" in refused("export", model, "--output", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_compressing_a_proxy(finished, tmp_path, refused):
    options = ["--model", finished.output / "proxy", "--sparsity=0.5", "--output", tmp_path / "out"]
    assert "is already an iprox proxy" in refused(*single(finished, "compress", *options))
    assert not (tmp_path / "out").exists()


def test_fine_tuning_a_proxy(finished, tmp_path, refused):
    said = refused(*single(finished, "finetune", "--model", finished.output / "proxy", "--output", tmp_path / "out"))
    assert f"{finished.output / 'proxy'}: is an iprox proxy, and proxies are for scoring; fine-tune its target" in said
    assert not (tmp_path / "out").exists()


def test_options_out_of_range_are_named(finished, model, tmp_path, refused):
    options = ["--model", model, "--output", tmp_path / "out"]
    assert "--sparsity: input should be less than 1 (given: 1.5)" in refused(
        *single(finished, "compress", *options, "--sparsity=1.5")
    )
    assert "--fraction: input should be greater than 0" in refused(
        *single(finished, "warmup", *options, "--fraction=0")
    )
    assert "--learning-rate: input should be greater than 0" in refused(
        *single(finished, "finetune", *options, "--learning-rate=-1")
    )
    assert not (tmp_path / "out").exists()


def test_output_folders_of_commands_must_be_new(finished, model, tmp_path, refused):
    (tmp_path / "mine.txt").write_text("x")
    for command, extra in (("compress", ["--sparsity=0.5"]), ("score", []), ("warmup", []), ("finetune", [])):
        said = refused(*single(finished, command, "--model", model, "--output", tmp_path, *extra))
        assert f"{tmp_path}: exists already" in said
    assert [file.name for file in tmp_path.iterdir()] == ["mine.txt"]


def test_a_folder_of_the_users_own_is_never_taken_for_what_a_command_left(finished, model, tmp_path, refused):
    """Its files may have the very names that a command leaves."""
    target = (
        finished.output / "warmup" / json.loads((finished.output / "warmup/checkpoints.json").read_text())[-1]["path"]
    )
    refine = ["refine", "--scores", finished.output, "--model", target]
    cases = {
        "candidates.jsonl": [*refine, "--pool", finished.pool, "--validation", f"a={finished.path / 'spelling.jsonl'}"],
        "mine.arrow": ["index", "--model", model, "--pool", finished.pool],
        "scores.parquet": single(finished, "score", "--model", model),
    }
    for name, command in cases.items():
        folder = tmp_path / name.partition(".")[0]
        folder.mkdir()
        (folder / name).write_text("mine")
        assert f"{folder}: exists already" in refused(*command, "--output", folder)
        assert [(file.name, file.read_text()) for file in folder.iterdir()] == [(name, "mine")]


def test_what_is_half_written_in_a_foreign_folder_is_left_alone(place, refused):
    (place.output / "proxy").mkdir(parents=True)
    (place.output / "proxy/download.partial").write_text("mine")
    assert "is not empty and has no run.json" in refused("run", place.recipe, "--quiet")
    assert (place.output / "proxy/download.partial").read_text() == "mine"


def test_a_selection_over_the_pool_itself(finished, tmp_path, refused):
    pool = tmp_path / "pool.jsonl"
    pool.write_bytes(finished.pool.read_bytes())
    files = ["--scores", finished.output, "--pool", pool, "--output"]
    assert "is a file of the pool itself" in refused("select", *files, pool, "--count=5")
    assert pool.read_bytes() == finished.pool.read_bytes()
    assert "is a folder" in refused("select", *files, tmp_path, "--count=5")
    assert "choose another place" in refused("select", *files, pool / "out.jsonl", "--count=5")


@pytest.mark.parametrize(
    ("dropped", "said"),
    [(["tokens"], "no column 'tokens'"), (["influence/spelling", "influence/arithmetic"], "influence/TASK")],
)
def test_a_table_that_holds_no_scores(finished, tmp_path, refused, dropped, said):
    table = pq.read_table(finished.output / "scores.parquet")
    pq.write_table(table.drop_columns(dropped), tmp_path / "scores.parquet")
    options = ["--pool", finished.pool, "--count=5", "--output", tmp_path / "o.jsonl"]
    assert said in refused("select", "--scores", tmp_path, *options)
    whole = (finished.output / "scores.parquet").read_bytes()
    (tmp_path / "scores.parquet").write_bytes(whole[: len(whole) // 2])
    assert "not a readable Parquet file" in refused("select", "--scores", tmp_path, *options)


def test_an_unreadable_record_of_a_run(copied, refused):
    (copied.output / "run.json").write_text("")
    said = refused("run", copied.recipe, "--quiet", "--fresh")
    assert f"{copied.output / 'run.json'}: is damaged: not JSON" in said


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["score", "--set=seed=-1"], "seed: input should be greater"),
        (["score", "--set=data.num_proc=-1"], "data.num_proc: input should be greater"),
        (["score", "--set=influence.query=proxy", "--target=x"], "--target x: has no effect with influence.query"),
        (["score", "--estimator=length", "--target=x"], "--target x: has no effect with --estimator length"),
        (["audit", "--lds=5"], "audit: lds: fewer than 10"),
        (["audit", "--removal=1"], "audit: removal: one repeat"),
        (["audit", "--removal=2", "--set=audit.learning_rate=0"], "audit.learning_rate: "),
    ],
)
def test_options_that_cannot_be_meant(finished, tmp_path, refused, given, said):
    model = [
        "--model",
        finished.output / "proxy",
        *(["--proxy", finished.output / "proxy"] if "audit" in given else []),
    ]
    assert said in refused(*single(finished, given[0], *model, "--output", tmp_path / "out", *given[1:]))
    assert not (tmp_path / "out").exists()


def test_what_is_refined_says_how_it_was_scored(finished, tmp_path, refused):
    table = pq.read_table(finished.output / "scores.parquet").replace_schema_metadata(None)
    pq.write_table(table, tmp_path / "scores.parquet")
    files = ["--pool", finished.pool, "--validation", f"spelling={finished.path / 'spelling.jsonl'}"]
    files += ["--model", finished.output / "aligned", "--output", tmp_path / "out"]
    assert "does not say how it was made" in refused("refine", "--scores", tmp_path, *files)
    assert "--candidates: input should be less than 1" in refused(
        "refine", "--scores", finished.output, *files, "--candidates=1.5"
    )
    assert not (tmp_path / "out").exists()


def test_more_rows_than_are_scored_again_are_refused_before_any_work(place, refused):
    said = refused("run", place.recipe, "--quiet", "--set", "refine.candidates=0.05")
    assert "20 rows are to be selected, but refine.candidates 0.05 scores only 10 again" in said
    said = refused("run", place.recipe, "--quiet", "--set", "refine={}", "select={tokens: 100}")
    assert "give select.fraction or select.count" in said
    assert not place.output.exists()


def test_scores_of_another_pool(finished, tmp_path, refused):
    shuffled = tmp_path / "pool.jsonl"
    write(shuffled, [{**row, "id": f"other-{number}"} for number, row in enumerate(rows(finished))])
    arguments = ["--scores", finished.output, "--pool", shuffled, "--count=5", "--output", tmp_path / "out.jsonl"]
    said = refused("select", *arguments)
    assert "the scores belong to a different pool" in said
    assert sorted(file.name for file in tmp_path.iterdir()) == ["pool.jsonl"]


def test_scores_of_a_longer_pool(finished, tmp_path, refused):
    short = tmp_path / "pool.jsonl"
    short.write_bytes(b"".join(finished.pool.read_bytes().splitlines(keepends=True)[:5]))
    said = refused(
        "select", "--scores", finished.output, "--pool", short, "--count=5", "--output", tmp_path / "out.jsonl"
    )
    assert "the scores are for 200 rows, but the pool has 5" in said
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--set=select.source_cap=lots"], "select.source_cap"),
        (["--set", "select.source_floor={a: 0.6, b: 0.7}"], "add up to 1.3"),
        (["--task=maths"], "there are no scores for the task 'maths'"),
        (["--set=select.deduplicate=2"], "deduplicate"),
        (["--set=select.threshold=1e30"], "no row has a score of"),
    ],
)
def test_a_selection_that_cannot_be_meant(finished, tmp_path, refused, options, said):
    output = tmp_path / "out.jsonl"
    assert said in refused(
        "select", "--scores", finished.output, "--pool", finished.pool, "--output", output, "--count=5", *options
    )
    assert not output.exists()


def test_no_scores(finished, tmp_path, refused):
    said = refused("select", "--scores", tmp_path, "--pool", finished.pool, "--count=5", "--output", tmp_path / "o")
    assert "no such scores file" in said


def test_checkpoints_without_known_learning_rates(finished, model, tmp_path, refused):
    said = refused(*single(finished, "score", "--model", model, model, "--output", tmp_path / "out"))
    assert "give --learning-rates" in said
    said = refused(
        *single(finished, "score", "--model", model, "--learning-rates", "1", "2", "--output", tmp_path / "out")
    )
    assert "1 models but 2 learning rates" in said


def test_validation_that_is_no_pair(finished, model, tmp_path, refused):
    arguments = ["score", "--model", model, "--pool", finished.pool, "--output", tmp_path / "out"]
    assert "write it as TASK=FILE" in refused(*arguments, "--validation", "spelling.jsonl")


def test_report_of_a_folder_that_is_no_run(tmp_path, refused):
    assert "missing; run `iprox run" in refused("report", tmp_path)


def test_the_recipe_is_checked_before_anything_is_read(place, refused, monkeypatch):
    monkeypatch.setattr(Pool, "scan", lambda _: pytest.fail("read too early"))
    assert "unknown key 'proxy.sparsty'" in refused("run", place.recipe, "--set", "proxy.sparsty=0.5")


def test_a_pool_that_changed_since_it_was_scored_is_refused_where_rows_are_known_by_place_only(
    tmp_path, model, finished, refused
):
    rows = [json.loads(line) for line in finished.pool.read_text().splitlines()[:40]]
    for row in rows:
        row.pop("id", None)
    write(tmp_path / "pool.jsonl", rows)
    files = ["--pool", str(tmp_path / "pool.jsonl"), "--quiet"]
    score = ["score", "--model", str(model), "--estimator=length", *files, "--output", str(tmp_path / "scores")]
    assert main([*score, "--validation", f"a={finished.path / 'spelling.jsonl'}"]) == 0
    select = ["select", "--scores", str(tmp_path / "scores"), *files, "--count=5"]
    assert main([*select, "--output", str(tmp_path / "before.jsonl")]) == 0
    write(tmp_path / "pool.jsonl", rows[::-1])
    said = refused(*select, "--output", tmp_path / "after.jsonl")
    assert "the files have changed since they were scored" in said
    assert not (tmp_path / "after.jsonl").exists()


@pytest.mark.parametrize("rates", ["nan", "0", "-1", "inf"])
def test_learning_rates_are_numbers_above_0(finished, refused, tmp_path, rates):
    common = ["score", "--model", finished.output / "aligned", "--pool", finished.pool, "--output", tmp_path / "out"]
    said = refused(*common, "--validation", f"a={finished.path / 'spelling.jsonl'}", f"--learning-rates={rates}")
    assert "each must be a positive number" in said


def test_a_pool_a_row_shorter_than_was_scored(finished, refused, tmp_path):
    fewer = tmp_path / "pool.jsonl"
    fewer.write_bytes(b"".join(finished.pool.read_bytes().splitlines(keepends=True)[:199]))
    scores = ["--scores", finished.output, "--pool", fewer]
    refine = ["refine", "--model", finished.output / "aligned", "--validation", f"a={finished.path / 'spelling.jsonl'}"]
    for command in (
        ["select", *scores, "--output", tmp_path / "selected.jsonl"],
        [*refine, *scores, "--output", tmp_path / "refined"],
    ):
        assert "--pool: the scores are for 200 rows, but the pool has 199" in refused(*command)
    assert not (tmp_path / "selected.jsonl").exists()


def test_a_pool_too_small_to_watch_a_proxy_on_is_refused_before_any_work(place, refused):
    place.pool.write_bytes(b"".join(place.pool.read_bytes().splitlines(keepends=True)[:15]))
    said = refused("run", place.recipe, "--quiet")
    assert "watching the alignment needs 16 rows or more, and the pool has 15; set proxy.align.held_out" in said
    said = refused("run", place.recipe, "--quiet", "--set", "proxy={fidelity: 0.9, align: false}")
    assert "proxy.fidelity needs 16 rows or more, and the pool has 15" in said
    assert not (place.output / "warmup").exists()


@pytest.mark.parametrize("variables", [{"WORLD_SIZE": "abc"}, {"WORLD_SIZE": "2", "RANK": "x"}, {"WORLD_SIZE": "-2"}])
def test_variables_of_launchers_are_numbers(refused, monkeypatch, variables):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    said = refused("finetune", "--model=m", "--selection=s", "--output=o")
    assert f"{name}={value} in the environment is not" in said


@pytest.mark.parametrize("width", ["0", "1"])
def test_help_for_a_terminal_of_no_width(monkeypatch, capsys, width):
    monkeypatch.setenv("COLUMNS", width)  # rich never ends at 0
    assert main(["select", "--help"]) == 0
    assert "--pool" in capsys.readouterr().out


def test_output_that_nobody_reads(finished, tmp_path, monkeypatch, capfd):
    read, write = os.pipe()
    os.close(read)
    chosen = ["select", "--scores", str(finished.output), "--pool", str(finished.pool), "--count", "4", "--json"]
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", os.fdopen(write, "w"))
        assert main([*chosen, "--output", str(tmp_path / "s.jsonl")]) == 2
    assert "iprox: standard output: broken pipe; the results are in" in capfd.readouterr().err
    assert len((tmp_path / "s.jsonl").read_bytes().splitlines()) == 4


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_a_selection_replaces_no_device_or_folder(finished, tmp_path, refused, make):
    make(tmp_path / "s.jsonl")
    chosen = ["select", "--scores", finished.output, "--pool", finished.pool, "--count", "4"]
    assert "not a regular file" in refused(*chosen, "--output", tmp_path / "s.jsonl")
    assert not (tmp_path / "s.jsonl").is_file()


def test_a_path_that_is_no_text(refused, finished, model):
    given = ["score", "--model", model, "--pool", finished.pool, "--validation", *finished.tasks()]
    assert "not a valid path" in refused(*given, "--output", "o\udcff", "--quiet")


@pytest.mark.parametrize(
    ("name", "column", "said"),
    [
        ("influence", pa.nulls(200, pa.string()), "the column 'influence' holds string"),
        ("influence/spelling", pa.nulls(200, pa.bool_()), "the column 'influence/spelling' holds bool"),
        ("examples/spelling", pa.nulls(200, pa.list_(pa.float64())), "the column 'examples/spelling' holds list"),
        ("more", pa.nulls(200), "two columns have the name 'more'"),
        ("", None, "its metadata, which says how it was scored, is damaged"),
    ],
)
def test_a_table_that_was_edited(finished, tmp_path, refused, name, column, said):
    table = pq.read_table(finished.output / "scores.parquet")
    if column is None:
        table = table.replace_schema_metadata({"iprox": "{"})
    else:
        table = table.drop_columns([name]) if name in table.column_names else table
        table = table.append_column(name, column)
        table = table.append_column(name, column) if name == "more" else table
    pq.write_table(table, tmp_path / "scores.parquet")
    pool = ["--pool", finished.pool, "--output", tmp_path / "s.jsonl"]
    assert said in refused("select", "--scores", tmp_path, "--count", "4", *pool)
