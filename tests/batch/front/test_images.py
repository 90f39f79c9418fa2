"""Pictures: tiles equal to both references' choice and Meta's pixels; every mode; limits; broken files."""

import ast
import base64
import io
import math
import os
from collections import defaultdict, namedtuple
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import batch.images as images
from batch.images import TileSpec, choose_grid, load_tiles, make_tiles, read_source, to_rgb
from batch.schema import LineError
from l4tool.core.arch import VisionArch
from l4tool.core.errors import CheckpointError

SPEC = TileSpec(336)
Square = namedtuple("Square", "height width")
VISION = VisionArch(8, 8, 1, 1, 3, 56, 14, 0.5, 8, 8, 8, 10000.0)


def picture(width, height, mode="RGB", seed=0):
    """Smooth colours with some noise: resizing it wrongly shows."""
    generator = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    channels = [(x * (i + 2) + y * (3 - i)) % 256 for i in range(3)]
    array = np.stack(channels, -1) + generator.integers(0, 40, (height, width, 3))
    return Image.fromarray(np.clip(array, 0, 255).astype(np.uint8)).convert(mode)


def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def theirs():
    """The pure functions of transformers' image_processing_llama4, whose import needs torchvision."""
    import torch
    import transformers

    path = Path(transformers.__file__).parent / "models/llama4/image_processing_llama4.py"
    names = {"get_factors", "get_max_res_without_distortion", "find_supported_resolutions", "get_best_fit"}
    tree = ast.parse(path.read_text())
    tree.body = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name in names]
    scope = {"math": math, "torch": torch, "defaultdict": defaultdict, "lru_cache": lru_cache, "SizeDict": object}
    exec(compile(tree, str(path), "exec"), scope)
    return scope


def their_grid(theirs, height, width, size, max_tiles, to_max=False):
    import torch

    options = theirs["find_supported_resolutions"](max_tiles, Square(size, size))
    best = theirs["get_best_fit"]((height, width), torch.tensor(options), resize_to_max_canvas=to_max)
    return int(best[0]) // size, int(best[1]) // size


SIDES = [1, 2, 7, 55, 56, 57, 100, 335, 336, 337, 500, 671, 672, 673, 1000, 1343, 1345, 2000, 3024, 5376, 9999]


@pytest.mark.parametrize(("size", "max_tiles"), [(336, 16), (56, 16), (336, 4), (448, 1)])
def test_grid_equals_transformers_on_a_sweep(theirs, size, max_tiles):
    for height in SIDES:
        for width in SIDES:
            spec = TileSpec(size, max_tiles)
            assert choose_grid(height, width, spec) == their_grid(theirs, height, width, size, max_tiles)


@settings(max_examples=300, deadline=None)
@given(height=st.integers(1, 6000), width=st.integers(1, 6000), to_max=st.booleans())
def test_grid_and_size_equal_transformers(theirs, height, width, to_max):
    spec = TileSpec(336, 16, resize_to_max_canvas=to_max)
    rows, columns = choose_grid(height, width, spec)
    assert (rows, columns) == their_grid(theirs, height, width, 336, 16, to_max)
    target = (rows * 336, columns * 336)
    if not to_max:
        target = (min(max(height, 336), target[0]), min(max(width, 336), target[1]))
    expected = theirs["get_max_res_without_distortion"]((height, width), target)
    got = images._size_within(width, height, rows * 336, columns * 336, spec)
    assert (got[1], got[0]) == tuple(max(side, 1) for side in expected)


@pytest.mark.parametrize(
    "size", [(336, 336), (100, 80), (400, 200), (1, 1), (1000, 3), (640, 480), (1200, 900), (333, 777), (1400, 1400)]
)
def test_pixels_equal_metas(meta_chat_format, size):
    """Bit for bit: uint8 / 255, normalised as Meta does it, against Meta's tiles."""
    import torch

    image = picture(*size)
    expected, (rows, columns) = meta_chat_format.VariableSizeImageTransform(336)(image, max_num_chunks=16)
    if expected.shape[0] > 1:
        whole = meta_chat_format.ResizeNormalizeImageTransform(336, 336)(image)
        expected = torch.cat([expected, whole[None]])
    tiles = make_tiles(image, SPEC)
    assert tiles.grid == (rows, columns)
    got = torch.from_numpy(tiles.pixels).float().div(255).sub(0.5).div(0.5)
    assert torch.equal(got, expected)


def test_tiles_are_row_by_row_and_padded_with_zero():
    white = Image.new("RGB", (60, 50), (255, 255, 255))
    tiles = make_tiles(white, TileSpec(56))
    assert tiles.grid == (1, 2) and tiles.pixels.shape == (3, 3, 56, 56) and tiles.pixels.dtype == np.uint8
    assert (tiles.pixels[0, :, :50] == 255).all() and (tiles.pixels[:2, :, 50:] == 0).all()
    assert (tiles.pixels[1, :, :50, :4] == 255).all() and (tiles.pixels[1, :, :, 4:] == 0).all()
    assert (tiles.pixels[2] == 255).all()  # the global tile is distorted, not padded


@pytest.mark.parametrize("mode", ["RGB", "L", "1", "P", "CMYK", "YCbCr", "HSV", "RGBX"])
def test_opaque_modes_equal_pillows_conversion(mode):
    image = picture(30, 20, mode)
    assert np.array_equal(np.asarray(to_rgb(image)), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "La", "RGBa"])
def test_alpha_is_over_white(mode):
    rgba = Image.new("RGBA", (4, 4), (200, 200, 200, 0))
    rgba.putpixel((0, 0), (100, 100, 100, 255))
    rgba.putpixel((1, 0), (0, 0, 0, 128))
    image = rgba.convert("LA").convert(mode) if mode in ("LA", "La") else rgba.convert(mode)
    rgb = to_rgb(image)
    assert rgb.mode == "RGB" and rgb.getpixel((0, 0)) == (100, 100, 100) and rgb.getpixel((3, 3)) == (255, 255, 255)
    if mode != "PA":
        assert all(abs(value - 127) <= 1 for value in rgb.getpixel((1, 0)))


def test_alpha_equals_metas(meta_chat_format):
    image = picture(50, 40, "RGBA")
    image.putalpha(Image.linear_gradient("L").resize((50, 40)))
    assert np.array_equal(np.asarray(to_rgb(image)), np.asarray(meta_chat_format.convert_image_to_rgb(image)))


def test_palette_transparency_is_over_white():
    image = Image.new("P", (3, 3), 1)
    image.putpalette([0, 0, 0, 10, 20, 30, 40, 50, 60])
    image.putpixel((0, 0), 2)
    data = encoded(image, "PNG", transparency=1)
    rgb = to_rgb(Image.open(io.BytesIO(data)))
    assert rgb.getpixel((0, 0)) == (40, 50, 60) and rgb.getpixel((2, 2)) == (255, 255, 255)


def test_sixteen_bit_grey_keeps_its_range():
    ramp = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    image = Image.open(io.BytesIO(encoded(Image.fromarray(ramp))))
    assert image.mode.startswith("I")
    grey = np.asarray(to_rgb(image))[..., 0].ravel().astype(int)
    assert grey[0] == 0 and grey[-1] == 255 and np.abs(grey - np.arange(256)).max() <= 1


def test_exif_orientation():
    image = Image.new("RGB", (40, 20), (255, 0, 0))
    image.paste((0, 0, 255), (0, 0, 20, 20))  # blue left
    exif = Image.Exif()
    exif[0x0112] = 6  # turn 90° clockwise to view
    upright = to_rgb(Image.open(io.BytesIO(encoded(image, "JPEG", exif=exif.tobytes(), quality=95))))
    assert upright.size == (20, 40)
    assert upright.getpixel((10, 5))[2] > 200 and upright.getpixel((10, 35))[0] > 200  # blue on top


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_animated_pictures_give_their_first_frame(kind):
    frames = [Image.new("RGB", (20, 20), color) for color in ((250, 0, 0), (0, 250, 0))]
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], duration=100)
    pixel = load_tiles(data, TileSpec(56)).pixels[0, :, 5, 5]
    assert pixel[0] > 200 and pixel[1] < 60


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM"])
def test_formats(kind):
    assert load_tiles(encoded(picture(100, 60), kind), SPEC).grid == (1, 1)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_truncated_files_are_errors(kind, share):
    data = encoded(picture(100, 60), kind)
    with pytest.raises(LineError) as caught:
        load_tiles(data[: int(len(data) * share)], SPEC)
    assert caught.value.code == "invalid_image"


@pytest.mark.parametrize(
    "data",
    [b"", b"hello", b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"%PDF-1.4", b"\x00" * 1000, b"\x89PNG\r\n\x1a\n"],
)
def test_not_images(data):
    with pytest.raises(LineError) as caught:
        load_tiles(data, SPEC)
    assert caught.value.code == "invalid_image"


@pytest.mark.parametrize("kind", ["ICO", "PCX", "TGA", "PDF"])
def test_formats_outside_the_list_are_refused(kind):
    with pytest.raises(LineError, match="none of PNG"):
        load_tiles(encoded(picture(32, 32), kind), SPEC)


def test_decompression_bombs_are_refused_from_the_header(monkeypatch):
    bomb = encoded(Image.new("1", (20_000, 20_000)))
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    with pytest.raises(LineError, match="megapixels") as caught:
        load_tiles(bomb, SPEC)
    assert caught.value.code == "image_too_large" and len(bomb) < 100_000
    with pytest.raises(LineError, match="9000×9000"):
        load_tiles(encoded_header(9000, 9000), SPEC)


def encoded_header(width, height):
    """A PNG that claims a size and has next to no data."""
    import struct
    import zlib

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 10)) + chunk(b"IEND", b"")
    )


def test_float_pictures_are_refused():
    with pytest.raises(LineError, match="floating-point"):
        load_tiles(encoded(Image.fromarray(np.zeros((4, 4), np.float32)), "TIFF"), SPEC)


@settings(max_examples=150, deadline=None)
@given(
    kind=st.sampled_from(["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"]),
    changes=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=12),
)
def test_mutated_files_give_tiles_or_a_line_error(kind, changes):
    data = bytearray(ORIGINALS[kind])
    for place, value in changes:
        data[int(place * len(data))] = value
    try:
        tiles = load_tiles(bytes(data), TileSpec(56))
    except LineError as error:
        assert error.code in ("invalid_image", "image_too_large")
    else:
        rows, columns = tiles.grid
        assert tiles.pixels.shape == (rows * columns + (rows * columns > 1), 3, 56, 56)


ORIGINALS = {kind: encoded(picture(70, 50), kind) for kind in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")}


def test_sources(tmp_path):
    data = encoded(picture(10, 10))
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/a b.png").write_bytes(data)
    assert read_source("sub/a b.png", tmp_path) == data
    assert read_source(str(tmp_path / "sub/a b.png"), Path("/")) == data
    text = base64.b64encode(data).decode()
    for uri in (
        f"data:image/png;base64,{text}",
        f"DATA:;base64,{text.rstrip('=')}",
        f"data:image/x;a=b;base64,{text[:8]}\n{text[8:]}",
    ):
        assert read_source(uri, tmp_path) == data


@pytest.mark.parametrize(
    ("source", "code"),
    [
        ("missing.png", "image_not_found"),
        (".", "invalid_image"),
        ("nul\0byte", "image_not_found"),
        ("x" * 5000, "image_not_found"),
        ("https://example.com/cat.png", "remote_image"),
        ("HTTP://example.com/cat.png", "remote_image"),
        ("ftp://example.com/cat.png", "invalid_image"),
        ("file:///etc/passwd", "image_outside_root"),
        ("data:image/png;base64,@@@", "invalid_image"),
        ("data:image/png;base64", "invalid_image"),
        ("data:image/png,abc", "invalid_image"),
        ("data:text/html;base64,AAAA", "invalid_image"),
        ("/dev/zero", "image_outside_root"),
        ("", "invalid_image"),
    ],
)
def test_bad_sources(tmp_path, source, code):
    with pytest.raises(LineError) as caught:
        read_source(source, tmp_path)
    assert caught.value.code == code


def test_pipes_do_not_block(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(LineError, match="not a file"):
        read_source("pipe.png", tmp_path)


def test_large_files_are_refused_before_they_are_read(tmp_path):
    with open(tmp_path / "big.png", "wb") as file:
        file.truncate(images.MAX_FILE_BYTES + 1)
    with pytest.raises(LineError) as caught:
        read_source("big.png", tmp_path)
    assert caught.value.code == "image_too_large"


def test_spec_from_config():
    published = {"size": {"height": 56, "width": 56}, "max_patches": 4, "resample": 2, "image_mean": [0.5] * 3}
    assert TileSpec.from_config(published, VISION) == TileSpec(56, 4)
    assert TileSpec.from_config({}, VISION) == TileSpec(56, 16)
    assert TileSpec.from_config({"size": {"height": 56, "width": 56, "longest_edge": None}}, VISION) == TileSpec(56)
    for wrong in (
        {"size": {"height": 336, "width": 336}},
        {"size": 56},
        {"image_std": [0.2] * 3},
        {"max_patches": 0},
        {"max_patches": "many"},
        {"resample": 99},
    ):
        with pytest.raises(CheckpointError, match=r"preprocessor_config\.json"):
            TileSpec.from_config(wrong, VISION)
