"""The exception for bad input, and one-line messages for errors of the system and of libraries."""

from __future__ import annotations

import errno
import os
import re
import reprlib

# Most characters of another error's text that a message repeats.
LONGEST = 200

# How Rust (safetensors, tokenizers) and C++ (Arrow) quote errors of the system in their own errors.
_QUOTED = re.compile(r"\((?:os )?error (\d+)\)|\[errno (\d+)\]", re.IGNORECASE)

_REMEDIES = {
    errno.ENOSPC: "free some and run the same command",
    errno.EDQUOT: "free some and run the same command",
    errno.EROFS: "choose another place",
    errno.ENAMETOOLONG: "choose a shorter one",
    errno.ELOOP: "correct the link, or choose another place",
    errno.EMFILE: "raise the limit (ulimit -n)",
    errno.ENFILE: "close other programs",
    errno.EIO: "check the disk",
    errno.ENOENT: "check that it exists",
}
_WORDS = {
    errno.ENOSPC: "no space left on the disk",
    errno.EDQUOT: "no space left on the disk (quota)",
    errno.EACCES: "permission denied",
    errno.EPERM: "permission denied",
    errno.ENAMETOOLONG: "the name is too long",
    errno.ELOOP: "a loop of symbolic links",
}


class InputError(ValueError):
    """Bad input or usage. The message is one line that names the file, the row and how to fix it.

    The command line prints it without a traceback and exits with code 2.
    """


def one_line(error: BaseException) -> str:
    """Return the first line of an error's text, cut to `LONGEST` characters; its type if it has no text (MemoryError).

    If the first line ends in a colon, the second line is appended.
    """
    lines = [line.strip() for line in str(error).strip().splitlines()]
    if not lines:
        return type(error).__name__
    return cut(" ".join(lines[:2]) if lines[0].endswith(":") else lines[0])


def cut(text: str, longest: int = LONGEST) -> str:
    """Return a text cut to a number of characters, with an ellipsis at its end if it was longer."""
    return text if len(text) <= longest else f"{text[: longest - 1]}…"


_short = reprlib.Repr()
_short.maxlevel, _short.maxstring, _short.maxother, _short.maxlong = 2, 76, 76, 40


def shown(value: object) -> str:
    """Return a value as one short line for a message; large values are never written out as a whole."""
    return cut(_short.repr(value), 80)


def system_refusal(error: BaseException, fallback: object = None) -> str | None:
    """Return one line for an error that the system or a path caused; None for any other error.

    Args:
        error: `OSError`, or an error of a library that wraps one.
        fallback: path to name if the error names none.
    """
    if isinstance(error, OSError) and error.errno is not None:
        number, place = error.errno, error.filename
        if place is None and number not in _WORDS and number not in _REMEDIES:
            return None  # error of a socket or a pipe, not of a path
    elif isinstance(error, ValueError) and "embedded null" in str(error):
        return f"{_place(fallback)}: a path cannot hold a NUL character; choose another name"
    elif isinstance(error, RuntimeError) and str(error).startswith("Symlink loop"):
        return f"{one_line(error)}: {_REMEDIES[errno.ELOOP]}"
    else:
        place = getattr(error, "filename", None)
        found = _QUOTED.search(str(error))
        # Some libraries quote the words of the system without the number.
        full = os.strerror(errno.ENOSPC) in str(error)
        if not found and not full:
            return None
        number = int(next(filter(None, found.groups()))) if found else errno.ENOSPC
    words = _WORDS.get(number) or os.strerror(number).lower()
    remedy = _REMEDIES.get(number, "choose another place or change its permissions")
    return f"{_place(place or fallback)}: {words}; {remedy}"


def _place(place: object) -> str:
    text = os.fsdecode(place) if isinstance(place, bytes) else str(place or "the output folder")
    return cut(text.replace("\0", "\\0"))
