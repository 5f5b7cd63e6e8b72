"""Read and write records as JSON, and compute keys of plain data."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from iprox.errors import InputError, one_line
from iprox.files import write_text

# Name of the record of a run or a command, and the type of a stage's entry in it: tokens, flops, and its own facts.
RUN = "run.json"
StageRecord = dict[str, Any]


def read_json(path: Path) -> Any:
    """Read a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def read_record(path: Path, advice: str) -> dict[str, Any]:
    """Read the `run.json` of an earlier start.

    Raises:
        InputError: it is damaged; the message ends in `advice`.
    """
    try:
        record = read_json(path)
        sound = isinstance(record["identity"], dict) and all(
            isinstance(stage["key"], str) and isinstance(stage["seconds"], int | float)
            for stages in (record["stages"], record.get("earlier", {}))
            for stage in stages.values()
        )
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: is damaged: not JSON ({one_line(error)}); {advice}") from error
    except (KeyError, TypeError, AttributeError):
        sound = False
    if not sound:
        raise InputError(f"{path}: is damaged: not the record of a run; {advice}")
    return record


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def key_of(value: Any) -> str:
    """Return a short hash of plain data; equal data have equal keys."""
    return hashlib.blake2b(json.dumps(value, sort_keys=True, default=str).encode(), digest_size=8).hexdigest()
