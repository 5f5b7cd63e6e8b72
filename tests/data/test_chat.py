import copy
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import trl
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from packaging.version import Version
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import chat_template_utils
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from iprox.data import IGNORE, ChatEncoder, Pool
from iprox.data.templates import CHATML
from iprox.data.tokens import fit
from iprox.errors import InputError

TEMPLATES = Path(trl.__file__).parent / "chat_templates"
READING_REASONS = [name for name in ("qwen3", "gptoss", "gemma4", "glm4moe") if (TEMPLATES / f"{name}.jinja").is_file()]
# transformers 5.20 and before give templates only the reasoning that has the template's own name, and iprox refuses the
# others; TRL 1.4 prepares rows in another way.
NAMES_REASONING = pytest.mark.skipif(
    not hasattr(chat_template_utils, "_REASONING_FIELDS"), reason="this transformers knows one name for reasoning"
)
PREPARES_LABELS = pytest.mark.skipif(
    Version(trl.__version__) < Version("1.14"), reason="this TRL prepares rows without labels"
)
MARKED = CHATML
UNMARKED = MARKED.replace("{% generation %}", "").replace("{% endgeneration %}", "")
TEXTS = ["What is two plus two? It is four.", "Name a color: blue, green or red.", "Answer the question, please."]


def make_tokenizer(template: Any = MARKED):
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore
    core.decoder = decoders.ByteLevel()  # pyright: ignore
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<pad>", "<|im_start|>", "<|im_end|>", "<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator([*TEXTS, "system\nuser\nassistant\n\n\n"] * 3, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<|endoftext|>", chat_template=template
    )


TOKENIZER = make_tokenizer()
BY_MARK = ChatEncoder(TOKENIZER, 10_000)
BY_BOUNDARY = ChatEncoder(TOKENIZER, 10_000, UNMARKED)


def chat(*turns):
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def encode(encoder, *rows):
    return encoder.encode(list(Pool(list(rows))))


def supervised_text(row):
    return str(TOKENIZER.decode(row.input_ids[row.labels != IGNORE]))


def same(one, other):
    return np.array_equal(one.input_ids, other.input_ids) and np.array_equal(one.labels, other.labels)


TWO_TURNS = chat(
    ("system", "Be short."), ("user", "2+2?"), ("assistant", "4"), ("user", "3+3?"), ("assistant", "Six 🙂")
)


def test_rules_are_named():
    assert (BY_MARK.mode, BY_BOUNDARY.mode) == ("generation", "boundary")
    assert "generation blocks of the tokenizer's chat template" in BY_MARK.describe
    assert "exact boundaries of the turns in the chat template given" in BY_BOUNDARY.describe
    assert BY_MARK.warnings == BY_BOUNDARY.warnings == ()
    assert TOKENIZER.chat_template == MARKED  # the caller's tokenizer is untouched


@pytest.mark.parametrize("encoder", [BY_MARK, BY_BOUNDARY], ids=["marks", "boundaries"])
def test_only_assistant_turns_and_their_ends_are_supervised(encoder):
    (row,) = encode(encoder, TWO_TURNS)
    assert supervised_text(row) == "4<|im_end|>Six 🙂<|im_end|>"
    assert str(TOKENIZER.decode(row.input_ids)).endswith("Six 🙂<|im_end|>\n")
    assert row.input_ids.dtype == row.labels.dtype == np.int32
    kept = row.labels != IGNORE
    assert (row.labels[kept] == row.input_ids[kept]).all()
    assert row.supervised == kept.sum()
    assert not row.truncated


unicode_text = st.text(st.characters(codec="utf-8"), min_size=1, max_size=12).filter(lambda s: not s.isspace())
conversations = st.lists(st.tuples(unicode_text, unicode_text), min_size=1, max_size=3)


@settings(max_examples=150, deadline=None)
@given(pairs=conversations, system=st.none() | unicode_text)
def test_supervised_tokens_decode_to_the_assistant_turns(pairs, system):
    turns = [("system", system)] if system else []
    for user, assistant in pairs:
        turns += [("user", user), ("assistant", assistant)]
    (by_mark,), (by_boundary,) = encode(BY_MARK, chat(*turns)), encode(BY_BOUNDARY, chat(*turns))
    assert same(by_mark, by_boundary)
    # A token that merges the template's "\n" with line breaks that open the answer is supervised whole.
    expected = "".join(a + "<|im_end|>" for _, a in pairs)
    if any(a[0].isspace() for _, a in pairs):
        assert supervised_text(by_mark).replace("\n", "") == expected.replace("\n", "")
    else:
        assert supervised_text(by_mark) == expected


def test_a_conversation_that_opens_with_the_assistant():
    turns = chat(("assistant", "Hello"), ("user", "Hi"), ("assistant", "Bye"))
    (by_mark,), (by_boundary,) = encode(BY_MARK, turns), encode(BY_BOUNDARY, turns)
    assert same(by_mark, by_boundary)
    assert supervised_text(by_mark) == "Hello<|im_end|>Bye<|im_end|>"


@pytest.mark.parametrize("encoder", [BY_MARK, BY_BOUNDARY], ids=["marks", "boundaries"])
def test_of_a_conversational_prompt_nothing_is_supervised(encoder):
    turns = TWO_TURNS["messages"]
    (row,) = encode(encoder, {"prompt": turns[:4], "completion": turns[4:]})
    assert supervised_text(row) == "Six 🙂<|im_end|>"


def test_a_turn_without_end_token_keeps_all_bytes_of_its_last_character():
    bare = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}{% if not loop.last %}{{ '\\n' }}{% endif %}"
    bare += "{% endfor %}{% if add_generation_prompt %}{{ '\\nassistant: ' }}{% endif %}"
    (row,) = encode(ChatEncoder(TOKENIZER, 100, bare), chat(("user", "Hi"), ("assistant", "ok 🙂")))
    assert supervised_text(row).strip() == "ok 🙂"


def test_order_and_mixture_are_kept():
    rows = [
        {"text": "four"},
        TWO_TURNS,
        {"prompt": "two ", "completion": "plus"},
        chat(("user", "Q"), ("assistant", "A")),
    ]
    together = encode(BY_MARK, *rows * 400)  # more than one chunk
    alone = [encode(BY_MARK, row)[0] for row in rows]
    assert len(together) == 1600
    assert all(same(row, alone[index % 4]) for index, row in enumerate(together))


def test_plain_text_ends_with_one_eos():
    text, closed = encode(BY_MARK, {"text": "It is four."}, {"text": "It is four.<|endoftext|>"})
    assert same(text, closed)
    assert text.input_ids[-1] == TOKENIZER.eos_token_id
    assert (text.labels == text.input_ids).all()
    assert text.supervised == len(text.labels) - 1


def test_plain_prompt_completion_supervises_the_completion():
    (row,) = encode(BY_MARK, {"prompt": "What is two plus two?", "completion": " It is four."})
    assert supervised_text(row) == " It is four.<|endoftext|>"
    assert TOKENIZER.decode(row.input_ids) == "What is two plus two? It is four.<|endoftext|>"


ROWS = {
    "messages": [TWO_TURNS, chat(("user", "Name a color"), ("assistant", "\n\nblue"))],
    "prompt and completion": [
        {"prompt": "What is two", "completion": " plus two?"},
        {"prompt": "Answer the ques", "completion": "tion, please."},  # a token may merge across the boundary
    ],
    "conversational prompt and completion": [
        {"prompt": TWO_TURNS["messages"][:4], "completion": TWO_TURNS["messages"][4:]},
        {"prompt": TWO_TURNS["messages"][1:2], "completion": TWO_TURNS["messages"][2:]},
    ],
    "text": [{"text": TEXTS[0]}, {"text": "red"}],
}


@PREPARES_LABELS
@pytest.mark.parametrize("kind", ROWS)
def test_labels_are_those_of_trl(kind, tmp_path):
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(TOKENIZER), hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
        )
    )
    chats = kind in ("messages", "conversational prompt and completion")
    config = SFTConfig(
        output_dir=str(tmp_path), assistant_only_loss=chats, max_length=None, report_to=[], use_cpu=True, bf16=False
    )
    trainer = SFTTrainer(
        model, args=config, train_dataset=Dataset.from_list(ROWS[kind]), processing_class=copy.deepcopy(TOKENIZER)
    )
    prepared: Any = trainer.train_dataset
    for theirs, ours in zip(prepared, encode(BY_MARK, *ROWS[kind]), strict=True):
        assert theirs["input_ids"] == ours.input_ids.tolist()
        assert theirs["labels"] == ours.labels.tolist()


def test_trl_knows_a_training_template_for_qwen3():
    template = (TEMPLATES / "qwen3.jinja").read_text()
    encoder = ChatEncoder(make_tokenizer(template), 1000)
    assert encoder.mode == "trl"
    assert "TRL's training variant of the tokenizer's chat template" in encoder.describe
    (row,) = encode(encoder, chat(("user", "Q"), ("assistant", "A"), ("user", "R"), ("assistant", "B")))
    think = "<think>\n\n</think>\n\n"
    assert supervised_text(row) == f"{think}A<|im_end|>\n{think}B<|im_end|>\n"


def test_a_template_that_rewrites_history_is_refused():
    rewriting = (
        "{% for m in messages %}{{ m['role'] + ': ' }}{{ m['content'] if loop.last else m['content'] | upper }}"
        "{{ '<|im_end|>' }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    encoder = ChatEncoder(TOKENIZER, 100, rewriting)
    assert encoder.mode == "boundary"
    with pytest.raises(InputError, match=r"row:1: the chat template renders turn 2 differently .*generation"):
        encode(encoder, chat(("user", "q"), ("assistant", "a"), ("user", "r"), ("assistant", "b")))


def test_a_template_for_images_is_refused():
    template = UNMARKED.replace("message['content']", "(message['content'] | selectattr('text') | join)")
    with pytest.raises(InputError, match="the chat template given leaves out the text of messages"):
        ChatEncoder(TOKENIZER, 100, template)


@pytest.mark.parametrize("broken", ["{% endfor %}", "{{ messages | nosuchfilter }}"])
def test_a_template_that_is_no_jinja_is_refused_by_its_line(broken):
    with pytest.raises(InputError, match="the chat template given, line 2: not valid Jinja: "):
        ChatEncoder(TOKENIZER, 100, "{{ messages[0].content }}\n" + broken)


def test_a_row_that_the_template_refuses_is_named():
    strict = "{% if messages[0]['role'] != 'user' %}{{ raise_exception('user goes first') }}{% endif %}" + MARKED
    good = chat(("user", "Q"), ("assistant", "A"))
    with pytest.raises(InputError, match="row:2: the chat template refuses this row: user goes first"):
        encode(ChatEncoder(TOKENIZER, 100, strict), good, TWO_TURNS)


def test_rows_are_cut_to_what_the_model_reads_and_that_is_said():
    long = chat(("user", "word " * 40), ("assistant", "A"))
    encoder = ChatEncoder(TOKENIZER, 100, MARKED, positions=24)
    with pytest.warns(UserWarning, match="rows are cut to 24 tokens, not 100: the model reads no more"):
        (cut,) = encode(encoder, long)
    assert len(cut.input_ids) == 24
    assert cut.truncated
    assert ChatEncoder(TOKENIZER, 24, MARKED, positions=100).lowered is None


def test_a_tokenizer_of_another_model_is_refused():
    one = chat(("user", "Q"), ("assistant", "A"))
    (encoded,) = encode(ChatEncoder(TOKENIZER, 100, MARKED), one)
    largest = int(encoded.input_ids.max())
    encode(ChatEncoder(TOKENIZER, 100, MARKED, vocabulary=largest + 1), one)
    with pytest.raises(InputError, match=f"row:1: the tokenizer gives .* {largest}, .* only {largest} embeddings;"):
        encode(ChatEncoder(TOKENIZER, 100, MARKED, vocabulary=largest), one)


def test_rows_that_the_template_refuses_can_be_left_without_labels():
    strict = "{% if messages[0]['role'] != 'user' %}{{ raise_exception('user goes first') }}{% endif %}" + MARKED
    good, bad = chat(("user", "Q"), ("assistant", "A")), chat(("system", "S"), ("user", "Q"), ("assistant", "A"))
    alone = encode(ChatEncoder(TOKENIZER, 100, strict), good)[0]
    first, refused, last = encode(ChatEncoder(TOKENIZER, 100, strict, skip_refused=True), good, bad, good)
    assert refused.supervised == 0
    for kept in (first, last):
        assert kept.input_ids.tolist() == alone.input_ids.tolist()
        assert kept.labels.tolist() == alone.labels.tolist()


def test_marks_that_mark_nothing_are_refused():
    useless = UNMARKED + "{% if false %}{% generation %}x{% endgeneration %}{% endif %}"
    with pytest.raises(InputError, match="row:1: the chat template marks no assistant token"):
        encode(ChatEncoder(TOKENIZER, 100, useless), TWO_TURNS)


def test_an_end_of_turn_outside_the_marks_is_warned_of():
    outside = MARKED.replace("+ '<|im_end|>' }}{% endgeneration %}", "}}{% endgeneration %}{{ '<|im_end|>' }}")
    encoder = ChatEncoder(TOKENIZER, 100, outside)
    assert len(encoder.warnings) == 1
    assert "stopping is not supervised" in encoder.warnings[0]
    (row,) = encode(encoder, chat(("user", "Q"), ("assistant", "A")))
    assert supervised_text(row) == "A"


def test_without_a_template_messages_are_refused_and_a_default_is_offered(tmp_path):
    bare = make_tokenizer(None)
    encoder = ChatEncoder(bare, 100)
    assert (encoder.mode, encoder.chat_template) == ("none", None)
    assert len(encode(encoder, {"text": "plain"})) == 1
    with pytest.raises(InputError, match=r"row:1: .*no chat template; name one: --set data.chat_template=chatml"):
        encode(encoder, TWO_TURNS)

    file = tmp_path / "t.jinja"
    file.write_text(MARKED)
    expected = encode(BY_MARK, TWO_TURNS)[0]
    for given_template in ("chatml", MARKED, str(file)):
        assert same(encode(ChatEncoder(bare, 100, given_template), TWO_TURNS)[0], expected)
    assert bare.chat_template is None
    with pytest.raises(InputError, match="'chatlm' is neither 'chatml' nor"):
        ChatEncoder(bare, 100, "chatlm")


def test_chatml_without_its_tokens_is_warned_of():
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore
    core.train_from_iterator(
        TEXTS, trainers.BpeTrainer(initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    )
    encoder = ChatEncoder(PreTrainedTokenizerFast(tokenizer_object=core), 100, "chatml")
    assert "<|im_end|> is not a single token" in encoder.warnings[0]


def test_named_templates_without_a_default_are_refused():
    tokenizer = make_tokenizer({"tools": MARKED, "rag": MARKED})
    with pytest.raises(InputError, match="none is the default"):
        ChatEncoder(tokenizer, 100)
    assert ChatEncoder(make_tokenizer({"default": MARKED, "rag": "x"}), 100).mode == "generation"


def test_what_cannot_encode():
    class Slow:
        is_fast = False

    with pytest.raises(InputError, match="Slow is a slow tokenizer"):
        ChatEncoder(Slow(), 100)
    with pytest.raises(InputError, match="at least 2 tokens, not 1"):
        ChatEncoder(TOKENIZER, 1)
    without_eos = copy.deepcopy(TOKENIZER)
    without_eos.eos_token = None
    with pytest.raises(InputError, match=r"row:1: .*EOS token, but the tokenizer has none"):
        encode(ChatEncoder(without_eos, 100), {"text": "a"})


@pytest.mark.parametrize(
    ("mask", "length", "kept"),
    [
        ("..aa", 4, "0123"),  # fits
        ("..aa.", 4, "0123"),  # the unsupervised end goes first
        ("....aa..", 4, "2345"),  # then the prompt, from the left
        ("..aaaaaa", 4, "2345"),  # the answer alone is too long: its start is kept
        (".aaaa.", 4, "1234"),
        ("..aaaa..a", 4, "5678"),  # several answers: the last one, with what came before it
        (".a..aaaaa", 4, "4567"),
        ("......", 4, "2345"),  # nothing supervised
    ],
)
def test_cutting_keeps_the_answer(mask, length, kept):
    ids = np.arange(len(mask), dtype=np.int32)
    labels = np.where([c == "a" for c in mask], ids, IGNORE).astype(np.int32)
    row = fit(ids, labels, length)
    assert "".join(map(str, row.input_ids)) == kept
    assert row.truncated == (len(mask) > length)
    np.testing.assert_array_equal(row.labels, labels[row.input_ids])


@given(st.lists(st.booleans(), min_size=1, max_size=40), st.integers(2, 20))
def test_cutting_always_fits_and_keeps_a_window(mask, length):
    ids = np.arange(len(mask), dtype=np.int32)
    labels = np.where(mask, ids, IGNORE).astype(np.int32)
    row = fit(ids, labels, length)
    assert len(row.input_ids) == min(length, len(mask))
    np.testing.assert_array_equal(row.input_ids, np.arange(row.input_ids[0], row.input_ids[0] + len(row.input_ids)))
    np.testing.assert_array_equal(row.labels, labels[row.input_ids])
    if any(mask):
        assert (row.labels != IGNORE).any()


def test_a_long_conversation_is_cut_to_its_answer():
    encoder = ChatEncoder(TOKENIZER, 8)
    (row,) = encode(encoder, chat(("user", "Name a color: " * 20), ("assistant", "red")))
    assert row.truncated
    assert len(row.input_ids) == 8
    assert supervised_text(row) == "red<|im_end|>"


TOOLS = [{"type": "function", "function": {"name": "add", "description": "plus", "parameters": {"type": "object"}}}]
CALL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": {"x": 2, "y": 2}}}
WITH_TOOLS = [
    {
        "messages": [
            {"role": "user", "content": "2+2?"},
            {"role": "assistant", "content": "", "reasoning_content": "I add.", "tool_calls": [CALL]},
            {"role": "tool", "content": "four"},
            {"role": "assistant", "content": "It is four."},
        ],
        "tools": TOOLS,
    },
    {**chat(("user", "Name a color"), ("assistant", "red")), "tools": json.dumps(TOOLS[:1])},
    {**chat(("user", "Name a color"), ("assistant", "red")), "tools": []},
    {**chat(("user", "Q"), ("assistant", "A")), "chat_template_kwargs": {"enable_thinking": False}},
    {
        "prompt": [{"role": "user", "content": "2+2?"}],
        "completion": [{"role": "assistant", "content": "four", "thinking": "plus"}],
        "tools": [{**TOOLS[0], "x": 1}],
    },
]
TRL_QWEN3 = (TEMPLATES / "qwen3.jinja").read_text()


def rendered_alone(encoder, row):
    """What the template makes of one row, by transformers itself."""
    tools = row.get("tools")
    turns = row.get("messages") or row["prompt"] + row["completion"]
    return encoder.tokenizer.apply_chat_template(
        turns,
        chat_template=encoder.chat_template,
        tools=(json.loads(tools) if isinstance(tools, str) else tools) or None,
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
        **row.get("chat_template_kwargs", {}),
    )


@NAMES_REASONING
def test_tools_their_calls_and_reasoning_are_rendered_as_trl_does():
    encoder = ChatEncoder(make_tokenizer(TRL_QWEN3), 10_000)
    encoded = encode(encoder, *WITH_TOOLS)
    for ours, row in zip(encoded, WITH_TOOLS, strict=True):
        alone = rendered_alone(encoder, row)
        assert ours.input_ids.tolist() == alone["input_ids"]
        assert (ours.labels != IGNORE).tolist() == [bool(mark) for mark in alone["assistant_masks"]]
    text = str(encoder.tokenizer.decode(encoded[0].input_ids))
    assert '"description": "plus"' in text
    learned = supervised_text(encoded[0])
    assert '<think>\nI add.\n</think>\n\n<tool_call>\n{"name": "add", "arguments": {"x": 2, "y": 2}}' in learned
    assert "<tool_response>" not in learned  # what the tool says is not the model's
    assert len(encoded[1].input_ids) > len(encoded[2].input_ids)
    assert "<think>\nplus\n</think>" in supervised_text(encoded[4])  # transformers knows both names of reasoning


@pytest.mark.parametrize("rule", ["generation", "boundary"])
def test_rows_of_different_tools_keep_their_places(rule):
    template = (
        "{% for tool in tools or [] %}{{ tool.function.name + tool.x | string }}{% endfor %}{{ hint }}"
        "{% for m in messages %}{{ m.role + ':' }}{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}"
        "{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
    )
    if rule == "boundary":
        template = template.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    tools = [None, [{**TOOLS[0], "x": 1}], [{**TOOLS[0], "x": 2}]]
    rows = [{**chat(("user", "Q"), ("assistant", f"A{at}")), "tools": tools[at % 3]} for at in range(9)]
    rows.append({**chat(("user", "Q"), ("assistant", "B")), "chat_template_kwargs": {"hint": "!"}})
    encoder = ChatEncoder(TOKENIZER, 100, template)
    assert encoder.mode == rule
    together = encode(encoder, *rows)
    assert all(same(ours, encode(encoder, row)[0]) for ours, row in zip(together, rows, strict=True))
    texts = [str(TOKENIZER.decode(each.input_ids)) for each in together]
    assert [text.split("user")[0] for text in texts] == ["", "add1", "add2"] * 3 + ["!"]


DROPPING = MARKED.replace("{% for message in messages %}", "{% for message in messages if message['role'] != 'tool' %}")


@pytest.mark.parametrize(
    ("template", "row", "parts"),
    [
        (MARKED, WITH_TOOLS[0], "tools, tool_calls, reasoning_content"),
        (MARKED, WITH_TOOLS[1], "tools"),
        (MARKED, chat(("user", "Q"), ("assistant", "A")) | {"tools": TOOLS}, "tools"),
        (DROPPING, chat(("user", "Q"), ("tool", "T"), ("assistant", "A")), "turns of role tool"),
    ],
)
def test_what_the_template_leaves_out_is_refused(template, row, parts):
    with pytest.raises(InputError, match=f"row:2: the row has {parts}, which the chat template leaves out"):
        encode(ChatEncoder(TOKENIZER, 10_000, template), TWO_TURNS, row)
    encoder = ChatEncoder(TOKENIZER, 10_000, template, skip_refused=True)
    kept, refused, last = encode(encoder, TWO_TURNS, row, TWO_TURNS)
    assert (kept.supervised > 0, refused.supervised) == (True, 0)
    assert same(kept, last)
    assert encode(encoder, row)[0].supervised == 0
    assert f"row:2: the row has {parts}" in encoder.refused


def masked_turns(*masked):
    turns = [{"role": role, "content": text} for role, text in (("user", "2+2?"), ("assistant", "5"))]
    turns += [{"role": "assistant", "content": "Or four"}, {"role": "user", "content": "3+3?"}]
    turns += [{"role": "assistant", "content": "Six"}]
    return {"messages": [{**turn, **({"train": False} if at in masked else {})} for at, turn in enumerate(turns)]}


@pytest.mark.parametrize("encoder", [BY_MARK, BY_BOUNDARY], ids=["marks", "boundaries"])
@pytest.mark.parametrize(
    ("masked", "supervised"),
    [
        ((), "5<|im_end|>Or four<|im_end|>Six<|im_end|>"),
        ((1,), "Or four<|im_end|>Six<|im_end|>"),
        ((2,), "5<|im_end|>Six<|im_end|>"),
        ((4,), "5<|im_end|>Or four<|im_end|>"),
        ((1, 2), "Six<|im_end|>"),
        ((2, 4), "5<|im_end|>"),
    ],
)
def test_masked_turns_are_read_and_not_supervised(encoder, masked, supervised):
    whole, row, after = encode(encoder, masked_turns(), masked_turns(*masked), TWO_TURNS)
    assert np.array_equal(row.input_ids, whole.input_ids)
    assert supervised_text(row) == supervised
    assert supervised_text(after).startswith("4<|im_end|>")  # of the rows together, each by its own


@pytest.mark.parametrize("encoder", [BY_MARK, BY_BOUNDARY], ids=["marks", "boundaries"])
def test_masked_turns_of_a_completion_are_not_supervised(encoder):
    turns = masked_turns(2)["messages"]
    (row,) = encode(encoder, {"prompt": turns[:1], "completion": turns[1:], "system": "Add."})
    assert supervised_text(row) == "5<|im_end|>Six<|im_end|>"
    assert "Add." in str(TOKENIZER.decode(row.input_ids))


@pytest.mark.parametrize("name", ["qwen3", "llama3", "qwen2_5"])
def test_masked_turns_of_the_templates_that_trl_marks(name):
    encoder = ChatEncoder(make_tokenizer((TEMPLATES / f"{name}.jinja").read_text()), 10_000)
    assert encoder.mode == "trl"
    row = masked_turns(1, 2)
    (ours,), (whole,) = encode(encoder, row), encode(encoder, masked_turns())
    decode = encoder.tokenizer.decode
    said = str(decode(ours.input_ids[ours.labels != IGNORE]))
    assert "Six" in said
    assert "four" not in said
    assert "5" not in said
    assert str(decode(whole.input_ids[whole.labels != IGNORE])).endswith(said)


def test_a_template_that_rewrites_earlier_turns_cannot_mask_one():
    shown = "{{ (message['content'] if loop.last else message['content'] | upper) + '<|im_end|>' }}"
    rewriting = MARKED.replace("{{ message['content'] + '<|im_end|>' }}", shown)
    with pytest.raises(
        InputError, match=r"row:1: the chat template renders turn \d differently when other turns follow"
    ):
        encode(ChatEncoder(TOKENIZER, 10_000, rewriting), masked_turns(2))


MARKS = [
    ("<think>", "</think>"),
    ("<thinking>", "</thinking>"),
    ("[THINK]", "[/THINK]"),
    ("<reasoning>", "</reasoning>"),
]
MARKS += [("", "</think>"), ("<seed:think>", "</seed:think>"), ("<|begin_of_thought|>", "<|end_of_thought|>")]


def thinking(opening, closing, *, earlier=False):
    thought = f"{opening}I add.\n{closing}\n\nFour"
    later = [("user", "Sure?"), ("assistant", "Yes")] if earlier else []
    return chat(("user", "2+2?"), ("assistant", thought), *later)


def stripping(closing, when="true"):
    """The template of models that reason, such as DeepSeek-R1: what stands before the mark is left out."""
    cut = f"(message['content'].split('{closing}')[-1] | trim if {when} else message['content'])"
    return MARKED.replace("{{ message['content'] + '<|im_end|>' }}", "{{ " + cut + " + '<|im_end|>' }}")


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("opening", "closing"), MARKS)
@pytest.mark.parametrize("earlier", [False, True])
def test_reasoning_in_the_content_that_a_template_strips_is_refused(opening, closing, earlier):
    row = thinking(opening, closing, earlier=earlier)
    said = re.escape(
        f"row:2: the row has reasoning in its content ({opening}...{closing}), which the chat template leaves"
    )
    with pytest.raises(InputError, match=said):
        encode(ChatEncoder(TOKENIZER, 10_000, stripping(closing)), TWO_TURNS, row)
    skipping = ChatEncoder(TOKENIZER, 10_000, stripping(closing), skip_refused=True)
    assert [each.supervised > 0 for each in encode(skipping, TWO_TURNS, row)] == [True, False]
    (kept,) = encode(BY_MARK, row)  # a template that renders contents as they are
    assert "I add." in supervised_text(kept)


@pytest.mark.parametrize(("opening", "closing"), MARKS[:2])
def test_reasoning_of_earlier_turns_that_a_template_strips_is_warned_of(opening, closing):
    encoder = ChatEncoder(TOKENIZER, 10_000, stripping(closing, "not loop.last"))
    with pytest.warns(UserWarning, match="leaves out the reasoning in the content of turns before the last"):
        (row,) = encode(encoder, thinking(opening, closing, earlier=True))
    assert "I add." not in str(TOKENIZER.decode(row.input_ids))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "content", ["Four", "<think>\n\n</think>\n\nFour", "a </b> c", "</think>", "Write <think> here"]
)
def test_answers_without_reasoning_are_taken_as_they_are(content):
    encoder = ChatEncoder(TOKENIZER, 10_000, stripping("</think>"))
    (row,) = encode(encoder, chat(("user", "Why <think>so</think>?"), ("assistant", content)))
    assert row.supervised > 0


def test_tools_that_the_turns_say_already_can_be_left_unread():
    said = f"You may call <tools>{json.dumps(TOOLS)}</tools>"
    row = {**chat(("system", said), ("user", "Q"), ("assistant", "A")), "tools": json.dumps(TOOLS)}
    with pytest.raises(InputError, match=r"has tools, .*leave the column unread if .* \(--set data.columns.tools=\)"):
        encode(BY_MARK, row)
    (left,) = BY_MARK.encode(list(Pool([row], columns={"tools": None})))
    assert supervised_text(left) == "A<|im_end|>"


def test_a_template_without_system_turns_is_warned_of():
    bare = MARKED.replace("for message in messages", "for message in messages if message['role'] != 'system'")
    with pytest.warns(UserWarning, match="leaves out turns of role system"):
        (row,) = encode(ChatEncoder(TOKENIZER, 10_000, bare), TWO_TURNS)
    assert "Be short" not in str(TOKENIZER.decode(row.input_ids))


@NAMES_REASONING
@pytest.mark.parametrize("key", ["reasoning_content", "thinking", "reasoning"])
@pytest.mark.parametrize("name", READING_REASONS)  # old versions of TRL lack some
def test_reasoning_by_any_name_reaches_the_templates_that_read_it(name, key):
    template = (TEMPLATES / f"{name}.jinja").read_text()
    encoder = ChatEncoder(make_tokenizer(template), 10_000)
    turns = [
        {"role": "user", "content": "2+2?"},
        {"role": "assistant", "content": "", key: "blue is red", "tool_calls": [CALL]},
    ]
    (row,) = encode(encoder, {"messages": turns})
    assert "blue is red" in encoder.tokenizer.decode(row.input_ids)


def test_keys_of_tools_keep_their_order_whatever_the_rows_beside():
    function = TOOLS[0]["function"]
    turned = [{"function": dict(reversed(function.items())), "type": "function"}]
    rows = [{**chat(("user", "Q"), ("assistant", "A")), "tools": tools} for tools in (TOOLS, turned)]
    encoder = ChatEncoder(make_tokenizer(TRL_QWEN3), 10_000)
    for ours, row in zip(encode(encoder, *rows), rows, strict=True):
        assert ours.input_ids.tolist() == rendered_alone(encoder, row)["input_ids"]


@PREPARES_LABELS
def test_nulls_of_the_users_own_are_rendered_and_those_that_arrow_fills_in_are_not(tmp_path):
    call = {"type": "function", "function": {"name": "add", "arguments": {"x": None, "y": 1}}}
    turns = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    row = {"messages": turns, "tools": TOOLS}
    encoder = ChatEncoder(make_tokenizer(TRL_QWEN3), 10_000)
    (ours,) = encode(encoder, row)
    assert '{"x": null, "y": 1}' in encoder.tokenizer.decode(ours.input_ids)
    assert ours.input_ids.tolist() == rendered_alone(encoder, row)["input_ids"]
    functions = [{"name": "add", "arguments": {"y": 1}}, {"name": "sub", "arguments": {"z": "red"}}]
    calls = [{"role": "assistant", "content": "", "tool_calls": [{"function": each}]} for each in functions]
    rows = [{"messages": [turns[0], each], "tools": TOOLS} for each in calls]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    for pool in (Pool(tmp_path / "rows.parquet"), Pool(Dataset.from_list(rows))):
        for ours, row in zip(encoder.encode(list(pool)), rows, strict=True):
            assert ours.input_ids.tolist() == rendered_alone(encoder, row)["input_ids"]
        # What is selected says the same when it is read again.
        pool.write_rows([1, 0], tmp_path / "chosen.jsonl")
        again = encoder.encode(list(Pool(tmp_path / "chosen.jsonl")))
        assert again[1].input_ids.tolist() == rendered_alone(encoder, rows[0])["input_ids"]
