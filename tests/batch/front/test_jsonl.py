"""The line reader and strict JSON."""

import io
import json
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batch.jsonl import HEAD_BYTES, BadJson, LineReader, count_lines, dump_line, parse_json

SCALARS = st.none() | st.booleans() | st.integers() | st.text() | st.floats(allow_nan=False, allow_infinity=False)
JSON_VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4), max_leaves=20
)


def lines_of(data, **options):
    reader = LineReader(io.BytesIO(data), **options)
    return [(line.number, line.data) for line in reader], reader


def test_line_endings_blank_lines_bom_and_numbers():
    found, reader = lines_of(b'\xef\xbb\xbf{"a":1}\r\n\n  \t\r\n{"b":2}\n\n{"c":3}')
    assert found == [(1, b'{"a":1}'), (4, b'{"b":2}'), (6, b'{"c":3}')]
    assert (reader.lines, reader.blank_lines) == (3, 3)


@pytest.mark.parametrize("data", [b"", b"\n", b"\r\n\r\n", b"   ", b"\xef\xbb\xbf"])
def test_empty_files(data):
    assert lines_of(data)[0] == []


def test_limit_counts_lines_that_are_not_blank():
    found, reader = lines_of(b"\n1\n\n2\n3\n", limit=2)
    assert [number for number, _ in found] == [2, 4] and reader.lines == 2


@pytest.mark.parametrize("size", [9, 10, 11, 25, 5_000_000])
def test_long_lines_are_flagged_and_skipped(size):
    reader = LineReader(io.BytesIO(b"x" * size + b"\nnext\n"), max_line_bytes=10)
    first, second = reader
    assert first.too_long == (size > 10) and len(first.data) <= HEAD_BYTES
    assert (second.number, second.data, second.too_long) == (2, b"next", False)


def test_a_long_last_line_without_newline():
    (line,) = LineReader(io.BytesIO(b"x" * 11), max_line_bytes=10)
    assert line.too_long


def test_a_huge_line_is_never_held(tmp_path):
    path = tmp_path / "huge.jsonl"
    with open(path, "wb") as file:
        for _ in range(64):
            file.write(b"x" * 2**20)
        file.write(b"\n{}\n")
    tracemalloc.start()
    with open(path, "rb") as file:
        found = [(line.number, line.too_long) for line in LineReader(file, max_line_bytes=2**20)]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found == [(1, True), (2, False)] and peak < 8 * 2**20


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"{", "not valid JSON"),
        (b"", "not valid JSON"),
        (b"{'a': 1}", "not valid JSON"),
        (b'{"a": 1} {"b": 2}', "not valid JSON"),
        (b'{"a": NaN}', "NaN"),
        (b'{"a": -Infinity}', "-Infinity"),
        (b'{"a": 1, "a": 2}', "appears twice"),
        (b'{"x": [{"b": 1, "b": 1}]}', "appears twice"),
        (b'{"a": "\xff"}', "UTF-8"),
        (b'{"a": "\x00"}', "not valid JSON"),
        (b'{"a": "\\ud800"}', "surrogate"),
        (b'{"\\uDFFF": 1}', "surrogate"),
        (b'["\\udc00\\ud800"]', "surrogate"),
        (b"[" * 200_000, "deeply"),
        (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "deeply"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not valid JSON"),
        (b"\xed\xa0\x80", "UTF-8"),
    ],
)
def test_bad_json_says_why(data, reason):
    with pytest.raises(BadJson, match=reason):
        parse_json(data)


def test_good_json():
    assert parse_json('{"a": ["\\ud83d\\ude00", "é", 1.5, null, true]}'.encode()) == {"a": ["😀", "é", 1.5, None, True]}


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_parse_or_are_bad_json(data):
    try:
        value = parse_json(data)
    except BadJson:
        return
    assert value == json.loads(data.decode())


@settings(max_examples=100, deadline=None)
@given(JSON_VALUES)
def test_what_is_dumped_parses_back_as_one_line(value):
    line = dump_line({"value": value})
    assert line.endswith(b"\n") and line.count(b"\n") == 1
    assert len(line.decode().splitlines()) == 1  # str.splitlines knows many more separators
    assert parse_json(line) == {"value": value}


def test_other_line_separators_are_escaped():
    assert dump_line({"é": "a\u2028b\u2029c\x85d\ve"}) == '{"é":"a\\u2028b\\u2029c\\u0085d\\u000be"}\n'.encode()


def test_nan_is_never_written():
    with pytest.raises(ValueError):
        dump_line({"value": float("nan")})


@pytest.mark.parametrize(("data", "count"), [(b"", 0), (b"a", 1), (b"a\n", 1), (b"a\nb", 2), (b"a\nb\n", 2)])
def test_counting_lines(tmp_path, data, count):
    path = tmp_path / "x"
    path.write_bytes(data)
    assert count_lines(path, 2**20) in ([count] if data else [0])


def test_large_files_are_estimated(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"0123456\n" * 2**19)  # 4 MiB
    assert count_lines(path, 2**20) == pytest.approx(2**19, rel=0.01)
