"""Tokens as text that reads on: spaces where they were, and characters of several tokens whole."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

# What a decoder gives for bytes that are no whole character.
BROKEN = "\N{REPLACEMENT CHARACTER}"
# Tokens that one character may come to, at the most four bytes; a token that is broken for longer is so itself.
LONGEST = 4


def token_pieces(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    """The text of each token, such that the pieces put together are the text.

    Decoded one by one, tokens of SentencePiece lose their spaces and parts of a character are no text. So each token
    is decoded after the one before it; the tokens of one character give "" but for the last, which gives the character.
    """
    pieces: list[str] = []
    start, done = 0, 0  # the context: the last token that is told, and what follows it
    for end in range(1, len(ids) + 1):
        before = _text(tokenizer, ids[start:done]) if done else ""
        after = _text(tokenizer, ids[start:end])
        if after.endswith(BROKEN) and end - done < LONGEST and end < len(ids):
            pieces.append("")
            continue
        pieces.append(after[len(before) :])
        start, done = done, end
    return pieces


def _text(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))
