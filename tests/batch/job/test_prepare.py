"""Preparing lines: any bytes give one request or one error; order, back-pressure and memory of the source."""

import base64
import io
import json
import threading
import time

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import batch.prepare as prepare_module
from batch.generation import SamplingDefaults, SamplingOptions
from batch.jsonl import RawLine, dump_line, parse_json
from batch.prepare import LinePreparer, PreparingSource
from batch.responses import ResponseWriter
from l4tool.core.errors import CheckpointError

TINY_PNG = io.BytesIO()
Image.new("RGB", (3, 2), (1, 2, 3)).save(TINY_PNG, "PNG")
PNG_URI = "data:image/png;base64," + base64.b64encode(TINY_PNG.getvalue()).decode()

VALID = [
    {"prompt": "Hello <|eot|> there", "id": "a", "temperature": 0.5, "max_tokens": 3, "stop": ["x", "yy"]},
    {"prompt": "see", "images": [PNG_URI], "n": 2, "seed": 3},
    {"prompt": [5, 6, 7], "logprobs": True, "top_logprobs": 1},
    {"prompt": "raw", "raw": True, "parse_special": True, "ignore_eos": True, "stop_token_ids": [1, 2]},
    {
        "custom_id": "c",
        "method": "POST",
        "url": "/v1/chat/completions",
        "body": {
            "messages": [
                {"role": "system", "content": "s"},
                {
                    "role": "user",
                    "content": [
                        {"type": "text", "text": "t"},
                        {"type": "image_url", "image_url": {"url": PNG_URI}},
                    ],
                },
            ],
            "top_p": 0.9,
        },
    },
    {"custom_id": "d", "method": "POST", "url": "/v1/completions", "body": {"prompt": "Once", "logprobs": 1}},
]


@pytest.fixture(scope="module")
def preparer(front, tmp_path_factory):
    return LinePreparer(front.arch, front.chat, front.tiles, front.defaults, tmp_path_factory.mktemp("base"), 4)


@pytest.mark.parametrize("value", VALID)
def test_valid_lines_become_requests(preparer, front, value):
    prepared = preparer.prepare(RawLine(9, json.dumps(value).encode()))
    assert prepared.error is None, prepared.error.message
    request = prepared.request
    assert request.key == 9 and len(request.prompt) > 0
    patches = request.prompt.count(front.arch.image_token_id)
    assert patches == sum(len(tiles.pixels) for tiles in request.images) * front.arch.vision.tokens_per_tile
    assert len(request.images) == (PNG_URI in json.dumps(value))


def answered_once(preparer, front, data):
    """Prepare, then build the output line: it is one line of valid JSON, and no bug of ours was met."""
    prepared = preparer.prepare(RawLine(1, data))
    assert (prepared.request is None) != (prepared.error is None)
    if prepared.error is None:
        return
    assert prepared.error.code != "internal_error", prepared.error.message
    writer = ResponseWriter(front.tokenizer, "m", "f", 0)
    line = dump_line(writer.error(prepared.info, prepared.error.code, prepared.error.message))
    assert line.count(b"\n") == 1 and isinstance(parse_json(line), dict)


QUIET = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@QUIET
@given(st.binary(max_size=120))
def test_random_bytes(preparer, front, data):
    answered_once(preparer, front, data)


EDITS = st.tuples(st.floats(0, 1, exclude_max=True), st.binary(max_size=3), st.integers(0, 3))


@QUIET
@given(base=st.sampled_from(VALID), changes=st.lists(EDITS, min_size=1, max_size=4))
def test_mutated_bytes_of_valid_lines(preparer, front, base, changes):
    data = json.dumps(base).encode()
    for where, new, removed in changes:
        place = int(where * len(data))
        data = data[:place] + new + data[place + removed :]
    answered_once(preparer, front, data)


ODD = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=20)
    | st.sampled_from(["data:image/png;base64,AAAA", "/dev/zero", "\x00", "<|image|>", "../x", 2**64, -(2**63), 1e308])
    | st.lists(st.integers() | st.text(max_size=3), max_size=3)
    | st.dictionaries(st.text(max_size=6), st.integers(), max_size=2)
)


def places(value, path=()):
    """Every path into a JSON value."""
    yield path
    if isinstance(value, dict):
        for key in value:
            yield from places(value[key], (*path, key))
    elif isinstance(value, list):
        for index in range(len(value)):
            yield from places(value[index], (*path, index))


@QUIET
@given(data=st.data())
def test_mutated_values_of_valid_lines(preparer, front, data):
    value = json.loads(json.dumps(data.draw(st.sampled_from(VALID))))
    for _ in range(data.draw(st.integers(1, 3))):
        path = data.draw(st.sampled_from(sorted(places(value), key=repr)))
        new = data.draw(ODD)
        if not path:
            value = new
            break
        parent = value
        for key in path[:-1]:
            parent = parent[key]
        action = data.draw(st.sampled_from(["replace", "drop", "rename"]))
        if action == "replace" or isinstance(parent, list):
            parent[path[-1]] = new
        else:
            old = parent.pop(path[-1])
            if action == "rename":
                parent[data.draw(st.text(max_size=8))] = old
        if not isinstance(value, dict | list) or not value:
            break
    answered_once(preparer, front, json.dumps(value).encode())


def test_seeds_depend_on_the_line_not_on_its_place(front):
    defaults = front.defaults
    assert defaults.line_seed(b"a") == defaults.line_seed(b"a") != defaults.line_seed(b"b")
    other = SamplingDefaults.build(SamplingOptions(seed=-1), {}, [1])
    assert other.line_seed(b"a") != defaults.line_seed(b"a") and 0 <= other.line_seed(b"a") < 2**63


def params(preparer, **fields):
    prepared = preparer.prepare(RawLine(1, json.dumps({"prompt": "x", **fields}).encode()))
    assert prepared.error is None, prepared.error.message
    return prepared.request


def test_the_line_wins_over_options_over_generation_config(front, preparer):
    published = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "eos_token_id": [7]}
    plain = SamplingDefaults.build(SamplingOptions(), published, [5])
    assert (plain.temperature, plain.top_p, plain.top_k, plain.max_tokens) == (0.6, 0.9, 0, 1024)
    assert plain.end_token_ids == {5, 7}
    options = SamplingOptions(temperature=0.0, top_k=40, max_tokens=9, stop=("S",))
    mixed = SamplingDefaults.build(options, published, [5])
    assert (mixed.temperature, mixed.top_p, mixed.top_k, mixed.max_tokens) == (0.0, 0.9, 40, 9)
    assert SamplingDefaults.build(SamplingOptions(), {"do_sample": False, "temperature": 0.6}, []).temperature == 0
    assert SamplingDefaults.build(SamplingOptions(), {}, []).temperature == 1
    ours = LinePreparer(front.arch, front.chat, front.tiles, mixed, preparer.image_base, 4)
    request = params(ours)
    assert request.stop == ("S",) and request.sampling.temperature == 0 and request.sampling.max_tokens == 9
    request = params(ours, temperature=1.5, top_k=-1, max_tokens=4, stop=[], stop_token_ids=[8], seed=11)
    sampling = request.sampling
    assert (sampling.temperature, sampling.top_k, sampling.max_tokens, sampling.seed) == (1.5, 0, 4, 11)
    assert request.stop == () and sampling.stop_token_ids == {5, 7, 8}
    assert params(ours, ignore_eos=True, stop_token_ids=[8]).sampling.stop_token_ids == {8}
    assert params(ours, max_tokens=9, max_completion_tokens=3).sampling.max_tokens == 3
    assert params(ours, temperature=1e-9).sampling.temperature == 0
    assert params(ours, seed=-1).sampling.seed == 2**63 - 1


@pytest.mark.parametrize("wrong", [{"temperature": -1}, {"top_p": "x"}, {"eos_token_id": ["a"]}, {"top_k": True}])
def test_broken_generation_config(wrong):
    with pytest.raises(CheckpointError, match=r"generation_config\.json"):
        SamplingDefaults.build(SamplingOptions(), wrong, [])


def test_answers_end_with_the_context(front, preparer):
    context = front.arch.text.max_position_embeddings
    prompt = [5] * (context - 3)
    assert params(preparer, prompt=prompt, max_tokens=100).sampling.max_tokens == 3
    prepared = preparer.prepare(RawLine(1, json.dumps({"prompt": [5] * context}).encode()))
    assert prepared.error.code == "prompt_too_long" and "4,096" in prepared.error.message


def raw_lines(count):
    return (RawLine(i, json.dumps({"id": i, "prompt": f"line {i}"}).encode()) for i in range(1, count + 1))


def drain(source):
    keys = []
    while (request := source.take(wait=True)) is not None:
        keys.append(request.key)
    return keys


def test_requests_come_in_input_order_and_errors_at_their_place(preparer):
    seen = []
    lines = [*raw_lines(5), RawLine(6, b"bad"), *(RawLine(6 + i.number, i.data) for i in raw_lines(300))]
    source = PreparingSource(
        iter(lines),
        preparer,
        lambda info, request: seen.append(info.number),
        lambda info, error: seen.append(-info.number),
    )
    keys = drain(source)
    assert keys == [i for i in range(1, 307) if i != 6] and seen == [*range(1, 6), -6, *range(7, 307)]
    assert source.take(wait=True) is None and source.take(wait=False) is None
    source.close()


def test_only_a_bounded_number_of_lines_is_read_ahead(preparer):
    read = []

    def lines():
        for line in raw_lines(10_000):
            read.append(line.number)
            yield line

    source = PreparingSource(lines(), preparer, lambda *a: None, lambda *a: None)
    source.take(wait=True)
    assert len(read) <= prepare_module.MAX_AHEAD + 1
    source.close()


def test_not_waiting_does_not_wait(preparer):
    release = threading.Event()

    class Slow:
        def prepare(self, raw, gate=None):
            release.wait(10)
            return preparer.prepare(raw, gate)

        def waits_for_the_web(self, raw):
            return False

        def close(self):
            pass

    source = PreparingSource(raw_lines(3), Slow(), lambda *a: None, lambda *a: None)
    assert source.take(wait=False) is None
    release.set()
    assert source.take(wait=True).key == 1
    source.close()


def test_pictures_wait_for_room_and_the_next_line_never_does(preparer, tmp_path):
    """A budget of one tile: decoded tiles that wait stay near it, and everything is answered in order."""
    line = json.dumps({"prompt": "x", "images": [PNG_URI] * 3}).encode()
    tile_bytes = 3 * 56 * 56
    source = PreparingSource(
        (RawLine(i, line) for i in range(1, 41)), preparer, lambda *a: None, lambda *a: None,
        num_threads=4, image_budget_bytes=tile_bytes,
    )  # fmt: skip
    assert source.take(wait=True).key == 1
    time.sleep(0.2)
    # the head's three pictures, and at most one more in each other thread that was past the gate
    assert sum(source._held.values()) <= tile_bytes * (3 + 4)
    assert drain(source) == list(range(2, 41))
    source.close()
    assert not source._held


def test_closing_while_pictures_wait_does_not_hang(preparer):
    line = json.dumps({"prompt": "x", "images": [PNG_URI] * 3}).encode()
    source = PreparingSource(
        (RawLine(i, line) for i in range(1, 41)), preparer, lambda *a: None, lambda *a: None, image_budget_bytes=1
    )
    source.take(wait=True)
    started_s = time.monotonic()
    source.close()
    assert time.monotonic() - started_s < 5


def test_pictures_are_found_beside_the_input(front, preparer):
    picture = Image.fromarray(np.arange(300, dtype=np.uint16).astype(np.uint8).reshape(10, 30))
    picture.save(preparer.image_base / "p.png")
    assert params(preparer, images=["p.png"]).images[0].grid == (1, 1)
