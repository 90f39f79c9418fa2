"""Reading checkpoints: canonical tensors out of any layout, from headers first, tensor slices on demand.

A canonical tensor has the per-expert name of Hugging Face's multimodal layout
(`language_model.model.layers.N.feed_forward.experts.E.gate_proj.weight`), and every projection is 2-D [out, in],
whatever the file stores. `open_checkpoint(path)` is the one way in.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from converters.names import Part
from converters.quant_config import LinearFormat
from l4tool.core.arch import Arch


@dataclass(frozen=True)
class TensorInfo:
    """A canonical tensor, known from headers alone. `file` is where its bytes lie; `nbytes` counts stored bytes."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    nbytes: int
    file: Path


@dataclass(frozen=True)
class Extent:
    """Bytes [start, stop) of one file: where a tensor lies, or for a fused expert all of the expert's projection."""

    file: Path
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        return self.stop - self.start


class Reader(Protocol):
    """One open checkpoint. Opening reads headers only and has already checked every name, shape and file size."""

    path: Path
    arch: Arch
    layout: str  # "hf", "hf-text", "per-expert", "compressed-tensors"
    quantization: dict[str, Any] | None  # config.json's quantization_config, as it stands
    config: dict[str, Any]  # config.json, as it stands
    dtype: torch.dtype  # of the unquantized weights
    computes: bool = False  # `read` computes values: reading the same rows twice costs twice

    def tensors(self) -> dict[str, TensorInfo]:
        """Every canonical tensor by name, in a stable order."""
        ...

    def read(self, name: str, rows: slice | None = None) -> torch.Tensor:
        """A canonical tensor or a range of its rows; a zero-copy view of the mapped file where the layout allows,
        so it may be strided (a fused expert is stored [in, out]) and must not be written to."""
        ...

    def pieces(self, name: str, rows: slice) -> list[tuple[Part, torch.Tensor]]:
        """A tensor of which at least these rows (of a matrix) are wanted, as the pieces that lie together: [rows, cols]
        of each `Part`, zero-copy as in `read`. KeyError if unknown."""
        shape = self.tensors()[name].shape
        if len(shape) != 2:
            return [(Part(name, shape), self.read(name))]
        return [(Part(name, shape, rows=(rows.start, rows.stop)), self.read(name, rows))]

    def extent(self, name: str) -> Extent:
        """Where the bytes behind a tensor lie, for whoever reads them by other ways. KeyError if unknown."""
        ...

    def from_bytes(self, name: str, raw: torch.Tensor) -> torch.Tensor:
        """What `read(name)` gives, out of a copy of its extent's bytes (uint8), sharing their memory."""
        ...

    def prefetch(self, name: str, rows: slice | None = None) -> None:
        """Start reading a tensor's bytes (of the whole expert for a fused one) into the page cache; returns at once.

        With the first of its `rows` the whole tensor is asked for, with later ones nothing more.
        """
        ...

    def release(self, name: str) -> None:
        """Let the kernel drop the mapped pages behind a tensor (of the whole expert for a fused one)."""
        ...

    def linear_format(self, prefix: str) -> LinearFormat | None:
        """How the Linear `prefix` (a name without `.weight`) is stored; None where it is not quantized."""
        ...

    def side_files(self) -> list[Path]:
        """Files to copy beside derived weights: tokenizer, chat template, processor and generation config, licence."""
        ...

    def made_files(self) -> dict[str, bytes]:
        """Such files by name, in Hugging Face's form, where the layout holds them in another; {} in that form."""
        return {}

    def weight_files(self) -> list[Path]:
        """The files that hold tensors, sorted by name."""
        ...

    def forget(self, file: Path) -> None:
        """Let go of a weight file's map: deleted, its disk space is free as soon as nobody holds a view of it."""
        ...

    def close(self) -> None: ...
