"""The single commands in a chain, as someone without a recipe uses them."""

import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM

from iprox.cli import main


class Chain:
    """Runs commands on the same inputs and keeps what each said with `--json`."""

    def __init__(self, place, model, capfd_text):
        self.place, self.model, self.path = place, str(model), place.path
        self.tasks = [f"{task}={place.path / task}.jsonl" for task in ("arithmetic", "spelling")]
        self.text = capfd_text

    def __call__(self, command, *arguments):
        curved = [self.place.few_curved] if command in ("align", "audit", "score") else []
        assert main([command, *map(str, arguments), *curved, "--set=data.max_length=48", "--quiet", "--json"]) == 0
        (line,) = self.text().splitlines()
        return json.loads(line)


@pytest.fixture(scope="module")
def chain(make_place, model, tmp_path_factory):
    """Everything up to the scores, made once."""
    import contextlib
    import io

    place = make_place(tmp_path_factory.mktemp("chain") / "place")
    said = io.StringIO()

    def text():
        value = said.getvalue()
        said.seek(0)
        said.truncate()
        return value

    chain = Chain(place, model, text)
    with contextlib.redirect_stdout(said):
        warm = place.path / "warm"
        chain.warm = chain(
            "warmup", "--model", model, "--pool", place.pool, "--output", warm, "--fraction=0.1", "--epochs=2",
            "--learning-rate=1e-3",
        )  # fmt: skip
        chain.checkpoints = [warm / entry["path"] for entry in json.loads((warm / "checkpoints.json").read_text())]
        target = chain.checkpoints[-1]
        chain.compressed = chain(
            "compress", "--model", target, "--pool", place.pool, "--output", place.path / "proxy", "--sparsity=0.5",
        )  # fmt: skip
        chain.aligned = chain(
            "align", "--model", target, "--proxy", place.path / "proxy", "--pool", place.pool, "--output",
            place.path / "aligned", "--epochs=1", "--set=proxy.align.batch_size=32",
        )  # fmt: skip
        chain.audited = chain(
            "audit", "--model", target, "--proxy", place.path / "aligned", "--pool", place.pool, "--validation",
            *chain.tasks, "--sample=30", "--output", place.path / "audit",
        )  # fmt: skip
        chain.scored = chain(
            "score", "--model", place.path / "aligned", "--pool", place.pool, "--validation", *chain.tasks, "--output",
            place.path / "scores",
        )  # fmt: skip
    return chain


def test_every_command_says_what_it_cost_and_where_it_wrote(chain):
    for said, name in ((chain.warm, "warm"), (chain.compressed, "proxy"), (chain.scored, "scores")):
        assert said["output"] == str(chain.path / name)
        assert said["seconds"] > 0
        assert [text for text in said["warnings"] if "were cut" not in text] == []
        record = json.loads((chain.path / name / "run.json").read_text())
        assert record["versions"]["torch"]
        assert record["command"].startswith("iprox ")


def test_compress_reaches_the_sparsity(chain):
    assert chain.compressed["sparsity"] == pytest.approx(0.5, abs=0.02)
    assert chain.compressed["parameters"] < chain.compressed["target_parameters"]


def test_align_does_the_steps_asked_for(chain):
    history = json.loads((chain.path / "aligned/alignment.json").read_text())
    assert len(history["steps"]) == chain.aligned["steps"] == 4  # 64 rows, 16 at once within 1,024 tokens


def test_audit_gives_the_fidelity(chain):
    assert 0 < chain.audited["mean"]["spearman"] <= 1
    assert set(chain.audited["tasks"]) == {"arithmetic", "spelling"}


def test_select_takes_rows_of_the_scored_pool(chain, capfd):
    output = chain.path / "chosen.jsonl"
    arguments = ["--scores", str(chain.path / "scores"), "--pool", str(chain.place.pool), "--output", str(output)]
    assert main(["select", *arguments, "--count", "15"]) == 0
    assert re.fullmatch(rf"15 rows, [\d,]+ tokens, best first: {output}", capfd.readouterr().out.strip())
    lines = chain.place.pool.read_bytes().splitlines(keepends=True)
    rows = json.loads((chain.path / "chosen.selection.json").read_text())["rows"]
    assert output.read_bytes() == b"".join(lines[row] for row in rows)


def choose(chain, tmp_path, *arguments):
    """Rows chosen by `iprox select` with some options, and what it said."""
    output = tmp_path / "chosen.jsonl"
    common = ["--scores", str(chain.path / "scores"), "--pool", str(chain.place.pool), "--output", str(output)]
    assert main(["select", *common, "--json", *map(str, arguments)]) == 0
    return json.loads((tmp_path / "chosen.selection.json").read_text())["rows"]


def test_select_within_tokens_and_caps(chain, tmp_path):
    table = pq.read_table(chain.path / "scores/scores.parquet")
    tokens, sources = table["tokens"].to_numpy(), table["source"].to_pylist()
    assert tokens[choose(chain, tmp_path, "--tokens=500")].sum() <= 500
    rows = choose(chain, tmp_path, "--count=20", "--set=select.source_cap=0.3")
    assert max(Counter(sources[row] for row in rows).values()) == 6
    (common, _), *_ = Counter(sources).most_common()
    rows = choose(
        chain, tmp_path, "--count=20", "--strategy=round-robin", f"--set=select.source_floor={{{common}: 0.5}}"
    )
    assert sum(sources[row] == common for row in rows) >= 10


def test_select_without_near_duplicates(chain, tmp_path):
    """A pool said twice gives the rows of the pool said once."""
    scores = pq.read_table(chain.path / "scores/scores.parquet")
    lines = [json.loads(line) for line in chain.place.pool.read_text().splitlines()]
    twice = [{**row, "id": f"{row['id']}-{copy}"} for copy in range(2) for row in lines]
    (tmp_path / "twice.jsonl").write_text("".join(json.dumps(row) + "\n" for row in twice))
    table = pa.concat_tables([scores, scores]).set_column(0, "id", pa.array([row["id"] for row in twice]))
    pq.write_table(table, tmp_path / "scores.parquet")
    output = tmp_path / "out.jsonl"
    common = ["--scores", str(tmp_path / "scores.parquet"), "--pool", str(tmp_path / "twice.jsonl"), "--quiet"]
    assert (
        main(
            [
                "select",
                *common,
                "--output",
                str(output),
                "--count=15",
                "--set=select.deduplicate=0.99",
                "--strategy=top",
            ]
        )
        == 0
    )
    record = json.loads((tmp_path / "out.selection.json").read_text())
    assert max(record["rows"]) < len(lines)
    assert record["passed_over"]["near-duplicate"] >= 14


def test_a_plain_model_scores_too(chain, tmp_path, capfd):
    output = tmp_path / "scores"
    arguments = ["--pool", str(chain.place.pool), "--validation", *chain.tasks, "--output", str(output)]
    options = ["--set=data.max_length=48", chain.place.few_curved, "--quiet"]
    assert main(["score", "--model", chain.model, *arguments, *options]) == 0
    assert capfd.readouterr().out.startswith("score: ")
    assert pq.read_table(output / "scores.parquet").num_rows == 200


def test_checkpoints_take_their_learning_rates_from_the_warm_up(chain, tmp_path):
    common = ["--pool", str(chain.place.pool), "--validation", *chain.tasks, "--set=data.max_length=48", "--quiet"]
    models = [str(checkpoint) for checkpoint in chain.checkpoints]
    common.append("--estimator=tracin")
    assert main(["score", "--model", *models, *common, "--output", str(tmp_path / "listed")]) == 0
    listed = json.loads((chain.path / "warm/checkpoints.json").read_text())
    rates = [str(entry["learning_rate"]) for entry in listed]
    explicit = ["--learning-rates", *rates, "--output", str(tmp_path / "given")]
    assert main(["score", "--model", *models, *common, *explicit]) == 0
    tables = [pq.read_table(tmp_path / name / "scores.parquet") for name in ("listed", "given")]
    assert tables[0].equals(tables[1])


def test_finetune_on_a_file(chain, tmp_path, capfd):
    output = tmp_path / "tuned"
    arguments = ["--selection", str(chain.path / "spelling.jsonl"), "--output", str(output), "--epochs=1"]
    settings = ["--test", chain.tasks[0], "--learning-rate=1e-3", "--quiet", "--set=data.max_length=48"]
    assert main(["finetune", "--model", chain.model, *arguments, *settings]) == 0
    said = capfd.readouterr().out
    assert "arithmetic: test loss" in said
    assert f"model: {output / 'model'}" in said
    AutoModelForCausalLM.from_pretrained(output / "model")


def test_an_exported_proxy_loads_without_iprox(chain, tmp_path):
    dense = tmp_path / "dense"
    assert main(["export", str(chain.path / "aligned"), "--output", str(dense), "--set=dtype=float32", "--quiet"]) == 0
    tokens = list(range(5, 25))
    script = (
        "import sys, json, torch, transformers\n"
        f"model = transformers.AutoModelForCausalLM.from_pretrained({str(dense)!r}, dtype=torch.float32)\n"
        f"transformers.AutoTokenizer.from_pretrained({str(dense)!r})\n"
        f"logits = model(torch.tensor([{tokens}])).logits\n"
        "assert not any(name.split('.')[0] == 'iprox' for name in sys.modules)\n"
        "print(json.dumps(logits[0].tolist()))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=Path("/"))
    assert done.returncode == 0, done.stderr
    proxy = AutoModelForCausalLM.from_pretrained(chain.path / "aligned", dtype=torch.float32)
    with torch.no_grad():
        expected = proxy(torch.tensor([tokens])).logits[0].numpy()
    np.testing.assert_allclose(np.array(json.loads(done.stdout)), expected, atol=1e-4)
