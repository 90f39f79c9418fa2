"""Lines and pictures that are made to cost much: little time and memory, measured in a process of their own."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from batch.jsonl import MAX_KEYS, MAX_PARTS, BadJson, parse_json
from batch.schema import LineError, parse_line

ROOT = Path(__file__).resolve().parents[3]
RUN = """
import json, resource, sys, time
import numpy
from batch.images import TileSpec, load_tiles
from batch.jsonl import BadJson, parse_json
from batch.schema import LineError, parse_line
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
{make}
before, started_s = peak(), time.process_time()
try:
    {work}
    code = "ok"
except (BadJson, LineError) as error:
    code = getattr(error, "code", "invalid_json")
print(json.dumps([code, time.process_time() - started_s, peak() - before]))
"""


def measured(make, work):
    """(code, CPU seconds, bytes that the peak grew by) of one piece of work in a fresh process."""
    code = RUN.format(make=make, work=work)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


LINES = [  # (what to build, code)
    ("b'[' + b'[],' * 20_000_000 + b'1]'", "invalid_json"),
    ("b'[' + b'{},' * 20_000_000 + b'1]'", "invalid_json"),
    ("b'[' + b'\"ab\",' * 12_000_000 + b'1]'", "invalid_json"),
    ("b'{' + b'\"a\":1,' * 10_000_000 + b'\"b\":1}'", "invalid_json"),
    ("b'[' * 60_000_000", "invalid_json"),
    ("b'9' * 60_000_000", "invalid_json"),
    ("b'\"' + b'\\\\' * 60_000_000", "invalid_json"),
    ("b'{\"prompt\": [1' + b',1.5' * 4_000_000 + b']}'", "invalid_request"),
    ("b'{\"prompt\": \"x\", \"stop\": [1' + b',1' * 8_000_000 + b']}'", "invalid_request"),
    ('b\'{"messages": [{"role": "user", "content": [1\' + b\',1\' * 8_000_000 + b\']}]}\'', "invalid_request"),
    ("b'{\"prompt\": \"' + b'[{:\\\\\"' * 9_000_000 + b'\"}'", "ok"),
    ("b'{\"prompt\": [1' + b',12345' * 8_000_000 + b']}'", "ok"),
]


def some(cases, quick):
    """The cases, those that are not quick marked as slow."""
    return [case if case in quick else pytest.param(*case, marks=pytest.mark.slow) for case in cases]


@pytest.mark.parametrize(("make", "code"), some(LINES, LINES[::2]))
def test_lines_that_would_take_gigabytes(make, code):
    found, took_s, grown_bytes = measured(f"data = {make}", "parse_line(parse_json(data))")
    assert found == code and took_s < 20 and grown_bytes < 1.5 * 2**30


def test_limits_of_json_are_exact():
    parse_json(json.dumps(["x"] * (MAX_PARTS - 1) + [1] * 5).encode())
    with pytest.raises(BadJson, match="strings, arrays and objects"):
        parse_json(json.dumps(["x"] * MAX_PARTS).encode())
    parse_json(json.dumps('[{"' * MAX_PARTS).encode())  # what stands in a string does not count
    parse_json(json.dumps({str(i): i for i in range(MAX_KEYS)}).encode())
    with pytest.raises(BadJson, match="keys"):
        parse_json(json.dumps({str(i): i for i in range(MAX_KEYS + 1)}).encode())


@pytest.mark.parametrize("count", [10, 5000])
def test_a_list_of_wrong_items_is_one_error(count):
    for line in ({"prompt": [1, *["x"] * count]}, {"prompt": "x", "images": [1] * count}, {"messages": [1] * count}):
        with pytest.raises(LineError) as caught:
            parse_line(line)
        assert caught.value.code == "invalid_request" and len(caught.value.message) < 200


BOMBS = {
    "header": ("data = png(50_000, 50_000)", "image_too_large"),
    "header_thin": ("data = png(2**31 - 1, 1)", "image_too_large"),
    "thin": ("data = saved(Image.new('1', (60_000_000, 1)), 'PNG')", "image_too_large"),
    "zeros": ("data = png(8000, 8000, zlib.compress(bytes(8000 * 24001), 9))", "ok"),
    "palette": ("data = saved(Image.new('P', (8000, 8000)), 'PNG', transparency=0)", "ok"),
    "alpha": ("data = saved(Image.new('LA', (8000, 8000)), 'PNG')", "ok"),
    "grey16": ("data = saved(Image.new('I;16', (8000, 8000)), 'PNG')", "ok"),
    "webp": ("data = saved(Image.new('RGBA', (8000, 8000)), 'WEBP', lossless=True, method=0)", "image_too_large"),
    "webp_most": ("data = saved(Image.new('RGBA', (8000, 4000)), 'WEBP', lossless=True, method=0)", "ok"),
    "gif": ("data = saved(Image.new('P', (8000, 8000)), 'GIF')", "ok"),
    "widest": ("data = saved(Image.new('L', (65_535, 900)), 'PNG')", "ok"),
    "text": ("data = png(8, 8, text=zlib.compress(bytes(300_000_000), 9))", "invalid_image"),
    "profile": ("data = png(8, 8, name=b'iCCP', text=zlib.compress(bytes(300_000_000), 9))", "invalid_image"),
    "scans": ("d = saved(Image.new('RGB', (4000, 4000)), 'JPEG', progressive=True)\n"
              "i = d.rindex(b'\\xff\\xda'); data = d[:i] + d[i:-2] * 3000 + d[-2:]", "invalid_image"),
}  # fmt: skip
MAKE = """
import io, struct, zlib
from PIL import Image
def chunk(name, data): return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
def png(width, height, pixels=b"", text=None, name=b"zTXt"):
    extra = b"" if text is None else chunk(name, b"k\\0\\0" + text)
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\\x89PNG\\r\\n\\x1a\\n" + head + extra + chunk(b"IDAT", pixels or zlib.compress(b"x"))
def saved(image, kind, **options):
    buffer = io.BytesIO(); image.save(buffer, kind, **options); return buffer.getvalue()
"""


QUICK = {"header", "header_thin", "thin", "palette", "webp", "text", "scans"}


@pytest.mark.parametrize(("name",), some([(name,) for name in BOMBS], [(name,) for name in QUICK]))
def test_picture_bombs(name, tmp_path):
    """Made in one process, loaded in another, whose peak counts."""
    make, code = BOMBS[name]
    path = tmp_path / "bomb"
    subprocess.run([sys.executable, "-c", f"{MAKE}\n{make}\nopen({str(path)!r}, 'wb').write(data)"], check=True)
    found, took_s, grown_bytes = measured(f"data = open({str(path)!r}, 'rb').read()", "load_tiles(data, TileSpec(336))")
    assert found == code and took_s < 20, (found, took_s)
    assert grown_bytes < (650 if code == "ok" else 60) * 10**6, grown_bytes
