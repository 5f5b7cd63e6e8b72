"""Label the assistant's tokens by the exact boundaries of its turns, for chat templates that do not mark them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from iprox.data.formats import Example
from iprox.data.messages import Message
from iprox.data.tokens import RefusedRowError


class TurnBoundaries:
    """Labels conversations by rendering them up to the start and to the end of each assistant turn.

    `apply` renders conversations with the template variables of their examples (see `ChatEncoder._apply`).
    """

    def __init__(self, tokenizer: Any, apply: Callable[..., Any]) -> None:
        self.tokenizer = tokenizer
        self._apply = apply

    def rows(self, examples: Sequence[Example]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return the token ids, int32 [L], and which of them are supervised, bool [L], of each example.

        Raises:
            RefusedRowError: a turn is rendered differently when other turns follow, or its start cannot be found.
        """
        texts: list[str] = self._apply([example.turns for example in examples], examples, tokenize=False)
        return self._tokens(texts, self._spans(examples, texts))

    def masked(self, examples: Sequence[Example]) -> list[np.ndarray]:
        """Return which tokens belong to masked turns, bool [L], of each example.

        A masked turn starts at the end of the turn before it, so that the template's marks around it are masked too.
        """
        texts: list[str] = self._apply([example.turns for example in examples], examples, tokenize=False)
        places = [(index, place) for index, example in enumerate(examples) for place in sorted(example.masked)]
        ends: list[dict[int, int]] = [{0: 0} for _ in examples]  # number of turns -> where their text ends
        asked = sorted({(index, turns) for index, place in places for turns in (place, place + 1) if turns})
        parts = self._apply(
            [examples[index].turns[:turns] for index, turns in asked],
            [examples[index] for index, _ in asked],
            tokenize=False,
        )
        for (index, turns), part in zip(asked, parts, strict=True):
            if not texts[index].startswith(part):
                raise RefusedRowError(_otherwise(examples[index], turns))
            ends[index][turns] = len(part)
        spans: list[list[tuple[int, int]]] = [[] for _ in examples]
        for index, place in places:
            spans[index].append((ends[index][place], ends[index][place + 1]))
        return [mask for _, mask in self._tokens(texts, spans)]

    def _tokens(self, texts: list[str], spans: list[list[tuple[int, int]]]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return the token ids of each text, int32 [L], and which of them are in its spans of characters, bool [L]."""
        out = self.tokenizer(
            texts, add_special_tokens=False, return_offsets_mapping=True, padding=False, truncation=False, verbose=False
        )
        rows = []
        for ids, offsets, within in zip(out["input_ids"], out["offset_mapping"], spans, strict=True):
            mask = np.zeros(len(ids), dtype=bool)
            starts, ends = np.array(offsets, dtype=np.int64).reshape(-1, 2).T
            for start, end in within:
                # Characters may have no token of their own (trimmed white space), or several (bytes).
                tokens = np.flatnonzero((starts < end) & (ends > start))
                if tokens.size and start < end:
                    mask[tokens[0] : tokens[-1] + 1] = True
            rows.append((np.asarray(ids, dtype=np.int32), mask))
        return rows

    def _spans(self, examples: Sequence[Example], texts: Sequence[str]) -> list[list[tuple[int, int]]]:
        """Return the character spans [start, end) of the assistant turns that are not masked."""
        before: list[tuple[int, list[Message]]] = []
        through: list[tuple[int, list[Message]]] = []
        for index, example in enumerate(examples):
            turns = example.turns
            for position, turn in enumerate(turns):
                if turn["role"] == "assistant" and position not in example.masked:
                    before.append((index, turns[:position]))
                    through.append((index, turns[: position + 1]))
        heads = iter(
            self._apply(
                [turns for _, turns in before if turns],
                [examples[index] for index, turns in before if turns],
                tokenize=False,
                add_generation_prompt=True,
            )
        )
        wholes = self._apply([turns for _, turns in through], [examples[index] for index, _ in through], tokenize=False)
        spans: list[list[tuple[int, int]]] = [[] for _ in examples]
        for (index, turns), whole in zip(before, wholes, strict=True):
            text = texts[index]
            head = next(heads) if turns else self._first_head(whole, examples[index])
            if not (whole.startswith(head) and text.startswith(whole)):
                raise RefusedRowError(_otherwise(examples[index], len(turns) + 1))
            spans[index].append((len(head), self._turn_end(whole, len(head))))
        return spans

    def _first_head(self, whole: str, example: Example) -> str:
        """Return the text before an assistant turn that opens a conversation; templates refuse to render zero turns."""
        probe: list[Message] = [{"role": "user", "content": "x"}]
        (plain,) = self._apply([probe], [example], tokenize=False)
        (asked,) = self._apply([probe], [example], tokenize=False, add_generation_prompt=True)
        opening = asked[len(plain) :] if asked.startswith(plain) else ""
        at = whole.find(opening)
        if not opening or at < 0:
            raise RefusedRowError(
                f"{example.origin}: the conversation opens with an assistant turn, and the chat template does not show "
                "where it starts; use a template that marks it with {% generation %} (--set data.chat_template=FILE)"
            )
        return whole[: at + len(opening)]

    def _turn_end(self, whole: str, start: int) -> int:
        # White space after the end-of-turn token belongs to the template: generation has already stopped.
        end = len(whole.rstrip())
        closed = any(whole.endswith(token, start, end) for token in self._added_tokens())
        return end if closed and end > start else len(whole)

    def _added_tokens(self) -> tuple[str, ...]:
        if not hasattr(self, "_added"):
            self._added = tuple(token for token in self.tokenizer.get_added_vocab() if token.strip())
        return self._added


def _otherwise(example: Example, turn: int) -> str:
    return (
        f"{example.origin}: the chat template renders turn {turn} differently when other turns follow, so the "
        "assistant's tokens cannot be identified; use a template that marks them with {% generation %} "
        "(--set data.chat_template=FILE)"
    )
