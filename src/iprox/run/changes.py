"""List the settings that changed since the last start of a run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

_LONGEST = 40
# Only their contents matter: other contents are refused elsewhere, and a new path to the same contents is no change.
_PATHS = frozenset({"model", "output", "data.pool", "data.validation", "finetune.test", "proxy.model"})


def changed_settings(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Return each changed setting as `proxy.sparsity 0.7 → 0.5`, in the order of the recipe."""
    return list(_changed(before, after, ""))


def _changed(before: Mapping[str, Any], after: Mapping[str, Any], prefix: str) -> Iterator[str]:
    for key in dict.fromkeys([*after, *before]):
        one, other = before.get(key), after.get(key)
        name = f"{prefix}{key}"
        if one == other or name in _PATHS:
            continue
        if isinstance(one, bool) or isinstance(other, bool):  # a section is off, or has settings
            one, other = bool(one), bool(other)
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            yield from _changed(one, other, f"{name}.")
        else:
            yield f"{name} {_shown(one)} → {_shown(other)}"


def _shown(value: Any) -> str:
    if value is None:
        return "not set"
    if isinstance(value, bool):
        return "on" if value else "off"
    text = ", ".join(f"{key} {each}" for key, each in value.items()) if isinstance(value, Mapping) else str(value)
    return text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"
