"""The tokens and labels of one example, how it is cut to a length, and the refusal where it has none."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from iprox.errors import InputError

IGNORE = -100
"""The label of a token that carries no loss (Hugging Face's convention)."""


class RefusedRowError(InputError):
    """The chat template cannot render one row, or not so that its assistant tokens can be told."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """The tokens of one example.

    Attributes:
        input_ids: int32 [L].
        labels: int32 [L]; the token id where it is supervised, -100 elsewhere. Not shifted.
        truncated: Whether tokens were cut to fit the longest length.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    truncated: bool

    @property
    def supervised(self) -> int:
        """Number of tokens with a loss. Position 0 has none: nothing comes before it to predict it."""
        return int(np.count_nonzero(self.labels[1:] != IGNORE))


def fit(ids: np.ndarray, labels: np.ndarray, max_length: int) -> Encoded:
    """Cut an example to `max_length` tokens, keeping the answer.

    First the unsupervised tokens after the last supervised one go, then tokens from the left. If the last answer
    (the last run of supervised tokens) is itself too long, its first `max_length` tokens are kept.

    Args:
        ids: int32 [L].
        labels: int32 [L], -100 where not supervised.
        max_length: Longest length in tokens.

    Returns:
        The example, at most `max_length` long.
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
