"""Read which turns are not trained on, and refuse rows that are marked as bad answers.

A turn is left out of the loss by `train`, `training` or `trainable` false (axolotl, verl), `loss` false (ms-swift),
`loss_mask` 0 (slime) or `weight` 0 (OpenAI, Together, Fireworks). Masks of parts of a turn are refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from iprox.data.messages import BadRowError, Message, is_blank, kind_of, leave_unread
from iprox.errors import shown

_TRAINS = ("train", "training", "trainable")  # on a user's turn, true asks to train on that turn
TURN_MASKS = (*_TRAINS, "loss", "loss_mask", "weight")
"""Keys of a turn or a row that say whether it counts in the loss."""

SPANS = "train_detail"
"""Key under which axolotl's data sets mark parts of a turn."""

VERDICTS = ("label", "kto_tag")
"""Columns of preference data that say whether an answer is good (KTO)."""

# Other keys of a turn that may say whether it counts (torchtune's `masked`).
_LIKE_MASKS = re.compile(r"mask|loss|train|weight|supervis|ignore|learn", re.IGNORECASE)
_YES, _NO = ("true", "yes"), ("false", "no")
_BAD = (*_NO, "bad", "rejected", "undesirable", "undesired")


def masked_turns(value: Sequence[Any], messages: Sequence[Message], key: str) -> frozenset[int]:
    """Return the positions of the assistant's turns that do not count in the loss.

    `value` are the turns of the column `key` as in the row, `messages` the same turns after reading.

    Raises:
        BadRowError: a turn asks for a mask that is not supported.
    """
    pairs = zip(value, messages, strict=True)
    counted = [_counts(item, f"{key}[{index}]", message["role"]) for index, (item, message) in enumerate(pairs)]
    return frozenset(
        index for index, message in enumerate(messages) if message["role"] == "assistant" and not counted[index]
    )


def require_assistant(messages: Sequence[Message], key: str, masked: frozenset[int] = frozenset()) -> None:
    """Refuse a conversation that has nothing to learn from.

    Raises:
        BadRowError: there is no turn of the assistant, or all of them are masked.
    """
    if not any(message["role"] == "assistant" for message in messages):
        roles = ", ".join(sorted({message["role"] for message in messages}))
        raise BadRowError(f"no assistant turn in {key} (roles: {roles})")
    if all(index in masked for index, message in enumerate(messages) if message["role"] == "assistant"):
        raise BadRowError(f"every assistant turn of {key} is masked, so nothing is supervised; remove the row")


def _counts(item: Mapping[Any, Any], where: str, role: str) -> bool:
    """Return whether a turn of the assistant counts in the loss.

    Raises:
        BadRowError: a key asks for parts of a turn, for a share of its loss, or for the loss of a turn that is not the
            assistant's.
    """
    counted = True
    for key in TURN_MASKS:
        verdict = _verdict(item.get(key), f"{key} of {where} ({role})") if key in item else None
        if verdict and role != "assistant" and key in _TRAINS:
            raise BadRowError(
                f"{key} of {where} is true, and iprox trains on turns of the assistant only, not of {role}"
            )
        counted = counted and verdict is not False
    if role == "assistant" and not _whole(item.get(SPANS)):
        raise BadRowError(
            f"{SPANS} of {where} masks a part of the turn, and iprox masks whole turns; remove it or the row"
        )
    for key in item if role == "assistant" else ():
        if key not in (*TURN_MASKS, SPANS) and _LIKE_MASKS.search(str(key)) and not is_blank(item[key]):
            raise BadRowError(
                f"{where} has {key!r}, which may mask it; iprox reads {', '.join(TURN_MASKS)}; rename or remove it"
            )
    return counted


def refuse_masked_row(data: Mapping[Any, Any]) -> None:
    """Refuse a row that is masked as a whole or in part by a key of `TURN_MASKS`.

    Raises:
        BadRowError: the row is masked.
    """
    for key in TURN_MASKS:
        value = data.get(key)
        # Columns with the other names often hold something else: the loss of some model, a split.
        whole = key in ("weight", "loss_mask")
        counted = _verdict(value, key, leave_unread(key)) if whole else _plain_verdict(value)
        if counted is False:
            raise BadRowError(f"{key} is {value!r}, so nothing of the row counts; remove the row ({leave_unread(key)})")
    if not _whole(data.get(SPANS)):
        raise BadRowError(f"{SPANS} masks parts of the row, and iprox masks whole turns ({leave_unread(SPANS)})")


def refuse_rejected_row(data: Mapping[Any, Any], *, preference: bool) -> None:
    """Refuse a row whose answer is labeled as bad by preference data, as iprox selects examples to imitate.

    `preference` says whether the row has the columns of KTO, prompt and completion; then 0 counts as false.
    """
    for key in VERDICTS:
        value = data.get(key)
        says_no = value is False or _text(value) in _BAD
        if preference or key == "kto_tag":  # elsewhere, 0 and -1 may be classes
            says_no = says_no or _plain_verdict(value) is False or value == -1
        if says_no:
            raise BadRowError(
                f"{key} is {value!r}, which marks a bad answer in preference data; remove the row "
                f"({leave_unread(key)} where it means something else)"
            )


def _verdict(value: Any, what: str, hint: str = "remove it or the row") -> bool | None:
    """Return whether a mask says that something counts; None if it says nothing."""
    verdict = _plain_verdict(value)
    if verdict is not None or is_blank(value):
        return verdict
    if isinstance(value, Sequence) and not isinstance(value, str):  # mask by token
        if all(_plain_verdict(each) for each in value):
            return True if value else None
        raise BadRowError(f"{what} masks parts, and iprox masks whole turns; {hint}")
    if isinstance(value, int | float):
        raise BadRowError(f"{what} is {shown(value)}: a turn counts with weight 1 or not at all (0); {hint}")
    raise BadRowError(f"{what} must be true or false, or 1 or 0, not {kind_of(value)}; {hint}")


def _plain_verdict(value: Any) -> bool | None:
    """Return a value as true or false, in any of the ways that files write these; None for any other value."""
    text = _text(value)
    if text in _YES or text in _NO:
        return text in _YES
    try:
        number = float(text if text is not None else value)
    except (TypeError, ValueError, OverflowError):
        return None
    return bool(number) if number in (0.0, 1.0) else None


def _text(value: Any) -> str | None:
    return value.strip().lower() if isinstance(value, str) else None


def _whole(spans: Any) -> bool:
    """Return whether the spans of a turn leave nothing out."""
    if is_blank(spans):
        return True
    if isinstance(spans, str) or not isinstance(spans, Sequence):
        return False
    return all(isinstance(span, Mapping) and _plain_verdict(span.get("train", True)) for span in spans)
