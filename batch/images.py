"""Pictures → tiles: decoded with Pillow within limits, resized and cut exactly as Meta's reference does it.

Canvas and size formulas: Meta's `VariableSizeImageTransform` and transformers' `get_best_fit`, in float32 as there.
"""

from __future__ import annotations

import base64
import binascii
import io
import math
import re
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from batch.local_files import MAX_FILE_BYTES, read_file, shown
from batch.requests import ImageTiles
from batch.schema import LineError
from l4tool.core.arch import VisionArch
from l4tool.core.errors import CheckpointError
from l4tool.core.sizes import format_bytes

Image.init()
FORMATS = tuple(f for f in ("PNG", "JPEG", "MPO", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF") if f in Image.OPEN)
MAX_PIXELS = 64_000_000
MAX_WEBP_PIXELS = 32_000_000  # its decoder holds three copies
MAX_SIDE = 65_535  # resizing needs memory in proportion to the longer side
MAX_JPEG_SCANS = 100  # each scan of a progressive JPEG goes over all pixels; cameras and encoders write about ten
_BAND_PIXELS = 1_000_000
_BIG_PIXELS = 8_000_000  # pictures above this are decoded one at a time, so that threads do not add up

warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
warnings.filterwarnings("ignore", module="PIL")
_big_picture = threading.Lock()
_small_pictures = threading.BoundedSemaphore(4)


@dataclass(frozen=True)
class TileSpec:
    """How pictures become tiles. `tile_size` is in pixels per side; `resample` is Pillow's filter."""

    tile_size: int
    max_tiles: int = 16
    resample: Image.Resampling = Image.Resampling.BILINEAR
    resize_to_max_canvas: bool = False

    @classmethod
    def from_config(cls, config: dict[str, Any], vision: VisionArch) -> TileSpec:
        """From preprocessor_config.json ({} → the published values) and the vision tower. Raises CheckpointError."""
        size = config.get("size", {"height": vision.image_size, "width": vision.image_size})
        if not isinstance(size, dict) or {size.get("height"), size.get("width")} != {vision.image_size}:
            raise CheckpointError(
                f"preprocessor_config.json: size {size} is not the vision tower's {vision.image_size}"
            )
        for name in ("image_mean", "image_std"):
            if config.get(name, [0.5] * 3) != [0.5] * 3:
                raise CheckpointError(
                    f"preprocessor_config.json: {name} {config[name]} is not 0.5: not a Llama 4 value"
                )
        max_tiles, resample = config.get("max_patches", 16), config.get("resample", 2)
        if not isinstance(max_tiles, int) or not 1 <= max_tiles <= 64:
            raise CheckpointError(f"preprocessor_config.json: max_patches {max_tiles!r} is not between 1 and 64")
        try:
            kind = Image.Resampling(resample)
        except ValueError:
            raise CheckpointError(f"preprocessor_config.json: unknown resample filter {resample!r}") from None
        return cls(vision.image_size, max_tiles, kind, bool(config.get("resize_to_max_canvas", False)))


def read_source(source: str, root: Path | None, fetch: Callable[[str], bytes] | None = None) -> bytes:
    """A picture's bytes from a data: URI, a local path below `root`, or with `fetch` from the web. Raises LineError."""
    head = source[:16].lower()
    if head.startswith("data:"):
        return _read_data_uri(source)
    if head.startswith(("http:", "https:")):
        if fetch is None:
            raise LineError("remote_image", "images from the web are off; --allow-url-images fetches them")
        return fetch(source)
    if re.match(r"[a-z][a-z0-9+.-]+://", head) and not head.startswith("file:"):
        raise LineError("invalid_image", f"{shown(source)}: give a path or a data: URI")
    if root is None:
        raise LineError(
            "image_not_found", f"{shown(source)}: an input behind a URL has no pictures beside it; see --image-root"
        )
    return read_file(source, root)


def _read_data_uri(source: str) -> bytes:
    comma = source.find(",", 0, 256)
    if comma < 0:
        raise LineError("invalid_image", "data: URI without a comma")
    kind, *parameters = source[5:comma].lower().split(";")
    if "base64" not in (parameter.strip() for parameter in parameters):
        raise LineError("invalid_image", "data: URI that is not base64")
    if kind and not kind.strip().startswith("image/"):
        raise LineError("invalid_image", f"data: URI of type {shown(kind)}, not image/…")
    if len(source) - comma > MAX_FILE_BYTES * 4 // 3 + 4096:
        raise LineError("image_too_large", f"a picture of more than {format_bytes(MAX_FILE_BYTES)}")
    payload = "".join(source[comma + 1 :].split())
    try:
        return base64.b64decode(payload + "=" * (-len(payload) % 4), validate=True)
    except (binascii.Error, ValueError):
        raise LineError("invalid_image", "data: URI with broken base64") from None


def load_tiles(data: bytes, spec: TileSpec) -> ImageTiles:
    """An image file's bytes → tiles. Raises LineError for anything that is not a whole, reasonable picture."""
    if not data:
        raise LineError("invalid_image", "the image is empty")
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            _check_size(image.width, image.height, MAX_WEBP_PIXELS if image.format == "WEBP" else MAX_PIXELS)
            if image.format in ("JPEG", "MPO") and data.count(b"\xff\xda") > MAX_JPEG_SCANS:
                raise LineError("invalid_image", f"a JPEG of more than {MAX_JPEG_SCANS} scans")
            with _big_picture if image.width * image.height > _BIG_PIXELS else _small_pictures:
                return make_tiles(to_rgb(image), spec)
    except LineError:
        raise
    except Image.DecompressionBombError:
        raise LineError("image_too_large", f"more than {MAX_PIXELS // 10**6} megapixels") from None
    except Image.UnidentifiedImageError:
        names = ", ".join(name for name in FORMATS if name != "MPO")
        raise LineError("invalid_image", f"not an image, or none of {names}") from None
    except MemoryError:
        raise LineError("image_too_large", "the image does not fit in memory") from None
    except Exception as error:  # Pillow's plugins raise nearly anything on broken files
        raise LineError("invalid_image", f"broken image: {type(error).__name__}: {str(error)[:200]}") from None


def _check_size(width: int, height: int, max_pixels: int = MAX_PIXELS) -> None:
    if max(width, height) > MAX_SIDE or not 0 < width * height <= max_pixels:
        limit = f"{max_pixels // 10**6} megapixels, {MAX_SIDE:,} on a side"
        raise LineError("image_too_large", f"{width}×{height} pixels; the limit is {limit}")


def to_rgb(image: Image.Image) -> Image.Image:
    """First frame, upright by its EXIF orientation, 8-bit RGB, transparency over white."""
    image.load()
    _check_size(image.width, image.height)  # a GIF's frame may be larger than its header says
    ImageOps.exif_transpose(image, in_place=True)
    mode = image.mode
    if mode == "RGB" and "transparency" not in image.info:
        return image
    if mode.startswith("I"):  # 16-bit grey; Pillow's own conversion would clip at 255
        return _in_bands(image, _eight_bits)
    if mode == "F":
        raise LineError("invalid_image", "floating-point pixels have no known range; use 8 or 16 bits")
    if mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        return _in_bands(image, _over_white)
    return image.convert("RGB")


def _in_bands(image: Image.Image, to_rgb_band: Callable[[Image.Image], Image.Image]) -> Image.Image:
    """The RGB picture, made a band of rows at a time, so that what lies between the two stays small."""
    result = Image.new("RGB", image.size)
    rows = max(1, _BAND_PIXELS // image.width)
    for top in range(0, image.height, rows):
        box = (0, top, image.width, min(top + rows, image.height))
        result.paste(to_rgb_band(image.crop(box)), box)
    return result


def _over_white(image: Image.Image) -> Image.Image:
    if image.mode in ("La", "PA"):
        image = image.convert("LA" if image.mode == "La" else "RGBA")
    rgba = image.convert("RGBA")
    white = Image.new("RGB", rgba.size, (255, 255, 255))
    white.paste(rgba, mask=rgba.getchannel("A"))
    return white


def _eight_bits(image: Image.Image) -> Image.Image:
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise LineError("invalid_image", "32-bit integer pixels have no known range; use 8 or 16 bits")
    return Image.fromarray(((values + 128) // 257).astype(np.uint8)).convert("RGB")


def make_tiles(image: Image.Image, spec: TileSpec) -> ImageTiles:
    """RGB picture → ImageTiles: resized without distortion, padded with 0 right and below, cut row by row; when that
    is more than one tile, the whole picture squeezed into one more."""
    size = spec.tile_size
    rows, columns = choose_grid(image.height, image.width, spec)
    width, height = _size_within(image.width, image.height, rows * size, columns * size, spec)
    canvas = np.zeros((rows * size, columns * size, 3), np.uint8)
    canvas[:height, :width] = np.asarray(_resize(image, width, height, spec))
    tiles = canvas.reshape(rows, size, columns, size, 3).transpose(0, 2, 4, 1, 3)  # [rows, columns, 3, S, S]
    pixels = tiles.reshape(rows * columns, 3, size, size)
    if rows * columns > 1:
        whole = np.asarray(_resize(image, size, size, spec)).transpose(2, 0, 1)
        pixels = np.concatenate([pixels, whole[None]])
    return ImageTiles(np.ascontiguousarray(pixels), (rows, columns))


def _resize(image: Image.Image, width: int, height: int, spec: TileSpec) -> Image.Image:
    return image if image.size == (width, height) else image.resize((width, height), spec.resample)


def choose_grid(height: int, width: int, spec: TileSpec) -> tuple[int, int]:
    """(rows, columns) of the canvas: upscale as little as possible, else downscale as little as possible; ties go to
    the smallest area. Scales are compared in float32, as both references do."""
    grids = _grids(spec.max_tiles)  # [G, 2] rows, columns
    scale_h = (grids[:, 0] * spec.tile_size).astype(np.float32) / np.float32(height)
    scale_w = (grids[:, 1] * spec.tile_size).astype(np.float32) / np.float32(width)
    scales = np.minimum(scale_h, scale_w)
    enlarging = scales[scales >= 1]
    largest = spec.resize_to_max_canvas or not len(enlarging)
    chosen = scales.max() if largest else enlarging.min()
    fitting = grids[scales == chosen]
    rows, columns = fitting[np.argmin(fitting[:, 0] * fitting[:, 1])]
    return int(rows), int(columns)


@lru_cache(maxsize=8)
def _grids(max_tiles: int) -> np.ndarray:
    pairs = [(rows, n // rows) for n in range(max_tiles, 0, -1) for rows in range(1, n + 1) if n % rows == 0]
    return np.array(pairs, np.int64)


def _size_within(width: int, height: int, canvas_height: int, canvas_width: int, spec: TileSpec) -> tuple[int, int]:
    """(width, height) after the resize that keeps the proportions and enlarges no side past max(side, tile_size)."""
    if not spec.resize_to_max_canvas:
        canvas_width = min(max(width, spec.tile_size), canvas_width)
        canvas_height = min(max(height, spec.tile_size), canvas_height)
    scale_w, scale_h = canvas_width / width, canvas_height / height
    if scale_w < scale_h:
        return max(canvas_width, 1), max(min(math.floor(height * scale_w), canvas_height), 1)
    return max(min(math.floor(width * scale_h), canvas_width), 1), max(canvas_height, 1)
