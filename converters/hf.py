"""The unquantized Hugging Face layouts: fused experts, multimodal or text-only, and per-expert."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from converters.folder import CheckpointFolder
from converters.names import EMBEDDING, LM_HEAD, MULTIMODAL_HF, TEXT_HF, Part, Row
from converters.quant_config import LinearFormat
from converters.reader import TensorInfo
from converters.transforms import part_view
from l4tool.core.arch import Arch


class HFReader:
    """Reads a folder through a name table (`rows`). See `converters.reader.Reader` for the contract."""

    def __init__(self, folder: CheckpointFolder, rows: list[Row], layout: str | None = None) -> None:
        self.folder = folder
        self.path: Path = folder.path
        self.arch: Arch = folder.arch
        self.layout = layout or (TEXT_HF if folder.arch.vision is None else MULTIMODAL_HF)
        self.quantization: dict[str, Any] | None = folder.quantization
        self.config: dict[str, Any] = folder.config
        self.dtype: torch.dtype = getattr(torch, folder.arch.dtype)
        folder.check({row.stored: (row.shape, self.dtype) for row in rows}, [r.stored for r in rows if not r.required])
        self._where: dict[str, tuple[str, Part]] = {part.name: (row.stored, part) for row in rows for part in row.parts}
        self._infos = {name: self._info(stored, part) for name, (stored, part) in self._where.items()}

    def _info(self, stored: str, part: Part) -> TensorInfo:
        count = 1
        for size in part.shape:
            count *= size
        nbytes = count * self.dtype.itemsize
        return TensorInfo(part.name, part.shape, self.dtype, nbytes, self.folder.stored[stored].file)

    def tensors(self) -> dict[str, TensorInfo]:
        """Every canonical tensor; a tied lm_head is not listed (`read` still gives the embedding for it)."""
        return self._infos

    def read(self, name: str, rows: slice | None = None) -> torch.Tensor:
        """A zero-copy view [out, in] (or any rank for norms and embeddings); fused experts give a strided one."""
        stored, part = self._find(name)
        return part_view(self.folder.view(stored), part, rows)

    def release(self, name: str) -> None:
        """Drop the mapped pages behind a tensor that is not needed any more (all of the expert's for a fused one)."""
        stored, part = self._find(name)
        tensor = self.folder.stored[stored]
        start, stop = tensor.start, tensor.stop
        if part.expert is not None:
            per_expert = tensor.nbytes // tensor.shape[0]
            start += part.expert * per_expert
            stop = start + per_expert
        self.folder.files[tensor.file].release(start, stop)

    def linear_format(self, prefix: str) -> LinearFormat | None:
        """Nothing is quantized in this layout."""
        return None

    def side_files(self) -> list[Path]:
        """Files to copy beside derived weights: tokenizer, chat template, processor and generation config, licence."""
        return self.folder.side_files()

    def weight_files(self) -> list[Path]:
        """The shards, sorted by name."""
        return sorted(self.folder.files)

    def close(self) -> None:
        self.folder.close()

    def _find(self, name: str) -> tuple[str, Part]:
        if name == LM_HEAD and self.arch.text.tie_word_embeddings:
            name = EMBEDDING
        return self._where[name]
