"""The recipe: defaults, refusals that name the key and the mend, overrides, and a round trip."""

import datetime
import runpy
from pathlib import Path

import pytest
import yaml

from iprox.errors import InputError
from iprox.recipe import load_recipe, parse_recipe, resolved, to_yaml, validated
from iprox.settings import (
    STAGES,
    FinetuneSection,
    InfluenceSection,
    Recipe,
    RefineSection,
    SelectSection,
    WarmupSection,
)

SMALLEST = {"model": "m", "data": {"pool": "p.jsonl", "validation": {"t": "v.jsonl"}}, "output": "o"}


def with_section(**sections):
    return {**SMALLEST, **sections}


@pytest.mark.parametrize(
    ("sections", "on"),
    [
        ({}, True),
        ({"proxy": {"sparsity": 0.5}, "select": {"count": 10}}, True),
        ({"refine": False}, False),
        ({"proxy": False}, False),
        ({"proxy": False, "refine": {}}, False),
        ({"influence": {"estimator": "perplexity"}}, False),
        ({"select": {"fraction": 0.5}}, False),
        ({"select": {"tokens": 1000}}, False),
        ({"select": {"threshold": 0.0}}, False),
        ({"select": {"source_cap": 0.3}}, False),
        ({"select": {"deduplicate": 0.8}}, False),
    ],
)
def test_the_best_rows_of_a_proxy_are_scored_again_by_default(sections, on):
    assert parse_recipe(with_section(**sections)).refine == (RefineSection() if on else False)


def test_defaults_are_those_of_the_design():
    recipe = parse_recipe(SMALLEST)
    assert (recipe.proxy.method, recipe.proxy.sparsity) == ("target", None)
    assert recipe.proxy.depth == 0.1
    assert parse_recipe(with_section(refine=False)).proxy.depth == 0.33
    assert parse_recipe(SMALLEST).proxy.depth == 0.1
    assert parse_recipe(with_section(refine=False, proxy={"depth": 0.2})).proxy.depth == 0.2
    assert recipe.proxy.align is False
    assert parse_recipe(with_section(proxy={"sparsity": 0.5})).proxy.align.kl_weight == 0.1
    assert recipe.warmup.epochs == 2
    assert recipe.select.fraction == 0.05
    assert recipe.audit.sample == 500
    assert recipe.finetune is False
    assert recipe.data.pool == ["p.jsonl"]


@pytest.mark.parametrize(
    ("given", "method"),
    [
        ({}, "target"),
        ({"align": False}, "target"),
        ({"depth": 0.5}, "target"),
        ({"sparsity": 0.5}, "ipsvd"),
        ({"fidelity": 0.9}, "target"),
        ({"align": {"epochs": 2}}, "ipsvd"),
        ({"probe": 0.01}, "ipsvd"),
        ({"method": "svd"}, "svd"),
    ],
)
def test_the_method_follows_from_what_is_given(given, method):
    proxy = parse_recipe(with_section(proxy=given)).proxy
    assert proxy.method == method
    assert proxy.depth == given.get("depth", 0.1 if method == "target" else 1.0)


@pytest.mark.parametrize(
    "given",
    [
        {"method": "target", "sparsity": 0.5},
        {"method": "target", "depth": 1.0},
        {"fidelity": 0.9, "depth": 0.5},
        {"method": "target", "align": {"epochs": 1}},
        {"depth": 0.0},
        {"depth": 1.5},
    ],
)
def test_gradients_that_cannot_be_left_out_so_are_refused(given):
    with pytest.raises(InputError, match="proxy"):
        parse_recipe(with_section(proxy=given))


def with_tasks(tasks):
    return {**SMALLEST, "data": {**SMALLEST["data"], "validation": tasks}}


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (with_section(modle="x"), "unknown key 'modle'; did you mean 'model'?"),
        (with_section(proxy={"sparsty": 0.5}), "unknown key 'proxy.sparsty'; did you mean 'sparsity'?"),
        (with_section(proxy={"align": {"step": 3}}), "unknown key 'proxy.align.step'"),
        (with_section(warmup={"zzzzzz": 1}), "known here: epochs, learning_rate, batch_size, accumulate, lora"),
        (
            with_section(influence={"estimator": "less"}, warmup={"lora": 4}),
            "influence.estimator less needs Adam's moments of the weights, which warmup.lora does not train",
        ),
        (with_section(warmup={"lora": 0}), "(given: 0)"),
        (with_section(proxy={"sparsity": 1.0}), "proxy.sparsity: "),
        (with_section(proxy={"sparsity": 0}), "(given: 0)"),
        (
            with_section(select={"fraction": 0.1, "count": 5}),
            "select: give exactly one of fraction, count and tokens, not fraction and count",
        ),
        (with_section(data={"pool": "p.jsonl"}), "the key 'data.validation' is missing"),
        (with_section(data={"pool": [], "validation": {"t": "v"}}), "data.pool: "),
        (with_section(data={"pool": "p", "validation": {}}), "data.validation: "),
        (with_section(warmup=True), "warmup: give a section of keys (or false"),
        (with_section(influence={"estimator": "tracinn"}), "did you mean 'tracin'? (given: 'tracinn')"),
        (with_section(influence={"estimator": "ek-fac"}), "did you mean 'ekfac'? (given: 'ek-fac')"),
        (with_section(influence={"estimator": "adam"}), "there is no such estimator; known: ekfac, kfac, tracin"),
        (with_section(influence={"gradient": "factors"}), "unknown key 'influence.gradient'"),
        (with_section(influence={"curvature": "k-fac"}), "unknown key 'influence.curvature'"),
        (with_section(influence={"over_examples": "max"}), "unknown key 'influence.over_examples'"),
        (with_section(influence={"norm_sketch": 16}), "unknown key 'influence.norm_sketch'"),
        (with_section(influence={"estimator": "rds", "normalize": "cosine"}), "normalize applies to gradients"),
        (with_section(influence={"estimator": "rds", "checkpoints": "all"}), "checkpoints: all is for gradients"),
        (with_section(influence={"estimator": "bm25"}), "runs no model; set proxy: false"),
        (with_section(refine={"candidates": 0.2}, proxy=False), "but proxy is off"),
        (with_section(refine={"candidates": 1}), "refine.candidates: "),
        (with_section(refine={"recall": 0.9}), "unknown key 'refine.recall'"),
        (with_section(influence={"damping": 0}), "influence.damping: "),
        (with_section(audit={"sample": "many"}), "audit.sample: "),
        (with_section(ray_worker=2), "unknown key 'ray_worker'; did you mean 'ray_workers'?"),
        (with_section(ray_workers="many"), "ray_workers: "),
        (with_section(seed=-1), "seed: "),
        (with_section(select={"threshold": float("nan")}), "select.threshold: "),
        (with_section(warmup={"learning_rate": float("inf")}), "warmup.learning_rate: "),
        (with_section(select={"source_cap": "lots"}), "select.source_cap: "),
        (with_section(seed=2**32), "seed: "),
        (with_section(proxy={"method": "layers", "align": {"epochs": 2}}), "the method layers has none"),
        (
            with_section(processes=3),
            "warmup.batch_size 16 is that of all 3 processes together; make it a multiple of 3",
        ),
        (with_section(ray_workers=2, device="cuda:1"), "choose GPUs with CUDA_VISIBLE_DEVICES"),
        (
            with_section(ray_workers=2, data={**SMALLEST["data"], "num_proc": 2}),
            "and ray_workers for others",
        ),
        ({"data": SMALLEST["data"], "output": "o"}, "the key 'model' is missing"),
        (
            with_tasks({False: "v"}),
            "data.validation: a key must be text, and YAML reads no, off and false as false: quote",
        ),
        (with_tasks({True: "v"}), 'reads yes, on and true as true: quote it, e.g. "yes"'),
        (with_tasks({1: "v"}), 'data.validation: a key must be text, and YAML reads 1 as a number: quote it, "1"'),
        (with_tasks({1.5: "v"}), 'YAML reads 1.5 as a number: quote it, "1.5"'),
        (with_tasks({None: "v"}), "YAML reads an empty key, ~ and null as nothing"),
        (with_tasks({datetime.date(2020, 1, 2): "v"}), 'reads 2020-01-02 as a date: quote it, "2020-01-02"'),
        (
            with_section(select={"source_floor": {False: 0.1}}),
            "select.source_floor: a key must be text, and YAML reads no",
        ),
        (
            with_section(select={"weights": {2: 0.1}}),
            "select.weights: a key must be text, and YAML reads 2 as a number",
        ),
        (with_section(finetune={"test": {False: "x"}}), "finetune.test: a key must be text, and YAML reads no"),
        (with_section(select={"task": False}), 'quote text that YAML reads as true or false (yes, no, on, off): "no"'),
        ({**SMALLEST, 1: 2}, 'a key must be text, and YAML reads 1 as a number: quote it, "1"'),
    ],
)
def test_refusals_name_the_key(raw, said):
    with pytest.raises(InputError) as refusal:
        parse_recipe(raw, "r.yaml")
    message = str(refusal.value)
    assert message.startswith("r.yaml: ")
    assert said in message
    assert "\n" not in message
    assert "literal[" not in message


def test_every_fault_is_named_at_once():
    with pytest.raises(InputError, match=r"proxy\.sparsity: .*unknown key 'outptu'"):
        parse_recipe(with_section(proxy={"sparsity": 3}, outptu="x"))


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(SMALLEST))
    return path


def test_overrides_reach_sections_that_the_file_does_not_have(file):
    recipe = load_recipe(file, ["proxy.align.epochs=2", "warmup=false", "select.count=7", "data.validation.u=u.jsonl"])
    assert recipe.proxy.align.epochs == 2
    assert recipe.warmup is False
    assert (recipe.select.count, recipe.select.fraction) == (7, None)
    assert recipe.data.validation == {"t": "v.jsonl", "u": "u.jsonl"}


def test_null_takes_a_value_of_the_file_away(file):
    raw = yaml.safe_load(file.read_text())
    file.write_text(yaml.safe_dump({**raw, "select": {"fraction": 0.1}}))
    recipe = load_recipe(file, ["select.count=7", "select.fraction=null"])
    assert (recipe.select.count, recipe.select.fraction) == (7, None)


def test_a_fault_of_a_whole_section_does_not_show_all_of_it():
    with pytest.raises(InputError) as refusal:
        parse_recipe(with_section(proxy={"method": "off-the-shelf"}))
    assert "given:" not in str(refusal.value)
    with pytest.raises(InputError) as refusal:
        validated(SelectSection, {"weights": {"a": 2}, "task": "t"}, "")
    assert str(refusal.value).startswith("weights are for several tasks")


def test_an_option_of_another_name_than_its_key_is_named():
    with pytest.raises(InputError, match=r"^--size: .*less than or equal to 1 \(given: 5\)"):
        validated(SelectSection, {"fraction": 5}, "", {"fraction": "--size"})


def test_a_key_given_twice_is_refused(file):
    file.write_text("select: {count: 3}\n" + file.read_text() + "select: {count: 5}\n")
    with pytest.raises(InputError, match="the key 'select' is given twice"):
        load_recipe(file)
    file.write_text(file.read_text().replace("select: {count: 5}\n", "").replace("count: 3", "count: 3, count: 4"))
    with pytest.raises(InputError, match="the key 'count' is given twice"):
        load_recipe(file)


def test_a_home_is_meant_by_a_tilde_everywhere(file, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "m").mkdir()
    raw = {**SMALLEST, "model": "~/m", "output": "~/runs/a", "data": {"pool": "~/p.jsonl", "validation": {"t": "~/v"}}}
    recipe = resolved(parse_recipe(raw))
    assert [recipe.model, recipe.output] == [str(tmp_path / "m"), str(tmp_path / "runs/a")]
    assert recipe.data.pool == [str(tmp_path / "p.jsonl")]
    with pytest.raises(InputError, match="there is no user of this name"):
        resolved(parse_recipe({**raw, "output": "~nobody-of-that-name/x"}))


def test_a_template_given_as_source_may_be_long(file):
    raw = {**SMALLEST, "data": {**SMALLEST["data"], "chat_template": "{{ messages }}" * 500}}
    assert resolved(parse_recipe(raw)).data.chat_template == "{{ messages }}" * 500


@pytest.mark.parametrize("override", ["proxy.sparsity", "=3", "proxy..sparsity=0.5", "seed=[1", "model.name=x", "."])
def test_nonsense_overrides_are_refused(file, override):
    with pytest.raises(InputError) as refusal:
        load_recipe(file, [override])
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [("- a\n- b\n", "a recipe is a mapping"), ("a: [1\n", "not valid YAML"), ("", "a recipe is a mapping")],
)
def test_files_that_are_no_recipe(tmp_path, text, said):
    path = tmp_path / "r.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=said):
        load_recipe(path)


def test_no_such_file(tmp_path):
    with pytest.raises(InputError, match="no such recipe file"):
        load_recipe(tmp_path / "none.yaml")


def test_yaml_of_a_recipe_is_the_recipe(file):
    recipe = resolved(load_recipe(file, ["finetune={epochs: 2}", "proxy=false"]))
    assert parse_recipe(yaml.safe_load(to_yaml(recipe))) == recipe


def test_resolving_makes_local_paths_absolute_and_leaves_hub_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "t.jinja").write_text("{{ messages }}")
    data = {"pool": ["a/*.jsonl", "hf://datasets/x/y"], "validation": {"t": ["v.jsonl"]}, "chat_template": "t.jinja"}
    recipe = resolved(parse_recipe(with_section(model="mine", data=data)))
    assert recipe.model == str(tmp_path / "mine")
    assert recipe.data.pool == [str(tmp_path / "a/*.jsonl"), "hf://datasets/x/y"]
    assert recipe.data.validation == {"t": [str(tmp_path / "v.jsonl")]}
    assert recipe.data.chat_template == str(tmp_path / "t.jinja")
    assert resolved(parse_recipe(with_section(model="Qwen/Qwen3-4B"))).model == "Qwen/Qwen3-4B"
    assert resolved(parse_recipe(with_section(data={**data, "chat_template": "chatml"}))).data.chat_template == "chatml"


def test_the_documented_table_is_that_of_the_settings():
    page = Path(__file__).parents[2] / "docs/recipe.md"
    table = runpy.run_path(str(page.parents[1] / "scripts/write_recipe_table.py"))["recipe_table"]()
    assert table in page.read_text(), "python scripts/write_recipe_table.py writes it"


def test_the_stages_are_named_as_in_run_json():
    assert STAGES[0] == "data"
    assert STAGES[-1] == "report"
    assert set(Recipe.model_fields) >= {"warmup", "audit", "select", "finetune"}


def test_less_takes_no_query_norm_unless_examples_are_scored_one_by_one():
    with pytest.raises(ValueError, match="query_norm saves nothing"):
        InfluenceSection(estimator="less", query_norm=0.9, per_example=False)
    assert InfluenceSection(estimator="less", query_norm=0.9, per_example=True).query_norm == 0.9


@pytest.mark.parametrize(
    ("given", "rate"),
    [({}, 1e-4), ({"lora": False}, 1e-4), ({"lora": 4}, 1e-3), ({"lora": 4, "learning_rate": 3e-4}, 3e-4)],
)
@pytest.mark.parametrize("section", [WarmupSection, FinetuneSection])
def test_a_learning_rate_left_out_is_that_of_what_is_trained(section, given, rate):
    assert section.model_validate(given).peak(1000) == pytest.approx(rate)


@pytest.mark.parametrize(
    ("given", "total", "examples"),
    [({}, 300, 300), ({}, 4000, 500), ({}, 100_000, 5000), ({}, 10**8, 10_000), ({"fraction": 0.05}, 300, 15)],
)
def test_a_warm_up_takes_enough_examples_and_no_more(given, total, examples):
    assert WarmupSection.model_validate(given).examples(total) == examples
