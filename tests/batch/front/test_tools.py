"""Tools: prompts against transformers and Meta, and calls read back from answers."""

import ast
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batch.chat import ChatFormat
from batch.schema import LineError, ToolCall, Turn, parse_line
from batch.structured import wanted_form
from batch.tools import parse_tool_calls

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Wetter für 日本 & <b>co</b>\n",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "unit": {"enum": ["°C", "°F"]}},
            "required": ["city"],
        },
        "strict": True,
    },
}
NOTE = {"type": "function", "function": {"name": "note"}}
USER = {"role": "user", "content": "Weather in Rome?"}
CALL = {
    "id": "call_1",
    "type": "function",
    "function": {"name": "get_weather", "arguments": '{"unit": "°C",  "city": "Rome"}'},
}
HISTORY = [
    {"role": "system", "content": "Be brief."},
    USER,
    {"role": "assistant", "content": None, "tool_calls": [CALL, {**CALL, "id": "call_2"}]},
    {"role": "tool", "tool_call_id": "call_1", "content": '{"temp": 21}'},
    {"role": "tool", "tool_call_id": "call_2", "content": "22 °C"},
    {"role": "user", "content": "And tomorrow?"},
]
CONVERSATIONS = [[USER], HISTORY[:2], HISTORY, HISTORY[1:], [*HISTORY, {"role": "assistant", "content": "x"}, USER]]


@pytest.fixture(scope="module")
def chat(tokenizer, llama4_template):
    return ChatFormat(tokenizer, llama4_template, tokens_per_tile=144)


def encoded(chat, messages, **fields):
    line = parse_line({"messages": messages, **fields})
    return chat.encode(line.turns, [], line.tools)


def as_transformers_wants(messages):
    """Arguments as objects and no content of None: what its documentation asks of the caller."""
    changed = []
    for message in messages:
        message = {**message, "content": message["content"] or ""}
        if "tool_calls" in message:
            message["tool_calls"] = [
                {**c, "function": {**c["function"], "arguments": json.loads(c["function"]["arguments"])}}
                for c in message["tool_calls"]
            ]
        changed.append(message)
    return changed


@pytest.mark.parametrize("tools", [[WEATHER], [NOTE, WEATHER], None])
@pytest.mark.parametrize("place", range(len(CONVERSATIONS)))
def test_equals_transformers(chat, hf_tokenizer, llama4_template, place, tools):
    messages = CONVERSATIONS[place]
    theirs = hf_tokenizer.apply_chat_template(
        as_transformers_wants(messages), tools=tools, chat_template=llama4_template, add_generation_prompt=True,
        return_dict=False,
    )  # fmt: skip
    assert encoded(chat, messages, tools=tools) == theirs


def test_without_a_template_calls_and_results_are_metas(tokenizer, meta_chat_format, meta_tokenizer):
    from llama_models.datatypes import RawMessage, StopReason
    from llama_models.datatypes import ToolCall as MetaCall

    call = MetaCall(call_id="c", tool_name="f", arguments={"a": 1})
    theirs = [
        RawMessage(role="user", content="go"),
        RawMessage(role="assistant", content="", stop_reason=StopReason.end_of_message, tool_calls=[call]),
        RawMessage(role="tool", content="done"),
    ]
    expected = meta_chat_format.ChatFormat(meta_tokenizer, None).encode_dialog_prompt(theirs).tokens
    ours = ChatFormat(tokenizer, None)
    calls = (ToolCall("c", "f", '{"a": 1}'),)
    turns = [Turn("user", ("go",)), Turn("assistant", (), None, calls), Turn("tool", ("done",), None, (), "c")]
    assert tokenizer.decode(ours.encode(turns, []), False) == tokenizer.decode(expected, False)
    assert ours.encode(turns, []).count(tokenizer.control_id("<|eom|>")) == 2
    with pytest.raises(LineError, match="no place for tools"):
        ours.encode(turns, [], [WEATHER])


def test_a_template_that_knows_no_tools_is_not_silent(tokenizer):
    plain = ChatFormat(tokenizer, "{% for message in messages %}{{ message.content }}{% endfor %}")
    with pytest.raises(LineError, match="no place for tools"):
        encoded(plain, [USER], tools=[WEATHER])
    with pytest.raises(LineError, match="no place for tool_calls"):
        encoded(plain, HISTORY)
    assert encoded(plain, [USER])


def test_special_tokens_in_tools_and_calls_stay_text(chat, tokenizer):
    spoken = "<|eot|><|header_start|>"
    tool = json.loads(json.dumps(WEATHER).replace("Wetter", spoken).replace('"city"', f'"{spoken}"'))
    call = {**CALL, "function": {"name": "get_weather", "arguments": json.dumps({spoken: spoken})}}
    messages = [USER, {"role": "assistant", "tool_calls": [call]}, {"role": "tool", "content": spoken}]
    plain = json.loads(json.dumps([tool, messages]).replace(spoken, "x"))
    ours, harmless = encoded(chat, messages, tools=[tool]), encoded(chat, plain[1], tools=[plain[0]])
    for name in ("<|eot|>", "<|header_start|>"):
        index = tokenizer.control_id(name)
        assert ours.count(index) == harmless.count(index)
    assert tokenizer.decode(ours, False).count(spoken) >= 5


def test_none_hides_the_tools(chat):
    assert encoded(chat, [USER], tools=[WEATHER], tool_choice="none") == encoded(chat, [USER])
    assert encoded(chat, [USER], tools=[]) == encoded(chat, [USER])
    assert encoded(chat, [USER], tools=[WEATHER], tool_choice="auto") == encoded(chat, [USER], tools=[WEATHER])


@pytest.mark.parametrize("arguments", ["", "[1]", "{", "NaN", '{"a": NaN}', "[" * 5000])
def test_arguments_must_be_an_object(chat, arguments):
    call = {**CALL, "function": {"name": "f", "arguments": arguments}}
    with pytest.raises(LineError, match="'f' are not a JSON object"):
        encoded(chat, [USER, {"role": "assistant", "tool_calls": [call]}])


NAMES = frozenset({"f", "get_weather", "a.b", "g-1"})


@pytest.mark.parametrize(
    ("text", "calls"),
    [
        ('{"name": "f", "parameters": {"a": 1}}', [("f", {"a": 1})]),
        ('  {"type": "function", "name": "f", "parameters": {}}\n', [("f", {})]),
        ('{"name": "f", "arguments": {"a": [1, {"b": null}]}}', [("f", {"a": [1, {"b": None}]})]),
        ('{"name": "f", "parameters": {}}{"name": "g-1", "parameters": {"x": "é"}}', [("f", {}), ("g-1", {"x": "é"})]),
        ('{"name": "f", "parameters": {}};\n{"name": "f", "parameters": {}}', [("f", {}), ("f", {})]),
        ('[{"name": "f", "parameters": {}}, {"name": "f", "parameters": {"q": 2}}]', [("f", {}), ("f", {"q": 2})]),
        ('{"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}', [("f", {"a": 1})]),
        ("[f(a=1, b='x', c=[1, -2.5], d={'k': None}, e=(True, false), g=null)]",
         [("f", {"a": 1, "b": "x", "c": [1, -2.5], "d": {"k": None}, "e": [True, False], "g": None})]),
        ("[f(), get_weather(city=\"Rome ']\")]", [("f", {}), ("get_weather", {"city": "Rome ']"})]),
        (" [ a.b(x=1) ] ", [("a.b", {"x": 1})]),
    ],
)  # fmt: skip
def test_calls(text, calls):
    assert [(name, json.loads(arguments)) for name, arguments in parse_tool_calls(text, NAMES)] == calls


@pytest.mark.parametrize(
    "text",
    [
        "",
        "f",
        "Sure: [f(a=1)]",
        "[f(a=1)] as you asked",
        "[other(a=1)]",
        "[f(a=1), other()]",
        "f(a=1)",
        "[]",
        "{}",
        "[f(1)]",
        "[f(**x)]",
        "[f(a=b)]",
        "[f(a=f())]",
        "[f(a=1+1)]",
        "[f(a='x' 'y'.z)]",
        "[f(a=1)",
        "[f(a=b'x')]",
        "[f(a=...)]",
        "[f(a={1: 2})]",
        "[f(a={**b})]",
        "[f(a=1e999)]",
        "[f(a=1, a=2)]",
        "[f(a=2j)]",
        "[f(a=-True)]",
        "[f(a=[x for x in y])]",
        "[f(a=lambda: 1)]",
        "[f(a=f'{1}')]",
        "[__import__('os').system('true')]",
        "[f(a=1)][0]",
        "[f()()]",
        "[f\x00()]",
        "[f(a=" + "[" * 300 + "]" * 300 + ")]",
        "[f(a=" + "-" * 100_000 + "1)]",
        '{"name": "f"}',
        '{"name": "f", "parameters": 5}',
        '{"name": "other", "parameters": {}}',
        '{"name": 5, "parameters": {}}',
        '{"name": "f", "parameters": {"a": NaN}}',
        '{"name": "f", "parameters": {}, "arguments": {}}',
        '{"name": "f", "parameters": {}, "more": 1}',
        '{"name": "f", "parameters": {}} and so on',
        '{"name": "f", "parameters"',
        '"name"',
        '[{"name": "f", "parameters": {}}, 5]',
        '{"name": "f", "parameters": ' + '{"a":' * 5000 + "1" + "}" * 5001,
        "[" * 100_000,
        '{"type": "answer", "name": "f", "parameters": {}}',
        "[f(a=" + "9" * 5000 + ")]",
    ],
)
def test_what_only_looks_like_a_call_is_text(text):
    assert parse_tool_calls(text, NAMES) is None


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**12), 10**12) | st.floats(-1e9, 1e9) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=150, deadline=None)
@given(arguments=st.dictionaries(st.from_regex(r"[a-z_]{1,8}", fullmatch=True).filter(str.isidentifier), JSON_VALUES))
def test_whatever_is_called_comes_back(arguments):
    import keyword

    arguments = {key: value for key, value in arguments.items() if not keyword.iskeyword(key)}
    pythonic = f"[f({', '.join(f'{key}={value!r}' for key, value in arguments.items())})]"
    assert ast.parse(pythonic)
    for text in (pythonic, json.dumps({"name": "f", "parameters": arguments})):
        ((name, found),) = parse_tool_calls(text, NAMES)
        assert name == "f" and json.loads(found) == arguments


@settings(max_examples=300, deadline=None)
@given(text=st.text(alphabet="[](){}'\",:=fab1. \\\n*-", max_size=40))
def test_any_answer_is_read_without_fuss(text):
    assert parse_tool_calls(text, NAMES) is None or text.strip()[0] in "[{;,"


def test_choices_that_force_a_call():
    def form(choice, **fields):
        return wanted_form(parse_line({"prompt": "x", "tools": [WEATHER, NOTE], "tool_choice": choice, **fields}))

    assert form("auto") is None and form("none") is None
    assert [tag["begin"] for tag in json.loads(form("required").source)["format"]["tags"]] == [
        '{"name": "get_weather", "parameters": ', '{"name": "note", "parameters": ',
    ]  # fmt: skip
    named = json.loads(form({"type": "function", "function": {"name": "note"}}, parallel_tool_calls=False).source)
    assert len(named["format"]["tags"]) == 1 and named["format"]["stop_after_first"]
    for choice, text in (
        ({"type": "function", "function": {"name": "nope"}}, "no tool is named 'nope'"),
        ({"type": "allowed_tools"}, "none, auto, required"),
    ):
        with pytest.raises(LineError, match=text):
            form(choice)
    with pytest.raises(LineError, match="needs tools"):
        wanted_form(parse_line({"prompt": "x", "tool_choice": "required"}))
    with pytest.raises(LineError, match="does not go with"):
        form("required", response_format={"type": "json_object"})
