"""The command line itself: help, usage, exit codes, and how long one waits for them."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest

from iprox.cli import actions, main
from iprox.cli.commands import COMMANDS
from iprox.cli.parser import build_app
from iprox.settings import Recipe, fields_of

NAMES = [command.name for command in COMMANDS]
# So many options, and no more, can be read at a glance.
MOST_OPTIONS = 12


@pytest.mark.parametrize("command", COMMANDS, ids=NAMES)
def test_help_of_every_command_shows_an_example_and_few_options(command, capsys):
    assert main([command.name, "--help"]) == 0
    said = capsys.readouterr().out
    assert "Example:" in said
    assert f"iprox {command.name} " in said
    listed = set(re.findall(r"(?<![\w`])--[a-z][a-z-]+", said.partition("Example:")[0]))
    assert listed >= {"--quiet", "--json"}
    shown = re.findall(r"^\W* (--[a-z-]+)", said.partition("Example:")[0], re.MULTILINE)
    assert len(shown) <= MOST_OPTIONS
    assert ("--set" in shown) == bool(command.reads)


def test_every_option_of_a_setting_is_a_key_of_the_recipe():
    keys = dict(fields_of(Recipe))
    for command in COMMANDS:
        assert {*command.needs, *command.offers} <= keys.keys()
        assert {key for key in (*command.reads, *command.unread) if key != "*"} <= keys.keys()


def test_help_names_every_command(capsys):
    assert main(["--help"]) == 0
    named = re.findall(r"^\W? ([a-z]+)  ", capsys.readouterr().out, re.MULTILINE)
    assert named == NAMES


def test_no_command_shows_the_help(capsys):
    assert main([]) == 2
    said = capsys.readouterr()
    assert "iprox quickstart" in said.err
    assert said.out == ""


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nonsense"], "nonsense"),
        (["scor"], 'Did you mean "score"'),
        (["run"], "RECIPE is missing"),
        (["select", "--scores", "s"], "--pool is missing"),
        (["warmup", "--model=m", "--pool=p", "--output=o", "--epochs=0"], "--epochs: input should be greater"),
        (["score", "--model=m", "--pool=p", "--validation", "t=v", "--output=o", "--set", "seed=x"], "seed: input"),
        (["select", "--scores=s", "--pool=p", "--output=o", "--set", "seed=1"], "iprox select does not read seed"),
        (["compress", "--model=m", "--pool=p", "--output=o", "--sparsity=much"], "--sparsity"),
        (["compress", "--model=m", "--pool=p", "--output=o", "--set", "proxy.rank=global"], "did you mean 'ranks'?"),
    ],
)
def test_usage_errors_exit_with_2_and_one_line(arguments, said, refused):
    message = refused(*arguments)
    assert said in message
    assert len(message.splitlines()) == 1


def fails_with(monkeypatch, error):
    def fail(_):
        raise error

    monkeypatch.setattr(actions, "report", fail)


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (KeyboardInterrupt(), 130, "iprox: interrupted"),
        (OSError(28, "No space left on device", "/data/x"), 2, "iprox: /data/x: no space left on the disk"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), 2, "no space left on the disk"),
        (PermissionError(13, "Permission denied", "/data/x"), 2, "iprox: /data/x: permission denied"),
        (FloatingPointError("p.jsonl:3: the score is not finite"), 2, "iprox: p.jsonl:3: the score is not finite"),
    ],
)
def test_exit_codes_of_what_is_not_our_fault(monkeypatch, capsys, error, code, said):
    fails_with(monkeypatch, error)
    assert main(["report", "x"]) == code
    message = capsys.readouterr().err
    assert said in message
    assert len(message.splitlines()) == 1


def test_our_own_faults_show_a_traceback_and_exit_with_1(monkeypatch, capsys):
    fails_with(monkeypatch, ZeroDivisionError("oops"))
    assert main(["report", "x"]) == 1
    message = capsys.readouterr().err
    assert "Traceback" in message
    assert message.splitlines()[-1].startswith("iprox: ZeroDivisionError: oops")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_knows_every_command(shell):
    script = build_app().generate_completion(shell=shell)
    assert all(command in script for command in NAMES)
    assert "--sparsity" in script or "-l sparsity" in script


def test_plan_runs_nothing(place, capsys):
    assert main(["plan", str(place.recipe), "--quiet", "--json", "--tflops", "0.05"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert list(planned["stages"]) == ["warmup", "curvature", "compress", "align", "audit", "score", "attribute"]
    assert planned["rows"] == 200
    for stage in planned["stages"].values():
        assert stage["flops"] > 0
        assert stage["memory_bytes"] > 0
        assert stage["seconds"] > 0
    assert not place.output.exists()


def test_plan_agrees_with_what_the_run_counted(finished, capsys):
    assert main(["plan", str(finished.recipe), "--quiet", "--json", "--tflops", "1"]) == 0
    planned = json.loads(capsys.readouterr().out)
    done = finished.record()["stages"]
    for name, stage in planned["stages"].items():
        assert stage["tokens"] == pytest.approx(done[name]["tokens"], rel=0.1), name
        assert stage["flops"] == pytest.approx(done[name]["flops"], rel=0.15), name
    cost = finished.record()["cost"]
    counted = (cost["construction_flops"] + cost["score_flops"]) / cost["target_score_flops"]
    assert planned["relative_score_cost"] == pytest.approx(counted, rel=0.1)


def test_plan_for_people(place, capsys):
    assert main(["plan", str(place.recipe), "--quiet", "--tflops", "0.05"]) == 0
    said = capsys.readouterr().out
    assert "200 rows of" in said
    assert "score" in said


def test_a_signal_in_training_exits_with_130_and_the_run_goes_on(place):
    place.set(warmup={"fraction": 0.5, "epochs": 200, "batch_size": 8}, compile=False)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "iprox.cli", "run", str(place.recipe)],
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        # A shell that runs the tests in the background ignores the signal, and so would what they start.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        for line in process.stderr:
            if line.startswith("warm-up:"):
                break
        deadline = time.monotonic() + 60
        while not list((place.output / "warmup").glob("checkpoint-*")) and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        rest = process.stderr.read()
        assert process.wait(timeout=60) == 130
    finally:
        process.kill()
    assert "Traceback" not in rest
    assert rest.splitlines()[-1] == "iprox: interrupted; the same command (without --fresh) resumes from here"
    place.set(warmup={"fraction": 0.02, "epochs": 1})
    assert place.run("--stop-after", "warmup") == 0
    assert place.done() == ["warmup"]
    assert len(list((place.output / "warmup").glob("checkpoint-*"))) == 1


def test_the_quickstart_recipe_is_valid_and_has_its_files(tmp_path):
    from iprox.quickstart import quickstart_recipe

    recipe = quickstart_recipe(str(tmp_path / "out"), ["seed=3"])
    assert recipe.seed == 3
    for file in [recipe.model, *recipe.data.pool, *recipe.data.validation.values()]:
        assert os.path.exists(file)
