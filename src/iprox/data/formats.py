"""Turn one raw row of any known format into an `Example`, or say why it cannot be one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from iprox.data.fields import BadRowError, kind_of, label_of, text_of
from iprox.data.messages import Message, read_messages, read_rendering, require_assistant, said

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
    *("system", "history", "tools", "chat_template_kwargs", "id", "source", "task"),
)
"""Every column that is read."""
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
        raise BadRowError(f"not an object but {kind_of(data)}")
    if None in data:  # csv.DictReader puts surplus fields there
        raise BadRowError("more fields than the header has; quote fields that contain commas or line breaks")
    rendering = read_rendering(data)
    messages: tuple[Message, ...] | None = None
    prompt = completion = text = None
    supervised_from = 0
    keys = _format_of(data)
    if keys == ("text",):
        text = text_of(data["text"], "text")
    elif keys == ("prompt", "completion"):
        if isinstance(data["prompt"], str) and isinstance(data["completion"], str):
            prompt = text_of(data["prompt"], "prompt")
            completion = text_of(data["completion"], "completion")
        else:
            before = read_messages(data["prompt"], "prompt")
            after = read_messages(data["completion"], "completion")
            require_assistant(after, "completion")
            messages, supervised_from = before + after, len(before)
    elif keys == ("instruction", "output"):
        instruction = text_of(data["instruction"], "instruction")
        extra = data.get("input")
        if extra is not None and extra != "":
            instruction += "\n\n" + text_of(extra, "input")
        turns = *_history(data.get("history")), (instruction, text_of(data["output"], "output"))
        messages = _system(data) + tuple(
            {"role": role, "content": text}
            for turn in turns
            for role, text in zip(("user", "assistant"), turn, strict=True)
        )
    else:
        messages = read_messages(data[keys[0]], keys[0])
        require_assistant(messages, keys[0])
        if keys == ("conversations",) and messages[0]["role"] != "system":
            messages = _system(data) + messages

    if rendering and messages is None:
        raise BadRowError(f"has {next(iter(rendering))!r}, which a chat template renders, and no messages")
    return Example(
        id=label_of(data.get("id"), "id") or default_id,
        source=label_of(data.get("source"), "source"),
        task=label_of(data.get("task"), "task"),
        row=row,
        origin=origin,
        messages=messages,
        prompt=prompt,
        completion=completion,
        text=text,
        supervised_from=supervised_from,
        rendering=rendering,
    )


def _format_of(data: Mapping[Any, Any]) -> tuple[str, ...]:
    # A column may exist for every row and be filled for some (Parquet, CSV), so a filled format wins over an
    # earlier empty one; a row with only empty ones gets the reason "... is empty" from its reader below.
    for empty in ((None, "", []), ()):
        for keys in FORMATS:
            if all(key in data and data[key] not in empty for key in keys):
                return keys
    named = ", ".join(repr(str(key)) for key in list(data)[:12]) or "no keys"
    raise BadRowError(
        f"no known format: it has {named}; known are {KNOWN_FORMATS} (data.columns, --columns output=response, reads "
        "yours as one)"
    )


def _system(data: Mapping[Any, Any]) -> tuple[Message, ...]:
    """The system turn that Alpaca's and ShareGPT's rows may have beside the others, in a column of its own."""
    system = data.get("system")
    return () if system is None or system == "" else ({"role": "system", "content": text_of(system, "system")},)


def _history(value: Any) -> Sequence[tuple[str, str]]:
    """Alpaca's earlier turns: pairs of what the user and the assistant said."""
    pairs = [] if value is None else value
    if not isinstance(pairs, Sequence) or isinstance(pairs, str):
        raise BadRowError(f"history must be a list of pairs, not {kind_of(value)}")
    turns: list[tuple[str, str]] = []
    for index, pair in enumerate(pairs):
        where = f"history[{index}]"
        if not isinstance(pair, Sequence) or isinstance(pair, str) or len(pair) != 2:
            raise BadRowError(f"{where} must be a pair of instruction and output")
        turns.append((text_of(pair[0], f"{where}[0]"), text_of(pair[1], f"{where}[1]")))
    return turns
