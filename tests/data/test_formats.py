import uuid
from decimal import Decimal

import pytest

from iprox.data.formats import to_example
from iprox.data.messages import BadRowError


def read(data):
    return to_example(data, row=0, origin="pool.jsonl:1", default_id="pool-00000001")


USER = {"role": "user", "content": "Q"}
ASSISTANT = {"role": "assistant", "content": "A"}


def test_messages_with_labels():
    example = read({"id": 7, "source": "gsm8k", "task": "math", "messages": [USER, ASSISTANT]})
    assert (example.id, example.source, example.task) == ("7", "gsm8k", "math")
    assert example.messages == (USER, ASSISTANT)
    assert example.supervised_from == 0
    assert example.text is example.prompt is example.completion is None


def test_content_parts_are_joined():
    parts = [{"type": "text", "text": "a "}, {"type": "text", "text": "b"}]
    example = read({"messages": [{"role": "user", "content": parts}, ASSISTANT]})
    assert example.messages is not None
    assert example.messages[0]["content"] == "a b"


def test_sharegpt_roles():
    turns = [("system", "S"), ("human", "Q"), ("gpt", "A"), ("user", "R"), ("assistant", "B"), ("tool", "T")]
    example = read({"conversations": [{"from": role, "value": text} for role, text in turns]})
    assert example.messages is not None
    assert [m["role"] for m in example.messages] == ["system", "user", "assistant", "user", "assistant", "tool"]
    assert [m["content"] for m in example.messages] == ["S", "Q", "A", "R", "B", "T"]


@pytest.mark.parametrize(("extra", "user"), [({}, "I"), ({"input": ""}, "I"), ({"input": "X"}, "I\n\nX")])
def test_alpaca(extra, user):
    # The original Alpaca set has a ready-made `text` column too; the turns win.
    example = read({"instruction": "I", "output": "O", "text": "Below is ...", **extra})
    assert example.messages == ({"role": "user", "content": user}, {"role": "assistant", "content": "O"})


def test_alpaca_and_sharegpt_rows_may_have_a_system_turn_and_alpaca_earlier_ones():
    history = [["Q1", "A1"], ("Q2", "A2")]
    example = read({"instruction": "Q3", "output": "A3", "history": history, "system": "S"})
    said = ["S", "Q1", "A1", "Q2", "A2", "Q3", "A3"]
    assert example.messages is not None
    assert [m["content"] for m in example.messages] == said
    assert [m["role"] for m in example.messages] == ["system", *["user", "assistant"] * 3]
    plain = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}
    assert read({"instruction": "Q", "output": "A", "history": [], "system": ""}).messages == plain
    turns = [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]
    system = {"role": "system", "content": "S"}
    assert read({"conversations": turns, "system": "S"}).messages == (system, *plain)


def contents(example):
    return [(turn["role"], turn["content"]) for turn in example.messages]


@pytest.mark.parametrize("column", ["system", "system_prompt", "system_message", "systemInstruction", "System"])
@pytest.mark.parametrize(
    "turns",
    [
        {"messages": [USER, ASSISTANT]},
        {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]},
        {"instruction": "Q", "output": "A"},
        {"prompt": [USER], "completion": [ASSISTANT]},
        {"messages": [{"role": "system", "content": " "}, USER, ASSISTANT]},
        {"messages": [{"role": "system", "content": "Rhyme."}, USER, ASSISTANT]},  # which says so already
    ],
)
def test_a_system_column_is_the_first_turn(column, turns):
    example = read({**turns, column: "Rhyme."})
    assert contents(example) == [("system", "Rhyme."), ("user", "Q"), ("assistant", "A")]
    assert example.supervised_from == (2 if "prompt" in turns else 0)
    assert contents(read({**turns, column: None}))[-2:] == [("user", "Q"), ("assistant", "A")]


def test_a_system_column_that_says_something_else_is_refused():
    own = {"messages": [{"role": "system", "content": "Be brief."}, USER, ASSISTANT]}
    refused(
        {**own, "system_prompt": "Rhyme."}, "system_prompt differs from the system turn .*data.columns.system_prompt="
    )
    refused(
        {**own, "messages": [{**own["messages"][0], "role": "developer"}, ASSISTANT], "system": "R"}, "system differs"
    )
    refused({"messages": [USER, ASSISTANT], "system": "a", "system_prompt": "b"}, "system and system_prompt say diff")
    refused(
        {"messages": [USER, ASSISTANT], "system": [{"text": "a"}]},
        "system must be text, not a list .*--set data.columns.sy",
    )
    refused({"prompt": "P", "completion": "C", "system": "Rhyme."}, "has 'system', which prompt does not contain")
    refused({"text": "T", "system": "Rhyme."}, "has 'system', which text does not contain")
    assert read({"prompt": "Rhyme.\nP", "completion": "C", "system": "Rhyme."}).prompt == "Rhyme.\nP"
    assert read({"text": "Rhyme. T", "system": "Rhyme."}).text == "Rhyme. T"


def refused(row, reason):
    with pytest.raises(BadRowError, match=reason):
        read(row)


FALSE = [False, 0, 0.0, "0", "0.0", "false", "False", " no "]


@pytest.mark.parametrize("key", ["train", "training", "trainable", "loss", "loss_mask", "weight"])
@pytest.mark.parametrize("value", FALSE)
def test_a_turn_that_is_masked_does_not_count(key, value):
    turns = [USER, {**ASSISTANT, key: value}, USER, {**ASSISTANT, key: True}]
    example = read({"messages": turns})
    assert example.masked == {1}
    assert example.messages == (USER, ASSISTANT, USER, ASSISTANT)  # a template does not see the mark
    assert read({"messages": turns, "system": "S"}).masked == {2}
    assert read({"prompt": turns[:2], "completion": [{**USER, "content": "R"}, *turns[1:]], "system": "S"}).masked == {
        4
    }
    sharegpt = [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A", key: value}]
    assert read({"conversations": [*sharegpt, *sharegpt[:1], {"from": "gpt", "value": "B"}]}).masked == {1}
    refused({"messages": turns[:2]}, "every assistant turn of messages is masked")
    refused({"prompt": [USER], "completion": [turns[1]]}, "every assistant turn of completion is masked")
    refused(
        {"messages": [USER, ASSISTANT], key: value},
        f"{key} is .*, so nothing of the row counts.*--set data.columns.{key}= ",
    )


@pytest.mark.parametrize("key", ["train", "training", "trainable", "loss", "loss_mask", "weight"])
@pytest.mark.parametrize("value", [None, "", True, 1, 1.0, "1", "true"])
def test_a_turn_that_is_not_masked_counts(key, value):
    assert read({"messages": [{**USER, key: False}, {**ASSISTANT, key: value}]}).masked == frozenset()
    assert read({"messages": [USER, ASSISTANT], key: value}).masked == frozenset()


@pytest.mark.parametrize(
    ("turn", "reason"),
    [
        ({"weight": 0.5}, "weight of .* is 0.5: a turn counts with weight 1 or not at all"),
        ({"weight": "0.5"}, "weight of .* must be true or false, or 1 or 0, not text"),
        ({"weight": 2}, "weight of .* is 2"),
        ({"loss_mask": [1, 0]}, "loss_mask of .* masks parts"),
        ({"train_detail": [{"begin_offset": 0, "end_offset": 1, "train": False}]}, "train_detail .* masks a part"),
        ({"train_detail": "half"}, "train_detail .* masks a part"),
        ({"training": "maybe"}, "training of .* must be true or false"),
    ],
)
def test_what_is_finer_than_a_turn_is_refused(turn, reason):
    refused({"messages": [USER, {**ASSISTANT, **turn}]}, reason)


def test_training_on_another_turn_than_the_assistants_is_refused():
    refused({"messages": [{**USER, "train": True}, ASSISTANT]}, "trains on turns of the assistant only, not of user")
    whole = [{"begin_offset": 0, "end_offset": 1, "train": True}]
    assert read({"messages": [{**USER, "weight": 1}, {**ASSISTANT, "train_detail": whole}]}).masked == frozenset()


def test_marks_of_a_row_are_taken_for_what_they_can_be():
    plain = {"prompt": "P", "completion": "C"}
    assert read({**plain, "loss": 2.31, "train": "split-1", "loss_mask": [1, 1]}).prompt == "P"
    refused({**plain, "weight": 0.5}, "weight is 0.5.*--set data.columns.weight= leaves")
    refused({**plain, "loss_mask": [0, 1]}, "loss_mask masks parts.*--set data.columns.loss_mask= ")
    refused({**plain, "train_detail": [{"train": False}]}, "train_detail masks parts")


def test_answers_that_preference_data_marks_as_bad_are_refused():
    for value in FALSE:
        refused(
            {"prompt": "P", "completion": "C", "label": value}, "label is .* a bad answer.*--set data.columns.label="
        )
    for value in (False, "false"):
        refused({"messages": [USER, ASSISTANT], "kto_tag": value}, "kto_tag is .* a bad answer")
    assert read({"prompt": "P", "completion": "C", "label": True}).prompt == "P"
    assert read({"messages": [USER, ASSISTANT], "label": 0}).masked == frozenset()  # a class
    assert read({"text": "T", "label": False}).text == "T"
    refused({"prompt": "P", "chosen": "C", "rejected": "D"}, "--set data.columns.completion=chosen")


@pytest.mark.parametrize(
    "column", ["image", "images", "image_url", "image_path", "audio", "audios", "video", "videos", "functions"]
)
def test_images_and_sound_are_refused_by_name(column):
    row = {"messages": [USER, ASSISTANT]}
    for value in (["a.png"], "a.png", [{"bytes": b"x"}], {"path": "a.png", "bytes": None}):
        refused(
            {**row, column: value}, f"has '{column}', which iprox does not read.*--set data.columns.{column}= leaves"
        )
        if column != "functions":
            refused({"messages": [{**USER, column: value}, ASSISTANT]}, rf"messages\[0\] has '{column}'")
    for value in (None, [], "", [None], {"path": None, "bytes": None}, [[]]):
        assert read({**row, column: value}).messages == (USER, ASSISTANT)


@pytest.mark.parametrize("kind", ["image", "image_url", "input_audio", "video", "file"])
def test_parts_of_a_content_that_are_no_text_are_refused(kind):
    refused({"messages": [{"role": "user", "content": [{"type": kind, kind: "x"}]}, ASSISTANT]}, f"not text: {kind}")


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (
            {"instruction": "I", "input": "", "output": "", "text": "T"},
            "output is empty .--set data.columns.output= .* as text",
        ),
        ({"instruction": "I", "output": None, "text": "T"}, "output is empty"),
        ({"instruction": "I", "output": " \n", "text": "T"}, "output is empty"),
        ({"instruction": "", "output": "O", "text": "T"}, "instruction is empty"),
        ({"instruction": None, "input": "X", "output": None, "text": "T"}, "instruction is empty"),
        (
            {"instruction": "I", "output": None, "prompt": "P", "completion": "C"},
            "such rows as prompt . completion",
        ),
        ({"prompt": "P", "completion": "", "text": "T"}, "completion is empty"),
        ({"prompt": "", "completion": "C", "text": "T"}, "prompt is empty"),
        ({"prompt": [], "completion": [ASSISTANT], "text": "T"}, "prompt is empty"),
        ({"messages": [], "text": "T"}, "messages is empty"),
        ({"conversations": [], "prompt": "P", "completion": "C"}, "conversations is empty"),
        ({"messages": [], "conversations": [USER]}, "messages is empty"),
    ],
)
def test_a_format_that_is_half_filled_gives_way_to_no_other(row, reason):
    refused(row, reason)


@pytest.mark.filterwarnings("error")
def test_a_format_that_is_not_filled_at_all_gives_way_with_a_warning():
    with pytest.warns(UserWarning, match="rows whose messages is empty are read as text"):
        assert read({"messages": None, "prompt": "", "completion": None, "text": "T"}).text == "T"
    with pytest.warns(UserWarning, match=r"rows whose instruction \+ output is empty are read as prompt \+ completion"):
        assert read({"instruction": float("nan"), "output": "", "prompt": "P", "completion": "C"}).prompt == "P"
    assert read({"messages": [USER, ASSISTANT], "instruction": "I", "output": "", "text": ""}).messages[0] == USER


def test_labels_of_other_kinds_name_the_way_out():
    text = {"text": "T"}
    assert (read({**text, "id": uuid.UUID(int=7)}).id, read({**text, "id": Decimal("7")}).id) == (
        str(uuid.UUID(int=7)),
        "7",
    )
    refused(
        {**text, "source": ["a"]},
        "source must be text or a whole number, not a list .--set data.columns.source= leaves",
    )
    refused({**text, "task": 0.5}, "task must be text or a whole number, not 0.5")
    refused({**text, "id": float("inf")}, "id must be text or a whole number, not inf")
    chat = {"messages": [USER, ASSISTANT]}
    refused({**chat, "tools": "now()"}, "tools is text that is not JSON .--set data.columns.tools= leaves")
    refused({**chat, "tools": {"name": "x"}}, "tools must be a list of objects .--set data.columns.tools= leaves")
    refused(
        {**chat, "chat_template_kwargs": "x"},
        "must be an object, not text .--set data.columns.chat_template_kwargs= leaves",
    )


def test_plain_prompt_completion():
    example = read({"prompt": "2+2=", "completion": "4"})
    assert (example.prompt, example.completion, example.messages) == ("2+2=", "4", None)


SPELLED = ["Assistant", "assistant ", "gpt", "model", "chatgpt", "Bot"]
MASKS = ["masked", "mask", "loss_weight", "loss_scale", "Train", "supervised", "ignore_loss"]
LOST = ["thought", "reasoning_details", "refusal", "tool_plan", "tool_responses", "documents", "files", "image_urls"]


def test_conversational_prompt_completion_supervises_only_the_completion():
    example = read({"prompt": [USER, ASSISTANT, USER], "completion": [ASSISTANT]})
    assert example.messages == (USER, ASSISTANT, USER, ASSISTANT)
    assert example.supervised_from == 3


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        ([1], "not an object but a list"),
        ({"question": "Q", "answer": "A"}, "no known format: it has 'question', 'answer'; known are messages"),
        ({}, "it has no keys"),
        ({"prompt": "only"}, "no known format: it has 'prompt'"),
        ({"messages": []}, "messages is empty"),
        ({"messages": "hello"}, "messages must be a list of messages, not text"),
        ({"messages": ["hello"]}, r"messages\[0\] must be an object"),
        ({"messages": [USER]}, r"no assistant turn in messages \(roles: user\)"),
        ({"messages": [{"content": "Q"}, ASSISTANT]}, r"messages\[0\] has no role"),
        ({"messages": [USER, {"role": "assistant", "content": " \n"}]}, r"content of messages\[1\] .* is empty"),
        ({"messages": [USER, {"role": "assistant", "content": None}]}, r"content of messages\[1\] .* is empty"),
        ({"messages": [USER, {"role": "assistant", "content": 4}]}, "must be text, not a number"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}, ASSISTANT]}, "not text: image"),
        ({"messages": [USER, {**ASSISTANT, "tool_calls": [{"x": 1}]}]}, "has a call without the name of a function"),
        ({"messages": [USER, {**ASSISTANT, "tool_calls": "f()"}]}, r"tool_calls of messages\[1\] .* list of objects"),
        ({"messages": [USER, {**ASSISTANT, "reasoning_content": ["x"]}]}, "reasoning_content of .* must be text"),
        ({"messages": [USER, {**ASSISTANT, "function_call": {"name": "f"}}]}, "'function_call', which iprox does not"),
        ({"messages": [USER, ASSISTANT], "functions": [{"name": "f"}]}, "'functions', which iprox does not read"),
        ({"messages": [USER, ASSISTANT], "tools": ["f"]}, "tools must be a list of objects"),
        ({"messages": [USER, ASSISTANT], "tools": "f()"}, "tools is text that is not JSON"),
        ({"messages": [USER, ASSISTANT], "tools": [{"x": float}]}, "tools or chat_template_kwargs: not JSON"),
        ({"messages": [USER, ASSISTANT], "tools": [{"x": "\udc80"}]}, "is not valid UTF-8"),
        ({"messages": [USER, ASSISTANT], "chat_template_kwargs": ["x"]}, "chat_template_kwargs must be an object"),
        (
            {"messages": [USER, ASSISTANT], "chat_template_kwargs": {"tokenize": False}},
            "has 'tokenize', which iprox sets",
        ),
        ({"messages": [USER, ASSISTANT], "chat_template_kwargs": {"tools": True}}, "has 'tools', which iprox sets"),
        ({"messages": [USER, ASSISTANT], "tools": "[" * 100_000}, "tools is text that is not JSON"),
        ({"text": "T", "tools": [{"name": "f"}]}, "has 'tools', which only chat templates render, but no messages"),
        ({"messages": [USER, {**ASSISTANT, "weight": 0}]}, "every assistant turn of messages is masked"),
        (
            {"conversations": [{"from": "human", "value": "Q"}, {"from": "function_call", "value": "f()"}]},
            r"conversations\[1\] is a turn of 'function_call'",
        ),
        ({"instruction": "I", "output": "O", "history": "Q"}, "history must be a list of pairs, not text"),
        ({"instruction": "I", "output": "O", "history": [["Q"]]}, r"history\[0\] must be a pair"),
        ({"instruction": "I", "output": "O", "history": [["Q", ""]]}, r"history\[0\]\[1\] is empty"),
        ({"instruction": "I", "output": ""}, "output is empty"),
        ({"instruction": " ", "output": "O"}, "instruction is empty"),
        ({"prompt": "p", "completion": ""}, "completion is empty"),
        ({"prompt": "p", "completion": [ASSISTANT]}, "prompt must be a list of messages, not text"),
        ({"prompt": [USER], "completion": [USER]}, "no assistant turn in completion"),
        ({"text": "  "}, "text is empty"),
        ({"text": "a\udc80"}, "text is not valid UTF-8"),
        ({"text": "a", "id": 1.5}, "id must be text or a whole number"),
        ({"text": "a", "id": float("inf")}, "id must be text or a whole number"),
        ({"text": "a", "source": ["x"]}, "source must be text"),
        ({"text": "a", None: ["x"]}, "more fields than the header"),
        *(({"messages": [USER, {"role": role, "content": "B"}, ASSISTANT]}, "write 'assistant'") for role in SPELLED),
        ({"conversations": [{"from": "Human", "value": "Q"}, ASSISTANT]}, "has the role 'Human'; write 'user'"),
        *(({"messages": [USER, {**ASSISTANT, key: 0}]}, f"has '{key}', which may mask it") for key in MASKS),
        *(({"messages": [USER, {**ASSISTANT, key: ["x"]}]}, f"'{key}', which iprox does not read") for key in LOST),
        ({"messages": [USER, {**ASSISTANT, "value": "B"}]}, "content and value, which differ"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "Q", "image": "x"}]}]}, "not text: image"),
        ({"messages": [USER, ASSISTANT], "kto_tag": 0}, "kto_tag is 0, which marks a bad answer"),
        ({"messages": [USER, ASSISTANT], "label": "Rejected"}, "label is 'Rejected', which marks a bad answer"),
        ({"prompt": "P", "completion": "C", "label": -1}, "label is -1, which marks a bad answer"),
        ({"prompt": [USER], "completion": [USER, ASSISTANT]}, "completion repeats the turns of prompt"),
        ({"instruction": "I", "output": "O", "context": "C"}, "has 'context'.*--set data.columns.input=context"),
        ({"messages": [USER, {**ASSISTANT, "weight": 10**4000}]}, r"weight .* is \d+\.\.\.\d+: a turn"),
    ],
)
def test_bad_rows_say_why(data, reason):
    with pytest.raises(BadRowError, match=reason):
        read(data)


@pytest.mark.parametrize("empty", [None, "", " ", float("nan")])
def test_optional_columns_may_be_empty(empty):
    row = {"instruction": "I", "output": "O", **dict.fromkeys(("input", "history", "context", "system", "id"), empty)}
    assert read(row).messages == ({"role": "user", "content": "I"}, {"role": "assistant", "content": "O"})
    known = {"profile": "p", "tokens": 3, "reasoning_tokens": 3, "timestamp": "t"}
    assert read({"messages": [{**USER, "masked": True}, {**ASSISTANT, **known}]}).masked == frozenset()


def test_tools_are_read_with_their_calls_and_answers():
    call = {"function": {"name": "f", "arguments": {"x": 1, "y": None}}}
    turns = [
        {**USER, "tool_calls": None, "reasoning_content": None},  # nulls that Parquet fills in
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "", "tool_call_id": "c1", "name": "f"},
        {**ASSISTANT, "reasoning_content": "R", "tool_calls": []},
    ]
    tools = [{"name": "f", "parameters": {"x": "int"}}]
    example = read({"messages": turns, "tools": tools, "chat_template_kwargs": {"enable_thinking": True}})
    assert example.messages == (
        USER,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "", "tool_call_id": "c1", "name": "f"},
        {**ASSISTANT, "reasoning_content": "R"},
    )
    assert example.rendering == {"enable_thinking": True, "tools": tools}
    assert example.words == 'Q\n{"function": {"name": "f", "arguments": {"x": 1, "y": null}}}\n\nR\nA'
    assert read({"messages": [USER, ASSISTANT], "tools": "[]"}).rendering == {}
    assert read({"text": "T", "tools": None}).rendering == {}


def test_an_empty_system_turn_is_kept_as_it_is():
    """Data sets for fine-tuning often have one in every row."""
    example = read({"messages": [{"role": "system", "content": ""}, USER, {"role": "assistant", "content": "A"}]})
    assert [message["content"] for message in example.messages] == ["", USER["content"], "A"]


@pytest.mark.parametrize(("given", "label"), [(7, "7"), (7.0, "7"), (float("nan"), None), (None, None), ("x", "x")])
def test_sources_are_read_as_pandas_writes_them(given, label):
    assert read({"text": "a", "source": given}).source == label
