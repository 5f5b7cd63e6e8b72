"""A small recipe on two layers of the bundled model and the start of its pool: a whole run takes a few seconds."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, ClassVar

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from transformers import AutoConfig, AutoModelForCausalLM, set_seed
from transformers.utils.logging import disable_progress_bar

from iprox.audits import agreement
from iprox.cli import main
from iprox.proxy import align
from iprox.run import steps

BUNDLED = Path(str(resources.files("iprox.quickstart")))
ROWS = 200
# Curvature on all rows would take half of a run; tests/influence has what it is worth.
CURVATURE_ROWS = 24


def copy_start(source: Path, target: Path, rows: int) -> Path:
    """The first rows of a JSONL file, byte for byte."""
    target.write_bytes(b"".join(source.read_bytes().splitlines(keepends=True)[:rows]))
    return target


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests that run a pipeline, or need a finished one, as slow: each takes seconds."""
    for item in items:
        if "make_place" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.slow)


@dataclass
class Place:
    """A folder with a pool, validation sets and a recipe, and ways to run commands on them."""

    path: Path
    # For commands without the recipe, which measure curvature on up to 256 rows.
    few_curved: ClassVar[str] = f"--set=influence.curvature_examples={CURVATURE_ROWS}"

    @property
    def pool(self) -> Path:
        return self.path / "pool.jsonl"

    @property
    def output(self) -> Path:
        return self.path / "run"

    @property
    def recipe(self) -> Path:
        return self.path / "recipe.yaml"

    def set(self, **changes: Any) -> None:
        """Change top-level sections of the recipe."""
        self.recipe.write_text(yaml.safe_dump({**yaml.safe_load(self.recipe.read_text()), **changes}))

    def run(self, *arguments: str) -> int:
        return main(["run", str(self.recipe), "--quiet", *arguments])

    def tasks(self) -> list[str]:
        """The validation sets as `--validation` takes them."""
        return [f"{task}={self.path / task}.jsonl" for task in ("arithmetic", "spelling")]

    def score(self, models: Sequence[Path], output: Path, *options: str) -> pa.Table:
        """Run `iprox score` on the pool and return the scores."""
        inputs = ["--pool", str(self.pool), "--validation", *self.tasks(), "--set=data.max_length=48", "--quiet"]
        inputs.append(self.few_curved)
        assert main(["score", "--model", *map(str, models), *inputs, "--output", str(output), *options]) == 0
        return pq.read_table(output / "scores.parquet")

    def record(self) -> dict[str, Any]:
        return json.loads((self.output / "run.json").read_text())

    def done(self) -> list[str]:
        """The stages that the last start did itself; the inputs are read every time."""
        return [name for name, entry in self.record()["stages"].items() if not entry["skipped"]][1:]

    def result(self) -> dict[str, bytes]:
        """The bytes that must not change between equal runs."""
        return {name: (self.output / name).read_bytes() for name in ("scores.parquet", "selected.jsonl")}

    def files(self) -> list[str]:
        return sorted(str(file.relative_to(self.path)) for file in self.path.rglob("*"))


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Like the bundled model, but narrower, of two layers, and of random weights: half of the time."""
    folder = tmp_path_factory.mktemp("model") / "model"
    shutil.copytree(BUNDLED / "model", folder)
    kinds = ["full_attention"] * 2
    size = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16, "num_hidden_layers": 2, "layer_types": kinds}
    set_seed(0)
    config = AutoConfig.from_pretrained(folder, **size)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def make_place(model: Path) -> Callable[[Path], Place]:
    """Makes a place in a folder."""
    return lambda path: _make_place(path, model)


def _make_place(path: Path, model: Path) -> Place:
    path.mkdir(parents=True, exist_ok=True)
    place = Place(path)
    copy_start(BUNDLED / "data/pool.jsonl", place.pool, ROWS)
    for task in ("arithmetic", "spelling"):
        copy_start(BUNDLED / f"data/{task}.val.jsonl", path / f"{task}.jsonl", 8)
    recipe = {
        "model": str(model),
        "data": {
            "pool": [str(place.pool)],
            "validation": {task: str(path / f"{task}.jsonl") for task in ("arithmetic", "spelling")},
            "max_length": 48,
        },
        "warmup": {"fraction": 0.06, "epochs": 2, "learning_rate": 1.0e-3, "batch_size": 8},
        "proxy": {
            "sparsity": 0.5,
            "align": {"epochs": 1, "batch_size": 16, "learning_rate": 1.0e-3, "held_out": 20},
        },
        "influence": {"curvature_examples": CURVATURE_ROWS},
        "audit": {"sample": 30},
        "refine": False,
        "select": {"fraction": 0.1},
        "output": str(place.output),
    }
    place.recipe.write_text(yaml.safe_dump(recipe))
    return place


@pytest.fixture
def place(tmp_path: Path, make_place: Callable[[Path], Place]) -> Place:
    """A place where nothing has run yet."""
    return make_place(tmp_path / "place")


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, make_place: Callable[[Path], Place]) -> Place:
    """A place with a whole run. For reading only."""
    place = make_place(tmp_path_factory.mktemp("finished") / "place")
    assert place.run() == 0
    return place


@pytest.fixture
def copied(finished: Place, tmp_path: Path) -> Place:
    """A copy of the finished place, with paths of its own: what a moved run folder is."""
    path = tmp_path / "place"
    shutil.copytree(finished.path, path)
    text = (path / "recipe.yaml").read_text()
    (path / "recipe.yaml").write_text(text.replace(str(finished.path), str(path)))
    return Place(path)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """In the tests of this folder, watch alignments before and after only, and resample few times.

    tests/proxy has the alignments that stop early, and tests/audit what intervals are worth. pytest calls this hook for
    the tests of every folder once this file is loaded.
    """
    if not item.path.is_relative_to(Path(__file__).parent):
        return (yield)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(align, "EVALUATIONS", 1)
        patch.setattr(agreement, "RESAMPLES", 50)
        patch.setattr(steps, "ATTRIBUTED", 8)
        return (yield)


@pytest.fixture(scope="session", autouse=True)
def _no_bars_of_libraries() -> None:
    """As the command line has it, also for what the tests themselves load."""
    disable_progress_bar()


@pytest.fixture
def refused(capfd: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a command that must be refused; gives the one line it says."""

    def call(*arguments: object) -> str:
        capfd.readouterr()
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as stop:  # argparse's own refusals
            code = stop.code
        said = capfd.readouterr()
        assert code == 2, said.err
        assert said.out == ""
        assert "Traceback" not in said.err
        return said.err.strip()

    return call
