"""Near-duplicates: texts that share most of their word runs, found by MinHash (Broder, 1997) with datasketch."""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Sequence

from datasketch import MinHash, MinHashLSH

# Number of words per run. A shorter text is one run.
SHINGLE = 5
PERMUTATIONS = 128
# Number of rows whose texts are held at a time: some 100 MB of chat.
READ_AT_ONCE = 1 << 16

# Row numbers -> the text of each.
Texts = Callable[[Sequence[int]], Sequence[str]]


class NearDuplicates:
    """The rows kept so far, none of which is a near-duplicate of another.

    Args:
        similarity: Jaccard similarity of two sets of word runs from which two texts are near-duplicates, in (0, 1]. It
            is estimated from 128 hashes, so its standard error is up to 0.044.
        texts: function that returns the texts of rows.
    """

    def __init__(self, similarity: float, texts: Texts) -> None:
        # The index only finds candidates: it may return too many, and must miss few. It cannot be built near 1.
        self._index = MinHashLSH(threshold=min(similarity, 0.9), num_perm=PERMUTATIONS, weights=(0.2, 0.8))
        self._similarity = similarity
        self._texts = texts
        self._read: dict[int, str] = {}
        self._kept: dict[Hashable, MinHash] = {}

    def read(self, rows: Sequence[int]) -> None:
        """Fetch the texts of the rows that are added next."""
        self._read = dict(zip(rows, self._texts(rows), strict=True))

    def add(self, row: int) -> bool:
        """Keep a row unless it is a near-duplicate of one kept before. Returns whether it was kept."""
        sketch = MinHash(num_perm=PERMUTATIONS, seed=1)
        sketch.update_batch([run.encode() for run in word_runs(self._read[row])])
        # The index returns candidates; the sketches decide.
        if any(self._kept[key].jaccard(sketch) >= self._similarity for key in self._index.query(sketch)):
            return False
        self._kept[row] = sketch
        self._index.insert(row, sketch)
        return True


def word_runs(text: str) -> set[str]:
    """Return the runs of `SHINGLE` words of a text, ignoring case and punctuation."""
    # In a text without words, such as one of emoji, every character counts as a word.
    words = re.findall(r"\w+", text.lower()) or list("".join(text.split()))
    return {" ".join(words[start : start + SHINGLE]) for start in range(max(1, len(words) - SHINGLE + 1))}
