"""GGUF for llama.cpp: the language model with its tokenizer in one file or several, the vision tower beside it."""

from __future__ import annotations

import contextlib
import json
import logging
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from converters.encoders import DTYPES, Plain
from converters.gguf_metadata import (
    ARCH,
    CONFIG_KEY,
    VISION_ARCH,
    require_expressible,
    rope_factors,
    text_metadata,
    vision_metadata,
)
from converters.gguf_names import ROPE_FREQS, is_always_f32, text_rows, vision_rows
from converters.gguf_tokenizer import tell_tokenizer
from converters.gguf_types import FILE_TYPES, QUANTIZED, Blocks, block_bytes
from converters.names import Row
from converters.origin import Origin, read_origin
from converters.reader import Reader
from converters.side_sources import side_object
from converters.targets import Options, Output, OutputFile, Piece
from converters.targets.hf import flat_shape, output_arch, output_config
from converters.writer import ShardPlan, TensorSpec
from converters.writing.encoder import Encoder
from l4tool.core.arch import Arch
from l4tool.core.errors import UsageError

# The embedding and the output decide every token: below 8 bits they stay at 8, as llama.cpp's own mixtures keep them.
KEPT_AT_8_BITS, EIGHT_BITS = ("token_embd.weight", "output.weight"), "q8_0"
DROPPED = ("*.json", "*.jinja", "tokenizer.model")  # what the metadata say
NAMES = {torch.bfloat16: "bf16", torch.float16: "f16", torch.float32: "f32"}


def make(reader: Reader, options: Options) -> Output:
    """See `converters.targets.Target.make`. Raises UsageError where the `gguf` package is not there, too."""
    _require_package()
    kind = options.dtype or NAMES[reader.dtype]
    arch = output_arch(reader, options.text_only, reader.dtype)
    require_expressible(arch)
    origin = read_origin(reader.path, reader.config)
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", origin.name).strip("-.") or "model"
    files = _files(f"{name}-{kind.upper()}.gguf", _TextFile(reader, arch, origin, kind, options), options.shard_bytes)
    if arch.vision is not None:
        seen = "bf16" if kind in QUANTIZED else kind
        files += _files(f"mmproj-{name}-{seen.upper()}.gguf", _VisionFile(reader, arch, origin, seen), None)
    return Output(files, drop=DROPPED, last=None)


def _require_package() -> None:
    try:
        import gguf  # noqa: F401
    except ImportError:
        raise UsageError("GGUF needs the package gguf", hint="pip install 'l4tool[gguf]'") from None


class _File:
    """One model file's rows and metadata."""

    arch_name: str
    rows: list[Row]

    def __init__(self, reader: Reader, arch: Arch, origin: Origin, kind: str) -> None:
        self.reader, self.arch, self.origin, self.kind = reader, arch, origin, kind

    def type_of(self, row: Row) -> str:
        """Name of the type that a tensor is stored in."""
        return "f32" if is_always_f32(row) else self.kind

    def encoder(self, row: Row) -> Encoder:
        kind = self.type_of(row)
        return Blocks(kind) if kind in QUANTIZED else Plain(DTYPES[kind])

    def constants(self) -> dict[str, np.ndarray[Any, Any]]:
        """Tensors that no canonical one is behind."""
        return {}

    def tell(self, writer: Any) -> None:
        """Every key but those of tensors and splits."""
        writer.add_name(self.origin.name)
        if self.origin.licence_id:
            writer.add_license(self.origin.licence_id)
        if self.origin.repo:
            writer.add_base_model_count(1)
            writer.add_base_model_name(0, self.origin.repo.split("/")[1])
            writer.add_base_model_organization(0, self.origin.repo.split("/")[0])
            writer.add_base_model_repo_url(0, f"https://huggingface.co/{self.origin.repo}")
        writer.add_file_type(FILE_TYPES[self.kind])
        writer.add_quantization_version(2)  # of the block formats: GGML_QNT_VERSION


class _TextFile(_File):
    arch_name = ARCH

    def __init__(self, reader: Reader, arch: Arch, origin: Origin, kind: str, options: Options) -> None:
        super().__init__(reader, arch, origin, kind)
        self.rows = text_rows(arch.text)
        self.config = output_config(reader, options.text_only, reader.dtype)

    def type_of(self, row: Row) -> str:
        low = self.kind in QUANTIZED and block_bytes(self.kind) < block_bytes(EIGHT_BITS)
        return EIGHT_BITS if low and row.stored in KEPT_AT_8_BITS else super().type_of(row)

    def constants(self) -> dict[str, np.ndarray[Any, Any]]:
        factors = rope_factors(self.arch.text)
        return {} if factors is None else {ROPE_FREQS: np.array(factors, dtype=np.float32)}

    def tell(self, writer: Any) -> None:
        writer.add_type("model")
        super().tell(writer)
        for _, method_name, value in text_metadata(self.arch):
            getattr(writer, method_name)(value)
        writer.add_string(CONFIG_KEY, json.dumps(self.config))
        tell_tokenizer(writer, self.reader, self.arch)


class _VisionFile(_File):
    arch_name = VISION_ARCH

    def __init__(self, reader: Reader, arch: Arch, origin: Origin, kind: str) -> None:
        super().__init__(reader, arch, origin, kind)
        assert arch.vision is not None
        self.vision = arch.vision
        self.rows = vision_rows(arch.vision, arch.text.hidden_size)

    def type_of(self, row: Row) -> str:
        kind = super().type_of(row)
        return "f32" if row.stored == "v.patch_embd.weight" and kind == "bf16" else kind  # im2col knows no bf16

    def tell(self, writer: Any) -> None:
        writer.add_type("mmproj")
        super().tell(writer)
        processor = side_object(self.reader, "preprocessor_config.json")
        for method, value in vision_metadata(self.vision, self.arch.text.hidden_size, processor):
            getattr(writer, method)(value)


def _files(file_name: str, model: _File, max_bytes: int | None) -> list[OutputFile]:
    """The file, or its parts of at most `max_bytes`, named as llama.cpp finds them."""
    writer, specs = _filled(model, max_bytes)
    constants, by_name = model.constants(), {row.stored: row for row in model.rows}
    files = []
    for name, header, tensors in _headers(writer, file_name):
        starts, at = {}, len(header)
        for tensor in tensors:
            starts[tensor] = at
            size = constants[tensor].nbytes if tensor in constants else specs[tensor].nbytes
            at += size + -size % writer.data_alignment
        rest = [(starts[tensor], constants[tensor].tobytes()) for tensor in tensors if tensor in constants]
        inside = [tensor for tensor in tensors if tensor not in constants]
        rest.append((at, b""))  # padding behind the last tensor belongs to the file
        plan = ShardPlan(name, tuple(specs[tensor] for tensor in inside), header, starts, tuple(rest))
        pieces = [Piece(by_name[tensor], model.encoder(by_name[tensor])) for tensor in inside]
        files.append(OutputFile(plan, pieces))
    return files


def _filled(model: _File, max_bytes: int | None) -> tuple[Any, dict[str, TensorSpec]]:
    """The package's writer with every key and tensor told, and what is to be written of each tensor."""
    from gguf import GGMLQuantizationType, GGUFWriter, size_label

    writer, specs = GGUFWriter(None, model.arch_name, split_max_size=max_bytes or 0), {}
    model.tell(writer)
    for name, values in model.constants().items():
        writer.add_tensor_info(name, values.shape, values.dtype, values.nbytes)
    for row in model.rows:
        kind = model.type_of(row)
        qtype, shape = GGMLQuantizationType[kind.upper()], flat_shape(row.shape)
        if kind in QUANTIZED:
            spec = TensorSpec(row.stored, (shape[0], shape[1] // 32 * block_bytes(kind)), torch.uint8)
            if shape[1] % 32:
                raise UsageError(f"{row.stored} has {shape[1]} inputs, {kind} packs 32 at a time", hint="--dtype bf16")
            byte_shape = (*row.shape[:-1], spec.shape[1])
            writer.add_tensor_info(row.stored, byte_shape, np.dtype(np.uint8), spec.nbytes, raw_dtype=qtype)
        else:
            spec = TensorSpec(row.stored, shape, DTYPES[kind])
            writer.add_tensor_info(row.stored, row.shape, np.dtype(np.float32), spec.nbytes, raw_dtype=qtype)
        specs[row.stored] = spec
    writer.add_size_label(size_label(*writer.get_total_parameter_count()))
    return writer, specs


def _headers(writer: Any, file_name: str) -> Iterator[tuple[str, bytes, list[str]]]:
    """(file name, header up to the first tensor, tensors in order) of each file, as the package writes them."""
    with tempfile.TemporaryDirectory(prefix="l4tool-") as folder, _quiet():
        writer.open_output_file(Path(folder) / file_name)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        paths = [Path(file.name) for file in writer.fout]
        tensors = [list(inside) for inside in writer.tensors]
        writer.close()
        for path, inside in zip(paths, tensors, strict=True):
            header = path.read_bytes()
            yield path.name, header + b"\0" * (-len(header) % writer.data_alignment), inside


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The package logs each file that it would write."""
    logger = logging.getLogger("gguf.gguf_writer")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before
