"""Limits on what a chat template takes to render one conversation."""

import threading
import time

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

from iprox.data import ChatEncoder, Pool, template_limits
from iprox.data.templates import CHATML
from iprox.errors import InputError


def bytes_tokenizer():
    """One token for each byte, and one for the end."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={token: at for at, token in enumerate([*alphabet, "<end>"])}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore
    core.decoder = decoders.ByteLevel()  # pyright: ignore
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>")


TOKENIZER = bytes_tokenizer()
TURNS = [
    {"role": "system", "content": "Be <b>brief</b>."},
    {"role": "user", "content": "Add two."},
    {"role": "assistant", "content": "It is four. 🙂"},
    {"role": "user", "content": "Name a color."},
    {"role": "assistant", "content": "blue"},
]
# What templates of well-known models do, in one.
USUAL = (
    "{%- macro shown(text, before='') %}{{ before ~ text | trim ~ '!' }}{% endmacro %}"
    "{%- set ns = namespace(last=-1, seen='') %}"
    "{%- for m in messages[::-1] %}{% set index = (messages | length - 1) - loop.index0 %}"
    "{%- if ns.last < 0 and m.role == 'user' %}{% set ns.last = index %}{% endif %}{% endfor %}"
    "{%- if tools %}{{ tools | tojson(indent=2) }}{% endif %}"
    "{%- set kept %}{% for m in messages %}{{ m.role[:1] | upper }}{% endfor %}{% endset %}{{ kept }}{{ '=' * 10 }}\n"
    "{% for m in messages if m.content %}{% set ns.seen = ns.seen + m.role[0] %}"
    "{{ '<|im_start|>' ~ m['role'] ~ '\n' }}"
    "{% if m.role == 'assistant' %}{% generation %}{{ shown(m.content) }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ m.content.replace('two', '2').split('.')[0] + ', '.join(['a', 'b']) }}"
    "{{ '%s-%03d' % (loop.index, 7) }}{{ '{:>4}'.format(loop.index * 3 ** 2) }}{{ 'x' | center(5) }}"
    "<|im_end|>{% endif %}\n"
    "{% if index is defined and loop.index0 > ns.last %}{% break %}{% endif %}{% endfor %}"
    "{{ range(3) | join('-') }}{{ ns.seen | replace('u', 'v') }}{{ strftime_now('%Y') | length }}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize("source", [USUAL, CHATML])
@pytest.mark.parametrize("marks", [False, True])
def test_a_template_within_the_limits_gives_what_it_gives_without(source, marks):
    given = {"tools": [{"name": "f"}], "add_generation_prompt": True, "return_assistant_tokens_mask": marks}
    plain = render_jinja_template([TURNS, TURNS[1:]], chat_template=source, **given)
    with template_limits.limited():
        assert render_jinja_template([TURNS, TURNS[1:]], chat_template=source, **given) == plain
    assert plain[0][0].count("four") == 1
    assert len(plain[1]) == (2 if marks else 0)


def marked(before):
    """A template that does something to every conversation of more than four turns, and is ChatML else."""
    return "{% if messages | length > 4 %}" + before + "{% endif %}" + CHATML


FORGETS = "{% for a in range(100000) %}{% for b in range(100000) %}{% set x = a %}{% endfor %}{% endfor %}"


@pytest.fixture
def hurried(monkeypatch):
    monkeypatch.setattr(template_limits, "SECONDS", 0.3)


@pytest.mark.parametrize(
    "before",
    [
        FORGETS,
        FORGETS.replace("range(100000)", "(messages[0].content * 3000)"),
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
        "{% for x in [1, 1] recursive %}{% if loop.depth < 60 %}{{ loop([1, 1]) }}{% endif %}{% endfor %}",
    ],
)
@pytest.mark.parametrize("skip", [False, True])
def test_a_template_that_takes_too_long_is_refused(hurried, before, skip):
    """Whatever becomes of bad rows: each of a pool may take as long."""
    encoder = ChatEncoder(TOKENIZER, 100, marked(before), skip_refused=skip)
    started = time.monotonic()
    with pytest.raises(
        InputError, match=r"row:2: the chat template given takes longer than 0\.3 s .*--set data.chat_template"
    ):
        encoder.encode(list(Pool([{"messages": TURNS[1:3]}, {"messages": TURNS}])))
    assert time.monotonic() - started < 20


def test_a_template_that_is_always_too_slow_is_refused_from_the_start(hurried, tmp_path):
    file = tmp_path / "slow.jinja"
    file.write_text(FORGETS + CHATML)
    with pytest.raises(InputError, match=r"chat template .*slow\.jinja takes longer than 0\.3 s"):
        ChatEncoder(TOKENIZER, 100, str(file))


def test_the_clock_runs_in_other_threads_too(hurried):
    said = []

    def render():
        try:
            with template_limits.limited():
                render_jinja_template([TURNS], chat_template=FORGETS)
        except template_limits.RenderingTimeError as error:
            said.append(str(error))

    thread = threading.Thread(target=render)
    thread.start()
    thread.join(20)
    assert said == ["takes longer than 0.3 s to render one conversation"]


WIDE = "it pads or repeats text more than 100,000 times"
LONG = r"it makes text of more than 16,777,216 characters"
FORMAT = "it formats text to a width of millions"


@pytest.mark.parametrize(
    ("before", "reason"),
    [
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ 1 % 0 }}", "zero"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "it calls itself without end"),
        ("{{ range(1000000000) | length }}", "Range too big"),
        ("{{ 'a' * 10**11 }}", LONG),
        ("{{ 10**11 * 'a' }}", LONG),
        ("{{ [1] * 10**11 }}", LONG),
        ("{{ 10**(10**10) }}", "it makes a number of more than 10,000 bits"),
        ("{% set n = namespace(x='ab') %}{% for i in range(99) %}{% set n.x = n.x + n.x %}{% endfor %}", LONG),
        ("{% set n = namespace(x='ab') %}{% for i in range(99) %}{% set n.x = n.x ~ n.x %}{% endfor %}", LONG),
        ("{% set n = namespace(x=[1]) %}{% for i in range(99) %}{% set n.x = n.x + n.x %}{% endfor %}", LONG),
        (
            "{% set n = namespace(x=3) %}{% for i in range(99) %}{% set n.x = n.x * n.x %}{% endfor %}",
            "a number of more",
        ),
        ("{% for i in range(100000) %}{{ 'x' * 1000 }}{% endfor %}", LONG),
        ("{% for i in range(100000) %}" + "x" * 1000 + "{% endfor %}", LONG),
        ("{% set x %}{% for i in range(100000) %}{{ 'x' * 90000 }}{% endfor %}{% endset %}", LONG),
        ("{% macro f() %}{% for i in range(100000) %}" + "x" * 9000 + "{% endfor %}{% endmacro %}{{ f() }}", LONG),
        ("{{ 'x' | center(10**10) }}", WIDE),
        ("{{ 'x'.ljust(10**10) }}", WIDE),
        ("{{ 'x'.zfill(width=10**10) }}|{{ 'x'.rjust(10**10) }}", WIDE),
        ("{{ 'x' | indent(10**10) }}", WIDE),
        ("{{ tools | tojson(indent=10**10) }}", WIDE),
        ("{{ [1] | slice(10**10) | list }}", WIDE),
        ("{{ [1] | batch(10**10, 0) | list }}", WIDE),
        ("{{ '%10000000000d' % 1 }}", FORMAT),
        ("{{ '%*d' % (10**10, 1) }}", FORMAT),
        ("{{ '%10000000000d' | format(1) }}", FORMAT),
        ("{{ '{:>10000000000}'.format(1) }}", FORMAT),
        ("{{ '{:>{}}'.format(1, 10**10) }}", FORMAT),
        ("{{ ('x' * 90000).replace('', 'y' * 90000) }}", LONG),
        ("{{ ('x' * 90000) | replace('x', 'y' * 90000) }}", LONG),
        ("{{ range(90000) | join('y' * 90000) }}", LONG),
        ("{{ ('y' * 90000).join(('x' * 90000) | list) }}", LONG),
        ("{{ lipsum(10**9) }}", "'lipsum' is undefined"),
        ("{{ messages['x']['y'] }}", "no"),
        ("{{ messages[99].content }}", "no element 99"),
        ("{{ raise_exception('never') }}", "never"),
        ("{{ {}['x'].y }}", "no attribute|undefined"),
        ("{{ messages.pop() }}", "unsafe|not safely"),
    ],
)
def test_a_row_that_a_template_cannot_render_is_refused_with_the_reason(before, reason):
    template = marked(before)
    encoder = ChatEncoder(TOKENIZER, 100, template)
    pool = Pool([{"messages": TURNS[1:3]}, {"messages": TURNS}])
    with pytest.raises(
        InputError, match=rf"row:2: the chat template refuses this row: .*({reason}).* \(--set data.on_bad_row=skip"
    ):
        encoder.encode(list(pool))
    skipping = ChatEncoder(TOKENIZER, 100, template, skip_refused=True)
    whole, left = skipping.encode(list(pool))
    assert (whole.supervised > 0, left.supervised) == (True, 0)


def test_what_is_just_within_the_limits_is_rendered():
    long = "a b " * 100_000
    template = "{{ 'x' * 100000 }}{{ '%6s' % 1 }}{{ 2 ** 100 }}" + CHATML
    with template_limits.limited():
        (text,), _ = render_jinja_template([[{"role": "user", "content": long}]], chat_template=template)
    assert len(text) > 500_000


def test_loops_nested_too_deep_for_python_are_the_rows_fault():
    deep = "{% for a in [1] %}" * 30 + "x" + "{% endfor %}" * 30
    with pytest.raises(InputError, match="the chat template refuses this row: too many statically nested blocks"):
        ChatEncoder(TOKENIZER, 100, deep + CHATML).encode(list(Pool([{"messages": TURNS}])))


def test_a_template_that_is_no_file_is_refused(tmp_path):
    (tmp_path / "zero.jinja").symlink_to("/dev/zero")
    with pytest.raises(InputError, match=r"zero\.jinja: is a device, not a regular file"):
        ChatEncoder(TOKENIZER, 100, str(tmp_path / "zero.jinja"))
    with pytest.raises(InputError, match="is a folder, not a regular file"):
        ChatEncoder(TOKENIZER, 100, str(tmp_path))


def test_transformers_is_as_it_was():
    from transformers.utils import chat_template_utils

    before = chat_template_utils._compile_jinja_template
    with pytest.raises(RuntimeError), template_limits.limited():
        raise RuntimeError
    assert chat_template_utils._compile_jinja_template is before


def test_a_thread_that_leaves_does_not_lift_the_limits_of_another():
    with template_limits.limited():

        def short():
            with template_limits.limited():
                pass

        thread = threading.Thread(target=short)
        thread.start()
        thread.join()
        with pytest.raises(template_limits.RenderingLimitError):
            render_jinja_template([TURNS], chat_template="{{ 'a' * 10 ** 9 }}")
