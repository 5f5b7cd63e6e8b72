"""The one exception that means "your input, not our fault", and what to say of the errors of others."""

from __future__ import annotations

import errno
import os
import re
import reprlib

# Characters of an error's text, or of a value that was given, that a message repeats.
LONGEST = 200

# As Rust (safetensors, tokenizers) and C++ (Arrow) quote the system's errors in errors of their own.
_QUOTED = re.compile(r"\((?:os )?error (\d+)\)|\[errno (\d+)\]", re.IGNORECASE)

_WHAT_HELPS = {
    errno.ENOSPC: "free some and run the same command",
    errno.EDQUOT: "free some and run the same command",
    errno.EROFS: "choose another place",
    errno.ENAMETOOLONG: "choose a shorter one",
    errno.ELOOP: "correct the link, or choose another place",
    errno.EMFILE: "raise the limit (ulimit -n)",
    errno.ENFILE: "close other programs",
    errno.EIO: "check the disk",
    errno.ENOENT: "see that it is there",
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
    """The first line of an error's text, cut to `LONGEST` characters; its type where it has no text (MemoryError).

    A first line that ends in a colon takes the next with it.
    """
    lines = [line.strip() for line in str(error).strip().splitlines()]
    if not lines:
        return type(error).__name__
    return cut(" ".join(lines[:2]) if lines[0].endswith(":") else lines[0])


def cut(text: str, longest: int = LONGEST) -> str:
    """A text of at most so many characters; what is left out at its end shows as an ellipsis."""
    return text if len(text) <= longest else f"{text[: longest - 1]}…"


def shown(value: object) -> str:
    """A value that was given, as a message repeats it: on one line, cut, and never written out whole on the way."""
    return cut(_short.repr(value), 80)


class _Short(reprlib.Repr):
    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxstring, self.maxother, self.maxlong = 2, 76, 76, 40


_short = _Short()


def system_refusal(error: BaseException, fallback: object = None) -> str | None:
    """One line for an error that the machine or a path caused; None for any other.

    Args:
        error: an `OSError`, or what a library has made of one.
        fallback: the place to name where the error names none.
    """
    if isinstance(error, OSError) and error.errno is not None:
        number, place = error.errno, error.filename
        if place is None and number not in _WORDS and number not in _WHAT_HELPS:
            return None  # of a socket or a pipe, not of a place
    elif isinstance(error, ValueError) and "embedded null" in str(error):
        return f"{_place(fallback)}: a path cannot hold a NUL character; choose another name"
    elif isinstance(error, RuntimeError) and str(error).startswith("Symlink loop"):
        return f"{one_line(error)}: {_WHAT_HELPS[errno.ELOOP]}"
    else:
        place = getattr(error, "filename", None)
        found = _QUOTED.search(str(error))
        # Errors of libraries that quote the system's words without the number.
        full = os.strerror(errno.ENOSPC) in str(error)
        if not found and not full:
            return None
        number = int(next(filter(None, found.groups()))) if found else errno.ENOSPC
    words = _WORDS.get(number) or os.strerror(number).lower()
    helps = _WHAT_HELPS.get(number, "choose another place or change its rights")
    return f"{_place(place or fallback)}: {words}; {helps}"


def _place(place: object) -> str:
    text = os.fsdecode(place) if isinstance(place, bytes) else str(place or "the output folder")
    return cut(text.replace("\0", "\\0"))
