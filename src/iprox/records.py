"""Read and write records as JSON, and compute keys of plain data."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from iprox.files import write_text

# Name of the record of a run or a command, and the type of a stage's entry in it: tokens, flops, and its own facts.
RUN = "run.json"
StageRecord = dict[str, Any]


def read_json(path: Path) -> Any:
    """Read a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def key_of(value: Any) -> str:
    """Return a short hash of plain data; equal data have equal keys."""
    return hashlib.blake2b(json.dumps(value, sort_keys=True, default=str).encode(), digest_size=8).hexdigest()
