"""What is imported when: help and refusals come at once, and a light `import iprox` still teaches transformers."""

import json
import subprocess
import sys
from importlib import resources
from importlib.metadata import version

import pytest

# Each takes a good part of a second to import, or more.
HEAVY = {
    "torch",
    "transformers",
    "datasets",
    "trl",
    "accelerate",
    "scipy",
    "pandas",
    "plotly",
    "numpy",
    "pyarrow",
    "ray",
}


# What a plan needs none of: it reads rows, and builds a model without weights.
NOT_FOR_A_PLAN = {"datasets", "trl", "pandas", "plotly", "ray", "peft", "scipy.stats", "transformers.trainer"}


def imported(code, modules=HEAVY):
    """Those of some modules that a new process has imported after some code, and what it printed before."""
    code += f"\nimport sys\nprint(sorted({modules!r} & {{*sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    *said, modules = done.stdout.splitlines()
    return modules, "\n".join([*said, done.stderr])


def test_importing_iprox_imports_nothing_heavy():
    assert imported("import iprox; iprox.InputError; dir(iprox)")[0] == "[]"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--help"], "Start with iprox quickstart"),
        (["--version"], version("iprox")),
        (["score", "--help"], "Example"),
        (["scor"], "Did you mean"),
        (["score", "--modle", "x"], "--model is missing"),
        (["run", "nowhere.yaml"], "nowhere.yaml"),
        (["run", "recipe.yaml", "--set", "proxy.sparsty=0.5"], "sparsity"),
        (["plan", "recipe.yaml", "--set", "select.fraction=2"], "select.fraction"),
        (["run", "recipe.yaml", "--stop-after", "scor"], "Did you mean"),
    ],
)
def test_help_and_refusals_import_nothing_heavy(arguments, said, tmp_path):
    recipe = {"model": "m", "data": {"pool": "p.jsonl", "validation": {"t": "v.jsonl"}}, "output": "o"}
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    given = [str(tmp_path / each) if each == "recipe.yaml" else each for each in arguments]
    code = f"from iprox.cli import main\ntry:\n    main({given!r})\nexcept SystemExit:\n    pass"
    modules, output = imported(code)
    assert modules == "[]"
    assert said in output


def test_a_plan_imports_nothing_that_trains_or_draws(tmp_path):
    bundled = resources.files("iprox.quickstart")
    recipe = {
        "model": str(bundled / "model"),
        "data": {
            "pool": str(bundled / "data/pool.jsonl"),
            "validation": {"t": str(bundled / "data/arithmetic.val.jsonl")},
        },
        "output": str(tmp_path / "run"),
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    code = f"from iprox.cli import main\nmain(['plan', {str(tmp_path / 'recipe.yaml')!r}, '--quiet', '--tflops=1'])"
    modules, output = imported(code, NOT_FOR_A_PLAN)
    assert modules == "[]"
    assert "2,000 rows" in output


@pytest.mark.parametrize("first", ["import iprox, transformers", "import transformers, transformers.quantizers, iprox"])
def test_transformers_loads_proxies_whichever_is_imported_first(first, tiny, tmp_path):
    from iprox.proxy.compress import derive_proxy
    from iprox.proxy.size import Size

    proxy, _ = derive_proxy(tiny.model("qwen3"), [tiny.batch([12, 9])], Size(sparsity=0.5))
    proxy.save_pretrained(tmp_path)
    code = (
        f"{first}\nmodel = transformers.AutoModelForCausalLM.from_pretrained({str(tmp_path)!r})\n"
        "print(sum(type(m).__name__ == 'LowRankLinear' for m in model.modules()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) > 0


def test_public_names_are_functions_also_after_their_packages_are_imported():
    code = "import iprox.audits, iprox.api.scoring, iprox\nprint(*(callable(getattr(iprox, n)) for n in iprox.__all__))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) == {"True"}
    import iprox

    with pytest.raises(AttributeError, match="no attribute 'scor'"):
        iprox.scor  # noqa: B018
