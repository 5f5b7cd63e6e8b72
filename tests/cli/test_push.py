"""iprox push, with the Hub's own client replaced by one that notes what it was asked."""

import json
from pathlib import Path
from types import SimpleNamespace

import httpx2
import pytest

from iprox import hub
from iprox.cli import main
from iprox.quickstart import quickstart_recipe

PROXY = "proxy"


@pytest.fixture
def calls(monkeypatch):
    noted = []

    class Api:
        def create_repo(self, repo, **options):
            noted.append(("create_repo", repo, options))

        def create_branch(self, repo, **options):
            noted.append(("create_branch", repo, options))

        def upload_folder(self, folder_path, **options):
            texts = {name: (folder_path / name).read_text() for name in ("config.json", "README.md")}
            names = sorted(file.name for file in folder_path.iterdir())
            noted.append(("upload_folder", {**options, "texts": texts, "names": names}))
            return SimpleNamespace(commit_url="https://hub.example/commit/1")

    monkeypatch.setattr(hub, "HfApi", Api)
    return noted


def test_a_proxy_is_pushed_with_its_card_and_without_local_paths(finished, calls, capsys):
    folder = finished.output / "aligned"
    assert (folder / "README.md").is_file()
    assert main(["push", str(folder), "me/proxy", "--private", "--revision", "v1"]) == 0
    assert capsys.readouterr().out.strip() == "https://hub.example/commit/1"
    assert calls[0] == ("create_repo", "me/proxy", {"private": True, "exist_ok": True})
    assert calls[1] == ("create_branch", "me/proxy", {"branch": "v1", "exist_ok": True})
    options = calls[2][1]
    assert options["repo_id"] == "me/proxy"
    target = json.loads((folder / "config.json").read_text())["quantization_config"]["target"]
    for name, text in options["texts"].items():
        assert target in (folder / name).read_text()
        assert str(finished.path) not in text
    assert options["names"] == sorted(file.name for file in folder.iterdir())
    assert json.loads(options["texts"]["config.json"])["quantization_config"]["target"] == Path(target).name
    assert options["revision"] == "v1"
    assert "run.json" in options["ignore_patterns"]
    assert "README.md" in options["allow_patterns"]


def test_the_card_carries_the_audits_figures(finished):
    text = (finished.output / "aligned" / "README.md").read_text()
    assert "random examples" in text


def test_what_is_no_proxy_is_not_pushed(calls, capsys):
    model = quickstart_recipe("unused", []).model
    assert main(["push", model, "me/model"]) == 2
    assert "is not an iprox proxy" in capsys.readouterr().err
    assert not calls


@pytest.mark.parametrize("error", [httpx2.ConnectError("no route"), PermissionError("401")])
def test_a_hub_that_refuses_gives_one_line(finished, monkeypatch, capsys, error):
    class Api:
        def create_repo(self, *_, **__):
            raise error

    monkeypatch.setattr(hub, "HfApi", Api)
    assert main(["push", str(finished.output / "aligned"), "me/proxy"]) == 2
    assert capsys.readouterr().err.startswith("iprox: me/proxy: cannot be pushed to")
