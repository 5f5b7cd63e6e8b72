"""Limit the time and memory of rendering a chat template, which is a program that comes with a model.

transformers compiles a template for jinja's sandbox, which limits what a template can access, but no loops except those
over `range`. `limited` makes transformers compile the same template with checks inserted: of the clock at each step of
a loop and each call of a macro, and of the length of the output and of every text made by an operator or filter. The
checks work in any thread and on any system. They do not change the output of a template within the limits.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache, wraps
from typing import Any

from jinja2 import Template, TemplateError, nodes, pass_context
from transformers.utils import chat_template_utils

from iprox.errors import one_line

SECONDS = 10.0
"""Most seconds per conversation."""
CHARACTERS = 16 << 20
"""Most characters of the output, and of any text made on the way."""
_WIDTH = 100_000
"""Largest width of padded text: the limit of jinja's sandbox for `range`."""
_BITS = 10_000
"""Most bits of an integer."""

RENDERING_ERRORS = (TemplateError, TypeError, ValueError, ArithmeticError, AttributeError, LookupError, MemoryError)
RENDERING_ERRORS += (RuntimeError, SyntaxError)  # from endless recursion, and loops nested too deep for Python
"""Errors of a template that cannot render a conversation."""

# How many times text may be counted: the output of a macro is counted again where it is inserted.
_COUNTED = 8
_TICK, _SAID, _JOINED = "iprox_tick", "iprox_said", "iprox_joined"
_PADDING = ("center", "indent", "wordwrap", "batch", "slice", "tojson", "ljust", "rjust", "zfill", "expandtabs")
# A width of seven digits, a width given as an argument, or a field inside a field.
_WIDE = re.compile(r"\d{7}|%[-#0 +]*\*|%[-#0 +]*\d*\.\*|\{[^{}]*\{")
_compile_as_transformers: Callable[[str], Template] = chat_template_utils._compile_jinja_template


class RenderingLimitError(TemplateError):
    """A rendering makes text that is too long."""


class RenderingTimeError(Exception):
    """A rendering takes too long. Not an error of the row, as every other row may take as long."""


def reason_of(error: BaseException) -> str:
    """Return why a template cannot render, in words."""
    if isinstance(error, RecursionError):
        return "it calls itself without end (maximum recursion depth exceeded)"
    if isinstance(error, MemoryError):
        return "it takes more memory than there is"
    if isinstance(error, KeyError):
        return f"there is no {error}"
    return one_line(error)


_lock = threading.Lock()
_blocks = 0


@contextmanager
def limited() -> Iterator[None]:
    """Make transformers render chat templates within the limits until the last thread leaves such a block."""
    _count(1)
    try:
        yield
    finally:
        _count(-1)


def _count(change: int) -> None:
    """Count the threads that are in a block of `limited`."""
    global _blocks
    with _lock:
        _blocks += change
        chat_template_utils._compile_jinja_template = _compiled if _blocks else _compile_as_transformers


@lru_cache(maxsize=32)
def _compiled(source: str) -> Template:
    """Return the compiled template with the checks."""
    # A new environment as transformers makes it.
    environment: Any = chat_template_utils._cached_compile_jinja_template("").environment
    clock = _Clock()
    environment.intercepted_binops = frozenset(["+", "*", "**", "%"])
    environment.call_binop = _call_binop(environment.call_binop)
    environment.call = _call(environment.call)
    environment.globals.pop("lipsum", None)  # makes long text, and chat templates have no use for it
    for name in ("center", "indent", "wordwrap", "batch", "slice", "tojson", "format", "replace", "join"):
        environment.filters[name] = _filter(name, environment.filters[name])
    own = {_TICK: clock.tick, _SAID: clock.said, _JOINED: _joined}
    environment.filters |= {name: _of_rendering(function) for name, function in own.items()}
    tree = environment.parse(source)
    _put_in_checks(tree, environment)
    template = Template.from_code(environment, environment.compile(tree), environment.make_globals(None))
    template.root_render_func = clock.bounded(template.root_render_func)
    return template


def _put_in_checks(tree: nodes.Template, environment: Any) -> None:
    for concat in list(tree.find_all(nodes.Concat)):  # `~`, which a sandbox cannot intercept as an operator
        parts = nodes.List(concat.nodes, lineno=concat.lineno)
        concat.nodes = [_filtered(parts, _JOINED)]
    for output in tree.find_all(nodes.Output):
        output.nodes = [
            part if isinstance(part, nodes.TemplateData | nodes.Const) else _filtered(part, _SAID)
            for part in output.nodes
        ]
    for block in tree.find_all((nodes.For, nodes.Macro, nodes.CallBlock)):
        written = sum(len(text.data) for text in block.find_all(nodes.TemplateData))
        block.body.insert(0, nodes.ExprStmt(_filtered(nodes.Const(written), _TICK), lineno=block.lineno))
    tree.set_environment(environment)


def _filtered(node: nodes.Expr, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


class _Clock(threading.local):
    """The deadline of the current rendering in a thread, and the number of characters written so far."""

    due = float("inf")
    length = 0

    def tick(self, written: int) -> None:
        """Check the clock at a step of a loop or a call of a macro that writes so many characters itself."""
        self.length += written
        _require_short(self.length / _COUNTED)
        if time.monotonic() > self.due:
            raise RenderingTimeError(f"takes longer than {SECONDS:g} s to render one conversation")

    def said(self, value: Any) -> Any:
        """Count text that is written to the output, to a variable or by a macro."""
        if isinstance(value, str):
            self.tick(len(value))
        return value

    def bounded(self, render: Callable[..., Iterator[str]]) -> Callable[..., Iterator[str]]:
        """Return a render function that starts the clock and checks the length of the output."""

        def rendered(*args: Any, **kwargs: Any) -> Iterator[str]:
            self.due, self.length, length = time.monotonic() + SECONDS, 0, 0
            for piece in render(*args, **kwargs):
                length += len(piece)
                _require_short(length)
                yield piece

        return rendered


def _of_rendering(function: Callable[[Any], Any]) -> Callable[..., Any]:
    """Return a filter that jinja does not evaluate at compile time."""

    @pass_context
    def filtered(_context: Any, value: Any) -> Any:
        return function(value)

    return filtered


def _require_short(length: float) -> None:
    if length > CHARACTERS:
        raise RenderingLimitError(f"it makes text of more than {CHARACTERS:,} characters")


def _require_narrow(*values: Any) -> None:
    if any(isinstance(value, int) and abs(value) > _WIDTH for value in values):
        raise RenderingLimitError(f"it pads or repeats text more than {_WIDTH:,} times")


def _call_binop(call: Callable[..., Any]) -> Callable[..., Any]:
    def call_binop(context: Any, operator: str, left: Any, right: Any) -> Any:
        numbers = isinstance(left, int) and isinstance(right, int)
        if operator == "*":
            for one, times in ((left, right), (right, left)):
                if isinstance(times, int) and hasattr(one, "__len__"):
                    _require_short(_size(one) * times)
        if numbers and operator in ("*", "**"):
            bits = left.bit_length() * right if operator == "**" else left.bit_length() + right.bit_length()
            if bits > _BITS:
                raise RenderingLimitError(f"it makes a number of more than {_BITS:,} bits")
        if operator == "%" and isinstance(left, str):
            _require_plain(left)
        made = call(context, operator, left, right)
        if hasattr(made, "__len__"):
            _require_short(_size(made))
        return made

    return call_binop


def _size(value: Any) -> int:
    """Return the number of characters of a text; for a list, the number of bytes of its pointers."""
    return len(value) * (1 if isinstance(value, str) else 8)


def _call(call: Callable[..., Any]) -> Callable[..., Any]:
    def limited_call(context: Any, called: Any, *args: Any, **kwargs: Any) -> Any:
        method = getattr(called, "__wrapped__", called)  # the sandbox replaces `format`
        owner = getattr(method, "__self__", None)
        if isinstance(owner, str):
            _look(method.__name__, owner, args, kwargs)
        return call(context, called, *args, **kwargs)

    return limited_call


def _filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)  # keeps jinja's mark for the first argument
    def limited_filter(*args: Any, **kwargs: Any) -> Any:
        values = args[1:] if hasattr(function, "jinja_pass_arg") else args
        if name == "join":
            values = (list(values[0]), *values[1:])
            given = values[1] if len(values) > 1 else kwargs.get("d", "")
            _require_short(len(values[0]) * len(str(given)) + sum(len(str(value)) for value in values[0]))
            args = (*args[: len(args) - len(values)], *values)
        else:
            _look(name, values[0], values[1:], kwargs)
        made = function(*args, **kwargs)
        if isinstance(made, str):
            _require_short(len(made))
        return made

    return limited_filter


def _look(name: str, text: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Refuse a method of text, or the filter of that name, that would make too long a text."""
    if name in ("format", "format_map"):
        _require_plain(str(text))
    elif name == "replace" and len(args) > 1:
        old, new = str(args[0]), str(args[1])
        _require_short(len(str(text)) + str(text).count(old) * (len(new) - len(old)))
    elif name == "join" and args and hasattr(args[0], "__len__"):
        _require_short(len(args[0]) * len(text) + sum(len(str(each)) for each in args[0]))
    elif name in _PADDING:
        _require_narrow(*args, *kwargs.values())


def _require_plain(text: str) -> None:
    """Refuse a format with a very large width."""
    if _WIDE.search(text):
        raise RenderingLimitError("it formats text to a width of millions, or to one that the format does not state")


def _joined(parts: list[Any]) -> str:
    """Return parts concatenated as by jinja's `~`."""
    texts = [str(part) for part in parts]
    _require_short(sum(map(len, texts)))
    return "".join(texts)
