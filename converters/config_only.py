"""A checkpoint that exists as a config only: what its tensors would be. For planning; there is nothing to read."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from converters.arch_io import arch_from_config
from converters.fields import read_json_object
from converters.names import MULTIMODAL_HF, TEXT_HF, canonical_shapes
from converters.quant_config import LinearFormat
from converters.reader import Extent, Reader, TensorInfo
from l4tool.core.arch import Arch
from l4tool.core.errors import CheckpointError, InputMissing


class ConfigOnly(Reader):
    """A Reader of a config.json alone. Raises InputMissing or CheckpointError for a file that is none."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config: dict[str, Any] = read_json_object(path)
        if self.config.get("quantization_config") is not None:
            raise CheckpointError(
                f"{path} is the config of a quantized checkpoint",
                hint="give its folder, or leave quantization_config out",
            )
        self.arch: Arch = arch_from_config(self.config, str(path))
        self.layout = MULTIMODAL_HF if self.arch.vision is not None else TEXT_HF
        self.quantization: dict[str, Any] | None = None
        self.dtype: torch.dtype = getattr(torch, self.arch.dtype)

    def tensors(self) -> dict[str, TensorInfo]:
        """Every canonical tensor, as an unquantized checkpoint would hold it."""
        size = self.dtype.itemsize
        return {
            name: TensorInfo(name, shape, self.dtype, math.prod(shape) * size, self.path)
            for name, shape in canonical_shapes(self.arch).items()
        }

    def read(self, name: str, rows: slice | None = None) -> torch.Tensor:
        raise InputMissing(f"{self.path} is a config without weights", hint="give the checkpoint's folder")

    def extent(self, name: str) -> Extent:
        raise InputMissing(f"{self.path} is a config without weights", hint="give the checkpoint's folder")

    def from_bytes(self, name: str, raw: torch.Tensor) -> torch.Tensor:
        raise InputMissing(f"{self.path} is a config without weights", hint="give the checkpoint's folder")

    def prefetch(self, name: str, rows: slice | None = None) -> None:
        """Nothing to read."""

    def release(self, name: str) -> None:
        """Nothing to let go."""

    def linear_format(self, prefix: str) -> LinearFormat | None:
        return None

    def forget(self, file: Path) -> None:
        """Nothing is mapped."""

    def side_files(self) -> list[Path]:
        return []

    def weight_files(self) -> list[Path]:
        return []

    def close(self) -> None:
        """Nothing is open."""
