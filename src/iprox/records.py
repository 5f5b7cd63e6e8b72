"""Records: JSON files that appear only when whole, and keys of plain data."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from iprox.files import write_text

# The record of a run or a command, in its folder, and what a stage says of itself there: tokens, flops, and anything
# particular to it.
RUN = "run.json"
StageRecord = dict[str, Any]


def read_json(path: Path) -> Any:
    """Read a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file that appears only when whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def key_of(value: Any) -> str:
    """Return a short key of plain data: the same data have the same key."""
    return hashlib.blake2b(json.dumps(value, sort_keys=True, default=str).encode(), digest_size=8).hexdigest()
