"""`import iprox` is quick and still teaches transformers to load proxies, whatever is imported first."""

import subprocess
import sys

import pytest

LOAD = (
    "from transformers import AutoModelForCausalLM\n"
    "model = AutoModelForCausalLM.from_pretrained({folder!r})\n"
    "print(type(model.model.layers[0].mlp.up_proj).__name__)\n"
)


def run(script):
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.parametrize("first", ["import iprox\n", "import transformers.modeling_utils\nimport iprox\n"])
def test_a_proxy_loads_with_transformers(finished, first):
    assert run(first + LOAD.format(folder=str(finished.output / "proxy"))) == ["LowRankLinear"]


def test_importing_iprox_imports_no_torch():
    assert run("import sys, iprox; print(iprox.__version__, 'torch' in sys.modules)")[1] == "False"


def test_audit_is_the_function_although_a_sub_package_has_its_name():
    script = (
        "import iprox, iprox.audit.fidelity\n"
        "from iprox import audit\n"
        "print(callable(iprox.audit), audit is iprox.audit, callable(iprox.score), 'score' in dir(iprox))\n"
    )
    assert run(script) == ["True"] * 4


def test_unknown_names_are_refused():
    import iprox

    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        iprox.nonsense  # noqa: B018
