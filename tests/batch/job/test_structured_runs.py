"""Structured output through the whole job, on a random model: what says it is complete parses and validates."""

import json
import re

import jsonschema
import pytest
from openai.types.chat import ChatCompletion

from batch.job import BatchOptions, run_batch
from tests.batch.front.test_structured import SCHEMAS, SHORT, obj
from tests.batch.job.conftest import FORCE

WEATHER = obj(city=SHORT, days={"type": "integer", "minimum": 1, "maximum": 7})
TOOLS = [
    {"type": "function", "function": {"name": "get_weather", "parameters": WEATHER}},
    {"type": "function", "function": {"name": "roll", "parameters": obj(sides={"enum": [6, 20]})}},
]
COMMON = {"temperature": 1.0, "max_tokens": 150}
PLAIN = [
    {"id": "plain", "prompt": "Tell me about the sea.", "temperature": 1.0, "max_tokens": 20},
    {"id": "greedy", "prompt": "word " * 40, "temperature": 0, "max_tokens": 20},
    {"id": "penalty", "prompt": "a a a", "temperature": 1.0, "presence_penalty": 1.0, "max_tokens": 20},
]
NAMES = ["unicode", "enum", "array", "optional", "pattern", "one of objects"]


def schema_line(name, **fields):
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMAS[name], "strict": True}}
    return {"id": f"schema {name}", "prompt": f"JSON: {name}", "response_format": wanted, **COMMON, **fields}


FORMED = [
    *(schema_line(name, **({"n": 3, "logprobs": True} if name == "enum" else {})) for name in NAMES),
    {"id": "choice", "prompt": "?", "structured_outputs": {"choice": ["yes", "no", "é"]}, "n": 4, **COMMON},
    {"id": "regex", "prompt": "?", "structured_outputs": {"regex": "[a-c]{3}-\\d{2}"}, "logprobs": True, **COMMON},
    {"id": "cut", "prompt": "?", "response_format": {"type": "json_object"}, **COMMON, "max_tokens": 3, "seed": 1},
    {"id": "stopped", "prompt": "?", "structured_outputs": {"regex": "(ab|cd){8}END"}, "stop": "da", **COMMON},
]  # fmt: skip


@pytest.fixture
def answers(tmp_path, scout_tiny):
    def call(lines, errors=0, **options):
        source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
        source.write_text("".join(json.dumps(line) + "\n" for line in lines))
        summary = run_batch(BatchOptions(source, target, scout_tiny, state=FORCE, dtype="float32", **options))
        found = [json.loads(line) for line in target.read_text().splitlines()]
        assert summary.num_errors == errors, [line for line in found if line.get("error")]
        return {line.get("custom_id") or line.get("id"): line for line in found}, summary

    return call


def choices(line):
    return line.get("choices", [line])


def check(found):
    """Every answer that ended by itself has its form. Returns how many did."""
    ended = 0
    for name in NAMES:
        for choice in choices(found[f"schema {name}"]):
            if choice["finish_reason"] == "stop":
                jsonschema.Draft202012Validator(SCHEMAS[name]).validate(json.loads(choice["text"]))
                ended += 1
    assert {choice["text"] for choice in choices(found["choice"])} <= {"yes", "no", "é"}
    assert re.fullmatch(r"[a-c]{3}-\d{2}", found["regex"]["text"]) and len(found["regex"]["logprobs"]) >= 4
    assert found["cut"]["finish_reason"] == "length"
    return ended


def test_every_complete_answer_has_its_form_in_any_company(answers):
    together, _ = answers(FORMED + PLAIN)
    assert check(together) >= len(NAMES)
    for line in (together["stopped"],):
        assert "da" not in line["text"] and re.fullmatch("(ab|cd)*(END)?c?", line["text"])
    crowded, summary = answers(PLAIN + FORMED[::-1], kv_memory_bytes=1 << 20, max_seqs=8, max_batch_tokens=64)
    assert summary.engine["preemptions"] > 0
    alone, _ = answers(PLAIN)
    for name, line in together.items():
        others = [crowded[name]] + ([alone[name]] if name in alone else [])
        for other in others:
            assert [c["text"] for c in choices(other)] == [c["text"] for c in choices(line)], name
            assert other["usage"]["completion_tokens"] == line["usage"]["completion_tokens"]


def test_tools_that_must_be_called(answers):
    def line(name, choice, **fields):
        messages = [{"role": "user", "content": "Weather?"}]
        body = {"messages": messages, "tools": TOOLS, "tool_choice": choice, **COMMON, **fields}
        return {"custom_id": name, "method": "POST", "url": "/v1/chat/completions", "body": body}

    named = {"type": "function", "function": {"name": "roll"}}
    found, _ = answers(
        [
            *(line(f"one {seed}", "required", parallel_tool_calls=False, seed=seed) for seed in range(3)),
            line("several", "required", max_tokens=60),
            *(line(f"named {seed}", named, parallel_tool_calls=False, seed=seed) for seed in range(2)),
            line("free", "auto", max_tokens=10),
        ]
    )
    called = set()
    for name, answer in found.items():
        parsed = ChatCompletion.model_validate(answer["response"]["body"], strict=True)
        for choice in parsed.choices:
            for call in choice.message.tool_calls or ():
                schema = next(t["function"]["parameters"] for t in TOOLS if t["function"]["name"] == call.function.name)
                jsonschema.validate(json.loads(call.function.arguments), schema)
                called.add(call.function.name)
                assert name != "free" and (not name.startswith("named") or call.function.name == "roll")
            if choice.finish_reason == "tool_calls":
                assert choice.message.content is None and choice.message.tool_calls
                assert name == "several" or len(choice.message.tool_calls) == 1
    ended = [a["response"]["body"]["choices"][0]["finish_reason"] == "tool_calls" for a in found.values()]
    assert sum(ended) >= 3 and "roll" in called


def test_bad_forms_are_error_lines_beside_good_ones(answers):
    bad = [
        {"id": "regex", "prompt": "x", "structured_outputs": {"regex": "(a"}},
        {"id": "schema", "prompt": "x", "structured_outputs": {"json": {"not": {}}}},
        {"id": "endless", "prompt": "x", "ignore_eos": True, "response_format": {"type": "json_object"}},
        {"id": "bias", "prompt": "x", "logit_bias": {"99999999": 1}},
        {"id": "tool", "prompt": "x", "tool_choice": "required"},
    ]  # fmt: skip
    found, summary = answers([*bad, FORMED[0], *PLAIN], errors=len(bad))
    assert summary.errors == {"invalid_grammar": 1, "unsupported_schema": 1, "invalid_request": 3}
    assert all(found[line["id"]]["text"] for line in PLAIN)


def test_forms_in_worker_processes(answers):
    """A worker compiles anew, and says what one process says."""
    lines = [FORMED[len(NAMES)], FORMED[len(NAMES) + 1], schema_line("unicode"), PLAIN[0]]
    assert without_cache(answers(lines, workers=2)[0]) == without_cache(answers(lines)[0])


def without_cache(found):
    """Answers without how much of their prompts somebody else had computed: that depends on their company."""
    for line in found.values():
        line["usage"].pop("prompt_tokens_details", None)
    return found
