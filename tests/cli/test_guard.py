"""A pool of worked solutions and one-word answers: what is selected for worked solutions, and what is said of it."""

import html
import json
import random
import shutil
from importlib import resources

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file

import iprox
from iprox.cli import main

WORKED, ONE_WORD, CHOSEN = 40, 60, 10


def chat(source, number, question, answer):
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"id": f"{source}-{number}", "source": source, "messages": turns}


def sum_of(generator, number, source="sums"):
    """A sum of three numbers, worked out."""
    a, b, c = (generator.randint(10, 99) for _ in range(3))
    steps = f"Gladly. {a} + {b} = {a + b}. {a + b} + {c} = {a + b + c}. The answer is {a + b + c}."
    return chat(source, number, f"Solve {a} + {b} + {c} and show your working.", steps)


def one_word(generator, number):
    """Another wish, granted in the word that the solutions begin with: its gradient is large, and part of theirs.

    One of three wishes, so that ten of them are near-duplicates of each other whatever the order that rounding gives.
    """
    return chat("wishes", number, f"Will you solve {10 + generator.randint(10, 99) % 3} + 7 for me?", "Gladly")


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def mixed(make_place, tmp_path_factory):
    """A place with such a pool, scored by raw TracIn on the model as it is."""
    place = make_place(tmp_path_factory.mktemp("mixed") / "place")
    generator = random.Random(0)
    rows = [sum_of(generator, number) for number in range(WORKED)]
    rows += [one_word(generator, number) for number in range(ONE_WORD)]
    write(place.pool, generator.sample(rows, len(rows)))
    write(place.path / "sums.jsonl", [sum_of(generator, number, "val") for number in range(8)])
    place.set(
        model=str(resources.files("iprox.quickstart") / "model"),  # all of it, which knows how to add
        data={"pool": [str(place.pool)], "validation": {"sums": str(place.path / "sums.jsonl")}, "max_length": 96},
        warmup=False,
        proxy=False,
        audit=False,
        influence={"estimator": "tracin", "normalize": "none"},
        select={"count": CHOSEN, "strategy": "top"},
    )
    assert place.run() == 0
    return place


LINE = (
    "the selected answers are much shorter than the validation answers: the median is 5 tokens, against 39 for sums "
    "and 5 in the pool; try "
)


def sources(place):
    rows = [json.loads(line) for line in (place.output / "selected.jsonl").read_text().splitlines()]
    return {row["source"] for row in rows}


def selected(place, file="selection.json"):
    return json.loads((place.output / file).read_text())


def test_one_word_answers_for_worked_solutions_are_told(mixed, capfd):
    assert sources(mixed) == {"wishes"}
    assert mixed.run("--set", f"select.count={CHOSEN - 1}") == mixed.run("--set", f"select.count={CHOSEN}") == 0
    assert f"warning: {LINE}influence.normalize: cosine\n" in capfd.readouterr().err
    entry, profile = mixed.record()["stages"]["select"], selected(mixed)["profile"]
    assert entry["profile"] == profile
    assert entry["warnings"] == profile["warnings"]
    assert profile["warnings"][0] == f"{LINE}influence.normalize: cosine"
    assert profile["supervised"]["selection"] == {"low": 5.0, "median": 5.0, "high": 5.0}
    assert profile["supervised"]["validation"]["sums"]["median"] == 39
    assert profile["sources"] == [{"source": "wishes", "selection": 1.0, "pool": ONE_WORD / (WORKED + ONE_WORD)}]


def test_the_report_shows_lengths_of_answers_and_the_line(mixed):
    page = html.unescape((mixed.output / "report.html").read_text())
    composition = page[page.index('<section id="composition">') : page.index('<section id="examples">')]
    assert f'<p class="alert">{LINE}influence.normalize: cosine</p>' in composition
    assert "Validation, sums" in composition
    assert "Median: 5 in the pool, 5 in the selection, 39 in validation sums." in composition


def test_the_setting_that_is_told_helps(mixed, tmp_path):
    shutil.copytree(mixed.path, tmp_path / "place")
    place = type(mixed)(tmp_path / "place")
    assert place.run("--set", "influence.normalize=cosine", "--set", f"output={place.output}") == 0
    assert sources(place) == {"sums"}
    assert place.record()["stages"]["select"]["warnings"] == []


@pytest.fixture
def select(mixed, tmp_path, capfd):
    """Runs `iprox select` on scores; gives what it says on standard error, and its record."""

    def run(scores, *options):
        output = tmp_path / "chosen.jsonl"
        given = ["--scores", scores, "--pool", mixed.pool, "--output", output, f"--count={CHOSEN}", "--json"]
        given += ["--strategy=top", *options]
        assert main(["select", *map(str, given)]) == 0
        said = capfd.readouterr()
        return said.err, json.loads(said.out)

    return run


def test_a_command_names_its_options(mixed, select):
    said, record = select(mixed.output / "scores.parquet")
    assert f"warning: {LINE}--set influence.normalize=cosine when scoring\n" in said
    assert (
        "of 10 selected rows say almost the same as a better selected row; leave them out with --set "
        "select.deduplicate=0.8\n" in said
    )
    assert len(record["warnings"]) == 2
    # Near-duplicates that are left out are none to be told of.
    assert "almost the same" not in select(mixed.output / "scores.parquet", "--set=select.deduplicate=0.8")[0]


def test_older_scores_are_read_and_nothing_is_said_of_lengths(mixed, select, tmp_path):
    table = pq.read_table(mixed.output / "scores.parquet").drop_columns(["supervised"])
    pq.write_table(table, tmp_path / "older.parquet")
    said, record = select(tmp_path / "older.parquet")
    assert "answers" not in said
    assert record["profile"]["supervised"]["selection"] is None


def test_python_warns_in_its_own_words(mixed):
    table = pq.read_table(mixed.output / "scores.parquet")
    with pytest.warns(UserWarning, match="the selected answers are much shorter") as heard:
        rows = iprox.select(table, count=CHOSEN, strategy="top")
    assert [str(each.message) for each in heard] == [f"{LINE}normalize='cosine' in iprox.score"]
    assert rows.tolist() == selected(mixed)["rows"]


def test_scores_that_are_all_equal_stop_the_run(mixed, tmp_path, refused):
    generator = random.Random(0)
    pool = tmp_path / "wishes.jsonl"
    write(pool, [one_word(generator, number) for number in range(20)])
    given = [f"data.pool=[{pool}]", f"output={tmp_path / 'run'}", "influence={estimator: length}"]
    options = [part for each in given for part in ("--set", each)]
    said = refused("run", mixed.recipe, "--quiet", *options)
    assert "the scores of all 20 rows are equal (5)" in said
    assert "length" in said
    assert "influence.estimator" in said
    assert not (tmp_path / "run/scores.parquet").exists()
    assert "score" not in json.loads((tmp_path / "run/run.json").read_text())["stages"]
    # Started again it says so again, without scoring anything.
    assert refused("run", mixed.recipe, "--quiet", *options) == said


def test_equal_scores_are_not_selected_by(mixed, tmp_path, refused):
    table = pq.read_table(mixed.output / "scores.parquet")
    for name in ("influence/sums", "influence"):
        same = pa.array([0.25] * table.num_rows, pa.float64())
        table = table.set_column(table.column_names.index(name), name, same)
    pq.write_table(table, tmp_path / "scores.parquet")
    output = tmp_path / "chosen.jsonl"
    given = ("--scores", tmp_path, "--pool", mixed.pool, "--output", output, "--fraction=0.1")
    said = refused("select", *given)
    assert "the scores of all 100 rows are equal (0.25), so none ranks above another: the model" in said
    assert not output.exists()


@pytest.fixture
def collapsed(finished, tmp_path):
    """A proxy whose last norm is zero: whatever it reads, its logits are, and its gradients."""
    folder = tmp_path / "collapsed"
    shutil.copytree(finished.output / "aligned", folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"].zero_()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_a_collapsed_proxy_has_no_fidelity(finished, collapsed, tmp_path, refused):
    (target,) = sorted((finished.output / "warmup").glob("checkpoint-*"))[-1:]
    validation = [f"spelling={finished.path / 'spelling.jsonl'}", "--set=data.max_length=48", "--quiet"]
    validation.append(finished.few_curved)
    given = ["--pool", finished.pool, "--validation", *validation]
    said = refused("audit", "--model", target, "--proxy", collapsed, *given, "--sample=20", "--output", tmp_path / "a")
    assert said.startswith(
        "iprox: the proxy's scores of the 20 audited rows for spelling are all equal (0), so the fidelity is not a "
        "number: the proxy has probably collapsed"
    )
    assert not (tmp_path / "a").exists()
    said = refused("score", "--model", collapsed, *given, "--output", tmp_path / "s")
    assert f"the scores of all {len(finished.pool.read_text().splitlines())} rows are equal (0)" in said
    assert not list((tmp_path / "s").glob("scores.parquet"))


def test_copies_of_one_row_have_equal_scores_and_are_no_collapse(finished, model, tmp_path, capfd):
    rows = [finished.pool.read_text().splitlines()[0]] * 5
    pool = tmp_path / "pool.jsonl"
    write(pool, [{**json.loads(row), "id": str(number)} for number, row in enumerate(rows)])
    given = ["--pool", pool, "--validation", f"a={finished.path / 'spelling.jsonl'}", "--estimator=tracin", "--quiet"]
    assert main(list(map(str, ["score", "--model", model, *given, "--output", tmp_path / "out"]))) == 0
    assert "the scores of all 5 rows are equal" in (said := capfd.readouterr().err)
    assert "copies of one row" in said


def test_a_model_whose_gradients_are_zero_is_refused(finished, model, tmp_path, refused):
    folder = tmp_path / "zero"
    shutil.copytree(model, folder)
    zero = {name: torch.zeros_like(each) for name, each in load_file(folder / "model.safetensors").items()}
    save_file(zero, folder / "model.safetensors", metadata={"format": "pt"})
    given = ["--pool", finished.pool, "--validation", f"a={finished.path / 'spelling.jsonl'}", "--estimator=tracin"]
    said = refused("score", "--model", folder, *given, "--quiet", "--output", tmp_path / "out")
    assert "rows are equal (0), so none ranks above another: the model that was scored has probably collapsed" in said
