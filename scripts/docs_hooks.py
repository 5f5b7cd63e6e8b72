"""Hooks of mkdocs: fill in the table of commands, and name files outside of docs/ rather than link to them."""

from __future__ import annotations

import re
from typing import Any

from iprox.cli.commands import COMMANDS

OUTSIDE = re.compile(r"\[([^\]]*)\]\((?:\.\./)+(benchmarks[^)#]*)[^)]*\)")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Return the page with both replacements."""
    if "<!-- commands -->" in markdown:
        blocks = [f"## {each.name}\n\n{each.summary}\n\n```bash\n{each.example}\n```\n" for each in COMMANDS]
        markdown = markdown.replace("<!-- commands -->", "\n".join(blocks))
    return OUTSIDE.sub(r"\1 (`\2` of the repository)", markdown)
