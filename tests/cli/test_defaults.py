"""With no key set but model, pool, validation and output, a run selects the data that the tasks ask for."""

import json
from collections import Counter
from importlib import resources
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml

from iprox.cli import main
from iprox.data import ChatEncoder, Pool
from iprox.models.loading import load_tokenizer

pytestmark = pytest.mark.slow
BUNDLED = Path(str(resources.files("iprox.quickstart")))
TASKS = ("arithmetic", "spelling")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of the whole bundled model on half of its pool, up to the selection."""
    folder = tmp_path_factory.mktemp("defaults")
    recipe = {
        "model": str(BUNDLED / "model"),
        "data": {
            "pool": str(folder / "pool.jsonl"),
            "validation": {task: str(BUNDLED / f"data/{task}.val.jsonl") for task in TASKS},
        },
        "output": str(folder / "run"),
    }
    rows = (BUNDLED / "data/pool.jsonl").read_bytes().splitlines(keepends=True)
    (folder / "pool.jsonl").write_bytes(b"".join(rows[:1000]))
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    quicker = ["--set", "audit=false"]  # which selects nothing
    assert main(["run", str(folder / "recipe.yaml"), "--quiet", "--stop-after", "select", *quicker]) == 0
    return folder / "run"


def test_nearly_all_rows_are_of_the_skills_asked_for(run):
    """Each validation set has 32 examples, so each skill gets about half of the selection, as far as it has rows."""
    rows = [json.loads(line) for line in (run / "selected.jsonl").read_text().splitlines()]
    sources = Counter(row["source"] for row in rows)
    assert len(rows) == 50
    assert sum(sources[task] for task in TASKS) >= 45
    assert min(sources[task] for task in TASKS) >= 12
    whole = Counter(example.source for example in Pool([str(run.parent / "pool.jsonl")]))
    assert sum(whole[task] for task in TASKS) < 0.25 * whole.total()  # so that this is no accident


def test_the_answers_are_as_long_as_the_validation_sets(run):
    encoder = ChatEncoder(load_tokenizer(BUNDLED / "model"), 2048)

    def median(pool):
        return float(np.median([example.supervised for example in encoder.encode(list(pool))]))

    chosen = median(Pool([str(run / "selected.jsonl")]))
    asked = [median(Pool([str(BUNDLED / f"data/{task}.val.jsonl")])) for task in TASKS]
    assert 0.5 * min(asked) <= chosen <= 2 * max(asked)


def test_what_was_done_is_in_the_record(run):
    stages = json.loads((run / "run.json").read_text())["stages"]
    assert stages["select"]["strategy"] == "round-robin"
    assert stages["warmup"]["examples"] == 500
    assert stages["warmup"]["learning_rate"] == pytest.approx(0.1 / 128)
    names = pq.read_schema(run / "scores.parquet").names
    assert [f"examples/{task}" in names for task in TASKS] == [True, True]
    assert json.loads(pq.read_schema(run / "scores.parquet").metadata[b"iprox"])["normalize"] == "cosine"
