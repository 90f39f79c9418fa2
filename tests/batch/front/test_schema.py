"""What a line may say, and how it is told what it may not."""

import pytest

from batch.line_models import IGNORED_FIELDS, UNSUPPORTED_FIELDS
from batch.schema import ImageRef, LineError, Turn, line_id, parse_line

USER = [{"role": "user", "content": "hi"}]
TOOL = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object"}}}
CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}


def openai(body, url="/v1/chat/completions", **extra):
    return {"custom_id": "c1", "method": "POST", "url": url, "body": body, **extra}


def with_part(part):
    return {"messages": [{"role": "user", "content": [part]}]}


def test_the_openai_chat_form():
    line = parse_line(
        openai(
            {
                "model": "m",
                "messages": [
                    {"role": "developer", "content": "be brief"},
                    {
                        "role": "user",
                        "name": "ann",
                        "content": [
                            {"type": "text", "text": "look"},
                            {"type": "image_url", "image_url": {"url": "a.png", "detail": "high"}},
                            {"type": "image", "image": "b.png"},
                        ],
                    },
                ],
                "max_completion_tokens": 5,
                "temperature": 1,
                "stop": "END",
                "logprobs": True,
                "top_logprobs": 3,
                "n": 2,
                "seed": -1,
            }
        )
    )
    assert (line.form, line.endpoint, line.id, line.model) == ("openai", "chat", "c1", "m")
    assert line.turns == (
        Turn("system", ("be brief",)),
        Turn("user", ("look", ImageRef("a.png"), ImageRef("b.png")), "ann"),
    )
    assert (line.stop, line.logprobs, line.sampling.n, line.sampling.temperature) == (("END",), 3, 2, 1.0)
    assert line.images == [ImageRef("a.png"), ImageRef("b.png")]


@pytest.mark.parametrize(
    ("prompt", "expected"), [("x", "x"), ([1, 2], [1, 2]), (["x"], "x"), ([[1, 2]], [1, 2]), ("", "")]
)
def test_the_openai_completion_form(prompt, expected):
    line = parse_line(openai({"prompt": prompt, "logprobs": 2}, "/v1/completions"))
    assert (line.endpoint, line.prompt, line.logprobs, line.turns) == ("completion", expected, 2, ())


def test_the_short_forms():
    line = parse_line({"prompt": "hi", "images": ["a.png", "b.png"], "id": 7, "top_k": -1})
    assert line.turns == (Turn("user", (ImageRef("a.png"), ImageRef("b.png"), "hi")),)
    assert (line.form, line.endpoint, line.id, line.logprobs, line.stop) == ("short", "chat", 7, None, None)
    assert parse_line({"messages": USER}).turns == (Turn("user", ("hi",)),)
    raw = parse_line({"prompt": "hi", "raw": True, "parse_special": True, "stop": []})
    assert (raw.endpoint, raw.prompt, raw.parse_special, raw.stop) == ("completion", "hi", True, ())
    assert parse_line({"prompt": [5, 6]}).prompt == [5, 6]
    assert parse_line({"prompt": "x", "logprobs": True}).logprobs == 0


def test_nulls_ignored_and_neutral_fields_pass():
    body = {name: {"any": "thing"} for name in IGNORED_FIELDS}
    body |= {name: values[0] for name, values in UNSUPPORTED_FIELDS.items() if values}
    body |= {"temperature": None, "stop": None, "n": None, "audio": None, "logprobs": None}
    message = {"role": "assistant", "content": "x", "tool_calls": None, "refusal": None, "audio": None}
    line = parse_line(openai({"messages": [message], **body}))
    assert line.sampling.temperature is None and line.sampling.n == 1


@pytest.mark.parametrize(
    ("value", "code", "text"),
    [
        (5, "invalid_line", "JSON object"),
        ([], "invalid_line", "JSON object"),
        ({}, "invalid_request", "either 'prompt' or 'messages'"),
        ({"prompt": "x", "messages": USER}, "invalid_request", "either"),
        ({"prompt": 5}, "invalid_request", "prompt"),
        ({"prompt": ["a", "b"]}, "invalid_request", "one prompt per line"),
        ({"prompt": [1, "b"]}, "invalid_request", "prompt.1"),
        ({"prompt": [True]}, "invalid_request", "prompt.0"),
        ({"prompt": [-1]}, "invalid_request", "prompt.0"),
        ({"prompt": "x", "tempreture": 1}, "unknown_field", "'tempreture'; did you mean 'temperature'"),
        ({"prompt": "x", "temperature": "hot"}, "invalid_request", "temperature: Input should be a valid number"),
        ({"prompt": "x", "temperature": -1}, "invalid_request", "temperature"),
        ({"prompt": "x", "temperature": float("inf")}, "invalid_request", "temperature"),
        ({"prompt": "x", "temperature": True}, "invalid_request", "temperature"),
        ({"prompt": "x", "top_p": 0}, "invalid_request", "top_p"),
        ({"prompt": "x", "top_p": 1.5}, "invalid_request", "top_p"),
        ({"prompt": "x", "max_tokens": 0}, "invalid_request", "max_tokens"),
        ({"prompt": "x", "max_tokens": 2.5}, "invalid_request", "max_tokens"),
        ({"prompt": "x", "n": 0}, "invalid_request", "n"),
        ({"prompt": "x", "n": 1000}, "invalid_request", "n"),
        ({"prompt": "x", "seed": 2**63}, "invalid_request", "seed"),
        ({"prompt": "x", "stop": ["a"] * 17}, "invalid_request", "at most 16"),
        ({"prompt": "x", "stop": ""}, "invalid_request", "stop"),
        ({"prompt": "x", "stop": [1]}, "invalid_request", "stop"),
        ({"prompt": "x", "top_logprobs": 2}, "invalid_request", "logprobs: true"),
        ({"prompt": "x", "logprobs": True, "top_logprobs": 21}, "invalid_request", "top_logprobs"),
        ({"prompt": "x", "images": "a.png"}, "invalid_request", "images"),
        ({"prompt": "x", "images": [""]}, "invalid_request", "images.0"),
        ({"prompt": "x", "raw": True, "images": ["a.png"]}, "invalid_request", "chat turn"),
        ({"messages": USER, "images": ["a.png"]}, "invalid_request", "among the content"),
        ({"messages": USER, "raw": True}, "invalid_request", "'raw'"),
        ({"prompt": "x", "parse_special": True}, "invalid_request", "parse_special"),
        ({"prompt": "x", "id": [1]}, "invalid_request", "id"),
        ({"prompt": "x", "stream": True}, "unsupported_field", "stream"),
        ({"prompt": "x", "tools": [{}]}, "invalid_request", "'tools.0.type' is missing"),
        ({"prompt": "x", "tools": [{"type": "custom"}]}, "invalid_request", "tools.0.type"),
        ({"prompt": "x", "tools": [TOOL] * 129}, "invalid_request", "tools"),
        ({"prompt": "x", "tools": [TOOL, TOOL]}, "invalid_request", "two tools are named 'f'"),
        ({"prompt": "x", "tools": [{**TOOL, "function": {"name": "a b"}}]}, "invalid_request", "tools.0.function.name"),
        ({"prompt": "x", "tools": [TOOL], "tool_choice": "any"}, "invalid_request", "tool_choice: none, auto"),
        ({"prompt": "x", "tools": [TOOL], "raw": True}, "invalid_request", "'tools' needs a chat turn"),
        ({"prompt": "x", "tool_choice": 5}, "invalid_request", "tool_choice"),
        ({"prompt": "x", "parallel_tool_calls": 1}, "invalid_request", "parallel_tool_calls"),
        ({"prompt": "x", "functions": [{}]}, "unsupported_field", "use tools"),
        ({"prompt": "x", "guided_regex": "a"}, "unsupported_field", '"structured_outputs": {"regex": …}'),
        ({"prompt": "x", "best_of": 2}, "unsupported_field", "best_of: not supported; leave it out"),
        ({"prompt": "x", "best_of": True}, "unsupported_field", "best_of"),
        ({"prompt": "x", "frequency_penalty": 2.5}, "invalid_request", "frequency_penalty"),
        ({"prompt": "x", "frequency_penalty": False}, "invalid_request", "frequency_penalty"),
        ({"prompt": "x", "repetition_penalty": 0}, "invalid_request", "repetition_penalty"),
        ({"prompt": "x", "logit_bias": {"a": 1}}, "invalid_request", "logit_bias"),
        ({"prompt": "x", "logit_bias": {"5": 101}}, "invalid_request", "logit_bias"),
        ({"prompt": "x", "min_tokens": 9, "max_tokens": 8}, "invalid_request", "min_tokens is more than max_tokens"),
        ({"prompt": "x", "response_format": {"type": "xml"}}, "invalid_request", "response_format.type"),
        ({"prompt": "x", "response_format": {"type": "json_schema"}}, "invalid_request", "response_format.json_schema"),
        ({"prompt": "x", "response_format": "json"}, "invalid_request", "response_format"),
        ({"prompt": "x", "structured_outputs": {}}, "invalid_request", "exactly one of json, regex, choice"),
        ({"prompt": "x", "structured_outputs": {"regex": "a", "choice": ["b"]}}, "invalid_request", "exactly one of"),
        ({"prompt": "x", "structured_outputs": {"regxe": "a"}}, "unknown_field", "structured_outputs.regxe"),
        ({"messages": []}, "invalid_request", "messages"),
        ({"messages": "hi"}, "invalid_request", "messages"),
        ({"messages": ["hi"]}, "invalid_request", "messages.0"),
        ({"messages": [{"role": "user"}]}, "invalid_request", "messages.0.content' is missing"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "invalid_request", "messages.0.role"),
        ({"messages": [{"role": "user", "content": 5}]}, "invalid_request", "messages.0.content"),
        ({"messages": [{"role": "user", "content": ["x"]}]}, "invalid_request", "content.0"),
        (with_part({"type": "video"}), "invalid_request", "text, image_url or image"),
        (with_part({"type": []}), "invalid_request", "text, image_url or image"),
        (with_part({"type": "image_url", "image_url": "a"}), "invalid_request", "messages.0.content.0.image_url"),
        (with_part({"type": "image_url", "image_url": {"url": "a", "size": 3}}), "unknown_field", "image_url.size"),
        ({"messages": [{**USER[0], "mood": "good"}]}, "unknown_field", "messages.0.mood"),
        ({"messages": [{**USER[0], "tool_calls": [{}]}]}, "invalid_request", "'messages.0.tool_calls.0.id' is missing"),
        ({"messages": [{**USER[0], "tool_calls": [CALL]}]}, "invalid_request", "only the assistant calls tools"),
        ({"messages": [{"role": "assistant", "content": None}]}, "invalid_request", "messages.0.content' is missing"),
        ({"messages": [{**USER[0], "refusal": "no"}]}, "unsupported_field", "messages.0.refusal"),
        (openai({"messages": USER, "x": 1}), "unknown_field", "'body.x'"),
        (openai({"messages": USER, "prompt": "x"}), "unknown_field", "'body.prompt'"),
        (openai({}), "invalid_request", "'body.messages' is missing"),
        (openai({"messages": USER}, "/v1/embeddings"), "unsupported_endpoint", "no embeddings; /v1/chat"),
        (openai({"input": "x"}, "/v1/responses"), "unsupported_endpoint", "'/v1/responses' is not answered here; /v1"),
        (openai({"input": "x"}, "http://x/v1/completions"), "unsupported_endpoint", "not answered here"),
        (openai({}, 5), "invalid_request", "url"),
        (openai({"messages": USER}, method="GET"), "invalid_request", "method"),
        (openai({"messages": USER}, priority=1), "unknown_field", "'priority'"),
        ({"custom_id": "a"}, "invalid_request", "'method' is missing"),
        ({"url": "/v1/completions", "method": "POST", "body": {}}, "invalid_request", "'custom_id' is missing"),
        ({**openai({"messages": USER}), "custom_id": 5}, "invalid_request", "custom_id"),
        (openai("x"), "invalid_request", "body"),
        (openai({"prompt": "x", "logprobs": True}, "/v1/completions"), "invalid_request", "body.logprobs"),
        (openai({"prompt": "x", "echo": True}, "/v1/completions"), "unsupported_field", "body.echo"),
        (openai({"messages": USER, "images": ["a.png"]}), "unknown_field", "body.images"),
    ],
)  # fmt: skip
def test_errors_name_the_field(value, code, text):
    with pytest.raises(LineError) as caught:
        parse_line(value)
    assert caught.value.code == code and text in caught.value.message, caught.value.message
    assert len(caught.value.message) < 500


def test_ids_of_wrong_lines():
    assert line_id({"custom_id": "a", "body": 5}) == "a"
    assert line_id({"id": 3, "nonsense": True}) == 3
    assert line_id({"id": True}) is None and line_id({"id": {}}) is None and line_id("x") is None
