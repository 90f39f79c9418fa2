"""GGUF files read back: float tensors, architecture, tokenizer. The `gguf` package parses the headers."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from converters.gguf_metadata import CONTROL, VISION_ARCH, arch_from_metadata
from converters.gguf_names import GGUF, ROPE_FREQS, text_rows, vision_rows
from converters.hf_side_files import small_files
from converters.mapped import MappedFile, StoredTensor
from converters.names import Part
from converters.piece_reader import PieceReader, Source
from converters.tiktoken_bpe import bpe_json, merges_of
from l4tool.core.byte_level import unspell
from l4tool.core.errors import CheckpointError, InputMissing, UsageError

MAGIC = b"GGUF"
SUFFIX = ".gguf"
DTYPES = {0: torch.float32, 1: torch.float16, 30: torch.bfloat16}  # GGMLQuantizationType
SIDE_FILES = ("LICENSE*", "NOTICE*", "USE_POLICY*", "README*")
_SPLIT = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf$")


def is_gguf(path: Path) -> bool:
    """A .gguf file, or a folder with such files and no other checkpoint in it."""
    if path.is_dir():
        return any(path.glob(f"*{SUFFIX}")) and not (path / "config.json").is_file()
    return path.suffix == SUFFIX and path.is_file()


class GgufFile(MappedFile):
    """One file: `metadata`, and its tensors in the reverse of GGUF's order of dimensions.

    Raises CheckpointError for anything wrong with the header, and for quantized tensors.
    """

    constants = frozenset({ROPE_FREQS})

    def __init__(self, path: Path) -> None:
        self.metadata: dict[str, Any] = {}
        reader = _parse(path)
        for name, field in reader.fields.items():
            self.metadata[name] = field.contents()
        super().__init__(path, {t.name: _stored(path, t) for t in reader.tensors})


def _parse(path: Path) -> Any:
    try:
        from gguf import GGUFReader
    except ImportError:
        raise UsageError("GGUF needs the package gguf", hint="pip install 'l4tool[gguf]'") from None
    try:
        with open(path, "rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise InputMissing(f"cannot read {path}: {error.strerror or error}", hint="give a .gguf file") from error
    if magic != MAGIC:
        raise CheckpointError(f"{path} is not a GGUF file", hint="download or copy it again")
    try:
        return GGUFReader(path)
    except Exception as error:  # the package checks little: a broken header raises whatever it happens to run into
        raise CheckpointError(f"{path} is not a sound GGUF file: {error}", hint="download or copy it again") from error


def _stored(path: Path, tensor: Any) -> StoredTensor:
    kind = int(tensor.tensor_type)
    if kind not in DTYPES:
        raise CheckpointError(
            f"{path}: tensor {tensor.name!r} is {tensor.tensor_type.name}, of which convert makes no floats",
            hint="convert from the GGUF file in BF16, F16 or F32 that it was quantized from",
        )
    dtype, shape = DTYPES[kind], tuple(int(size) for size in reversed(tensor.shape))
    start, count = int(tensor.data_offset), 1
    for size in shape:
        count *= size
    stop = start + count * dtype.itemsize
    if stop > path.stat().st_size:
        raise CheckpointError(f"{path} is truncated: tensor {tensor.name!r} ends at byte {stop}")
    return StoredTensor(tensor.name, dtype, shape, start, stop, path)


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
            sources += _sources(vision, vision_rows(arch.vision, arch.text.hidden_size))
        folder = path if path.is_dir() else path.parent
        side = sorted({file for pattern in SIDE_FILES for file in folder.glob(pattern) if file.is_file()})
        super().__init__(folder, GGUF, arch, config, sources, self._hf_files, side, lambda name: tuple(DTYPES.values()))

    def dtype_of(self, stored: StoredTensor) -> torch.dtype:
        return self.dtype

    def values(self, piece: Part, stored: StoredTensor, view: torch.Tensor) -> torch.Tensor:
        return view.to(self.dtype)

    def _hf_files(self) -> dict[str, bytes]:
        files = small_files(self.arch)
        files["tokenizer.json"] = _tokenizer(self._text.metadata, str(self._text.files[0].path)).encode()
        template = self._text.metadata.get("tokenizer.chat_template")
        if isinstance(template, str):
            files["chat_template.jinja"] = template.encode()
        return files


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
    vision = by_arch[True]
    return _joined(by_arch[False], path), _joined(vision, path) if vision else None


def _wanted(file: Path, path: Path) -> bool:
    """The file itself, the other parts of it, and a vision tower."""
    ours, theirs = _SPLIT.match(path.name), _SPLIT.match(file.name)
    same = file == path or (ours is not None and theirs is not None and ours[1] == theirs[1] and ours[3] == theirs[3])
    return same or file.name.startswith("mmproj")


def _joined(files: list[GgufFile], path: Path) -> _Model:
    """One model of one file or of all parts of a split. Raises CheckpointError or InputMissing."""
    counts = {int(file.metadata.get("split.count", 1)) for file in files}
    if len(counts) > 1 or (counts == {1} and len(files) > 1):
        names = ", ".join(file.path.name for file in files[:4])
        raise CheckpointError(f"{path} holds several models: {names}", hint="give one of the files instead")
    parts = {int(file.metadata.get("split.no", 0)): file for file in files}
    missing = sorted(set(range(counts.pop())) - set(parts))
    if missing:
        raise InputMissing(f"{path}: part {missing[0] + 1} of the split model is missing", hint="finish the download")
    return _Model([parts[number] for number in sorted(parts)])


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
            if tensor.dtype == dtype or name == ROPE_FREQS:
                continue
            values = file.view(name)
            if not torch.equal(values.to(dtype).to(values.dtype), values):
                return "float32"
    return str(dtype).removeprefix("torch.")


def _with_sizes(vision: _Model) -> dict[str, Any]:
    """Its metadata, and the size that only a tensor tells."""
    found = vision.tensor("mm.model.mlp.2.weight")
    return vision.metadata | ({"mm.model.mlp.2": found[1].shape[0]} if found else {})


def _tokenizer(metadata: dict[str, Any], where: str) -> str:
    """tokenizer.json out of the tokens and merges. Raises CheckpointError for another kind of tokenizer."""
    try:
        kinds, tokens = metadata["tokenizer.ggml.token_type"], metadata["tokenizer.ggml.tokens"]
        merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
        if metadata["tokenizer.ggml.model"] != "gpt2" or metadata["tokenizer.ggml.pre"] != "llama4":
            raise ValueError(f"{metadata['tokenizer.ggml.model']}/{metadata['tokenizer.ggml.pre']}")
        first = kinds.index(CONTROL)
        base = [unspell(token) for token in tokens[:first]]
    except (KeyError, ValueError, AttributeError, TypeError) as error:
        raise CheckpointError(
            f"{where}: its tokenizer is not Llama 4's ({error})", hint="convert the model anew"
        ) from error
    whole = {(tokens[left], tokens[right]) for left, right in merges_of(base)}
    pairs = [(merge[0], merge[1]) for merge in merges]
    special = [token for token, kind in zip(tokens[first:], kinds[first:], strict=True) if kind == CONTROL]
    return bpe_json(tokens[:first], pairs, special, ignore_merges=set(pairs) == whole)
