"""GGUF files: the header, strictly checked, and zero-copy views of the mapped file.

Layout (llama.cpp's `gguf.cpp`, version 3, little-endian): "GGUF", version, number of tensors, number of keys; the name,
type and value of each key; name, dimensions (the contiguous one first), type and offset of each tensor; then, aligned,
the tensors' bytes. Parsed here because the `gguf` package's reader takes 20 s and 1 GB for Llama 4's vocabulary, and
raises whatever a broken header makes it run into.
"""

from __future__ import annotations

import math
import mmap
import struct
from pathlib import Path
from typing import Any

import torch

from converters.gguf_names import ROPE_FREQS
from converters.mapped import MappedFile, StoredTensor
from l4tool.core.errors import CheckpointError, InputMissing

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT, MAX_ALIGNMENT = 32, 1 << 20
MAX_DIMS = 4
MAX_NAME_BYTES = 1 << 16
STRING, ARRAY, BOOL = 8, 9, 7
# Value types: GGUF's number → struct's letter.
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", BOOL: "?", 10: "Q", 11: "q", 12: "d"}
# Tensor types (GGMLQuantizationType): the floats, and what the others are called.
DTYPES = {0: torch.float32, 1: torch.float16, 30: torch.bfloat16}
OTHER_TYPES = {
    2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 9: "Q8_1", 10: "Q2_K", 11: "Q3_K", 12: "Q4_K", 13: "Q5_K",
    14: "Q6_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S",
    22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M", 34: "TQ1_0",
    35: "TQ2_0", 39: "MXFP4", 40: "NVFP4",
}  # fmt: skip


class GgufFile(MappedFile):
    """One open file: `metadata` by key, and float tensors, their shapes in the reverse of GGUF's order of dimensions.

    Raises InputMissing, or CheckpointError for anything wrong with the header or the size, and for tensors that are no
    floats.
    """

    constants = frozenset({ROPE_FREQS})

    def __init__(self, path: Path) -> None:
        self.metadata, tensors = read_header(path)
        super().__init__(path, tensors)


def read_header(path: Path) -> tuple[dict[str, Any], dict[str, StoredTensor]]:
    """Metadata by key, and the tensors by name in the order of their offsets. Raises as GgufFile does."""
    try:
        with open(path, "rb") as file:
            if file.read(len(MAGIC)) != MAGIC:
                raise _bad(path, "it does not begin with GGUF")
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise InputMissing(f"cannot read {path}: {error.strerror or error}", hint="give a .gguf file") from error
    with mapped:
        return _Header(path, mapped).read()


def _bad(path: Path, what: str) -> CheckpointError:
    return CheckpointError(f"{path} is not a sound GGUF file: {what}", hint="download or copy it again")


class _Header:
    """A cursor over the header; nothing is read or allocated that the file is too short for."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self.data, self.at = path, data, len(MAGIC)

    def read(self) -> tuple[dict[str, Any], dict[str, StoredTensor]]:
        self._check_version()
        num_tensors, num_keys = self._number("Q"), self._number("Q")
        metadata: dict[str, Any] = {}
        for _ in range(self._count(num_keys, 8 + 4 + 1, "keys")):
            key = self._name("a key")
            if key in metadata:
                raise _bad(self.path, f"the key {key!r} occurs twice")
            metadata[key] = self._value(self._number("I"), key)
        listed = [self._tensor() for _ in range(self._count(num_tensors, 8 + 4 + 4 + 8, "tensors"))]
        return metadata, self._placed(listed, self._alignment(metadata))

    def _check_version(self) -> None:
        raw = self._take(4)
        version = int.from_bytes(raw, "little")
        if version in VERSIONS:
            return
        if int.from_bytes(raw, "big") in VERSIONS:
            raise CheckpointError(
                f"{self.path} is a big-endian GGUF file",
                hint="make a little-endian one of it: gguf-convert-endian FILE little",
            )
        raise _bad(self.path, f"it says version {version}, this tool reads {' and '.join(map(str, VERSIONS))}")

    def _take(self, size: int) -> bytes:
        if size > len(self.data) - self.at:
            raise _bad(self.path, f"it is truncated: its header does not end before byte {len(self.data)}")
        self.at += size
        return self.data[self.at - size : self.at]

    def _number(self, letter: str) -> Any:
        return struct.unpack("<" + letter, self._take(struct.calcsize("<" + letter)))[0]

    def _count(self, count: int, least_bytes: int, what: str) -> int:
        """`count` of things that take so many bytes each at least, if the file can hold them."""
        if count * least_bytes > len(self.data) - self.at:
            raise _bad(self.path, f"it cannot hold the {count} {what} that its header speaks of")
        return count

    def _text(self, what: str) -> str:
        try:
            return self._take(self._number("Q")).decode("utf-8")
        except UnicodeDecodeError as error:
            raise _bad(self.path, f"{what} is not UTF-8") from error

    def _name(self, what: str) -> str:
        text = self._text(what)
        if not 0 < len(text) <= MAX_NAME_BYTES:
            raise _bad(self.path, f"{what} has a name of {len(text)} characters")
        return text

    def _value(self, kind: int, key: str) -> Any:
        if kind == STRING:
            return self._text(key)
        if kind in SCALARS:
            return self._number(SCALARS[kind])
        if kind != ARRAY:
            raise _bad(self.path, f"the key {key!r} has a value of the unknown type {kind}")
        inner, count = self._number("I"), self._number("Q")
        if inner == STRING:
            return self._texts(self._count(count, 8, f"strings of {key}"), key)
        if inner not in SCALARS:
            raise _bad(self.path, f"the key {key!r} has an array of the unknown type {inner}")
        size = struct.calcsize("<" + SCALARS[inner])
        return list(struct.unpack(f"<{count}{SCALARS[inner]}", self._take(self._count(count, size, key) * size)))

    def _texts(self, count: int, key: str) -> list[str]:
        """An array of strings; a vocabulary has some 200,000 of them, so without a call for each."""
        data, at, end = self.data, self.at, len(self.data)
        texts: list[str] = []
        length_at = struct.Struct("<Q").unpack_from
        try:
            for _ in range(count):
                at += 8
                stop = at + length_at(data, at - 8)[0]
                if stop > end:
                    raise _bad(self.path, f"it is truncated inside {key}")
                texts.append(data[at:stop].decode("utf-8"))
                at = stop
        except UnicodeDecodeError as error:
            raise _bad(self.path, f"entry {len(texts)} of {key} is not UTF-8") from error
        except struct.error as error:
            raise _bad(self.path, f"it is truncated inside {key}") from error
        self.at = at
        return texts

    def _alignment(self, metadata: dict[str, Any]) -> int:
        alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or not 0 < alignment <= MAX_ALIGNMENT or alignment & (alignment - 1):
            raise _bad(self.path, f"general.alignment is {alignment!r}, not a power of two")
        return alignment

    def _tensor(self) -> tuple[str, tuple[int, ...], torch.dtype, int]:
        """(name, shape with the contiguous dimension last, dtype, offset in the tensors' bytes)."""
        name, num_dims = self._name("a tensor"), self._number("I")
        if not 0 < num_dims <= MAX_DIMS:
            raise _bad(self.path, f"tensor {name!r} has {num_dims} dimensions")
        sizes = [self._number("Q") for _ in range(num_dims)]
        kind, offset = self._number("I"), self._number("Q")
        if kind in DTYPES:
            return name, tuple(reversed(sizes)), DTYPES[kind], offset
        if kind not in OTHER_TYPES:
            raise _bad(self.path, f"tensor {name!r} has the unknown type {kind}")
        raise CheckpointError(
            f"{self.path}: tensor {name!r} is {OTHER_TYPES[kind]}, of which convert makes no floats",
            hint="convert from the GGUF file in BF16, F16 or F32 that it was quantized from",
        )

    def _placed(
        self, listed: list[tuple[str, tuple[int, ...], torch.dtype, int]], alignment: int
    ) -> dict[str, StoredTensor]:
        """Where each tensor lies; offsets count from the first aligned byte behind the header."""
        first = self.at + -self.at % alignment
        found: dict[str, StoredTensor] = {}
        end, before = first, ""
        for name, shape, dtype, offset in sorted(listed, key=lambda entry: entry[3]):
            start = first + offset
            stop = start + math.prod(shape) * dtype.itemsize
            if name in found:
                raise _bad(self.path, f"the tensor {name!r} occurs twice")
            if offset % alignment or start < end:
                raise _bad(self.path, f"tensor {name!r} is not aligned or overlaps {before!r}")
            if stop > len(self.data):
                raise _bad(self.path, f"it is truncated: tensor {name!r} ends at byte {stop} of {len(self.data)}")
            found[name] = StoredTensor(name, dtype, shape, start, stop, self.path)
            end, before = stop, name
        return found
