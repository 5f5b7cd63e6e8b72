"""The code blocks of README and docs: Python runs, recipes and other YAML are checked, command lines parse."""

import json
import re
import shlex
import shutil
import subprocess
from importlib.resources import files
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM
from trl import ModelConfig, ScriptArguments, SFTConfig, TrlParser
from trl.scripts.utils import DatasetMixtureConfig

from iprox.cli import main
from iprox.cli.parser import Request, build_app
from iprox.recipe import parse_recipe
from iprox.settings import Recipe

MODEL = str(files("iprox.quickstart") / "model")
ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "AGENTS.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
# What the pages may call besides iprox.
OTHERS = {
    "accelerate",
    "pip",
    "uv",
    "uvx",
    "make",
    "docker",
    "git",
    "ruff",
    "pre-commit",
    "hf",
    "npm",
    "python",
    "pytest",
    "mkdocs",
}


def blocks(*languages):
    """The blocks of some languages: (page and number, text)."""
    found = []
    for page in PAGES:
        for number, match in enumerate(FENCE.finditer(page.read_text()), 1):
            if match[1] in languages:
                found.append(pytest.param(match[2], id=f"{page.relative_to(ROOT)}-{number}"))
    return found


def test_every_block_is_of_a_language_that_is_checked():
    languages = {match[1] for page in PAGES for match in FENCE.finditer(page.read_text())}
    assert languages <= {"python", "yaml", "bash", "json", "sh", "yml"}


@pytest.mark.parametrize("text", blocks("json"))
def test_json(text):
    json.loads(text)


@pytest.mark.parametrize("text", blocks("yaml"))
def test_yaml(text, tmp_path):
    content = yaml.safe_load(text)
    if content.keys() <= Recipe.model_fields.keys():
        base = {"model": "m", "data": {"pool": ["p"], "validation": {"math": "v", "code": "w"}}, "output": "o"}
        parse_recipe({**base, **content}, "the page")
    elif "datasets" in content and "model_name_or_path" in content:
        file = tmp_path / "sft.yaml"
        file.write_text(text + "use_cpu: true\nbf16: false\n")
        parser = TrlParser((ScriptArguments, SFTConfig, ModelConfig, DatasetMixtureConfig))
        _, training, _, mixture = parser.parse_args_and_config(["--config", str(file)])  # refuses unknown keys
        assert mixture.datasets[0].data_files == "selected.jsonl"
        assert training.assistant_only_loss
    else:
        assert content.keys() & {"base_model", "stage"}  # axolotl, LLaMA-Factory


@pytest.mark.parametrize("text", blocks("yml"))
def test_manifests(text):
    assert {"apiVersion", "kind", "spec"} <= yaml.safe_load(text).keys()


@pytest.mark.parametrize("text", blocks("sh"))
def test_scripts(text):
    subprocess.run(["bash", "-n"], input=text, text=True, check=True)
    run = next(line for line in text.splitlines() if " iprox run " in line)
    given = shlex.split(run.partition(" iprox ")[2])
    request = build_app()(given, exit_on_error=False, print_error=False, result_action="return_value")
    assert isinstance(request, Request)


@pytest.mark.parametrize("text", blocks("bash"))
def test_command_lines(text):
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for line in text.splitlines():
        words = shlex.split(line, comments=True)
        while words and "=" in words[0]:  # VARIABLE=value
            words = words[1:]
        if not words:
            continue
        if words[0] == "iprox":
            request = build_app()(words[1:], exit_on_error=False, print_error=False, result_action="return_value")
            assert isinstance(request, Request) or "--help" in words, line
            continue
        assert Path(words[0]).name in OTHERS, line
        if words[0] == "make":
            assert {word for word in words[1:] if "=" not in word} <= set(targets), line
        if words[:2] == ["docker", "build"] and "-f" in words:
            assert (ROOT / words[words.index("-f") + 1]).is_file(), line


@pytest.fixture
def desk(finished, tmp_path, monkeypatch):
    """A folder with the files that the pages name: the finished run, its proxy, and that proxy exported."""
    monkeypatch.chdir(tmp_path)
    for run in ("quickstart", "qwen3-4b"):
        shutil.copytree(finished.output, tmp_path / "runs" / run)
    shutil.copytree(finished.output / "aligned", tmp_path / "proxy")
    assert main(["export", "proxy", "--output", "dense", "--quiet"]) == 0
    return finished


def known_names(finished):
    """The names that the README uses without defining them."""
    pool = [json.loads(line) for line in finished.pool.read_text().splitlines()[:60]]
    validation = [json.loads(line) for line in (finished.path / "arithmetic.jsonl").read_text().splitlines()]
    return {
        **dict.fromkeys(("pool", "sample", "probe", "data"), pool),
        "few": pool[:2],
        "validation": validation,
    }


class Classifier(torch.nn.Module):
    """A classifier of pictures; that of recordings returns its logits as transformers' models do."""

    def __init__(self, recordings):
        super().__init__()
        self.layers = torch.nn.Sequential(
            torch.nn.Flatten(), torch.nn.Linear(16, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3)
        )
        self.recordings = recordings

    def forward(self, x):
        logits = self.layers(x)
        return SimpleNamespace(logits=logits) if self.recordings else logits


def of_page(page):
    """What the names of a page about another kind of data stand for."""
    if page == "preference":
        pairs = [{"prompt": f"{i}+{i}=", "chosen": f" {2 * i}", "rejected": " no idea"} for i in range(40)]
        return {"pairs": pairs, "validation": pairs[:3], "model": AutoModelForCausalLM.from_pretrained(MODEL)}
    if page not in ("vision", "speech"):
        return {}
    x = torch.randn(40, 4, 4, generator=torch.Generator().manual_seed(0))
    pool = torch.utils.data.TensorDataset(x, torch.arange(40) % 3)
    few = torch.utils.data.Subset(pool, range(20))
    return {"pool": pool, "sample": few, "validation": few, "model": Classifier(page == "speech")}


@pytest.mark.parametrize(
    "page", [page for page in PAGES if "```python" in page.read_text()], ids=lambda page: page.stem
)
def test_python(page, desk, recwarn):
    names = {**known_names(desk), **of_page(page.stem)}
    model = yaml.safe_load(desk.recipe.read_text())["model"]
    for language, text in FENCE.findall(page.read_text()):
        if language != "python":
            continue
        if 'batch["x"]' in text:
            rows = [{"x": each, "y": each[:1]} for each in torch.randn(8, 3)]
            names |= {"pool": rows, "validation": rows[:2], "model": torch.nn.Sequential(torch.nn.Linear(3, 1))}

        text = text.replace("Qwen/Qwen3-4B", model).replace('"sibling": others', '"sibling": scores')
        exec(compile(text, str(page), "exec"), names)
