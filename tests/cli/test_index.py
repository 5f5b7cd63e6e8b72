"""A gradient index through the command line: written once, queried, resumed, refused."""

import json
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
from scipy.stats import spearmanr

from iprox.cli import main
from iprox.scores import scores_metadata


@pytest.fixture(scope="module")
def indexed(make_place, tmp_path_factory):
    """A run with two checkpoints that kept the optimizer's state, and indexes of its proxies."""
    place = make_place(tmp_path_factory.mktemp("indexed") / "place")
    options = ["influence.checkpoints=all", "influence.estimator=less", "audit=false"]
    assert place.run("--set", *options, "--stop-after", "compress") == 0
    place.proxies = sorted((place.output / "proxy").glob("checkpoint-*"))
    place.indexes = [place.path / f"index-{number}" for number in range(2)]
    for proxy, index in zip(place.proxies, place.indexes, strict=True):
        assert make(place, proxy, index) == 0
    return place


def make(place, model, output, *arguments):
    common = ["--pool", str(place.pool), "--output", str(output), "--set=data.max_length=48", "--quiet"]
    return main(["index", "--model", str(model), *common, *arguments])


def query(place, indexes, output, *arguments):
    named = ["--validation", *place.tasks(), "--output", str(output), "--quiet"]
    return main(["query", "--index", *map(str, indexes), *named, *arguments])


@pytest.mark.parametrize("normalize", ["none", "cosine"])
def test_a_query_ranks_as_scoring_does(indexed, tmp_path, normalize):
    how = ["--estimator=tracin", "--set", f"influence.normalize={normalize}"]
    exact = indexed.score(indexed.proxies[1:], tmp_path / "exact", *how)
    assert query(indexed, indexed.indexes[1:], tmp_path / "queried", "--set", f"influence.normalize={normalize}") == 0
    queried = pq.read_table(tmp_path / "queried/scores.parquet")
    assert queried.schema.names == exact.schema.names
    assert queried["id"].equals(exact["id"])
    for name in ("tokens", "supervised"):
        assert queried[name].equals(exact[name])
    lengths = [scores_metadata(table)["validation_supervised"] for table in (exact, queried)]
    assert lengths[0] == lengths[1]
    assert list(lengths[0]["tasks"]) == ["arithmetic", "spelling"]
    for task in ("arithmetic", "spelling"):
        a, b = (table[f"influence/{task}"].to_numpy() for table in (exact, queried))
        assert spearmanr(a, b).statistic > 0.85
        assert np.std(b) == pytest.approx(np.std(a), rel=0.25)
    record = json.loads((tmp_path / "queried/run.json").read_text())["stages"]["query"]
    assert record["query"] == "target"
    assert record["rows"] == 200
    index = json.loads((indexed.indexes[1] / "run.json").read_text())["stages"]["index"]
    assert index["tokens"] == sum(exact["tokens"].to_pylist())
    assert index["dimension"] == 8192


def test_a_query_twice_gives_the_same_bytes(indexed, tmp_path):
    for name in ("once", "twice"):
        assert query(indexed, indexed.indexes[:1], tmp_path / name, "--set", "influence.per_example=true") == 0
    table = pq.read_table(tmp_path / "once/scores.parquet")
    assert table.schema.field("examples/spelling").type.list_size == 8
    assert (tmp_path / "once/scores.parquet").read_bytes() == (tmp_path / "twice/scores.parquet").read_bytes()


def test_scores_by_example_change_no_score_of_a_task(indexed, tmp_path):
    for name, options in (("alone", []), ("kept", ["--set", "influence.per_example=true"])):
        assert query(indexed, indexed.indexes[:1], tmp_path / name, "--set=influence.normalize=cosine", *options) == 0
    alone, kept = (pq.read_table(tmp_path / name / "scores.parquet") for name in ("alone", "kept"))
    for column in ("influence/spelling", "influence/arithmetic"):
        np.testing.assert_allclose(kept[column].to_numpy(), alone[column].to_numpy(), rtol=0.02, atol=2e-3)


def test_killed_when_all_but_its_marker_is_done_an_index_is_finished_by_the_same_command(indexed, tmp_path):
    again = tmp_path / "index"
    shutil.copytree(indexed.indexes[0], again)
    described = json.loads((again / "index.json").read_text())
    rows = described.pop("rows")
    (again / "identity.json").write_text(json.dumps(described, sort_keys=True))
    record = json.loads((again / "run.json").read_text())
    (again / "run.json").write_text(json.dumps({**record, "stages": {}}))
    assert make(indexed, indexed.proxies[0], again) == 0
    assert not (again / "identity.json").exists()
    assert json.loads((again / "index.json").read_text())["rows"] == rows


def test_several_indexes_are_checkpoints(indexed, tmp_path):
    rates = [0.25, 0.5]
    for number, index in enumerate(indexed.indexes):
        assert query(indexed, [index], tmp_path / f"{number}") == 0
    assert query(indexed, indexed.indexes, tmp_path / "both", "--learning-rates", *map(str, rates)) == 0
    parts = [pq.read_table(tmp_path / name / "scores.parquet")["influence/spelling"].to_numpy() for name in "01"]
    both = pq.read_table(tmp_path / "both/scores.parquet")["influence/spelling"].to_numpy()
    np.testing.assert_allclose(both, sum(r * part for r, part in zip(rates, parts, strict=True)), rtol=1e-9)


def test_the_steps_that_less_scores_are_indexed(indexed, tmp_path):
    exact = indexed.score(
        indexed.proxies[1:], tmp_path / "exact", "--estimator=less", "--set=influence.normalize=cosine"
    )
    assert make(indexed, indexed.proxies[1], tmp_path / "index", "--estimator=less") == 0
    assert query(indexed, [tmp_path / "index"], tmp_path / "queried", "--set=influence.normalize=cosine") == 0
    queried = pq.read_table(tmp_path / "queried/scores.parquet")
    a, b = (table["influence/spelling"].to_numpy() for table in (exact, queried))
    np.testing.assert_allclose(b, a, rtol=0, atol=6 / 8192**0.5)  # six standard errors of a cosine near 0
    assert np.corrcoef(a, b)[0, 1] > 0.9


def test_tokenizing_ahead_gives_the_same_bytes(indexed, tmp_path):
    assert make(indexed, indexed.proxies[0], tmp_path / "index", "--set=data.num_proc=2") == 0
    ours, theirs = (folder / "000000.arrow" for folder in (tmp_path / "index", indexed.indexes[0]))
    assert ours.read_bytes() == theirs.read_bytes()


def refusal(capfd):
    (line,) = capfd.readouterr().err.splitlines()
    return line


def test_what_cannot_be_is_refused(indexed, tmp_path, capfd):
    before = {file.name: file.read_bytes() for file in indexed.indexes[0].glob("*.arrow")}
    assert make(indexed, indexed.proxies[0], indexed.indexes[0]) == 0  # done already
    assert {file.name: file.read_bytes() for file in indexed.indexes[0].glob("*.arrow")} == before
    assert make(indexed, indexed.proxies[0], indexed.indexes[0], "--dimension=256") == 2
    assert "exists already and has another result (dimension differ)" in refusal(capfd)
    assert make(indexed, indexed.proxies[0], tmp_path / "index", "--dimension=101") == 2
    assert "power of two" in refusal(capfd)
    assert not (tmp_path / "index").exists()
    assert query(indexed, [tmp_path], tmp_path / "out") == 2
    assert "is not an index" in refusal(capfd)
    assert query(indexed, indexed.indexes[:1], tmp_path / "out", "--model", str(indexed.proxies[1])) == 2
    assert "is not the model of the index" in refusal(capfd)
    assert query(indexed, indexed.indexes, tmp_path / "out") == 2
    assert "learning rate" in refusal(capfd)
    assert main(["export", str(indexed.path / "run/warmup"), "--output", str(tmp_path / "out"), "--quiet"]) == 2
    refusal(capfd)
    assert not (tmp_path / "out").exists()
