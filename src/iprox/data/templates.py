"""Choose the chat template, and with it the rule that decides which tokens are supervised."""

from __future__ import annotations

import copy
import logging
import re
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateSyntaxError

from iprox.data.messages import EARLIER, NO_MARK, REASONING, THOUGHT
from iprox.data.template_limits import RENDERING_ERRORS, RenderingTimeError, limited
from iprox.errors import InputError
from iprox.files import expanded, not_regular

_LOG = logging.getLogger(__name__)

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}"
    "{% else %}{{ message['content'] + '<|im_end|>\\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""The template named by `--set data.chat_template=chatml`."""

GIVEN = "the chat template given"
"""Origin of a template that is given as Jinja source."""

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True)
class TemplateChoice:
    """The chat template in use and the rule for labels that it allows.

    Attributes:
        template: Jinja source; None if the tokenizer has none.
        rule: `"generation"` (the template marks what the assistant generates), `"trl"` (TRL's training variant
            of the tokenizer's template, which marks it too), `"boundary"` (exact text boundaries of the
            assistant turns) or `"none"` (no template; only plain text can be encoded).
        describe: sentence about the rule, for messages and `run.json`.
        warnings: warnings about the labels.
        origin: origin of the template, for messages.
    """

    template: str | None
    rule: str
    describe: str
    warnings: tuple[str, ...] = ()
    origin: str = ""


def choose_template(tokenizer: Any, chat_template: str | None) -> TemplateChoice:
    """Choose the template and the rule for labels, as TRL's `SFTTrainer(assistant_only_loss=True)` does.

    The rule is `"boundary"` where TRL has no training template and would refuse. `chat_template` replaces the
    tokenizer's own: `"chatml"`, Jinja source, or the path of a file.

    Raises:
        InputError: the template cannot be read, is not valid Jinja, takes too long or loses the text of messages; or
            the tokenizer has several named templates but no default.
    """
    template, origin = _given(tokenizer, chat_template)
    warnings: list[str] = []
    if template is None:
        return TemplateChoice(None, "none", "no chat template: plain text only")
    if chat_template == "chatml" and len(tokenizer("<|im_end|>", add_special_tokens=False)["input_ids"]) > 1:
        warnings.append(
            "the ChatML end-of-turn mark <|im_end|> is not a single token of this tokenizer; it is written as several"
        )
    try:
        with limited():
            return _choice(tokenizer, template, origin, warnings)
    except RenderingTimeError as error:
        raise InputError(f"{origin} {error}; give another (--set data.chat_template=FILE)") from error


def _choice(tokenizer: Any, template: str, origin: str, warnings: list[str]) -> TemplateChoice:
    _require_content(tokenizer, template, origin)
    if _GENERATION.search(template):
        rule, describe = "generation", f"assistant tokens as marked by the generation blocks of {origin}"
    elif (training := _training_template(tokenizer, template)) is not None:
        template, rule = training, "trl"
        describe = f"assistant tokens as marked by TRL's training variant of {origin}"
        _require_content(tokenizer, template, origin)
    else:
        rule, describe = "boundary", f"assistant tokens by the exact boundaries of the turns in {origin}"
    if rule != "boundary" and not _stop_is_supervised(tokenizer, template):
        warnings.append(
            "the chat template leaves the end-of-turn token out of the assistant's tokens, "
            "so stopping is not supervised; put it inside {% generation %}"
        )
    for warning in warnings:
        _LOG.warning("%s", warning)
    return TemplateChoice(template, rule, describe, tuple(warnings), origin)


def leaves_out(tokenizer: Any, template: str, part: str) -> bool:
    """Return whether a template leaves out a part of a conversation, tested on artificial conversations.

    A part that the template refuses to render is not left out: the template will refuse rows with it too. `part` is
    `"tools"`, `"tool_calls"`, one of `REASONING`, `"role ROLE"` for turns of that role, or `THOUGHT` or `EARLIER`
    followed by the marks of reasoning in the content (see `messages.thought_marks`), in any turn or in earlier turns.

    Raises:
        RenderingTimeError: the template takes too long.
    """
    mark = "q31415926"  # letters and digits that no template changes
    answer: dict[str, Any] = {"role": "assistant", "content": "x"}
    function: dict[str, Any] = {"name": "x", "arguments": {"x": 1}}
    call: dict[str, Any] = {"role": "assistant", "content": ""}
    call["tool_calls"] = [{"id": "q27182818", "type": "function", "function": function}]
    marked = {"role": part.removeprefix("role "), "content": mark, "name": "x", "tool_call_id": "q27182818"}
    asked, turns, given = {"role": "user", "content": "x"}, [answer], {}
    if part == "tools":
        schema = {"name": mark, "description": "x", "parameters": {"type": "object", "properties": {}}}
        given["tools"] = [{"type": "function", "function": schema}]
    elif part == "tool_calls":
        function["name"] = mark
        turns = [call]
    elif part in REASONING:
        answer[part] = call[part] = mark
        # Some templates show the reasoning only before a tool call.
        turns = [answer, {"role": "user", "content": "x"}, call]
    elif part.startswith((THOUGHT, EARLIER)):
        opening, closing = part.removeprefix(THOUGHT).removeprefix(EARLIER).split()[-2:]
        answer["content"] = f"{'' if opening == NO_MARK else opening}\n{mark}\n{closing}\n\nx"
        later = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "x"}]
        turns = [answer, *(later if part.startswith(EARLIER) else ())]
    else:
        turns = [call if part == "role tool" else answer, marked, answer]
    turns = [marked, asked, answer] if part == "role system" else [asked, *turns]
    try:
        with limited():
            text = tokenizer.apply_chat_template(turns, chat_template=template, tokenize=False, **given)
    except RENDERING_ERRORS:
        return False
    return mark not in text


def _given(tokenizer: Any, chat_template: str | None) -> tuple[str | None, str]:
    if chat_template is None:
        if not tokenizer.chat_template:
            return None, ""
        try:
            return tokenizer.get_chat_template(), "the tokenizer's chat template"
        except ValueError as error:
            raise InputError(
                "the tokenizer has several named chat templates and none is the default; name a template file "
                "with --set data.chat_template=FILE"
            ) from error
    if chat_template == "chatml":
        return CHATML, "iprox's ChatML template"
    if "{{" in chat_template or "{%" in chat_template:
        return chat_template, GIVEN
    try:
        file = expanded(chat_template)
        if irregular := not_regular(file):
            raise InputError(f"chat template {chat_template}: {irregular}")
        return file.read_text(encoding="utf-8"), f"the chat template {chat_template}"
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"chat template {chat_template!r} is neither 'chatml' nor Jinja source nor a readable file"
        ) from error


def _training_template(tokenizer: Any, template: str) -> str | None:
    from trl.chat_template_utils import get_training_chat_template

    if tokenizer.chat_template != template:
        tokenizer = copy.copy(tokenizer)  # TRL reads the template from the tokenizer; the caller's copy does not change
        tokenizer.chat_template = template
    try:
        return get_training_chat_template(tokenizer)
    except RENDERING_ERRORS:
        # TRL raises ValueError for unknown templates; other errors come from templates that refuse TRL's test messages.
        return None


def _require_content(tokenizer: Any, template: str, origin: str) -> None:
    # Templates of multimodal processors loop over the parts of a content and render nothing for a string.
    # The test texts are digits because a template may change letters (to upper case).
    asked, answered = "31415926", "27182818"
    turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
    try:
        text = tokenizer.apply_chat_template(turns, chat_template=template, tokenize=False)
    except TemplateSyntaxError as error:
        raise InputError(f"{origin}, line {error.lineno}: not valid Jinja: {error.message}") from error
    except RENDERING_ERRORS:
        return  # `encode` names the row if the template refuses real messages too
    if asked not in text or answered not in text:
        raise InputError(
            f"{origin} leaves out the text of messages (is it made for images?); "
            "use one for text: --set data.chat_template=chatml (or a Jinja file)"
        )


def _stop_is_supervised(tokenizer: Any, template: str) -> bool:
    turns = [{"role": role, "content": "x"} for role in ("user", "assistant", "user")]
    try:
        out = tokenizer.apply_chat_template(
            turns,
            chat_template=template,
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
    except RENDERING_ERRORS:
        return True  # the template refuses the test messages; `encode` names the row if it refuses real ones too
    kept = [token for token, mask in zip(out["input_ids"], out["assistant_masks"], strict=True) if mask]
    return len(tokenizer.decode(kept).strip()) > 1  # more than the "x"
