"""Which tokens a row's score comes from, as levels of shade."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from iprox.report import formats

# Shades on either side of none.
LEVELS = 5
# Of one row, and of all of them: what is beyond this is left out of the page.
ROW_TOKENS, ALL_TOKENS = 1_200, 60_000


@dataclass(frozen=True, slots=True)
class ShadedToken:
    """A token as shown: its text, its shade (-5 harms most, 5 helps most) and its term of the score.

    `supervised` tokens are those that the loss is taken on.
    """

    text: str
    level: int
    term: str
    supervised: bool

    @property
    def classes(self) -> str:
        """The classes of its element."""
        shade = f"help{self.level}" if self.level > 0 else f"harm{-self.level}" if self.level < 0 else ""
        return " ".join(name for name in ("tok", shade, "sup" if self.supervised else "") if name)


def read_shading(path: Path) -> dict[int, list[ShadedToken]]:
    """The shaded tokens of each row of `attribution.parquet`, by row number; none where there is no such file."""
    if not path.is_file():
        return {}
    names = ["row", "tokens", "supervised", "influence"]
    columns = [pq.read_table(path, columns=[name])[name].to_pylist() for name in names]
    found, total = {}, 0
    for row, tokens, supervised, terms in zip(*columns, strict=True):
        if terms is None:
            continue
        shown = shaded(tokens, supervised, np.array(terms))
        total += len(shown)
        if total > ALL_TOKENS:
            break
        found[row] = shown
    return found


def shaded(tokens: Sequence[str], supervised: Sequence[bool], terms: np.ndarray) -> list[ShadedToken]:
    """Tokens with the shades of their terms, the strongest of the row the darkest; long rows keep their end.

    The end is where the answer is. A row whose terms are all nothing has no shade.
    """
    strongest = float(np.abs(terms).max(initial=0.0))
    levels = np.rint(LEVELS * terms / strongest).astype(int) if strongest > 0 else np.zeros(len(terms), int)
    return [
        ShadedToken(text, int(level), formats.score(float(term)), counts)
        for text, level, term, counts in list(zip(tokens, levels, terms, supervised, strict=True))[-ROW_TOKENS:]
    ]


def browser_tokens(tokens: Sequence[ShadedToken] | None) -> list[tuple[str, str, str]] | None:
    """What browser.js needs of a row's tokens: (text, classes, term)."""
    return None if tokens is None else [(token.text, token.classes, token.term) for token in tokens]
