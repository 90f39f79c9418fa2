"""The reader of every layout: a checkpoint folder seen through a table of rows."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from converters.folder import CheckpointFolder
from converters.names import EMBEDDING, LM_HEAD, Part, Row
from converters.quant_config import LinearFormat
from converters.reader import Extent, Reader, TensorInfo
from converters.safetensors_io import SafetensorsFile
from converters.transforms import part_view
from l4tool.core.arch import Arch


class TableReader(Reader):
    """Reads a folder through `rows`. See `converters.reader.Reader` for the contract; safe for several threads.

    `dtypes`: stored name → the dtypes it may have, where that is not the config's dtype. `formats`: canonical Linear
    name (without `.weight`) → how it is stored, for the quantized ones. Where the folder's `report` goes on after a
    fault, the tensors that are not as they must be are left out.
    """

    def __init__(
        self,
        folder: CheckpointFolder,
        rows: list[Row],
        layout: str,
        dtypes: Mapping[str, tuple[torch.dtype, ...]] | None = None,
        formats: Mapping[str, LinearFormat] | None = None,
    ) -> None:
        self.folder = folder
        self.path: Path = folder.path
        self.arch: Arch = folder.arch
        self.layout = layout
        self.quantization: dict[str, Any] | None = folder.quantization
        self.config: dict[str, Any] = folder.config
        self.dtype: torch.dtype = getattr(torch, folder.arch.dtype)
        self._formats = dict(formats or {})
        plain, dtypes = (self.dtype,), dtypes or {}
        expected = {row.stored: (row.shape, dtypes.get(row.stored, plain)) for row in rows}
        sound = folder.check(expected, {row.stored for row in rows if not row.required})
        self.rows = [row for row in rows if row.stored in sound]
        self._where: dict[str, tuple[str, Part]] = {
            part.name: (row.stored, part) for row in rows if row.stored in sound for part in row.parts
        }
        self._infos = {name: self._info(stored, part) for name, (stored, part) in self._where.items()}

    def _info(self, stored_name: str, part: Part) -> TensorInfo:
        stored = self.folder.stored[stored_name]
        nbytes = math.prod(part.shape) * stored.dtype.itemsize
        return TensorInfo(part.name, part.shape, stored.dtype, nbytes, stored.file)

    def tensors(self) -> dict[str, TensorInfo]:
        """Every canonical tensor; a tied lm_head is not listed (`read` still gives the embedding for it)."""
        return self._infos

    def read(self, name: str, rows: slice | None = None) -> torch.Tensor:
        """A zero-copy view, [out, in] for every Linear; a fused expert gives a strided one. KeyError if unknown."""
        stored, part = self._find(name)
        tensor = part_view(self.folder.view(stored), part)
        return tensor if rows is None else tensor[rows]

    def pieces(self, name: str, rows: slice) -> list[tuple[Part, torch.Tensor]]:
        """All of it as one piece, which costs no more than its rows. KeyError if unknown."""
        tensor = self.read(name)
        return [(Part(name, tuple(tensor.shape)), tensor)]

    def extent(self, name: str) -> Extent:
        """Where the bytes behind a tensor lie (all of the expert's for a fused one). KeyError if unknown."""
        file, start, stop = self._bytes_of(name)
        return Extent(file.path, start, stop)

    def from_bytes(self, name: str, raw: torch.Tensor) -> torch.Tensor:
        """What `read(name)` gives, out of a copy of its extent's bytes (uint8), sharing their memory where the dtype's
        alignment allows."""
        stored, part = self._find(name)
        tensor = self.folder.stored[stored]
        aligned = raw if raw.data_ptr() % tensor.dtype.itemsize == 0 else raw.clone()
        if not part.transposed:
            return aligned.view(tensor.dtype).view(tensor.shape)
        return part_view(aligned.view(tensor.dtype).view(1, *tensor.shape[1:]), replace(part, row=0))

    def prefetch(self, name: str, rows: slice | None = None) -> None:
        """Start reading a tensor's bytes (all of the expert's for a fused one) into the page cache."""
        if rows is not None and rows.start:
            return  # asked for with its first rows
        file, start, stop = self._bytes_of(name)
        file.prefetch(start, stop)

    def release(self, name: str) -> None:
        """Drop the mapped pages behind a tensor that is not needed any more (all of the expert's for a fused one)."""
        file, start, stop = self._bytes_of(name)
        file.release(start, stop)

    def linear_format(self, prefix: str) -> LinearFormat | None:
        """How the Linear `prefix` (canonical, without `.weight`) is stored; None where it is not quantized."""
        return self._formats.get(prefix)

    def stored_name(self, name: str) -> str:
        """What the file calls the tensor that holds the canonical one. KeyError if unknown."""
        return self._find(name)[0]

    def side_files(self) -> list[Path]:
        """Files to copy beside derived weights: tokenizer, chat template, processor and generation config, licence."""
        return self.folder.side_files()

    def weight_files(self) -> list[Path]:
        """The shards, sorted by name."""
        return sorted(self.folder.files)

    def forget(self, file: Path) -> None:
        """Let go of a weight file's map: deleted, its disk space is free as soon as nobody holds a view of it."""
        self.folder.files[file].close()

    def close(self) -> None:
        self.folder.close()

    def _find(self, name: str) -> tuple[str, Part]:
        if name == LM_HEAD and self.arch.text.tie_word_embeddings:
            name = EMBEDDING
        return self._where[name]

    def _bytes_of(self, name: str) -> tuple[SafetensorsFile, int, int]:
        """(file, start, stop) of the bytes to touch for a canonical tensor."""
        stored, part = self._find(name)
        tensor = self.folder.stored[stored]
        start, stop = tensor.start, tensor.stop
        if part.transposed:  # one expert's rows of a fused tensor [E, in, out']
            per_row = tensor.shape[-1] * tensor.dtype.itemsize
            start += part.row * per_row
            stop = start + tensor.shape[-2] * per_row
        return self.folder.files[tensor.file], start, stop
