"""Trainings of adapters instead of weights, through the commands and a whole run."""

import json
import shutil
import sys

import pytest
import yaml
from peft import AutoPeftModelForCausalLM

from iprox.cli import main
from iprox.models.adapters import adapter_base
from iprox.models.loading import load_model


@pytest.fixture(scope="module")
def tuned(tmp_path_factory, make_place):
    place = make_place(tmp_path_factory.mktemp("lora") / "place")
    arguments = ["warmup.lora=4", "finetune={lora: 2, epochs: 1, batch_size: 4, accumulate: 2}"]
    arguments += ["proxy.align=false", "audit=false", "influence={estimator: tracin, checkpoints: all}"]
    assert place.run("--set", *arguments) == 0
    return place


def test_a_run_scores_on_checkpoints_with_the_adapters_multiplied_in(tuned):
    listed = json.loads((tuned.output / "warmup/checkpoints.json").read_text())
    assert len(listed) == 2
    for entry in listed:  # whole models, which hang on nothing outside the folder
        assert adapter_base(tuned.output / "warmup" / entry["path"]) is None
        load_model(tuned.output / "warmup" / entry["path"])
    stages = tuned.record()["stages"]
    assert stages["score"]["checkpoints"] == 2
    assert 0 < stages["finetune"]["trained_parameters"] < stages["warmup"]["trained_parameters"]
    # Its own adapters are what was asked for, and nothing to warn of.
    assert not [text for entry in stages.values() for text in entry["warnings"] if "adapter" in text]
    assert stages["warmup"]["last_loss"] < stages["warmup"]["first_loss"]


def test_what_was_fine_tuned_is_an_adapter_that_peft_loads(tuned, model):
    folder = tuned.output / "finetune/model"
    assert adapter_base(folder) == str(model)
    assert json.loads((folder / "adapter_config.json").read_text())["lora_alpha"] == 4
    AutoPeftModelForCausalLM.from_pretrained(folder)


def test_a_second_start_does_nothing(tuned):
    assert main(["run", str(tuned.output / "recipe.yaml")]) == 0
    assert tuned.done() == []


def test_the_commands_train_adapters(place, model, capsys):
    warm, pool = place.path / "warm", ["--pool", str(place.pool)]
    options = [
        "--fraction=0.1",
        "--epochs=1",
        "--set",
        "warmup.batch_size=4",
        "warmup.accumulate=2",
        "--lora=4",
        "--json",
    ]
    assert main(["warmup", "--model", str(model), *pool, "--output", str(warm), *options]) == 0
    assert json.loads(capsys.readouterr().out)["trained_parameters"] > 0
    (entry,) = json.loads((warm / "checkpoints.json").read_text())
    history = json.loads((warm / "history.json").read_text())
    assert 0.1 / 64 < max(step["learning_rate"] for step in history) <= 1 / 64  # ten times that of whole weights
    proxy = ["--pool", str(place.pool), "--output", str(place.path / "proxy"), "--quiet"]
    assert main(["compress", "--model", str(warm / entry["path"]), *proxy]) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--lora=0"], "--lora: give a rank of 1 or more"),
        (["--lora=4", "--optimizer-state"], "--optimizer-state keeps Adam's moments of the weights"),
    ],
)
def test_options_that_do_not_go_together_are_refused(place, model, capsys, options, said):
    required = ["--model", str(model), "--pool", str(place.pool), "--output", str(place.path / "warm")]
    assert main(["warmup", *required, *options]) == 2
    assert said in capsys.readouterr().err


def test_a_run_that_cannot_train_adapters_at_its_end_does_not_begin(place, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    assert place.run("--set", "finetune={lora: 2}") == 2
    assert "pip install 'iprox[lora]'" in capsys.readouterr().err
    assert not place.output.exists()


def test_experts_are_refused_before_any_work(place, tiny, capsys, tmp_path):
    moe = tmp_path / "moe"
    shutil.copytree(yaml.safe_load(place.recipe.read_text())["model"], moe)
    tiny.model("qwen3-moe", vocab_size=2048).save_pretrained(moe)
    said = "moe: has fused experts, which LoRA would not adapt"
    for command in ("run", "plan"):
        assert main([command, str(place.recipe), "--set", f"model={moe}", "warmup.lora=4"]) == 2
        assert said in capsys.readouterr().err
    options = ["--model", str(moe), "--pool", str(place.pool), "--output", str(place.path / "warm"), "--lora=4"]
    assert main(["warmup", *options]) == 2
    assert said in capsys.readouterr().err
    assert not (place.path / "warm").exists()


def test_plan_foretells_less_work_and_memory_of_adapters(place, capsys):
    planned = {}
    for lora in ("false", "4"):
        assert main(["plan", str(place.recipe), "--json", "--set", f"warmup.lora={lora}"]) == 0
        planned[lora] = json.loads(capsys.readouterr().out)["stages"]["warmup"]
    whole, adapters = planned.values()
    assert 2 / 3 < adapters["flops"] / whole["flops"] < 1
    assert adapters["memory_bytes"] < whole["memory_bytes"]
