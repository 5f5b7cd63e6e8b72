"""Read the turns of a conversation, and what a chat template renders next to them: tools, tool calls, reasoning."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

Message = dict[str, Any]
"""One turn: `{"role": ..., "content": ...}`, both text. It may also have a key of `REASONING` (text) and
`tool_calls` (a list of objects; then `content` may be None). The turn of a tool may have `name` and `tool_call_id`."""

REASONING = ("reasoning_content", "thinking", "reasoning")
"""Keys of the assistant's reasoning; each is passed to the chat template under its own name."""

THOUGHT, EARLIER, NO_MARK = "reasoning in the content ", "reasoning in the content of earlier turns ", "-"
"""How `optional_parts` names reasoning inside the content; its two marks follow."""
_THOUGHTS = re.compile(
    r"(?P<open><(?:\w+:)?(?:think|thinking|thought|reasoning)>|\[THINK\]|\u25c1think\u25b7|<\|begin_of_thought\|>)?"
    r"(?P<said>.*?)"
    r"(?P<close></(?:\w+:)?(?:think|thinking|thought|reasoning)>|\[/THINK\]|\u25c1/think\u25b7|<\|end_of_thought\|>)",
    re.DOTALL,
)

_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}
# Media is not read. Dropping it silently would change the training text.
_MEDIA = ("image", "images", "image_url", "image_path", "audio", "audios", "video", "videos")
UNREAD_ROW_KEYS = ("functions", *_MEDIA)
"""Columns whose content is not read; rows where one is filled are refused."""
_READ_MESSAGE_KEYS = ("role", "from", "content", "value", "name", "tool_call_id", "tool_calls", *REASONING)
# Other keys of a turn that hold a part of it.
_LOST = re.compile(
    r"reason|think|thought|refusal|tool|function|image|audio|video|(?<!pro)file|attach|document(?!.*_(id|name)$)", re.I
)
SYSTEM = ("system", "system_prompt", "system_message", "system_instruction", "sys_prompt")
SYSTEM += ("System", "systemPrompt", "systemMessage", "systemInstruction")
"""Columns that hold the system turn of a row."""
_SYSTEM_ROLES = ("system", "developer")
# Arguments of `apply_chat_template` itself, which only the encoder sets.
_RESERVED = frozenset(
    {
        *("self", "messages", "conversation", "conversations", "tools", "chat_template", "add_generation_prompt"),
        *("continue_final_message", "tokenize", "sanitize_control_tokens", "padding", "truncation", "max_length"),
        *("return_tensors", "return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs"),
    }
)
# Other spellings of a role, which a chat template would take for a role of its own.
_SPELLINGS = {each: each for each in ("system", "developer", "user", "assistant", "tool")} | _SHAREGPT_ROLES
_SPELLINGS |= dict.fromkeys(("ai", "bard", "bing", "bot", "chatbot", "chatgpt", "claude", "model"), "assistant")
_UNREAD_ROLES = ("function_call", "observation")  # roles of ShareGPT that chat templates do not know by this name


class BadRowError(ValueError):
    """A row that is not an example; the message is the reason, without file and row number."""


def is_blank(value: Any) -> bool:
    """Return whether a column is empty: null, white space, or the NaN that pandas writes for a missing value."""
    return (
        value is None or (isinstance(value, str) and not value.strip()) or (isinstance(value, float) and value != value)
    )


def leave_unread(column: str) -> str:
    """Return the advice on how to leave a column unread, for messages."""
    return f"--set data.columns.{column}= leaves the column unread"


def text_of(value: Any, what: str) -> str:
    """Return a text that is not blank."""
    if is_blank(value):
        raise BadRowError(f"{what} is empty")
    if not isinstance(value, str):
        raise BadRowError(f"{what} must be text, not {kind_of(value)}")
    return valid(value, what)


def valid(value: str, what: str) -> str:
    """Return a text that is valid Unicode.

    Lone surrogates stand for bytes that were not UTF-8 (CSV), or come from a broken escape in JSON.
    """
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:
            raise BadRowError(f"{what} is not valid UTF-8") from None
    return value


def kind_of(value: Any) -> str:
    """Return the kind of a value in words."""
    if value is None:
        return "null"
    names = {str: "text", int: "a number", float: "a number", bool: "true/false", list: "a list", dict: "an object"}
    return names.get(type(value), f"a {type(value).__name__}")


def read_messages(value: Any, key: str) -> tuple[Message, ...]:
    """Return the turns in one column.

    Raises:
        BadRowError: the column is not a list, or a turn is malformed, empty, or has a part that iprox does not read.
    """
    if isinstance(value, str) or not isinstance(value, Sequence):
        if value is None:
            raise BadRowError(f"{key} is empty")
        raise BadRowError(f"{key} must be a list of messages, not {kind_of(value)}")
    if not value:
        raise BadRowError(f"{key} is empty")
    return tuple(_message(item, f"{key}[{index}]") for index, item in enumerate(value))


def system_of(data: Mapping[Any, Any]) -> tuple[str, str] | None:
    """Return the system turn that a row has in a separate column, as (column, text); None if there is none.

    Raises:
        BadRowError: the column is not text, or two columns have different texts.
    """
    given = {column: data[column] for column in SYSTEM if not is_blank(data.get(column))}
    for column, value in given.items():
        if not isinstance(value, str):
            raise BadRowError(f"{column} must be text, not {kind_of(value)} ({leave_unread(column)})")
        valid(value, column)
    if len({text.strip() for text in given.values()}) > 1:
        raise BadRowError(f"{' and '.join(given)} say different things; keep one ({leave_unread(list(given)[-1])})")
    return next(iter(given.items()), None)


def with_system(messages: tuple[Message, ...], system: tuple[str, str] | None) -> tuple[Message, ...]:
    """Return a conversation with the system turn of its row (see `system_of`) in front, unless it has one already.

    Raises:
        BadRowError: the conversation has a different system turn.
    """
    if system is None:
        return messages
    column, text = system
    given = [message["content"] or "" for message in messages if message["role"] in _SYSTEM_ROLES]
    own = [content for content in given if content.strip()]
    if not own:
        start = 1 if messages[0]["role"] in _SYSTEM_ROLES else 0  # replaces an empty system turn
        return ({"role": "system", "content": text}, *messages[start:])
    if not any(text.strip() in content for content in own):
        raise BadRowError(f"{column} differs from the system turn of the messages; keep one ({leave_unread(column)})")
    return messages


def read_rendering(data: Mapping[Any, Any]) -> dict[str, Any]:
    """Return the template variables of a row: `tools`, and those in `chat_template_kwargs`.

    They are read as TRL reads them: `tools` is a list of JSON schemas, or that list as JSON text; an empty list is the
    same as none.

    Raises:
        BadRowError: they are malformed, or the row has a column that iprox does not read.
    """
    for key in UNREAD_ROW_KEYS:
        if _filled(data.get(key)):
            why = " (it scores text alone, not text given images or sound)" if key in _MEDIA else ""
            raise BadRowError(
                f"has {key!r}, which iprox does not read{why}; remove it or the row ({leave_unread(key)})"
            )
    tools = data.get("tools")
    if isinstance(tools, str) and tools:
        try:
            tools = json.loads(tools)
        except (ValueError, RecursionError):
            raise BadRowError(f"tools is text that is not JSON ({leave_unread('tools')})") from None
    given = data.get("chat_template_kwargs") or {}
    if not isinstance(given, Mapping) or not all(isinstance(key, str) for key in given):
        hint = leave_unread("chat_template_kwargs")
        raise BadRowError(f"chat_template_kwargs must be an object, not {kind_of(given)} ({hint})")
    rendering = dict(given)
    for key in rendering:
        if key in _RESERVED:
            raise BadRowError(f"chat_template_kwargs has {key!r}, which iprox sets itself; remove it")
    if tools:
        rendering["tools"] = _objects(tools, "tools", f" ({leave_unread('tools')})")
    _check_json(rendering, "tools or chat_template_kwargs")
    return rendering


def said(message: Message) -> list[tuple[str, str]]:
    """Return the parts of a turn (reasoning, content, tool calls), each as (description, text)."""
    role = message["role"]
    parts = [(f"{role}, reasoning", message[key]) for key in REASONING if key in message]
    if message["content"] or not (parts or "tool_calls" in message):
        parts.append((role, message["content"] or ""))
    if "tool_calls" in message:
        calls = "\n".join(json.dumps(call, ensure_ascii=False) for call in message["tool_calls"])
        parts.append((f"{role}, tool calls", calls))
    return parts


def optional_parts(messages: Sequence[Message], rendering: Mapping[str, Any]) -> list[str]:
    """Return the parts of a conversation that a chat template may leave out, by the names of `templates.leaves_out`."""
    parts = {"tools": None} if "tools" in rendering else {}
    last = max((index for index, message in enumerate(messages) if message["role"] == "assistant"), default=-1)
    for index, message in enumerate(messages):
        parts |= {key: None for key in ("tool_calls", *REASONING) if key in message}
        if message["role"] not in ("user", "assistant") and message["content"]:
            parts[f"role {message['role']}"] = None
        if message["role"] == "assistant" and (marks := thought_marks(message["content"] or "")):
            parts |= {THOUGHT + marks: None} | ({EARLIER + marks: None} if index < last else {})
    return list(parts)


def thought_marks(content: str) -> str:
    """Return the marks around the reasoning in an answer, as `"<think> </think>"`; "" if there is no reasoning.

    The first mark is `NO_MARK` if the prompt has opened the reasoning, so that the answer starts with it.
    """
    if "/" not in content and "<|end_of_thought|>" not in content:
        return ""
    found = _THOUGHTS.search(content)
    if found is None or not found["said"].strip():
        return ""
    return f"{found['open'] or NO_MARK} {found['close']}"


def _message(item: Any, where: str) -> Message:
    if not isinstance(item, Mapping):
        raise BadRowError(f"{where} must be an object with role and content, not {kind_of(item)}")
    for key, value in item.items():
        unread = key not in _READ_MESSAGE_KEYS and not isinstance(value, int | float) and _LOST.search(str(key))
        if unread and _filled(value):
            raise BadRowError(f"{where} has {key!r}, which iprox does not read; remove it or the row")
    role = item.get("role")
    if role is None and isinstance(item.get("from"), str):
        role = _SHAREGPT_ROLES.get(item["from"], item["from"])
    if not isinstance(role, str) or not role:
        raise BadRowError(f"{where} has no role")
    if role in _UNREAD_ROLES:
        raise BadRowError(f"{where} is a turn of {role!r}, which iprox does not read; remove the row")
    if (meant := _SPELLINGS.get(role.strip().lower(), role)) != role:
        raise BadRowError(f"{where} has the role {role!r}; write {meant!r}")
    message: Message = {"role": role, "content": None}
    for key in (*REASONING, "name", "tool_call_id"):
        value = item.get(key)
        if value is None or value == "":
            continue
        if not isinstance(value, str):
            raise BadRowError(f"{key} of {where} ({role}) must be text, not {kind_of(value)}")
        message[key] = valid(value, f"{key} of {where} ({role})")
    if item.get("tool_calls"):
        message["tool_calls"] = _tool_calls(item["tool_calls"], f"tool_calls of {where} ({role})")
    message["content"] = _content(item, where, role, calls="tool_calls" in message)
    return message


def _filled(value: Any) -> bool:
    """Return whether an unread column holds something; empty lists and objects, which Arrow fills in, do not count."""
    if isinstance(value, Mapping):
        return any(_filled(each) for each in value.values())
    if isinstance(value, list | tuple):
        return any(_filled(each) for each in value)
    return not is_blank(value) and value is not False


def _content(item: Mapping[Any, Any], where: str, role: str, *, calls: bool) -> str | None:
    content, value = item.get("content", item.get("value")), item.get("value")
    if not is_blank(value) and value != content:
        raise BadRowError(f"{where} has content and value, which differ; keep one")
    if isinstance(content, Sequence) and not isinstance(content, str):
        content = "".join(_part(part, where) for part in content)
    what = f"content of {where} ({role})"
    if calls and content is None:
        return None  # stays None, as a template may test whether there is content
    # Data sets often have an empty system turn in every row; tools and turns with tool calls may be empty too.
    if isinstance(content, str) and not content.strip() and (calls or role in ("system", "tool")):
        return valid(content, what)
    return text_of(content, what)


def _part(part: Any, where: str) -> str:
    what = part.get("type") if isinstance(part, Mapping) else kind_of(part)
    if isinstance(part, Mapping) and what == "text":
        what = next((key for key in _MEDIA if _filled(part.get(key))), what)
        if what == "text" and isinstance(part.get("text"), str):
            return part["text"]
    raise BadRowError(f"{where} has a part that is not text: {what} (iprox scores text alone)")


def _tool_calls(value: Any, what: str) -> list[dict[str, Any]]:
    calls = _objects(value, what)
    for call in calls:
        function = call.get("function", call)
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise BadRowError(f"{what} has a call without the name of a function")
    _check_json(calls, what)
    return calls


def _objects(value: Any, what: str, hint: str = "") -> list[dict[str, Any]]:
    if not isinstance(value, list | tuple) or not all(isinstance(each, dict) for each in value):
        raise BadRowError(f"{what} must be a list of objects{hint}")
    return list(value)


def _check_json(value: Any, what: str) -> None:
    try:
        written = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise BadRowError(f"{what}: not JSON: {error}") from None
    valid(written, what)
