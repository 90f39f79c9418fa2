"""Every weight of a checkpoint into memory: mapped for a CPU, read ahead by several threads for a device."""

from __future__ import annotations

from typing import Any, cast

import torch

from batch.kernels import ops
from batch.model.vision import VisionWeights, load_vision
from batch.model.weights import Loader, TextWeights, load_text
from converters.disk import WeightFiles
from converters.read_ahead import ReadAhead
from converters.reader import Reader


class _Noting:
    """A Reader that notes what is read."""

    def __init__(self, reader: Reader) -> None:
        self._reader = reader
        self.names: list[str] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._reader, name)

    def read(self, name: str) -> torch.Tensor:
        self.names.append(name)
        return self._reader.read(name)

    def release(self, name: str) -> None:
        """Nothing was touched."""


def load_weights(
    reader: Reader, device: torch.device, dtype: torch.dtype, activations: str
) -> tuple[TextWeights, VisionWeights | None]:
    """Every weight. For a device the tensors are read ahead, in the order in which loading to nowhere asks for them.
    Raises CheckpointError, UsageError, InputMissing."""
    if not ops.has_cuda_kernels(device) or not reader.weight_files():
        return _load_all(Loader(reader, device, dtype, activations))
    noting = cast("Any", _Noting(reader))
    _load_all(Loader(noting, torch.device("meta"), dtype))
    files = WeightFiles(reader.weight_files(), keep_cached=True)
    ahead = ReadAhead(reader, files)
    try:
        ahead.expect(noting.names)
        return _load_all(Loader(cast("Any", ahead), device, dtype, activations))
    finally:
        ahead.finish()
        files.close()


def _load_all(loader: Loader) -> tuple[TextWeights, VisionWeights | None]:
    arch = loader.reader.arch
    text = load_text(loader, arch.text)
    return text, load_vision(loader, arch.vision) if arch.vision is not None else None
