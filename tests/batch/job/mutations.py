# ruff: noqa: E501 (tables read better in columns)
"""Damaged lines and damaged pictures without end, each a function of its seed."""

import base64
import io
import json
import random
import struct
import zlib

from PIL import Image, PngImagePlugin

from tests.batch.job.test_prepare import PNG_URI, VALID, places

USER = [{"role": "user", "content": "hi"}]
TOOL = {
    "type": "function",
    "function": {"name": "get_weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
}
MORE = [
    {
        "custom_id": "t",
        "method": "POST",
        "url": "/v1/chat/completions",
        "body": {
            "model": "m",
            "messages": [
                *USER,
                {
                    "role": "assistant",
                    "content": None,
                    "tool_calls": [
                        {
                            "id": "1",
                            "type": "function",
                            "function": {"name": "get_weather", "arguments": '{"city": "X"}'},
                        }
                    ],
                },
                {"role": "tool", "tool_call_id": "1", "content": "sunny"},
            ],
            "logprobs": True,
            "top_logprobs": 2,
            "max_completion_tokens": 9,
            "stop": "\n",
            "metadata": {"a": "b"},
        },
    },
    {"messages": USER, "seed": 5, "frequency_penalty": 0.5, "logit_bias": {"5": -100}, "min_tokens": 1, "id": 12},
    {"messages": USER, "tools": [TOOL], "tool_choice": "auto", "parallel_tool_calls": False},
    {"prompt": "look", "images": ["a.png", "sub/b.png"], "id": "two"},
    {
        "messages": USER,
        "response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "object"}}},
    },
    {"prompt": "x", "structured_outputs": {"regex": "[a-z]+[0-9]?"}},
    {"prompt": "x", "structured_outputs": {"choice": ["yes", "no"]}},
    {"custom_id": "e", "method": "POST", "url": "/v1/embeddings", "body": {"input": "x"}},
]
BASES = [*VALID, *MORE]
NASTY_BYTES = [
    b"\x00", b"\xff", b"\xed\xa0\x80", b"\xc0\x80", b"\xf4\x90\x80\x80", b"\xef\xbb\xbf", b'"', b"\\", b"{", b"}", b"[", b"]",
    b"\\ud800", b"\\u0000", b"\\udc00\\ud800", b"NaN", b"-Infinity", b"1e999", b"-0", b"9" * 5000, b",", b":", b"\r", b"\t",
    b"\xe2\x80\xa8", b"null", b"true", b'"a":1,"a":2', b"[" * 3000, b'{"a":' * 3000, b"<|eot|>", b"'", b"//", b"\x1b[31m",
]  # fmt: skip
NASTY_VALUES = [
    None, True, False, 0, -1, 1, 2**31, 2**63, -(2**63) - 1, 10**400, 0.5, -0.0, 1e308, 5e-324, "", " ", "\x00", "x" * 5000,
    "<|eot|><|image|>", "\u2028", "\ufdd0", "é😀", "../a.png", "/etc/passwd", "/dev/zero", "http://127.0.0.1/x.png",
    "https://[::ffff:10.0.0.1]/", "file:///etc/passwd", "data:image/png;base64,", "data:image/png;base64,AAAA", "data:,x",
    PNG_URI, "a.png", "gone.png", "{{ 7 * 7 }}", "{% for %}", "true", "NaN", "1", [], {}, [[]], [{}], [None], ["x"], [1, "x"],
    {"a": 1}, {"": ""}, {"type": "text", "text": "x"}, {"type": "image", "image": "a.png"}, {"type": "image_url"},
    {"url": "a.png"}, [[1, 2], [3]], list(range(300)), {str(i): i for i in range(300)}, [USER[0]] * 50,
]  # fmt: skip


def deeper(value, depth):
    for _ in range(depth):
        value = [value] if depth % 2 else {"a": value}
    return value


def type_changes():
    """Every nasty value at every place of every base line."""
    for base in BASES:
        for path in list(places(base)):
            for value in NASTY_VALUES:
                yield json.dumps(changed(base, path, value)).encode()


def changed(base, path, value):
    if not path:
        return value
    copy = json.loads(json.dumps(base))
    parent = copy
    for key in path[:-1]:
        parent = parent[key]
    parent[path[-1]] = value
    return copy


def damaged_line(generator):
    """One line: a base with values changed, or bytes changed, cut, spliced and doubled. Never a line feed."""
    value = generator.choice(BASES)
    for _ in range(generator.choice([0, 0, 1, 1, 2, 4])):
        found = list(places(value)) if isinstance(value, dict | list) else [()]
        new = generator.choice(NASTY_VALUES)
        value = changed(value, generator.choice(found), deeper(new, generator.choice([0, 0, 0, 1, 5, 40])))
    line = bytearray(json.dumps(value, ensure_ascii=generator.random() < 0.5).encode())
    for _ in range(generator.choice([0, 0, 1, 1, 2, 6])):
        place = generator.randrange(len(line) + 1)
        match generator.randrange(7):
            case 0 if place < len(line):
                line[place] ^= 1 << generator.randrange(8)
            case 1:
                del line[place:]
            case 2:
                del line[place : place + generator.randrange(1, 30)]
            case 3:
                line[place:place] = generator.choice(NASTY_BYTES)
            case 4:
                other = json.dumps(generator.choice(BASES)).encode()
                line[place:] = other[generator.randrange(len(other)) :]
            case 5:
                line[place:place] = line[place : place + 200] * generator.choice([1, 2, 50])
            case 6:
                line[place:place] = generator.randbytes(generator.randrange(1, 20))
    return bytes(line).replace(b"\n", b" ")


def good_line(number):
    """A line that is always answered, with a picture now and then."""
    line = {"id": f"good-{number}", "prompt": f"What is {number}?", "max_tokens": 5}
    if number % 7 == 0:
        line["images"] = [PNG_URI]
    return json.dumps(line).encode()


def picture(mode="RGB", size=(70, 50)):
    return Image.linear_gradient("L").resize(size).convert("RGB").convert(mode)


def saved(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def base_pictures():
    """Small files of every format, mode and extra that the loader knows."""
    frames = [picture(), picture().rotate(90)]
    text = PngImagePlugin.PngInfo()
    text.add_text("k", "v" * 500, zip=True)
    text.add_itxt("i", "é" * 500, zip=True)
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "x" * 500
    found = [saved(picture(mode), "PNG") for mode in ("RGB", "L", "1", "P", "RGBA", "LA")]
    found += [
        saved(picture("P"), "PNG", transparency=3),
        saved(Image.frombytes("I;16", (70, 50), bytes(range(250)) * 28), "PNG"),
    ]
    found += [saved(picture(), "PNG", pnginfo=text, icc_profile=b"x" * 300, exif=exif.tobytes())]
    found += [saved(picture(mode), "JPEG") for mode in ("RGB", "L", "CMYK")]
    found += [
        saved(picture(), "JPEG", progressive=True, exif=exif.tobytes(), icc_profile=b"y" * 300, comment=b"c" * 99)
    ]
    found += [saved(picture(), "WEBP", lossless=lossless, exif=exif.tobytes()) for lossless in (True, False)]
    found += [
        saved(picture("RGBA"), "WEBP"),
        saved(picture("P"), "GIF"),
        saved(picture(), "BMP"),
        saved(picture("1"), "BMP"),
    ]
    found += [
        saved(frames[0], kind, save_all=True, append_images=frames[1:]) for kind in ("GIF", "WEBP", "PNG", "TIFF")
    ]
    found += [saved(picture(mode), "TIFF", compression=how) for mode in ("RGB", "CMYK", "L")
              for how in (None, "tiff_lzw", "tiff_adobe_deflate", "packbits")]  # fmt: skip
    found += [saved(picture("1"), "TIFF", compression="group4"), saved(picture(), "TIFF", compression="jpeg")]
    found += [saved(picture(mode), "PPM") for mode in ("RGB", "L", "1")]
    if "AVIF" in Image.SAVE:
        found.append(saved(picture(), "AVIF"))
    return found


EDGES = [struct.pack(order + kind, value) for order in "<>" for kind, values in
         (("H", (0, 1, 0xFFFF, 0x7FFF, 50_000)), ("I", (0, 1, 0xFFFFFFFF, 0x7FFFFFFF, 50_000, 65_536)))
         for value in values]  # fmt: skip


def damaged_picture(generator, bases):
    """One file: bytes changed, cut, spliced, numbers set to extremes; a PNG's checksums mended so that it is read."""
    data = bytearray(generator.choice(bases))
    for _ in range(generator.choice([1, 1, 2, 3, 8])):
        near_head = generator.random() < 0.5
        place = generator.randrange(min(len(data), 200) if near_head and data else len(data) + 1)
        match generator.randrange(6):
            case 0 if place < len(data):
                data[place] = generator.randrange(256)
            case 1:
                edge = generator.choice(EDGES)
                data[place : place + len(edge)] = edge
            case 2 if generator.random() < 0.4:
                del data[place:]
            case 3:
                del data[place : place + generator.randrange(1, 60)]
            case 4:
                other = generator.choice(bases)
                data[place:] = other[generator.randrange(len(other)) :]
            case 5:
                data[place:place] = data[place : place + 100] * generator.choice([1, 1, 20])
        data = data or bytearray(b"\x00")
    return mend_png(bytes(data)) if generator.random() < 0.7 else bytes(data)


def mend_png(data):
    """The same file with right checksums as far as its chunks can be followed."""
    if data[:8] != b"\x89PNG\r\n\x1a\n":
        return data
    out, place = bytearray(data[:8]), 8
    while place + 12 <= len(data):
        size = int.from_bytes(data[place : place + 4], "big")
        if place + 12 + size > len(data):
            break
        body = data[place + 4 : place + 8 + size]
        out += data[place : place + 4] + body + zlib.crc32(body).to_bytes(4, "big")
        place += 12 + size
    return bytes(out + data[place:])


def as_line(picture_bytes):
    return json.dumps({"prompt": "x", "images": ["data:;base64," + base64.b64encode(picture_bytes).decode()]}).encode()


def generator(seed):
    return random.Random(seed)
