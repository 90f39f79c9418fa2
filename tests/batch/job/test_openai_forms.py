"""OpenAI's own types read every form of answer, and the files of its batch guide run as they stand."""

import json

import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion

from batch.requests import Choice, GenerationResult, TokenLogprob
from tests.batch.job.conftest import EchoBackend

MESSAGES = [{"role": "user", "content": "Hello world!"}]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
CHAT = "/v1/chat/completions"


def line(body, url=CHAT, custom_id="r"):
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": {"model": "m", **body}}


class Says(EchoBackend):
    """Answers with the text that the prompt ends with, in the tokens it has."""

    text = ""
    finish_reason = "stop"
    cached_tokens = 0

    def answer(self, request):
        tokenizer = self.front.tokenizer
        ids = tokenizer.encode(self.text)
        if "<|" in self.text:
            ids = [
                i
                for place, piece in enumerate(tokenizer.split_control(self.text))
                for i in ([tokenizer.control_tokens[piece]] if place % 2 else tokenizer.encode(piece))
            ]
        logprobs = [TokenLogprob(i, -0.5, ((i, -0.5),)) for i in ids] if request.sampling.logprobs is not None else None
        text = tokenizer.decode(ids)
        choices = [Choice(i, ids, text, self.finish_reason, logprobs) for i in range(request.n)]
        return GenerationResult(request.key, choices, len(request.prompt), cached_tokens=self.cached_tokens)


def says(text, finish_reason="stop", cached_tokens=0):
    return type("Said", (Says,), {"text": text, "finish_reason": finish_reason, "cached_tokens": cached_tokens})


def read(answer, model=ChatCompletion):
    """The body by OpenAI's types, which must know every field of it; and the batch object around it."""
    assert set(answer) == {"id", "custom_id", "response", "error"} and answer["error"] is None
    assert set(answer["response"]) == {"status_code", "request_id", "body"} and answer["response"]["status_code"] == 200
    body = answer["response"]["body"]
    parsed = model.model_validate(body, strict=True)
    assert not unknown_fields(parsed), unknown_fields(parsed)
    assert parsed.model_dump(exclude_unset=True) == body
    return parsed


def unknown_fields(value):
    """Names that OpenAI's models took only because they take anything."""
    if isinstance(value, list):
        return [name for item in value for name in unknown_fields(item)]
    if not hasattr(value, "model_fields_set"):
        return []
    inner = [name for field in type(value).model_fields for name in unknown_fields(getattr(value, field))]
    return [*(value.model_extra or {}), *inner]


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"n": 3},
        {"logprobs": True},
        {"logprobs": True, "top_logprobs": 2, "n": 2},
        {"max_completion_tokens": 2},
        {"tools": [TOOL]},
        {"response_format": {"type": "text"}},
    ],
)
def test_chat_forms(run, body):
    _, (answer,) = run([line({"messages": MESSAGES, **body})])
    parsed = read(answer)
    assert parsed.object == "chat.completion" and parsed.model == "m" and len(parsed.choices) == body.get("n", 1)
    for choice in parsed.choices:
        assert choice.message.content and choice.finish_reason == "length" and choice.message.tool_calls is None
        assert (choice.logprobs is None) == ("logprobs" not in body)
    assert parsed.usage.total_tokens == parsed.usage.prompt_tokens + parsed.usage.completion_tokens


@pytest.mark.parametrize("body", [{}, {"n": 2}, {"logprobs": 2}])
def test_completion_forms(run, body):
    _, (answer,) = run([line({"prompt": "Once upon", **body}, "/v1/completions")])
    parsed = read(answer, Completion)
    assert parsed.object == "text_completion" and len(parsed.choices) == body.get("n", 1)


@pytest.mark.parametrize(
    ("said", "content", "calls"),
    [
        ('{"name": "f", "parameters": {"a": "é"}}', None, [{"a": "é"}]),
        ("[f(a=1), f()]", None, [{"a": 1}, {}]),
        ("<|python_start|>[f(a=1)]<|python_end|>", None, [{"a": 1}]),
        ('<|python_start|>Let me look.<|python_end|>{"name": "f", "parameters": {}}', "Let me look.", [{}]),
        ("I would call [f(a=1)]", "I would call [f(a=1)]", None),
        ("[g(a=1)]", "[g(a=1)]", None),
    ],
)
def test_tool_calls(run, said, content, calls):
    backend = says(said)
    _, (answer, short) = run(
        [line({"messages": MESSAGES, "tools": [TOOL], "n": 2}), {"id": 1, "messages": MESSAGES, "tools": [TOOL]}],
        backend,
    )
    answer, short = (answer, short) if "custom_id" in answer else (short, answer)
    for choice in read(answer).choices:
        assert choice.message.content == content
        found = choice.message.tool_calls
        assert (found and [json.loads(call.function.arguments) for call in found]) == calls
        assert choice.finish_reason == ("tool_calls" if calls else "stop")
    ids = [call.id for choice in read(answer).choices for call in choice.message.tool_calls or ()]
    assert len(set(ids)) == len(ids) == 2 * len(calls or ())
    assert short["text"] == (content or "") and short["finish_reason"] == ("tool_calls" if calls else "stop")
    assert [json.loads(call["function"]["arguments"]) for call in short.get("tool_calls", [])] == (calls or [])


@pytest.mark.parametrize("body", [{}, {"tools": [TOOL], "tool_choice": "none"}])
def test_nothing_is_a_call_where_there_are_no_tools(run, body):
    _, (answer,) = run([line({"messages": MESSAGES, **body})], says("[f(a=1)]"))
    (choice,) = read(answer).choices
    assert (choice.message.content, choice.finish_reason) == ("[f(a=1)]", "stop")


def test_calls_that_max_tokens_ended_are_calls_of_length(run):
    _, (answer,) = run([line({"messages": MESSAGES, "tools": [TOOL]})], says("[f(a=1)]", "length"))
    (choice,) = read(answer).choices
    assert choice.finish_reason == "length" and len(choice.message.tool_calls) == 1


def test_cached_tokens_are_in_usage(run):
    _, (answer,) = run([line({"messages": MESSAGES})], says("x", cached_tokens=16))
    assert read(answer).usage.prompt_tokens_details.cached_tokens == 16


GUIDE = """\
{"custom_id": "request-1", "method": "POST", "url": "/v1/chat/completions", "body": {"model": "gpt-3.5-turbo-0125", "messages": [{"role": "system", "content": "You are a helpful assistant."},{"role": "user", "content": "Hello world!"}],"max_tokens": 1000}}
{"custom_id": "request-2", "method": "POST", "url": "/v1/chat/completions", "body": {"model": "gpt-3.5-turbo-0125", "messages": [{"role": "system", "content": "You are an unhelpful assistant."},{"role": "user", "content": "Hello world!"}],"max_tokens": 1000}}
{"custom_id": "task-0", "method": "POST", "url": "/v1/chat/completions", "body": {"model": "gpt-4o-mini", "temperature": 0.1, "response_format": {"type": "json_object"}, "messages": [{"role": "system", "content": "Extract movie categories as JSON."}, {"role": "user", "content": "Drama."}], "max_tokens": 5}}
{"custom_id": "task-1", "method": "POST", "url": "/v1/chat/completions", "body": {"model": "gpt-4o-mini", "temperature": 0.2, "max_tokens": 300, "messages": [{"role": "system", "content": "Caption it."}, {"role": "user", "content": [{"type": "text", "text": "Title"}, {"type": "image_url", "image_url": {"url": "https://example.com/a.jpg"}}]}]}}
{"custom_id": "embedding", "method": "POST", "url": "/v1/embeddings", "body": {"model": "text-embedding-3-small", "input": "Hello world!"}}
{"custom_id": "response", "method": "POST", "url": "/v1/responses", "body": {"model": "gpt-4o-mini", "input": "Hello world!"}}
"""  # noqa: E501  lines as they stand in files for OpenAI's service


def test_files_of_the_guide(run):
    """Chats run; what is not for this model is refused by name, under its own id."""
    _, answers = run(GUIDE.encode())
    found = {answer["custom_id"]: answer for answer in answers}
    assert len(found) == 6
    for name in ("request-1", "request-2", "task-0"):
        assert read(found[name]).choices[0].message.role == "assistant"
    assert found["request-1"]["response"]["body"]["model"] == "gpt-3.5-turbo-0125"
    for name, code in (
        ("task-1", "remote_image"),
        ("embedding", "unsupported_endpoint"),
        ("response", "unsupported_endpoint"),
    ):
        answer = found[name]
        assert answer["error"]["code"] == answer["response"]["body"]["error"]["code"] == code
        assert answer["response"]["status_code"] == 400
