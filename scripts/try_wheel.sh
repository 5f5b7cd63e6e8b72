#!/usr/bin/env bash
# Install a wheel with its base dependencies in an environment of its own, outside of the clone, and run the quickstart.
# PYTHON is one whose torch is borrowed: torch is large, and any version in the range does.
set -euo pipefail
python=$(realpath --no-symlinks "$1") wheel=$(realpath "$2")
torch=$("$python" -c 'import importlib.metadata as m; print(m.version("torch"))')
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
"$python" -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet "torch==${torch%+*}" "$wheel"
cd "$place"
env -u PYTHONPATH "$place/venv/bin/iprox" quickstart --output run --json --quiet
"$place/venv/bin/python" - <<'PYTHON'
import iprox
from pathlib import Path
from transformers import AutoModelForCausalLM

assert "site-packages" in iprox.__file__
assert Path("run/report.html").stat().st_size < 1_500_000
AutoModelForCausalLM.from_pretrained("run/proxy")
PYTHON
