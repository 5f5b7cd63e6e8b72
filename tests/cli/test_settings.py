"""Settings are written once: the commands, a recipe and Python have the same keys, defaults and rules."""

import inspect
import json
from operator import attrgetter

import pytest

import iprox
from iprox.cli import main
from iprox.cli.commands import COMMANDS
from iprox.cli.parser import build_app
from iprox.errors import InputError
from iprox.settings import AuditSection, InfluenceSection, Settings, fields_of

COMPUTING = [command for command in COMMANDS if command.reads and "*" not in command.reads]
APP = build_app()
GIVEN = {"model": "m", "output": "o", "data.pool": "p", "data.validation": "t=v"}


def request(command, *overrides):
    """What a command line with its required options and some `--set` asks for."""
    line = [command.name]
    for key in command.needs:
        line += [f"--{command.option(key)}", GIVEN[key]]
    for each in command.inputs:
        if each.default is ...:
            line += ["x"] if each.positional else [f"--{each.name.replace('_', '-')}", "x"]
    for text in overrides:
        line += ["--set", text]
    return APP(line, exit_on_error=False, print_error=False, result_action="return_value")


@pytest.mark.parametrize("command", COMPUTING, ids=lambda command: command.name)
def test_set_reaches_every_setting_that_a_command_reads_and_no_other(command):
    """`iprox align` once lacked six of the settings that a recipe has, and had two of its own."""
    for key, field in fields_of(Settings):
        if field.json_schema_extra or not isinstance(field.default, str | int | float) or field.default is False:
            continue  # sections, and what depends on the model or is not given
        value = json.dumps(field.default)
        if command.takes(key):
            assert attrgetter(key)(request(command, f"{key}={value}").settings) == field.default
        else:
            with pytest.raises(InputError, match=f"iprox {command.name} does not read {key}"):
                request(command, f"{key}={value}")


def test_defaults_of_python_are_those_of_the_recipe():
    """The default of normalize was `none` in Python's align, and cosine elsewhere; the seed of curvature was 0."""
    parameters = inspect.signature(iprox.score).parameters
    section = InfluenceSection()
    for name in parameters.keys() & InfluenceSection.model_fields.keys():
        default = parameters[name].default
        assert default in (None, getattr(section, name)), name  # None: what the section has
    assert "norm_sketch" not in parameters
    assert "norm_sketch" not in inspect.signature(iprox.audit).parameters


def test_a_command_measures_on_as_many_rows_as_a_run(finished, tmp_path):
    """`iprox compress` probed 512 rows where a recipe took 64."""
    target = json.loads((finished.output / "warmup/checkpoints.json").read_text())[-1]["path"]
    files = ["--model", str(finished.output / "warmup" / target), "--pool", str(finished.pool)]
    options = ["--output", str(tmp_path / "proxy"), "--sparsity=0.5", "--set=data.max_length=48", "--quiet"]
    assert main(["compress", *files, *options]) == 0
    alone = json.loads((tmp_path / "proxy/run.json").read_text())["stages"]["compress"]
    assert alone["examples"] == finished.record()["stages"]["compress"]["examples"] == 64


def test_rules_and_their_words_are_the_same_everywhere(finished, refused, tmp_path):
    said = "lds: fewer than 10 subsets are too few; 0 leaves it out"
    with pytest.raises(ValueError, match=said):
        AuditSection(lds=5)
    files = ["--model=m", "--proxy=p", "--pool", finished.pool, "--validation", "t=v", "--output", tmp_path / "o"]
    assert said in refused("audit", *files, "--lds=5")
    assert said in refused("run", finished.recipe, "--set", "audit.lds=5")
