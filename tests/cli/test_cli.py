"""The command line itself: help, usage, exit codes, and how long one waits for them."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from importlib.metadata import version

import pytest

from iprox.cli import main, run_commands

COMMANDS = [
    "quickstart",
    "run",
    "plan",
    "warmup",
    "compress",
    "align",
    "score",
    "select",
    "audit",
    "finetune",
    "report",
    "export",
    "refine",
    "index",
    "query",
    "push",
    "doctor",
    "compare",
]

COMPUTING = {"--seed", "--dtype", "--device", "--batch-tokens", "--max-length"}
# Commands whose result some of these do not change.
ONLY = {
    "plan": COMPUTING - {"--seed"},
    "warmup": COMPUTING - {"--batch-tokens"},
    "query": COMPUTING - {"--seed"},
    "select": set(),
    "report": set(),
    "export": {"--dtype", "--device"},
    "push": set(),
    "doctor": {"--device"},
    "compare": set(),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_every_command_shows_an_example(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    said = capsys.readouterr().out
    assert f"example:\n  iprox {command} " in said
    listed = set(re.findall(r"^  (--[a-z-]+)", said, re.MULTILINE))
    assert listed >= {"--quiet", "--json"}
    assert listed & COMPUTING == ONLY.get(command, COMPUTING)


def test_help_names_every_command(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    named = {line.split()[0] for line in capsys.readouterr().out.splitlines() if line.startswith("    ")}
    assert named >= set(COMMANDS)


def test_no_command_shows_the_help(capsys):
    assert main([]) == 2
    said = capsys.readouterr()
    assert "iprox quickstart" in said.err
    assert said.out == ""


@pytest.mark.parametrize(
    "arguments",
    [
        ["nonsense"],
        ["run"],
        ["select", "--scores", "s"],
        ["warmup", "--epochs", "0"],
        ["score", "--seed", "x"],
        ["select", "--seed", "1"],
    ],
)
def test_usage_errors_exit_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert "usage: iprox" in capsys.readouterr().err


def fails_with(monkeypatch, error):
    def fail(_):
        raise error

    monkeypatch.setattr(run_commands, "report", fail)


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


def test_doctor_says_what_the_machine_can_do(capsys):
    assert main(["doctor", "--device", "cpu", "--json"]) == 0
    said = capsys.readouterr().out
    found = json.loads(said.splitlines()[-1])
    assert found["device"] == "cpu"
    assert found["dtype"] in found["gemm_flops_per_second"]
    assert all(rate > 1e8 for rate in found["gemm_flops_per_second"].values())
    assert 0 < found["free_bytes"] <= found["memory_bytes"]
    assert found["optional"]["peft"] == version("peft")
    assert main(["doctor", "--device", "cpu"]) == 0
    said = capsys.readouterr().out
    assert all(word in said for word in ("FLOP/s", "optional package", "compiler", "→"))
    assert main(["doctor", "--device", "cuda:99"]) == 2
    assert "not usable here" in capsys.readouterr().err


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_completion_knows_every_command(shell, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--print-completion", shell])
    assert ended.value.code == 0
    script = capsys.readouterr().out
    assert all(command in script for command in COMMANDS)
    assert "--source-cap" in script


def test_plan_runs_nothing(place, capsys):
    assert main(["plan", str(place.recipe), "--quiet", "--json", "--tflops", "0.05"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert list(planned["stages"]) == ["warmup", "compress", "align", "audit", "score", "attribute"]
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
    place.set(warmup={"fraction": 0.5, "epochs": 200, "batch_size": 8})
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
    assert rest.splitlines()[-1] == "iprox: interrupted; the same command (without --fresh) goes on from here"
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
