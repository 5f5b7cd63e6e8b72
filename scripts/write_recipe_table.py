"""Write the table of all settings into docs/recipe.md, between its two marks.

python scripts/write_recipe_table.py
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from iprox.settings import Recipe, fields_of

PAGE = Path(__file__).resolve().parents[1] / "docs/recipe.md"
MARKS = re.compile(r"(<!-- settings -->\n).*?(<!-- /settings -->)", re.DOTALL)


def main() -> None:
    """Replace what stands between the marks."""
    page = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(MARKS.sub(lambda found: f"{found[1]}{recipe_table()}{found[2]}", page), encoding="utf-8")


def recipe_table() -> str:
    """Return the settings as a Markdown table, sections in bold."""
    lines = ["| key | default | meaning |", "| --- | --- | --- |"]
    for key, field in fields_of(Recipe):
        meaning = str(field.description).replace("|", "\\|")
        if is_section(field.annotation):
            stated = isinstance(field.json_schema_extra, dict) or field.default is False
            lines.append(f"| **{key}** | {default_of(field) if stated else ''} | {meaning} |")
        else:
            lines.append(f"| `{key}` | {default_of(field)} | {meaning}{choices_of(field.annotation)} |")
    return "\n".join(lines) + "\n"


def is_section(annotation: Any) -> bool:
    """Return whether a field holds other settings."""
    return any(isinstance(part, type) and issubclass(part, BaseModel) for part in (annotation, *get_args(annotation)))


def default_of(field: FieldInfo) -> str:
    """Return a setting's default as one reads it."""
    extra = field.json_schema_extra
    if isinstance(extra, dict) and "left_out" in extra:
        return str(extra["left_out"])
    if field.is_required():
        return "required"
    default = field.default
    return {"None": "", "{}": "", "[]": "", "False": "false", "True": "true"}.get(str(default), str(default))


def choices_of(annotation: Any) -> str:
    """Return the words that a setting takes, if it takes words only."""
    choices = [part for part in get_args(annotation) if isinstance(part, str)]
    return f" ({', '.join(f'`{choice}`' for choice in choices)})" if choices else ""


if __name__ == "__main__":
    main()
