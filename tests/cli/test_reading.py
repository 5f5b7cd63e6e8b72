"""YAML that no person writes: bombs of aliases, towers of brackets, merge keys."""

import pytest
import yaml

from iprox.errors import InputError
from iprox.recipe import DEEPEST, MOST, load_recipe, read_yaml

PLAIN = "model: m\ndata: {pool: [p.jsonl], validation: {t: v.jsonl}}\noutput: o\n"


def bomb(levels, key):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, levels)]
    return "\n".join([*lines, f"{key}: *a{levels - 1}"]) + "\n"


@pytest.mark.parametrize("text", [PLAIN, "a: &x [1, 2]\nb: *x\n", "- 1.5\n- null\n", "", "a: 2026-11-29\n", "1:30: x"])
def test_plain_yaml_is_read_as_yaml_reads_it(text):
    assert read_yaml(text) == yaml.safe_load(text)


@pytest.mark.parametrize(
    ("text", "word"),
    [
        (bomb(9, "seed"), f"more than {MOST:,} values"),
        ("[" * 900, "levels deep"),
        ("[" * 20_000 + "]" * 20_000, "levels deep"),
        ("\n".join(" " * n + "a:" for n in range(DEEPEST + 5)), "levels deep"),
        ("a: &a [*a]", "an alias refers to a value that contains it"),
        ("a: &a {b: *a}", "an alias refers to a value that contains it"),
        ("a: &p {x: 1}\nb: {<<: *p}", "merge keys"),
        ("a: 1\na: 2", "the key 'a' is given twice"),
        ("? [a]\n: 1", "unhashable"),
        ("a: !!python/object/apply:os.system [x]", "constructor"),
    ],
)
def test_what_no_recipe_needs_is_refused(text, word):
    with pytest.raises(ValueError, match=word) as error:
        read_yaml(text)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("key", ["seed", "data", "model", "proxy", "unknown"])
@pytest.mark.parametrize("levels", [3, 9])
def test_a_message_never_repeats_a_whole_value(tmp_path, key, levels):
    lines = [line for line in PLAIN.splitlines() if not line.startswith(f"{key}:")]
    (tmp_path / "r.yaml").write_text("\n".join(lines) + "\n" + bomb(levels, key))
    with pytest.raises(InputError) as error:
        load_recipe(tmp_path / "r.yaml")
    assert len(str(error.value)) < 2500
    assert len(str(error.value).splitlines()) == 1


def test_overrides_are_read_alike(tmp_path):
    (tmp_path / "r.yaml").write_text(PLAIN)
    for value in ("[" * 3000, "{a: 1, a: 2}", "&a [*a]"):
        with pytest.raises(InputError, match="--set seed="):
            load_recipe(tmp_path / "r.yaml", [f"seed={value}"])
    assert load_recipe(tmp_path / "r.yaml", ["seed=7"]).seed == 7
