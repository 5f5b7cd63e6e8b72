#!/usr/bin/env bash
# Run tests of each part with the oldest dependencies that pyproject.toml allows, in .venv-oldest.
# BIN is the folder of a venv with uv; TORCH a requirement, e.g. torch==2.13.0, or "" for the oldest one too.
set -euo pipefail
bin=$1 torch=$2 venv=.venv-oldest
"$bin/python" -m venv --clear "$venv"
echo "$torch" > "$venv/torch.txt"
# torch is installed by pip, which knows local wheels; its own dependencies come with it.
[ -z "$torch" ] || "$venv/bin/pip" install --quiet "$torch"
"$bin/uv" pip compile --quiet --no-annotate --no-header --resolution lowest-direct --override "$venv/torch.txt" \
  --extra lora pyproject.toml \
  | { if [ -n "$torch" ]; then grep -vE '^(torch|triton|cuda-.*|nvidia-.*)=='; else cat; fi; } > "$venv/oldest.txt"
"$venv/bin/pip" install --quiet -r "$venv/oldest.txt" pytest pytest-xdist hypothesis
"$venv/bin/pip" install --quiet --no-deps -e .
grep -E '^(torch|transformers|trl|peft|datasets|accelerate|numpy|pyarrow|pydantic|huggingface-hub)==' "$venv/oldest.txt"
OMP_NUM_THREADS=1 "$venv/bin/pytest" -n 2 --dist worksteal -q -m "not slow" tests/test_api.py tests/test_finetune.py \
  tests/data/test_chat.py tests/models/test_loading.py tests/models/test_loss.py tests/influence/test_estimators.py \
  tests/influence/test_scoring.py tests/proxy/test_compress.py tests/selection
