"""Pushing to a stand-in for the Hub's API, which keeps what it was sent."""

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from huggingface_hub import DatasetCard, ModelCard, constants

from iprox.cli import main


class Hub(BaseHTTPRequestHandler):
    """The calls of a push: create a repository, check the card's front matter, ask how to send files, commit."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        where, hub = self.path.split("/")[2:], self.server
        if where == ["validate-yaml"]:
            return self.answer(200, {"errors": [], "warnings": []})
        if self.headers["Authorization"] != "Bearer hf_token":
            return self.answer(401, {"error": "Invalid token"})
        if where == ["repos", "create"]:
            asked = json.loads(body)
            private = asked.get("private") or asked.get("visibility") == "private"  # huggingface_hub 1 and 2
            hub.repos[f"me/{asked['name']}"] = {**asked, "private": private, "files": {}}
            return self.answer(200, {"url": f"{hub.url}/{asked.get('type', 'model')}s/me/{asked['name']}"})
        name = "/".join(where[1:3])
        if where[3] == "preupload":
            files = [{"path": each["path"], "uploadMode": "regular"} for each in json.loads(body)["files"]]
            return self.answer(200, {"files": [{**each, "shouldIgnore": False, "oid": None} for each in files]})
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                hub.repos[name]["files"][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        return self.answer(200, {"commitUrl": f"{hub.url}/{name}/commit/0", "commitOid": "0", "success": True})

    def answer(self, status, content):
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(monkeypatch):
    server = HTTPServer(("127.0.0.1", 0), Hub)
    server.repos, server.url = {}, f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setenv("HF_TOKEN", "hf_token")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_a_run_is_pushed_as_a_dataset_with_a_card_and_its_report(finished, hub, capfd):
    assert main(["push", str(finished.output), "me/chosen"]) == 0
    assert capfd.readouterr().out.strip() == f"{hub.url}/datasets/me/chosen"
    repo = hub.repos["me/chosen"]
    assert (repo["type"], repo["private"]) == ("dataset", True)
    assert set(repo["files"]) == {"README.md", "selected.jsonl", "selection.json", "report.html"}
    for name in ("selected.jsonl", "report.html"):
        assert repo["files"][name] == (finished.output / name).read_bytes()
    card = DatasetCard(repo["files"]["README.md"].decode())
    assert card.data.to_dict()["configs"] == [{"config_name": "default", "data_files": "selected.jsonl"}]
    fidelity = finished.record()["stages"]["audit"]["fidelity"]["spearman"]
    chosen = json.loads((finished.output / "selection.json").read_text())
    for said in (
        f"Spearman {fidelity:.2f}",
        "arithmetic: 8 rows",
        f"{chosen['count']} rows of 200",
        "| model | model |",
    ):
        assert said in card.text
    assert str(finished.path) not in card.text


def test_a_selection_a_proxy_and_a_report_alone(finished, hub, tmp_path):
    scores, pool = ["--scores", str(finished.output)], ["--pool", str(finished.pool)]
    chosen = tmp_path / "ten.jsonl"
    assert main(["select", *scores, *pool, "--count=10", "--task=spelling", "--output", str(chosen), "--quiet"]) == 0
    assert main(["push", str(chosen), "me/ten", "--public", "--json"]) == 0
    assert not hub.repos["me/ten"]["private"]
    assert hub.repos["me/ten"]["files"]["selected.jsonl"] == chosen.read_bytes()
    card = hub.repos["me/ten"]["files"]["README.md"].decode()
    assert "# Training data selected for spelling" in card
    assert "10 rows of 200" in card

    assert main(["push", str(finished.output / "proxy"), "me/proxy", "--json"]) == 0
    files = hub.repos["me/proxy"]["files"]
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= set(files)
    assert "iprox" in ModelCard(files["README.md"].decode()).data.tags

    assert main(["push", str(finished.output / "report.html"), "me/report", "--json"]) == 0
    assert hub.repos["me/report"]["sdk"] == "static"
    assert hub.repos["me/report"]["files"]["index.html"] == (finished.output / "report.html").read_bytes()


def test_refusals(finished, hub, tmp_path, monkeypatch, capfd):
    def refused(*arguments):
        assert main(["push", *map(str, arguments)]) == 2
        return capfd.readouterr().err

    assert "is no proxy or run folder" in refused(tmp_path, "me/x")
    (tmp_path / "x.jsonl").write_text("{}\n")
    assert "no x.selection.json next to it" in refused(tmp_path / "x.jsonl", "me/x")
    assert "me/a/b: not pushed" in refused(finished.output / "report.html", "me/a/b")
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    assert "me/x: not pushed" in refused(finished.output / "report.html", "me/x")
    assert not hub.repos
