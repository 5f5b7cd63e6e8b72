"""Turn one raw row of any known format into an `Example`, or say why it cannot be one."""

from __future__ import annotations

import difflib
import math
import uuid
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
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
COLUMNS = (
    *("messages", "conversations", "instruction", "input", "output", "prompt", "completion", "text"),
    *(*SYSTEM, "history", "tools", "chat_template_kwargs", "id", "source", "task"),
)
"""Every column that is read."""
REFUSED = (*UNREAD_ROW_KEYS, *TURN_MASKS, SPANS, *VERDICTS)
"""Columns that are not read, and that rows may be refused for unless they are left unread by name."""
# What a row of a format may hold beside the columns that make it one.
_BESIDE: dict[tuple[str, ...], tuple[str, ...]] = {("instruction", "output"): ("input", "history")}
KNOWN_FORMATS = "messages, conversations, instruction + output, prompt + completion, or text"


@dataclass(frozen=True, slots=True)
class Example:
    """One training example.

    Exactly one of three contents is set: `messages` (chat), `prompt` and `completion` (plain), or `text`.

    Attributes:
        id: Unique in its pool.
        source: Where the row came from, if the row says so.
        task: Name of the task, if the row says so.
        row: 0-based position among the good rows of the whole pool.
        origin: File and 1-based row, such as `pool.jsonl:17`, for messages to people.
        messages: The turns of a chat example.
        prompt: The plain prompt.
        completion: The plain completion.
        text: Plain text, all of it supervised.
        supervised_from: Only assistant messages at or after this index are supervised.
        rendering: What a chat template gets beside the messages: `tools` and other variables of the row.
        masked: Places of assistant messages that do not count in the loss.
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

    @property
    def turns(self) -> list[Message]:
        """The turns of a chat example."""
        return list(self.messages or ())

    @property
    def words(self) -> str:
        """All that it says, without roles or template."""
        if self.messages is not None:
            return "\n".join(part for message in self.messages for _, part in said(message))
        return "\n".join(part for part in (self.prompt, self.completion, self.text) if part is not None)


class Columns:
    """Which column of a row is read as which that iprox knows.

    A row keeps the others. A column that it does not have, or has empty beside a filled one of the known name, is not
    read, so that rows of several kinds go together.

    Args:
        named: by the name that iprox knows (`COLUMNS`) the name in the files, e.g. `{"output": "response"}`. An empty
            one, or None, leaves the column unread as if no row had it; so may those be that rows are refused for
            (`REFUSED`).

    Attributes:
        named: the same, with "" for None.
        unmet: of the names in the files, those that no row so far has had.
        there: the columns of the first row.

    Raises:
        InputError: a name is not one that iprox knows.
    """

    def __init__(self, named: Mapping[str, str | None] | None = None) -> None:
        self.named = {known: own or "" for known, own in (named or {}).items()}
        for known, own in self.named.items():
            if known not in COLUMNS and (own or known not in REFUSED):
                raise InputError(_unknown(known, own))
        self.unread = frozenset(known for known, own in self.named.items() if not own)
        self.unmet = [own or known for known, own in self.named.items()]
        self.there: tuple[str, ...] = ()

    def why_unmet(self, own: str) -> str:
        """That no row has had a column, with the nearest that the first row has."""
        known = next((known for known, named in self.named.items() if named == own), None)
        near = difflib.get_close_matches(own, self.there, n=1, cutoff=0.5)
        what = "leave unread" if known is None else f"read as {known}"
        return f"no row has the column {own!r} to {what}{f'; did you mean {near[0]!r}?' if near else ''}"

    def read(self, data: Any) -> Any:
        """A row as read from a file, under the names that iprox knows."""
        if not self.named or not isinstance(data, Mapping):
            return data
        self.there = self.there or tuple(map(str, data))
        if self.unmet:
            self.unmet = [own for own in self.unmet if own not in data]
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
        data: The row as read from the file; a mapping if it is good.
        row: 0-based position among the good rows.
        origin: File and row for messages.
        default_id: The id of a row that has none.

    Returns:
        The example.

    Raises:
        BadRowError: The row is of no known format, or what it holds is empty or malformed.
    """
    if not isinstance(data, Mapping):
        raise BadRowError(f"not an object but {kind_of(data)}")
    if None in data:  # csv.DictReader puts surplus fields there
        raise BadRowError("more fields than the header has; quote fields that contain commas or line breaks")
    keys = _format_of(data)
    rendering = read_rendering(data)
    refuse_masked_row(data)
    if keys != ("text",):  # where `label` is a class
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
            messages, supervised_from = before + after, len(before)
            masked = frozenset(index + len(before) for index in masked)
    elif keys == ("instruction", "output"):
        instruction = text_of(data["instruction"], "instruction")
        extra = data.get("input")
        if extra is not None and extra != "":
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
            raise BadRowError(f"has {next(iter(rendering))!r}, which a chat template renders, and no messages")
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


def _format_of(data: Mapping[Any, Any]) -> tuple[str, ...]:
    """Which of `FORMATS` a row is of.

    A column may exist for every row and be filled for some (Parquet, CSV), so a format whose columns are all empty
    gives way to a later one, which is warned of. One of which a part is filled does not: the row would be read as
    something else than what it was written as.
    """
    there = [keys for keys in FORMATS if all(key in data for key in keys)]
    for place, keys in enumerate(there):
        if all(is_blank(data[key]) for key in (*keys, *_BESIDE.get(keys, ())) if key in data):
            continue
        empty = [key for key in keys if is_blank(data[key]) or (isinstance(data[key], list) and not data[key])]
        other = next((each for each in there[place + 1 :] if not any(is_blank(data[key]) for key in each)), None)
        if empty and other is not None:
            hint = f"--columns {empty[0]}= has such rows read as {' + '.join(other)}"
            raise BadRowError(f"{empty[0]} is empty ({hint})")
        if place:
            passed = " + ".join(there[0])
            warnings.warn(f"rows whose {passed} is empty are read as {' + '.join(keys)}", stacklevel=2)
        return keys
    if there:
        return there[0]  # whose reader says that it is empty
    named = ", ".join(repr(str(key)) for key in list(data)[:12]) or "no keys"
    if "chosen" in data and "rejected" in data:
        hint = "--columns completion=chosen, with a prompt, or messages=chosen reads the answers preferred"
    else:
        hint = "data.columns, --columns output=response, reads yours as one"
    raise BadRowError(f"no known format: it has {named}; known are {KNOWN_FORMATS} ({hint})")


def _require_said(system: tuple[str, str] | None, text: str, what: str) -> None:
    """Refuse plain text beside a system turn that it does not hold: there is no place to put it."""
    if system is not None and system[1].strip() not in text:
        raise BadRowError(
            f"has {system[0]!r}, which {what} does not hold, and no messages to put it before; add it to {what} "
            f"({leave_unread(system[0])})"
        )


def _history(value: Any) -> Sequence[tuple[str, str]]:
    """Alpaca's earlier turns: pairs of what the user and the assistant said."""
    pairs = [] if value is None else value
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
        mend = f"; did you mean {near[0]}=?" if near else ""
        return f"columns: {known!r} is a column that iprox does not read anyway{mend}"
    mend = f"did you mean {own}={known}?" if own in COLUMNS else f"there are {', '.join(COLUMNS)}"
    return f"columns: no column is read as {known!r}; {mend}"


def _label(value: Any, what: str) -> str | None:
    """A text or whole number that names something, None where there is none."""
    # pandas keeps whole numbers as floats where a column lacks some, and NaN for those it lacks.
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
