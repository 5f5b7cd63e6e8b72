"""Render examples with the chat template, tokenize them, and label the tokens that training would learn from."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from iprox.data.formats import Example
from iprox.data.labels import TurnBoundaries
from iprox.data.messages import EARLIER, NO_MARK, THOUGHT, Message, optional_parts
from iprox.data.template_limits import RENDERING_ERRORS, RenderingTimeError, limited, reason_of
from iprox.data.templates import GIVEN, choose_template, leaves_out
from iprox.data.tokens import IGNORE, Encoded, RefusedRowError, fit
from iprox.errors import InputError

_CHUNK = 1024


class ChatEncoder:
    """Turns examples into the tokens and labels that TRL's `SFTTrainer` would train on.

    Chat examples follow `assistant_only_loss=True`; plain prompt and completion follow `completion_only_loss=True`; in
    plain text every token is supervised. Examples that are not chat end with the EOS token.

    Args:
        tokenizer: fast tokenizer of transformers.
        max_length: longest length in tokens. Longer examples keep the answer and lose the start of the prompt (see
            `fit`).
        chat_template: replacement for the tokenizer's own template: `"chatml"`, Jinja source, or the path of a file.
        skip_refused: whether rows that the template cannot render become rows without a supervised token.
        positions: largest number of tokens that the model reads; lowers `max_length`.
        vocabulary: number of embeddings of the model; larger token ids are refused.

    Attributes:
        chat_template: template in use (Jinja source), or None.
        mode: rule for labels: `"generation"`, `"trl"`, `"boundary"` or `"none"`.
        origin: where the template comes from, for messages.
        describe: sentence about the rule, for `run.json`.
        warnings: warnings about the labels.
        refused: why the first row was left without labels; "" if none was.
        lowered: warning that rows are cut to what the model reads; None if `max_length` was not lowered.

    Raises:
        InputError: the tokenizer is a slow one, `max_length` is less than 2, or the template cannot be read.
    """

    def __init__(
        self,
        tokenizer: Any,
        max_length: int,
        chat_template: str | None = None,
        *,
        skip_refused: bool = False,
        positions: int | None = None,
        vocabulary: int | None = None,
    ) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise InputError(
                f"{type(tokenizer).__name__} is a slow tokenizer and cannot say which characters a token covers; "
                "save the model with a fast one (tokenizer.json)"
            )
        if max_length < 2:
            raise InputError(f"max length must be at least 2 tokens, not {max_length}")
        self.tokenizer = tokenizer
        self.max_length = max_length if positions is None else min(max_length, positions)
        self.vocabulary = vocabulary
        self.skip_refused = skip_refused
        choice = choose_template(tokenizer, chat_template)
        self.chat_template = choice.template
        self.mode = choice.rule
        self.origin = choice.origin
        self.describe = choice.describe
        self.warnings = choice.warnings
        self.lowered = None
        self.refused = ""
        self._boundaries = TurnBoundaries(tokenizer, self._apply)
        self._left_out: dict[str, bool] = {}  # part -> whether the template leaves it out; filled as parts occur
        if self.max_length < max_length:
            self.lowered = (
                f"rows are cut to {self.max_length:,} tokens, not {max_length:,}: the model reads no more "
                "(max_position_embeddings in its config)"
            )

    def encode(self, examples: Sequence[Example]) -> list[Encoded]:
        """Tokenize and label examples, in order. After cutting, an example may have no supervised token.

        Raises:
            InputError: there are messages but no chat template, the template refuses a row or its turns cannot be
                located (unless such rows are skipped), or there is plain text but no EOS token.
        """
        rows = [row for example in examples for row in example.rows]
        # Chunks limit the memory of the tokenizer's own results, which are far larger than ours.
        chunks = (rows[start : start + _CHUNK] for start in range(0, len(rows), _CHUNK))
        encoded = (row for chunk in chunks for row in self._encode_chunk(chunk))
        firsts = ((example, next(encoded)) for example in examples)
        return [row if example.rejected is None else replace(row, rejected=next(encoded)) for example, row in firsts]

    def _encode_chunk(self, examples: Sequence[Example]) -> list[Encoded]:
        chats = [example for example in examples if example.messages is not None]
        plain = [example for example in examples if example.messages is None]
        of_chats, of_plain = iter(self._encode_chats(chats)), iter(self._encode_plain(plain))
        rows = []
        for example in examples:
            ids, mask = next(of_plain if example.messages is None else of_chats)
            if self.vocabulary is not None and len(ids) and ids.max() >= self.vocabulary:
                raise InputError(
                    f"{example.origin}: the tokenizer gives the token {ids.max()}, but the model has only "
                    f"{self.vocabulary} embeddings; use the model's own tokenizer"
                )
            if self.lowered and len(ids) > self.max_length:
                warnings.warn(self.lowered, stacklevel=2)
            rows.append(fit(ids, np.where(mask, ids, IGNORE).astype(np.int32), self.max_length))
        return rows

    def _encode_chats(self, examples: Sequence[Example]) -> list[tuple[np.ndarray, np.ndarray]]:
        if not examples:
            return []
        if self.chat_template is None:
            raise InputError(
                f"{examples[0].origin}: the row has messages, but the tokenizer has no chat template; "
                "name one: --set data.chat_template=chatml (or a Jinja file)"
            )
        unread = [self._why_unread(example) for example in examples]
        first = next(filter(None, unread), "")
        if first and not self.skip_refused:
            raise RefusedRowError(first)
        self.refused = self.refused or first
        read = [example for example, why in zip(examples, unread, strict=True) if not why]
        try:
            rendered = self._render(read) if read else []
        except RefusedRowError:
            if not self.skip_refused:
                raise
            rendered = [self._rendered_or_empty(example) for example in read]
        rows = iter(rendered)
        return [_empty() if why else next(rows) for why in unread]

    def _rendered_or_empty(self, example: Example) -> tuple[np.ndarray, np.ndarray]:
        try:
            return self._render([example])[0]
        except RefusedRowError as refusal:
            self.refused = self.refused or str(refusal)
            return _empty()

    def _why_unread(self, example: Example) -> str:
        """Return why a row is refused because the template leaves out a part of it; "" if it is not refused."""
        lost = []
        for part in optional_parts(example.messages or (), example.rendering):
            if part not in self._left_out:
                self._left_out[part] = self._leaves_out(part, example)
            if self._left_out[part]:
                lost.append(part)
        earlier = [part for part in lost if part.startswith(EARLIER)]
        # Templates of reasoning models leave out the reasoning before the last question on purpose.
        if any(THOUGHT + part.removeprefix(EARLIER) not in lost for part in earlier):
            warnings.warn(
                "the chat template leaves out the reasoning in the content of turns before the last, so rows are read "
                "without it",
                stacklevel=2,
            )
        lost = [_part_in_words(part) for part in lost if part not in earlier]
        if lost == ["turns of role system"]:  # some templates do so on purpose, and a conversation remains
            warnings.warn(
                "the chat template leaves out turns of role system, so rows are read without them", stacklevel=2
            )
            return ""
        if not lost:
            return ""
        # Data sets with tools may also list them in the system turn.
        unread = (
            "leave the column unread if a turn lists the tools (--set data.columns.tools=), " if "tools" in lost else ""
        )
        return (
            f"{example.origin}: the row has {', '.join(lost)}, which the chat template leaves out; give one that "
            f"renders them (--set data.chat_template=FILE), {unread}or leave such rows out (--set data.on_bad_row=skip)"
        )

    def _leaves_out(self, part: str, example: Example) -> bool:
        try:
            return leaves_out(self.tokenizer, self.chat_template or "", part)
        except RenderingTimeError as error:
            raise self._too_slow(example, error) from error

    def _too_slow(self, example: Example, error: RenderingTimeError) -> InputError:
        return InputError(f"{example.origin}: {self.origin} {error}; give another (--set data.chat_template=FILE)")

    def _render(self, examples: Sequence[Example]) -> list[tuple[np.ndarray, np.ndarray]]:
        rows = self._boundaries.rows(examples) if self.mode == "boundary" else self._by_mask(examples)
        with_masks = [index for index, example in enumerate(examples) if example.masked]
        if with_masks and self.mode != "boundary":
            masked = self._boundaries.masked([examples[index] for index in with_masks])
            for index, unsupervised in zip(with_masks, masked, strict=True):
                rows[index][1][unsupervised] = False
        # A conversational prompt may contain assistant turns; TRL supervises only what follows the prompt.
        with_prompt = [index for index, example in enumerate(examples) if example.supervised_from]
        if with_prompt:
            prompts = [examples[i].turns[: examples[i].supervised_from] for i in with_prompt]
            named = [examples[index] for index in with_prompt]
            prompt_ids = self._apply(prompts, named, tokenize=True, return_dict=True, add_generation_prompt=True)
            for index, prompt in zip(with_prompt, prompt_ids["input_ids"], strict=True):
                ids, mask = rows[index]
                if examples[index].paired:
                    mask[:] = True  # DPO's loss is over all that follows the prompt
                mask[: _common_prefix(np.asarray(prompt, dtype=np.int32), ids)] = False
        return rows

    def _by_mask(self, examples: Sequence[Example]) -> list[tuple[np.ndarray, np.ndarray]]:
        chats = [example.turns for example in examples]
        out = self._apply(chats, examples, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
        rows = []
        for example, ids, marks in zip(examples, out["input_ids"], out["assistant_masks"], strict=True):
            mask = np.asarray(marks, dtype=bool)
            if not mask.any():
                raise RefusedRowError(
                    f"{example.origin}: the chat template marks no assistant token in this row; "
                    "put {% generation %} and {% endgeneration %} around what the assistant says"
                )
            rows.append((np.asarray(ids, dtype=np.int32), mask))
        return rows

    def _encode_plain(self, examples: Sequence[Example]) -> list[tuple[np.ndarray, np.ndarray]]:
        if not examples:
            return []
        eos = self.tokenizer.eos_token
        if not eos:
            raise InputError(
                f"{examples[0].origin}: plain text must end with the EOS token, but the tokenizer has none; "
                "set eos_token in tokenizer_config.json"
            )
        texts = []
        for example in examples:
            text = example.text if example.text is not None else (example.prompt or "") + (example.completion or "")
            texts.append(text if text.endswith(eos) else text + eos)
        all_ids = self._tokenize(texts)
        prompts = iter(self._tokenize([example.prompt for example in examples if example.prompt is not None]))
        rows = []
        for example, ids in zip(examples, all_ids, strict=True):
            mask = np.ones(len(ids), dtype=bool)
            if example.prompt is not None:
                mask[: _common_prefix(next(prompts), ids)] = False
            rows.append((ids, mask))
        return rows

    def _tokenize(self, texts: list[str]) -> list[np.ndarray]:
        if not texts:
            return []
        out = self.tokenizer(texts, padding=False, truncation=False, verbose=False)
        return [np.asarray(ids, dtype=np.int32) for ids in out["input_ids"]]

    def _apply(self, chats: list[list[Message]], examples: Sequence[Example], **kwargs: Any) -> Any:
        """Apply the template to many conversations at once; if it refuses, find the row and name it."""
        if not chats:
            return []
        # One call takes one set of template variables, and the order of their keys shows in the text.
        alike: dict[str, list[int]] = {}
        for place, example in enumerate(examples):
            alike.setdefault(json.dumps(example.rendering), []).append(place)
        if len(alike) > 1:
            parts = [
                (places, self._apply([chats[at] for at in places], [examples[at] for at in places], **kwargs))
                for places in alike.values()
            ]
            if not kwargs["tokenize"]:
                return _in_order(parts)
            return {key: _in_order([(places, part[key]) for places, part in parts]) for key in parts[0][1]}
        if kwargs["tokenize"]:
            kwargs["tokenizer_kwargs"] = {"verbose": False}  # long rows are cut here; no warning per row
        kwargs |= examples[0].rendering
        try:
            return self._rendered(chats, **kwargs)
        except (*RENDERING_ERRORS, RenderingTimeError) as error:
            for chat, example in zip(chats, examples, strict=True):
                try:
                    self._rendered([chat], **kwargs)
                except RenderingTimeError as slow:
                    raise self._too_slow(example, slow) from slow
                except RENDERING_ERRORS as refusal:
                    raise RefusedRowError(
                        f"{example.origin}: {self._refuses(refusal)} (--set data.on_bad_row=skip leaves such rows out)"
                    ) from refusal
            raise InputError(f"{self.origin} cannot be used: {reason_of(error)}") from error

    def _rendered(self, chats: list[list[Message]], **kwargs: Any) -> Any:
        with limited():
            return self.tokenizer.apply_chat_template(chats, chat_template=self.chat_template, **kwargs)

    def _refuses(self, refusal: Exception) -> str:
        of_file = self.origin.startswith("the chat template ") and self.origin != GIVEN
        named = self.origin if of_file else "the chat template"
        return f"{named} refuses this row: {reason_of(refusal)}"


def _part_in_words(part: str) -> str:
    if part.startswith(THOUGHT):
        opening, closing = part.removeprefix(THOUGHT).split()
        return f"reasoning in its content ({'' if opening == NO_MARK else opening}...{closing})"
    return f"turns of {part}" if part.startswith("role ") else part


def _empty() -> tuple[np.ndarray, np.ndarray]:
    """Return the tokens and mask of a row without labels, which has no score."""
    return np.zeros(1, dtype=np.int32), np.zeros(1, dtype=bool)


def _in_order(parts: Sequence[tuple[Sequence[int], Sequence[Any]]]) -> list[Any]:
    """Return the results of several calls in the order of their inputs' places."""
    found = {place: each for places, results in parts for place, each in zip(places, results, strict=True)}
    return [found[place] for place in range(len(found))]


def _common_prefix(prompt: np.ndarray, ids: np.ndarray) -> int:
    """Return how many leading tokens the prompt and the whole share; the completion starts there, as in TRL."""
    length = min(len(prompt), len(ids))
    different = np.flatnonzero(prompt[:length] != ids[:length])
    return int(different[0]) if different.size else length
