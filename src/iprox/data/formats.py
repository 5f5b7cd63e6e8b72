"""Turn one raw row of any known format into an `Example`, or say why it cannot be one."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Message = dict[str, str]
"""One turn of a conversation: `{"role": ..., "content": ...}`."""

# In order of precedence. The original Alpaca set also has a `text` column and UltraChat a `prompt` column,
# so the more specific format comes first.
FORMATS: tuple[tuple[str, ...], ...] = (
    ("messages",),
    ("conversations",),
    ("instruction", "output"),
    ("prompt", "completion"),
    ("text",),
)
KNOWN_FORMATS = "messages, conversations, instruction + output, prompt + completion, or text"

_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}
# What a chat template would render beyond role and content. To drop it would change the training text.
_UNREAD_ROW_KEYS = ("tools", "functions", "chat_template_kwargs")
_UNREAD_MESSAGE_KEYS = ("tool_calls", "function_call", "reasoning_content", "thinking")
_UNREAD_ROLES = ("function_call", "observation")  # of ShareGPT, which chat templates know by other names or not at all


class BadRowError(ValueError):
    """A row that is no example; the message is the reason, without file and row number."""


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

    @property
    def words(self) -> str:
        """All that it says, without roles or template."""
        if self.messages is not None:
            return "\n".join(message["content"] for message in self.messages)
        return "\n".join(part for part in (self.prompt, self.completion, self.text) if part is not None)


def to_example(data: Any, *, row: int, origin: str, default_id: str) -> Example:
    """Recognise the format of one raw row and read it.

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
        raise BadRowError(f"not an object but {_kind(data)}")
    if None in data:  # csv.DictReader puts surplus fields there
        raise BadRowError("more fields than the header has; quote fields that contain commas or line breaks")
    for key in _UNREAD_ROW_KEYS:
        if data.get(key):
            raise BadRowError(f"has {key!r}, which iprox does not read; remove it or the row")

    messages: tuple[Message, ...] | None = None
    prompt = completion = text = None
    supervised_from = 0
    keys = _format_of(data)
    if keys == ("text",):
        text = _text(data["text"], "text")
    elif keys == ("prompt", "completion"):
        if isinstance(data["prompt"], str) and isinstance(data["completion"], str):
            prompt = _text(data["prompt"], "prompt")
            completion = _text(data["completion"], "completion")
        else:
            before = _messages(data["prompt"], "prompt")
            after = _messages(data["completion"], "completion")
            _require_assistant(after, "completion")
            messages, supervised_from = before + after, len(before)
    elif keys == ("instruction", "output"):
        instruction = _text(data["instruction"], "instruction")
        extra = data.get("input")
        if extra is not None and extra != "":
            instruction += "\n\n" + _text(extra, "input")
        turns = *_history(data.get("history")), (instruction, _text(data["output"], "output"))
        messages = _system(data) + tuple(
            {"role": role, "content": text}
            for turn in turns
            for role, text in zip(("user", "assistant"), turn, strict=True)
        )
    else:
        messages = _messages(data[keys[0]], keys[0])
        _require_assistant(messages, keys[0])
        if keys == ("conversations",) and messages[0]["role"] != "system":
            messages = _system(data) + messages

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
    )


def _format_of(data: Mapping[Any, Any]) -> tuple[str, ...]:
    # A column may exist for every row and be filled for some (Parquet, CSV), so a filled format wins over an
    # earlier empty one; a row with only empty ones gets the reason "... is empty" from its reader below.
    for empty in ((None, "", []), ()):
        for keys in FORMATS:
            if all(key in data and data[key] not in empty for key in keys):
                return keys
    named = ", ".join(repr(str(key)) for key in list(data)[:12]) or "no keys"
    raise BadRowError(f"no known format: it has {named}; known are {KNOWN_FORMATS}")


def _system(data: Mapping[Any, Any]) -> tuple[Message, ...]:
    """The system turn that Alpaca's and ShareGPT's rows may have beside the others, in a column of its own."""
    system = data.get("system")
    return () if system is None or system == "" else ({"role": "system", "content": _text(system, "system")},)


def _history(value: Any) -> Sequence[tuple[str, str]]:
    """Alpaca's earlier turns: pairs of what the user and the assistant said."""
    pairs = [] if value is None else value
    if not isinstance(pairs, Sequence) or isinstance(pairs, str):
        raise BadRowError(f"history must be a list of pairs, not {_kind(value)}")
    turns: list[tuple[str, str]] = []
    for index, pair in enumerate(pairs):
        where = f"history[{index}]"
        if not isinstance(pair, Sequence) or isinstance(pair, str) or len(pair) != 2:
            raise BadRowError(f"{where} must be a pair of instruction and output")
        turns.append((_text(pair[0], f"{where}[0]"), _text(pair[1], f"{where}[1]")))
    return turns


def _messages(value: Any, key: str) -> tuple[Message, ...]:
    if isinstance(value, str) or not isinstance(value, Sequence):
        if value is None:
            raise BadRowError(f"{key} is empty")
        raise BadRowError(f"{key} must be a list of messages, not {_kind(value)}")
    if not value:
        raise BadRowError(f"{key} is empty")
    return tuple(_message(item, f"{key}[{index}]") for index, item in enumerate(value))


def _message(item: Any, where: str) -> Message:
    if not isinstance(item, Mapping):
        raise BadRowError(f"{where} must be an object with role and content, not {_kind(item)}")
    for key in _UNREAD_MESSAGE_KEYS:
        if item.get(key):
            raise BadRowError(f"{where} has {key!r}, which iprox does not read; remove it or the row")
    role = item.get("role")
    if role is None and isinstance(item.get("from"), str):
        role = _SHAREGPT_ROLES.get(item["from"], item["from"])
    if not isinstance(role, str) or not role:
        raise BadRowError(f"{where} has no role")
    if role == "assistant" and item.get("weight") == 0:
        raise BadRowError(f"{where} has 'weight' 0, and iprox trains on every assistant turn; remove it or the row")
    if role in _UNREAD_ROLES:
        raise BadRowError(f"{where} is a turn of {role!r}, which iprox does not read; remove the row")
    content = item.get("content", item.get("value"))
    if isinstance(content, Sequence) and not isinstance(content, str):
        content = "".join(_part(part, where) for part in content)
    if role == "system" and isinstance(content, str) and not content.strip():
        return {"role": role, "content": _valid(content, f"content of {where} ({role})")}  # data sets often have it so
    return {"role": role, "content": _text(content, f"content of {where} ({role})")}


def _part(part: Any, where: str) -> str:
    if isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return part["text"]
    kind = part.get("type") if isinstance(part, Mapping) else _kind(part)
    raise BadRowError(f"{where} has a part that is not text: {kind}")


def _require_assistant(messages: tuple[Message, ...], key: str) -> None:
    if not any(message["role"] == "assistant" for message in messages):
        roles = ", ".join(sorted({message["role"] for message in messages}))
        raise BadRowError(f"no assistant turn in {key} (roles: {roles})")


def _text(value: Any, what: str) -> str:
    if value is None or value == "" or (isinstance(value, str) and value.isspace()):
        raise BadRowError(f"{what} is empty")
    if not isinstance(value, str):
        raise BadRowError(f"{what} must be text, not {_kind(value)}")
    return _valid(value, what)


def _label(value: Any, what: str) -> str | None:
    # pandas keeps whole numbers as floats where a column lacks some, and NaN for those it lacks.
    if value is None or value == "" or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        raise BadRowError(f"{what} must be text or a whole number, not {_kind(value)}")
    return _valid(value, what)


def _valid(value: str, what: str) -> str:
    # Lone surrogates stand for bytes that were not UTF-8 (CSV), or come from a broken JSON escape.
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:
            raise BadRowError(f"{what} is not valid UTF-8") from None
    return value


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    names = {str: "text", int: "a number", float: "a number", bool: "true/false", list: "a list", dict: "an object"}
    return names.get(type(value), f"a {type(value).__name__}")
