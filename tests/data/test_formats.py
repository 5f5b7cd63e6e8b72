import pytest

from iprox.data.fields import BadRowError
from iprox.data.formats import to_example


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


def test_a_weight_counts_for_assistant_turns_only():
    example = read({"messages": [{**USER, "weight": 0}, {**ASSISTANT, "weight": 1}]})
    assert example.messages == (USER, ASSISTANT)


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
    own = [{"from": "system", "value": "own"}, *turns]
    assert read({"conversations": own, "system": "S"}).messages == ({"role": "system", "content": "own"}, *plain)
    # As TRL, which knows no such column beside messages.
    assert read({"messages": [USER, ASSISTANT], "system": "S"}).messages == (USER, ASSISTANT)


def test_plain_prompt_completion():
    example = read({"prompt": "2+2=", "completion": "4"})
    assert (example.prompt, example.completion, example.messages) == ("2+2=", "4", None)


def test_conversational_prompt_completion_supervises_only_the_completion():
    example = read({"prompt": [USER, ASSISTANT, USER], "completion": [ASSISTANT]})
    assert example.messages == (USER, ASSISTANT, USER, ASSISTANT)
    assert example.supervised_from == 3


def test_a_filled_format_wins_over_an_empty_column():
    assert read({"messages": None, "prompt": "", "completion": "x", "text": "T"}).text == "T"
    assert read({"messages": [], "text": "T", "id": None}).id == "pool-00000001"


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
        ({"messages": [USER, ASSISTANT], "tools": "f()"}, "tools is text, and not JSON"),
        ({"messages": [USER, ASSISTANT], "tools": [{"x": float}]}, "tools or chat_template_kwargs: not JSON"),
        ({"messages": [USER, ASSISTANT], "tools": [{"x": "\udc80"}]}, "is not valid UTF-8"),
        ({"messages": [USER, ASSISTANT], "chat_template_kwargs": ["x"]}, "chat_template_kwargs must be an object"),
        ({"messages": [USER, ASSISTANT], "chat_template_kwargs": {"tokenize": False}}, "has 'tokenize', which is not"),
        ({"messages": [USER, ASSISTANT], "chat_template_kwargs": {"tools": True}}, "has 'tools', which is not"),
        ({"messages": [USER, ASSISTANT], "tools": "[" * 100_000}, "tools is text, and not JSON"),
        ({"text": "T", "tools": [{"name": "f"}]}, "has 'tools', which a chat template renders, and no messages"),
        ({"messages": [USER, {**ASSISTANT, "weight": 0}]}, r"messages\[1\] has 'weight' 0"),
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
    ],
)
def test_bad_rows_say_why(data, reason):
    with pytest.raises(BadRowError, match=reason):
        read(data)


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
