"""Numbers as people read them: 1,234; 3.4 s; 2.1 GB; 1.2 TFLOP. A missing or non-finite value is a dash."""

import math
from collections.abc import Sequence
from datetime import datetime
from html import escape

DASH = "–"
_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def _missing(value: float | None) -> bool:
    return value is None or not math.isfinite(value)


def count(value: float | None) -> str:
    """Return a whole number with thousands separated: `1,234`."""
    return DASH if _missing(value) else f"{value:,.0f}"


def rows(number: int) -> str:
    """Return a number of rows: `1 row`, `1,234 rows`."""
    return f"{number:,} row" if number == 1 else f"{number:,} rows"


def moment(iso: str | None) -> str:
    """Return a point in time without its seconds: `2026-11-24 09:30 UTC`; other text as it is."""
    if not iso:
        return DASH
    try:
        # Python 3.10 does not read the Z.
        when = datetime.fromisoformat(iso.replace("Z", "+00:00"))
    except ValueError:
        return iso
    zone = when.strftime("%Z")
    return f"{when:%Y-%m-%d %H:%M} {zone}".rstrip()


def decimal(value: float | None, digits: int = 2) -> str:
    """Return a number with a fixed number of decimals: `0.67`, `−0.10`."""
    return DASH if _missing(value) else f"{value:.{digits}f}".replace("-", "−")


def signed(value: float, digits: int = 2) -> str:
    """Return a number with its sign and a fixed number of decimals: `+0.67`, `−0.10`."""
    return f"{value:+.{digits}f}".replace("-", "−")


def percent(share: float | None, digits: int = 1) -> str:
    """Return a share of one as a percentage: 0.05 gives `5.0 %`."""
    return DASH if share is None or _missing(share) else f"{100 * share:.{digits}f} %".replace("-", "−")


def points(difference: float | None) -> str:
    """Return a difference of two shares in percentage points, with its sign: 0.05 gives `+5.0`."""
    return DASH if difference is None or _missing(difference) else f"{100 * difference:+.1f}".replace("-", "−")


def score(value: float | None) -> str:
    """Return a signed score with three significant digits: `+0.0123`, `−1.2 × 10⁻⁵`."""
    if value is None or _missing(value):
        return DASH
    if value == 0:
        return "0"
    mantissa, _, exponent = f"{value:+.3g}".partition("e")
    shown = mantissa.replace("-", "−")
    return f"{shown} × 10{str(int(exponent)).translate(_SUPERSCRIPT)}" if exponent else shown


def learning_rate(value: float | None) -> str:
    """Return a learning rate as it is written in recipes: `1.7e-05`."""
    return DASH if _missing(value) else f"{value:.3g}"


def duration(seconds: float | None) -> str:
    """Return a time span: `85 ms`, `3.4 s`, `2 min 05 s`, `1 h 03 min`."""
    if seconds is None or _missing(seconds):
        return DASH
    if seconds == 0:
        return "0 s"
    if seconds < 0.0995:
        return f"{1000 * seconds:.0f} ms"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60:,} h {minutes % 60:02d} min"


def _scaled(value: float, units: tuple[str, ...]) -> str:
    """Divide by 1,000 until at most three digits stand before the point."""
    index = 0
    # 999.5 and not 1000: what would round up to four digits takes the next unit.
    while abs(value) >= 999.5 and index < len(units) - 1:
        value /= 1000
        index += 1
    shown = f"{value:.0f}" if index == 0 or abs(value) >= 99.95 else f"{value:.1f}"
    return f"{shown} {units[index]}"


def size(number: float | None) -> str:
    """Return bytes in decimal units: `2.1 GB`."""
    return DASH if number is None or _missing(number) else _scaled(number, ("B", "kB", "MB", "GB", "TB", "PB"))


def flops(number: float | None) -> str:
    """Return floating-point operations: `1.2 TFLOP`."""
    units = ("FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP", "PFLOP", "EFLOP", "ZFLOP", "YFLOP")
    return DASH if number is None or _missing(number) else _scaled(number, units)


def parameters(number: float | None) -> str:
    """Return a parameter count: `16.9 M`."""
    return DASH if number is None or _missing(number) else _scaled(number, ("", "k", "M", "B", "T")).strip()


def ratio(part: float | None, whole: float | None) -> str:
    """Return part / whole as a factor: `0.53×`; a dash where either is missing or the whole is 0."""
    if part is None or whole is None or _missing(part) or _missing(whole) or whole == 0:
        return DASH
    factor = part / whole
    if factor < 0.1:
        return f"{factor:.2g}×"
    return f"{factor:.2f}×" if factor < 10 else f"{factor:,.0f}×"


def shorten(text: str, width: int) -> str:
    """Return the text cut in the middle to at most `width` characters, so that both ends stay readable."""
    if len(text) <= width:
        return text
    head = (width - 1) * 2 // 3
    return f"{text[:head]}…{text[len(text) - (width - 1 - head) :]}"


def listing(names: list[str], most: int = 5) -> str:
    """Return names as a phrase: `a, b and c`, or `a, b and 3 more`."""
    if len(names) <= 1:
        return "".join(names)
    if len(names) <= most:
        return f"{', '.join(names[:-1])} and {names[-1]}"
    return f"{', '.join(names[: most - 1])} and {len(names) - most + 1} more"


def html_table(caption: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return an HTML table for a notebook, all texts escaped; the first cell of a row names it."""
    head = "".join(f"<th>{escape(text)}</th>" for text in heads)
    body = "".join(
        f"<tr><th>{escape(row[0])}</th>" + "".join(f"<td>{escape(cell)}</td>" for cell in row[1:]) + "</tr>"
        for row in rows
    )
    return f"<table><caption>{escape(caption)}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
