"""The job over the real engine: the same line says the same whatever else is in the file (float32, CPU)."""

import json

import pytest
from PIL import Image

from batch.job import BatchOptions, run_batch
from batch.jsonl import RawLine
from batch.prepare import LinePreparer
from tests.batch.job.conftest import FORCE

LINES = [
    {"id": "sampled", "prompt": "Tell me about the sea.", "temperature": 1.0, "top_p": 0.9, "max_tokens": 12},
    {"id": "picture", "prompt": "What is this?", "images": ["wide.png"], "temperature": 1.0, "max_tokens": 12},
    {
        "id": "several",
        "prompt": "Three names",
        "n": 3,
        "seed": 5,
        "temperature": 1.0,
        "max_tokens": 8,
        "logprobs": True,
    },
    {"id": "greedy", "prompt": "word " * 60, "temperature": 0, "max_tokens": 12},
]


@pytest.fixture
def answers(tmp_path, scout_tiny):
    Image.linear_gradient("L").resize((150, 60)).save(tmp_path / "wide.png")

    def call(lines, **options):
        source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
        source.write_text("".join(json.dumps(line) + "\n" for line in lines))
        summary = run_batch(BatchOptions(source, target, scout_tiny, state=FORCE, dtype="float32", **options))
        assert summary.num_errors == 0
        return {line["id"]: line for line in map(json.loads, target.read_text().splitlines())}

    return call


def test_a_line_says_the_same_in_any_company(answers):
    together = answers(LINES)
    filler = [{"id": i, "prompt": f"filler {i} " * (5 * i % 17 + 1), "max_tokens": 5} for i in range(10)]
    crowded = answers(filler[:5] + LINES[::-1] + filler[5:], max_batch_tokens=64)
    alone = {line["id"]: answers([line])[line["id"]] for line in LINES[1:3]}
    for line in LINES:
        expected = alone.get(line["id"], together[line["id"]])
        for other in (together[line["id"]], crowded[line["id"]]):
            assert strip(other) == strip(expected)
            assert logprobs(other) == pytest.approx(logprobs(expected), abs=1e-4)


def strip(line):
    return {k: v for k, v in line.items() if k not in ("logprobs", "choices")} | {"texts": texts(line)}


def texts(line):
    return [choice["text"] for choice in line.get("choices", [line])]


def logprobs(line):
    return [token["logprob"] for choice in line.get("choices", [line]) for token in choice.get("logprobs", [])]


def test_stop_strings_and_limits(answers):
    (free,) = answers([{**LINES[3], "max_tokens": 20}]).values()
    assert free["finish_reason"] in ("length", "stop") and free["text"]
    word = free["text"].split()[1][:4]
    (stopped,) = answers([{**LINES[3], "max_tokens": 20, "stop": [word]}]).values()
    assert stopped["finish_reason"] == "stop" and stopped["text"] == free["text"][: free["text"].index(word)]
    (ended,) = answers([{**LINES[3], "max_tokens": 1}]).values()
    assert ended["finish_reason"] == "length" and ended["usage"]["completion_tokens"] == 1


GREEDY = [
    {"id": "text", "prompt": "Tell me about the sea. " * 8, "temperature": 0, "max_tokens": 10, "ignore_eos": True},
    {
        "id": "two pictures",
        "messages": [
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "First"},
                    {"type": "image", "image": "wide.png"},
                    {"type": "text", "text": "then"},
                    {"type": "image", "image": "small.png"},
                ],
            }
        ],
        "temperature": 0,
        "max_tokens": 10,
        "ignore_eos": True,
    },
]


def test_greedy_answers_equal_transformers_generate(answers, front, scout_tiny, tmp_path):
    """From the line of JSON to the text: template, tiles, image tokens and model together."""
    import torch
    from transformers import Llama4ForConditionalGeneration

    Image.radial_gradient("L").resize((40, 50)).convert("RGBA").save(tmp_path / "small.png")
    got = answers(GREEDY)
    model = Llama4ForConditionalGeneration.from_pretrained(scout_tiny, dtype=torch.float32)
    model.generation_config.eos_token_id = None  # as ignore_eos
    preparer = LinePreparer(front.arch, front.chat, front.tiles, front.defaults, tmp_path, 4)
    for line in GREEDY:
        request = preparer.prepare(RawLine(1, json.dumps(line).encode())).request
        inputs = {"input_ids": torch.tensor([request.prompt])}
        if request.images:
            pixels = torch.cat([torch.from_numpy(image.pixels) for image in request.images])
            inputs["pixel_values"] = (pixels.float() / 255 - 0.5) / 0.5
        out = model.generate(**inputs, max_new_tokens=10, do_sample=False)
        expected = front.tokenizer.decode(out[0, len(request.prompt) :].tolist())
        assert got[line["id"]]["text"] == expected


def test_the_summary_says_how_long_the_engine_had_nothing_to_do(tmp_path, scout_tiny):
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps(line) + "\n" for line in LINES if "images" not in line))
    options = BatchOptions(source, tmp_path / "out.jsonl", scout_tiny, dtype="float32", summary=tmp_path / "s.json")
    summary = run_batch(options)
    engine = json.loads((tmp_path / "s.json").read_text())["engine"]
    assert 0 < engine["input_wait_s"] + engine["output_wait_s"] < engine["run_s"] <= summary.seconds
    waited = engine["input_wait_s"] + engine["output_wait_s"]
    assert engine["idle_share"] == pytest.approx(waited / engine["run_s"], abs=2e-3)
    assert "engine idle" in summary.as_table()
