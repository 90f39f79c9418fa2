"""A quantized checkpoint seen as one of plain floats: what convert reads."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from converters.names import EMBEDDING, LM_HEAD, canonical_shapes
from converters.quant_config import LinearFormat
from converters.reader import Extent, Reader, TensorInfo
from l4tool.core.errors import UsageError
from quant.dequantize import read_linear


class PlainReader(Reader):
    """`reader`'s checkpoint with every Linear dequantized to the checkpoint's dtype; nothing else differs.

    Memory: `read` makes the rows that are asked for.
    """

    computes = True
    quantization: dict[str, Any] | None = None

    def __init__(self, reader: Reader) -> None:
        self._reader = reader
        self.path, self.arch, self.dtype, self.layout = reader.path, reader.arch, reader.dtype, reader.layout
        self.config = {key: value for key, value in reader.config.items() if key != "quantization_config"}
        self._infos = {name: self._info(name, shape) for name, shape in canonical_shapes(reader.arch).items()}

    def _info(self, name: str, shape: tuple[int, ...]) -> TensorInfo:
        parts = self._parts(name)
        if parts is None:
            return self._reader.tensors()[name]
        file = self._reader.tensors()[parts[0]].file
        return TensorInfo(name, shape, self.dtype, math.prod(shape) * self.dtype.itemsize, file)

    def _parts(self, name: str) -> list[str] | None:
        """The stored parts that a quantized weight is made of, codes first; None for any other tensor."""
        prefix = name.removesuffix(".weight")
        form = self._reader.linear_format(prefix) if prefix != name else None
        return None if form is None else [f"{prefix}.{part}" for part in form.value_parts]

    def tensors(self) -> dict[str, TensorInfo]:
        return self._infos

    def read(self, name: str, rows: slice | None = None) -> torch.Tensor:
        if name == LM_HEAD and self.arch.text.tie_word_embeddings:
            name = EMBEDDING
        if self._parts(name) is None:
            return self._reader.read(name, rows)
        return read_linear(self._reader, name.removesuffix(".weight"), rows).to(self.dtype)

    def stored_name(self, name: str) -> str:
        """What the file calls the first part of the tensor. KeyError if unknown."""
        named: str = self._reader.stored_name((self._parts(name) or [name])[0])  # type: ignore[attr-defined]
        return named

    def extent(self, name: str) -> Extent:
        raise UsageError(f"{self.path} is quantized: {name} as floats does not lie in its files")

    def from_bytes(self, name: str, raw: torch.Tensor) -> torch.Tensor:
        raise UsageError(f"{self.path} is quantized: {name} as floats does not lie in its files")

    def prefetch(self, name: str, rows: slice | None = None) -> None:
        for part in self._parts(name) or [name]:
            self._reader.prefetch(part, rows)

    def release(self, name: str) -> None:
        for part in self._parts(name) or [name]:
            self._reader.release(part)

    def linear_format(self, prefix: str) -> LinearFormat | None:
        return None

    def side_files(self) -> list[Path]:
        return self._reader.side_files()

    def made_files(self) -> dict[str, bytes]:
        return self._reader.made_files()

    def weight_files(self) -> list[Path]:
        return self._reader.weight_files()

    def forget(self, file: Path) -> None:
        self._reader.forget(file)

    def close(self) -> None:
        self._reader.close()
