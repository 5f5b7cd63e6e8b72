"""The tokens and labels of one example, cut to a length; how many tokens are supervised; tokens as text again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from iprox.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORE = -100
"""The label of a token that carries no loss (Hugging Face's convention)."""

VALIDATION_LENGTHS = "validation_supervised"
"""The key of `ValidationLengths` in the metadata of a scores file."""

# What a decoder gives for bytes that are not a whole character.
_BROKEN = "\N{REPLACEMENT CHARACTER}"
# Most tokens per character, which has at most four bytes; a token that stays broken for longer is broken itself.
_TOKENS_PER_CHARACTER = 4


class RefusedRowError(InputError):
    """The chat template cannot render one row, or the assistant's tokens in it cannot be identified."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """The tokens of one example.

    Attributes:
        input_ids: int32 [L].
        labels: int32 [L], the token id where it is supervised and -100 elsewhere; not shifted.
        truncated: whether tokens were cut to fit the longest length.
        rejected: the same prompt with the answer that is not preferred, of a preference pair.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    truncated: bool
    rejected: Encoded | None = None

    @property
    def rows(self) -> tuple[Encoded, ...]:
        """The rows that a batch holds of the example: itself, and the rejected answer of a pair."""
        return (self,) if self.rejected is None else (self, self.rejected)

    @property
    def tokens(self) -> int:
        """Number of tokens of all rows."""
        return sum(len(row.input_ids) for row in self.rows)

    @property
    def longest(self) -> int:
        """Number of tokens of the longest row."""
        return max(len(row.input_ids) for row in self.rows)

    @property
    def supervised(self) -> int:
        """Number of tokens with a loss; 0 for a pair of which one answer has none.

        Position 0 of a row has none, as no token comes before it to predict it.
        """
        counts = [int(np.count_nonzero(row.labels[1:] != IGNORE)) for row in self.rows]
        return sum(counts) if all(counts) else 0


def fit(ids: np.ndarray, labels: np.ndarray, max_length: int) -> Encoded:
    """Cut an example, given as token ids and labels [L], to `max_length` tokens, keeping the answer.

    First the unsupervised tokens after the last supervised one are cut, then tokens from the left. If the last answer
    (the last run of supervised tokens) is itself too long, its first `max_length` tokens are kept.
    """
    if len(ids) <= max_length:
        return Encoded(ids, labels, False)
    places = np.flatnonzero(labels != IGNORE)
    last = int(places[-1]) if places.size else len(ids) - 1
    start = max(last + 1, max_length) - max_length
    if places.size:
        gaps = np.flatnonzero(np.diff(places) > 1)
        answer = int(places[gaps[-1] + 1]) if gaps.size else int(places[0])
        start = min(start, answer)
    return Encoded(ids[start : start + max_length].copy(), labels[start : start + max_length].copy(), True)


@dataclass(frozen=True, slots=True)
class Lengths:
    """The 10th, 50th and 90th percentile of the number of supervised tokens per example."""

    low: float
    median: float
    high: float

    @classmethod
    def of(cls, supervised: np.ndarray | Sequence[int]) -> Lengths | None:
        """Return the quantiles of the counts that are not 0; None if there is none.

        Examples without a supervised token are left out because nothing is trained on them.
        """
        counts = np.asarray(supervised)
        counts = counts[counts > 0]
        if not len(counts):
            return None
        return cls(*(float(each) for each in np.quantile(counts, (0.1, 0.5, 0.9))))


@dataclass(frozen=True, slots=True)
class ValidationLengths:
    """Lengths of the validation examples of each task, and of all tasks together."""

    tasks: Mapping[str, Lengths]
    together: Lengths | None

    @classmethod
    def of(cls, validation: Mapping[str, Sequence[Encoded]]) -> ValidationLengths:
        """Return the lengths of encoded validation examples, given by task."""
        counts = {task: [example.supervised for example in examples] for task, examples in validation.items()}
        found = {task: Lengths.of(each) for task, each in counts.items()}
        known = {task: each for task, each in found.items() if each is not None}
        return cls(known, Lengths.of([count for each in counts.values() for count in each]))

    def as_metadata(self) -> dict[str, Any]:
        """Return the lengths as an entry for the metadata of a scores file."""
        return {VALIDATION_LENGTHS: asdict(self)}

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any]) -> ValidationLengths | None:
        """Return the lengths in the metadata of a scores file; None if it has none."""
        kept = metadata.get(VALIDATION_LENGTHS)
        if kept is None:
            return None
        tasks = {task: Lengths(**each) for task, each in kept["tasks"].items()}
        return cls(tasks, kept["together"] and Lengths(**kept["together"]))


def token_pieces(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    """Return the text of each token, such that the concatenated pieces are the whole text.

    Decoded one by one, tokens of SentencePiece lose their spaces, and parts of a character are not text. So each token
    is decoded after the one before it. Where several tokens form one character, the last one gets the character and
    the others get "".
    """

    def text(start: int, end: int) -> str:
        return str(tokenizer.decode(list(ids[start:end]), clean_up_tokenization_spaces=False))

    pieces: list[str] = []
    start, done = 0, 0  # the context is ids[start:done], the last token with a text of its own and those before it
    for end in range(1, len(ids) + 1):
        before = text(start, done) if done else ""
        after = text(start, end)
        if after.endswith(_BROKEN) and end - done < _TOKENS_PER_CHARACTER and end < len(ids):
            pieces.append("")
            continue
        pieces.append(after[len(before) :])
        start, done = done, end
    return pieces
