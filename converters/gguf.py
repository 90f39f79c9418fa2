"""GGUF files read back: float tensors, architecture, tokenizer."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from converters.gguf_file import DTYPES, GgufFile
from converters.gguf_metadata import VISION_ARCH, arch_from_metadata
from converters.gguf_names import GGUF, ROPE_FREQS, text_rows, vision_rows
from converters.gguf_tokenizer import hf_files
from converters.mapped import StoredTensor
from converters.names import Part, Row
from converters.piece_reader import PieceReader, Source
from l4tool.core.errors import CheckpointError, InputMissing

SUFFIX = ".gguf"
COMPARED = 1 << 24  # values at a time, to see whether a narrower dtype holds them
MAX_PARTS = 1 << 16
SIDE_FILES = ("LICENSE*", "NOTICE*", "USE_POLICY*", "README*")
_SPLIT = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf$")


def is_gguf(path: Path) -> bool:
    """A .gguf file, or a folder with such files and no other checkpoint in it."""
    if path.is_dir():
        return any(path.glob(f"*{SUFFIX}")) and not (path / "config.json").is_file()
    return path.suffix == SUFFIX and path.is_file()


@dataclass(frozen=True)
class _Model:
    """A model's files (parts of one split), and its metadata: those of the first."""

    files: list[GgufFile]

    @property
    def metadata(self) -> dict[str, Any]:
        return self.files[0].metadata

    def tensor(self, name: str) -> tuple[GgufFile, StoredTensor] | None:
        for file in self.files:
            if name in file.tensors:
                return file, file.tensors[name]
        return None


class GgufReader(PieceReader):
    """Canonical tensors out of GGUF files.

    What is always stored in float32 (norms, router) is given in the checkpoint's dtype, which holds it exactly: a
    checkpoint with such values that its dtype does not hold is given in float32 altogether.
    """

    def __init__(self, path: Path) -> None:
        text, vision = _models(path)
        self._text = text
        where = str(text.files[0].path)
        dtype = _dtype(text, vision)
        factors = text.tensor(ROPE_FREQS)
        scaling = factors[0].view(ROPE_FREQS).tolist() if factors else None
        seen = None if vision is None else _with_sizes(vision)
        arch, config = arch_from_metadata(text.metadata, seen, scaling, dtype, where)
        sources = _sources(text, text_rows(arch.text))
        if vision is not None and arch.vision is not None:
            sources += _sources(vision, _spelled(vision, vision_rows(arch.vision, arch.text.hidden_size)))
        folder = path if path.is_dir() else path.parent
        side = sorted({file for pattern in SIDE_FILES for file in folder.glob(pattern) if file.is_file()})
        super().__init__(folder, GGUF, arch, config, sources, self._hf_files, side, lambda name: tuple(DTYPES.values()))

    def dtype_of(self, stored: StoredTensor) -> torch.dtype:
        return self.dtype

    def values(self, piece: Part, stored: StoredTensor, view: torch.Tensor) -> torch.Tensor:
        return view.to(self.dtype)

    def from_bytes(self, name: str, raw: torch.Tensor) -> torch.Tensor:
        return super().from_bytes(name, raw).to(self.dtype)

    def _hf_files(self) -> dict[str, bytes]:
        return hf_files(self._text.metadata, self.arch, str(self._text.files[0].path))


def open_gguf(path: Path) -> GgufReader:
    """Open a .gguf file (the first part of a split one) with the mmproj beside it, or a folder of such files."""
    return GgufReader(path)


def _models(path: Path) -> tuple[_Model, _Model | None]:
    """The language model, and the vision tower where there is one beside it. Raises CheckpointError for several."""
    folder = path if path.is_dir() else path.parent
    found = [GgufFile(file) for file in sorted(folder.glob(f"*{SUFFIX}")) if path.is_dir() or _wanted(file, path)]
    by_arch: dict[bool, list[GgufFile]] = {True: [], False: []}
    for file in found:
        by_arch[file.metadata.get("general.architecture") == VISION_ARCH].append(file)
    if not by_arch[False]:
        raise CheckpointError(
            f"{path} has no language model in GGUF", hint="give the model's .gguf file, not its mmproj"
        )
    text, towers = _joined(by_arch[False], path), by_arch[True]
    if len(towers) > 1:  # repositories offer one tower in several types
        kind = text.metadata.get("general.file_type")
        towers = [file for file in towers if file.metadata.get("general.file_type") == kind] or towers
    return text, _joined(towers, path) if towers else None


def _wanted(file: Path, path: Path) -> bool:
    """The file itself, the other parts of it, and what may be a vision tower."""
    ours, theirs = _SPLIT.match(path.name), _SPLIT.match(file.name)
    same = file == path or (ours is not None and theirs is not None and ours[1] == theirs[1] and ours[3] == theirs[3])
    return same or "mmproj" in file.name.lower()


def _joined(files: list[GgufFile], path: Path) -> _Model:
    """One model of one file or of all parts of a split. Raises CheckpointError or InputMissing."""
    count = _number(files[0], "split.count", 1)
    stems = {split[1] if (split := _SPLIT.match(file.path.name)) else file.path.name for file in files}
    if len(stems) > 1 or any(_number(file, "split.count", 1) != count for file in files):
        names = ", ".join(file.path.name for file in files[:4])
        raise CheckpointError(f"{path} holds several models: {names}", hint="leave one of them in the folder")
    parts = {_number(file, "split.no", 0): file for file in files}
    missing = sorted(set(range(count)) - set(parts))
    if missing:
        raise InputMissing(f"{path}: part {missing[0] + 1} of the split model is missing", hint="finish the download")
    total = sum(len(file.tensors) for file in files)
    if len(files) != count or total != _number(files[0], "split.tensors.count", total):
        raise CheckpointError(f"{path}: the parts are not of one model", hint="download or convert it again")
    return _Model([parts[number] for number in sorted(parts)])


def _number(file: GgufFile, key: str, default: int) -> int:
    value = file.metadata.get(key, default)
    if not isinstance(value, int) or not 0 <= value < MAX_PARTS:
        raise CheckpointError(f"{file.path}: {key} is {str(value)[:40]!r}", hint="download or copy it again")
    return value


def _spelled(vision: _Model, rows: list[Row]) -> list[Row]:
    """The converter with gguf 0.19 calls a layer's second norm what it calls Gemma 4's: both are named alike in HF."""
    if vision.tensor("v.blk.0.ln2.weight") or not vision.tensor("v.blk.0.attn_post_norm.weight"):
        return rows
    return [replace(row, stored=row.stored.replace(".ln2.", ".attn_post_norm.")) for row in rows]


def _sources(model: _Model, rows: Iterable[Any]) -> list[Source]:
    """Each file with the rows of the tensors that it holds; what none holds is asked of the first."""
    by_file: dict[Path, list[Any]] = {file.path: [] for file in model.files}
    for row in rows:
        found = model.tensor(row.stored)
        by_file[found[0].path if found else model.files[0].path].append(row)
    return [Source(file, by_file[file.path], lambda name: name == ROPE_FREQS) for file in model.files]


def _dtype(text: _Model, vision: _Model | None) -> str:
    """The dtype that holds every value: that of the embedding, float32 where a float32 tensor has finer values."""
    embedding = text.tensor("token_embd.weight")
    if embedding is None:
        raise CheckpointError(f"{text.files[0].path} has no token_embd.weight", hint="give a whole model")
    dtype = embedding[1].dtype
    for file in [*text.files, *(vision.files if vision else ())]:
        for name, tensor in file.tensors.items():
            if dtype not in (tensor.dtype, torch.float32) and name != ROPE_FREQS and not _holds(dtype, file.view(name)):
                return "float32"
    return str(dtype).removeprefix("torch.")


def _holds(dtype: torch.dtype, values: torch.Tensor) -> bool:
    return all(torch.equal(v.to(dtype).to(v.dtype), v) for v in values.reshape(-1).split(COMPARED))


def _with_sizes(vision: _Model) -> dict[str, Any]:
    """Its metadata, and the size that only a tensor tells."""
    found = vision.tensor("mm.model.mlp.2.weight")
    return vision.metadata | ({"mm.model.mlp.2": found[1].shape[0]} if found else {})
