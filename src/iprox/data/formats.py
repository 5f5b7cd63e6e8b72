"""Turn one raw row of any known format into an `Example`, or say why it is not one; rename its columns first."""

from __future__ import annotations

import difflib
import math
import uuid
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from decimal import Decimal
from typing import Any

from iprox.data.masks import (
    SPANS,
    TURN_MASKS,
    VERDICTS,
    masked_turns,
    refuse_masked_row,
    refuse_rejected_row,
    require_assistant,
)
from iprox.data.messages import (
    SYSTEM,
    UNREAD_ROW_KEYS,
    BadRowError,
    Message,
    is_blank,
    kind_of,
    leave_unread,
    read_messages,
    read_rendering,
    said,
    system_of,
    text_of,
    valid,
    with_system,
)
from iprox.errors import InputError

# In order of precedence. The original Alpaca set also has a `text` column and UltraChat a `prompt` column,
# so the more specific format comes first.
FORMATS: tuple[tuple[str, ...], ...] = (
    ("messages",),
    ("conversations",),
    ("instruction", "output"),
    ("prompt", "completion"),
    ("text",),
)
PAIR = ("chosen", "rejected")
"""The columns of a preference pair."""
COLUMNS = (
    *("messages", "conversations", "instruction", "input", "output", "prompt", "completion", "text"),
    *(*PAIR, *SYSTEM, "history", "tools", "chat_template_kwargs", "id", "source", "task"),
)
"""All columns that are read."""
REFUSED = (*UNREAD_ROW_KEYS, *TURN_MASKS, SPANS, *VERDICTS, "context")
"""Columns that are not read. A row may be refused because of one, unless the user leaves the column unread."""
_SAME = "chosen and rejected are the same, or one is the start of the other; remove the row"
# Optional columns of a format.
_OPTIONAL: dict[tuple[str, ...], tuple[str, ...]] = {("instruction", "output"): ("input", "history")}
KNOWN_FORMATS = "messages, conversations, instruction + output, prompt + completion, or text"


@dataclass(frozen=True, slots=True)
class Example:
    """One training example.

    Exactly one of three contents is set: `messages` (chat), `prompt` and `completion` (plain), or `text`.

    Attributes:
        id: identifier, unique in its pool.
        source: name of the row's origin, if the row has one.
        task: name of the task, if the row has one.
        row: 0-based position among the good rows of the whole pool.
        origin: file and 1-based row, such as `pool.jsonl:17`, for messages.
        messages: turns of a chat example.
        prompt: plain prompt.
        completion: plain completion.
        text: plain text, all of it supervised.
        supervised_from: index of the first message that may be supervised.
        rendering: variables for the chat template besides the messages, such as `tools`.
        masked: positions of assistant messages that do not count in the loss.
        rejected: the same prompt with the answer that is not preferred, of a preference pair.
        paired: whether it is one of a pair.
    """

    id: str
    source: str | None
    task: str | None
    row: int
    origin: str
    messages: tuple[Message, ...] | None
    prompt: str | None
    completion: str | None
    text: str | None
    supervised_from: int = 0
    rendering: Mapping[str, Any] = field(default_factory=dict)
    masked: frozenset[int] = frozenset()
    rejected: Example | None = None
    paired: bool = False

    @property
    def rows(self) -> tuple[Example, ...]:
        """The example itself, and the rejected answer of a pair."""
        return (self,) if self.rejected is None else (self, self.rejected)

    @property
    def turns(self) -> list[Message]:
        """Turns of a chat example."""
        return list(self.messages or ())

    @property
    def words(self) -> str:
        """All text of the example, without roles and template."""
        if self.messages is not None:
            return "\n".join(part for message in self.messages for _, part in said(message))
        return "\n".join(part for part in (self.prompt, self.completion, self.text) if part is not None)


class Columns:
    """Renames the columns of rows to the names that iprox knows. Other columns stay.

    A row is not changed if it lacks the column, or if the column is empty and the one with the known name is filled, so
    a pool may mix rows of several kinds.

    Args:
        named: name in the files by known name (`COLUMNS`), e.g. `{"output": "response"}`. An empty name or None ignores
            the known column, as if no row had it; this is also allowed for the columns in `REFUSED`.

    Attributes:
        named: the same, with "" for None.
        missing: names in the files that no row so far has had.
        there: columns of the first row.
    """

    def __init__(self, named: Mapping[str, str | None] | None = None) -> None:
        self.named = {known: own or "" for known, own in (named or {}).items()}
        for known, own in self.named.items():
            if known not in COLUMNS and (own or known not in REFUSED):
                raise InputError(_unknown(known, own))
        self.unread = frozenset(known for known, own in self.named.items() if not own)
        self.missing = [own or known for known, own in self.named.items()]
        self.there: tuple[str, ...] = ()

    def why_missing(self, own: str) -> str:
        """Return the message that no row has a column, with the nearest column of the first row."""
        known = next((known for known, named in self.named.items() if named == own), None)
        near = difflib.get_close_matches(own, self.there, n=1, cutoff=0.5)
        what = "leave unread" if known is None else f"read as {known}"
        return f"no row has the column {own!r} to {what}{f'; did you mean {near[0]!r}?' if near else ''}"

    def read(self, data: Any) -> Any:
        """Return a row as read from a file, with its columns renamed."""
        if not self.named or not isinstance(data, Mapping):
            return data
        self.there = self.there or tuple(map(str, data))
        if self.missing:
            self.missing = [own for own in self.missing if own not in data]
        found = {
            known: data[own]
            for known, own in self.named.items()
            if own and own in data and (data[own] not in (None, "") or known not in data)
        }
        gone = self.unread | {own for known, own in self.named.items() if known in found}
        return {**{key: value for key, value in data.items() if key not in gone}, **found}


def to_example(data: Any, *, row: int, origin: str, default_id: str) -> Example:
    """Recognize the format of one raw row and read it.

    Args:
        data: row as read from the file.
        row: 0-based position among the good rows.
        origin: file and row for messages.
        default_id: id for a row without one.

    Raises:
        BadRowError: the row has no known format, or its content is empty or malformed.
    """
    if not isinstance(data, Mapping):
        raise BadRowError(f"not an object but {kind_of(data)}")
    if None in data:  # csv.DictReader puts surplus fields there
        raise BadRowError("more fields than the header has; quote fields that contain commas or line breaks")
    keys = _format_of(data)
    rendering = read_rendering(data)
    refuse_masked_row(data)
    if keys != ("text",):  # there, `label` is a class
        refuse_rejected_row(data, preference=keys == ("prompt", "completion"))
    messages: tuple[Message, ...] | None = None
    prompt = completion = text = None
    supervised_from, masked = 0, frozenset[int]()
    if keys == ("text",):
        text = text_of(data["text"], "text")
    elif keys == ("prompt", "completion"):
        if isinstance(data["prompt"], str) and isinstance(data["completion"], str):
            prompt = text_of(data["prompt"], "prompt")
            completion = text_of(data["completion"], "completion")
        else:
            before = read_messages(data["prompt"], "prompt")
            after = read_messages(data["completion"], "completion")
            masked = masked_turns(data["completion"], after, "completion")
            require_assistant(after, "completion", masked)
            if after[: len(before)] == before:
                raise BadRowError("completion repeats the turns of prompt; leave them out of one")
            messages, supervised_from = before + after, len(before)
            masked = frozenset(index + len(before) for index in masked)
    elif keys == ("instruction", "output"):
        instruction = text_of(data["instruction"], "instruction")
        extra, context = data.get("input"), data.get("context")
        if not is_blank(context) and str(context) not in f"{instruction}{extra}":  # Dolly's name of the input
            hint = f"--set data.columns.input=context reads it, {leave_unread('context')}"
            raise BadRowError(f"has 'context', which iprox does not read ({hint})")
        if not is_blank(extra):
            instruction += "\n\n" + text_of(extra, "input")
        turns = *_history(data.get("history")), (instruction, text_of(data["output"], "output"))
        messages = tuple(
            {"role": role, "content": text}
            for turn in turns
            for role, text in zip(("user", "assistant"), turn, strict=True)
        )
    else:
        messages = read_messages(data[keys[0]], keys[0])
        masked = masked_turns(data[keys[0]], messages, keys[0])
        require_assistant(messages, keys[0], masked)

    system = system_of(data)
    if messages is None:
        if rendering:
            raise BadRowError(f"has {next(iter(rendering))!r}, which only chat templates render, but no messages")
        _require_said(system, prompt or text or "", "text" if prompt is None else "prompt")
    else:
        before, messages = len(messages), with_system(messages, system)
        added = len(messages) - before
        supervised_from += added if supervised_from else 0
        masked = frozenset(index + added for index in masked)
    return Example(
        id=_label(data.get("id"), "id") or default_id,
        source=_label(data.get("source"), "source"),
        task=_label(data.get("task"), "task"),
        row=row,
        origin=origin,
        messages=messages,
        prompt=prompt,
        completion=completion,
        text=text,
        supervised_from=supervised_from,
        rendering=rendering,
        masked=masked,
    )


def to_pair(data: Any, **place: Any) -> Example:
    """Read a preference row: an answer `chosen` over another, `rejected`, in the formats of TRL's DPO.

    Without a `prompt`, the turns or the text that both start with are the prompt, as in TRL. So they are where `prompt`
    is text that repeats a turn of the conversations.

    Args:
        data: row as read from the file.
        **place: as for `to_example`.

    Raises:
        BadRowError: an answer is missing or malformed, or masks a turn.
    """
    if not isinstance(data, Mapping) or any(key not in data for key in PAIR):
        raise BadRowError(
            f"no preference pair: loss: dpo reads {' and '.join(PAIR)}, with or without a prompt"
            + (f"; it has {', '.join(repr(str(key)) for key in list(data)[:12])}" if isinstance(data, Mapping) else "")
        )
    whole = [data[key] for key in PAIR]
    turns = all(isinstance(each, Sequence) and not isinstance(each, str) for each in whole)
    prompt = data.get("prompt")
    if is_blank(prompt) or (turns and isinstance(prompt, str)):
        if not turns and not all(isinstance(each, str) for each in whole):
            raise BadRowError("chosen and rejected must both be text, or both lists of turns")
        shared = _shared(*whole)
        if not shared:
            raise BadRowError("chosen and rejected start differently, so there is no prompt; give one in `prompt`")
        said = [turn.get("content") for turn in whole[0][:shared] if isinstance(turn, Mapping)]
        if not is_blank(prompt) and prompt not in said:
            raise BadRowError("prompt is text, and no turn that chosen and rejected share; give it as a list of turns")
        prompt, whole = whole[0][:shared], [each[shared:] for each in whole]
    if whole[0] == whole[1]:
        raise BadRowError(_SAME)
    others = {
        key: value for key, value in data.items() if key not in (*PAIR, *{key for keys in FORMATS for key in keys})
    }
    found = []
    for key, answer in zip(PAIR, whole, strict=True):
        try:
            found.append(to_example({**others, "prompt": prompt, "completion": answer}, **place))
        except BadRowError as error:
            raise BadRowError(f"{key}: {error}") from None
        if any(index >= found[-1].supervised_from for index in found[-1].masked):
            raise BadRowError(f"{key} has a masked turn, and the loss of a pair is over whole answers; remove the row")
    chosen, rejected = (replace(each, paired=True, masked=frozenset()) for each in found)
    return replace(chosen, rejected=rejected)


def _shared(chosen: Sequence[Any], rejected: Sequence[Any]) -> int:
    """Return how many turns, or characters, two answers share at their start; the space before an answer is its own."""
    pairs = zip(chosen, rejected, strict=False)
    count = next((place for place, (one, other) in enumerate(pairs) if one != other), None)
    if count is None:
        raise BadRowError(_SAME)
    return count - 1 if count and chosen[count - 1] == " " else count


def _format_of(data: Mapping[Any, Any]) -> tuple[str, ...]:
    """Return the format of a row, one of `FORMATS`.

    In Parquet and CSV a column exists in every row, and may be filled in some rows only. So a format whose columns are
    all empty gives way to a later one, with a warning. A format of which only a part is empty does not: the row would
    be read as something that its author did not mean.
    """
    there = [keys for keys in FORMATS if all(key in data for key in keys)]
    for place, keys in enumerate(there):
        if all(is_blank(data[key]) for key in (*keys, *_OPTIONAL.get(keys, ())) if key in data):
            continue
        empty = [key for key in keys if is_blank(data[key]) or (isinstance(data[key], list) and not data[key])]
        other = next((each for each in there[place + 1 :] if not any(is_blank(data[key]) for key in each)), None)
        if empty and other is not None:
            hint = f"--set data.columns.{empty[0]}= reads such rows as {' + '.join(other)}"
            raise BadRowError(f"{empty[0]} is empty ({hint})")
        if place:
            passed = " + ".join(there[0])
            warnings.warn(f"rows whose {passed} is empty are read as {' + '.join(keys)}", stacklevel=2)
        return keys
    if there:
        return there[0]  # its reader reports that it is empty
    named = ", ".join(repr(str(key)) for key in list(data)[:12]) or "no keys"
    if "chosen" in data and "rejected" in data:
        hint = (
            "to score preference pairs: --set loss=dpo; to read the preferred answers alone: --set "
            "data.columns.completion=chosen with a prompt, or messages=chosen"
        )
    else:
        hint = "name your columns in data.columns, or with --set data.columns.output=response"
    raise BadRowError(f"no known format: it has {named}; known are {KNOWN_FORMATS} ({hint})")


def _require_said(system: tuple[str, str] | None, text: str, what: str) -> None:
    """Refuse plain text that does not contain the system turn of its row, as there is no place to put that turn."""
    if system is not None and system[1].strip() not in text:
        raise BadRowError(
            f"has {system[0]!r}, which {what} does not contain, but no messages; add it to {what} "
            f"({leave_unread(system[0])})"
        )


def _history(value: Any) -> Sequence[tuple[str, str]]:
    """Return Alpaca's earlier turns as pairs of instruction and output."""
    pairs = [] if is_blank(value) else value
    if not isinstance(pairs, Sequence) or isinstance(pairs, str):
        raise BadRowError(f"history must be a list of pairs, not {kind_of(value)} ({leave_unread('history')})")
    turns: list[tuple[str, str]] = []
    for index, pair in enumerate(pairs):
        where = f"history[{index}]"
        if not isinstance(pair, Sequence) or isinstance(pair, str) or len(pair) != 2:
            raise BadRowError(f"{where} must be a pair of instruction and output")
        turns.append((text_of(pair[0], f"{where}[0]"), text_of(pair[1], f"{where}[1]")))
    return turns


def _unknown(known: str, own: str) -> str:
    if not own:
        near = difflib.get_close_matches(known, (*COLUMNS, *REFUSED), n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]}=?" if near else ""
        return f"columns: {known!r} is a column that iprox does not read anyway{hint}"
    hint = f"did you mean {own}={known}?" if own in COLUMNS else f"known are {', '.join(COLUMNS)}"
    return f"columns: iprox has no column {known!r}; {hint}"


def _label(value: Any, what: str) -> str | None:
    """Return a text or whole number that names something; None if there is none."""
    # pandas stores whole numbers as floats in a column with missing values, and NaN for these.
    if value is None or value == "" or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, float | Decimal) and math.isfinite(value) and value == int(value):
        value = int(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, uuid.UUID):
        return str(value)
    if not isinstance(value, str):
        given = repr(value) if isinstance(value, float) else kind_of(value)
        raise BadRowError(f"{what} must be text or a whole number, not {given} ({leave_unread(what)})")
    return valid(value, what)
