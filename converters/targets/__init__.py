"""The layouts that convert writes: one module each, named in one table."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from converters.names import Row
    from converters.reader import Reader
    from converters.writer import ShardPlan
    from converters.writing.encoder import Encoder

DEFAULT_SHARD_BYTES = 5 * 10**9


@dataclass(frozen=True)
class Options:
    """What to make. None: as the source has it, or the target's own default."""

    to: str
    dtype: str | None = None  # "bf16", "f16", "f32"; for GGUF its own types too
    text_only: bool = False
    shards: int | None = None  # how many files, where the layout asks (Meta: tensor-parallel ranks)
    shard_bytes: int | None = None  # most bytes in a file, where the layout lets us choose


@dataclass(frozen=True)
class Piece:
    """One tensor of an output file: what it is made of, and how its values are stored."""

    row: Row
    encoder: Encoder


@dataclass(frozen=True)
class OutputFile:
    """One file with tensors. The plan's tensors are matrices ([n] for vectors), whatever shape the header says."""

    plan: ShardPlan
    pieces: list[Piece]


@dataclass(frozen=True)
class Output:
    """All that convert writes, from headers alone.

    `made`: files beside the weights by name. `drop`: name patterns of the source's side files that do not fit.
    `last`: the file of `made` that makes the folder a checkpoint; None where the weight files alone do. `has_index`:
    safetensors' index is written.
    """

    files: list[OutputFile]
    made: Mapping[str, bytes] = field(default_factory=dict)
    drop: tuple[str, ...] = ()
    last: str | None = "config.json"
    has_index: bool = False


@dataclass(frozen=True)
class Target:
    """One row of the table. `options`: those of `Options` that it takes. `floats`: quantized sources come as floats.
    `dtypes`: what `dtype` may be."""

    module: str
    title: str
    options: tuple[str, ...]
    floats: bool = True
    dtypes: tuple[str, ...] = ("bf16", "f16", "f32")

    def make(self, reader: Reader, options: Options) -> Output:
        """What this target makes of a checkpoint. Raises UsageError or CheckpointError where it cannot."""
        function: Callable[[Any, Options], Output] = importlib.import_module(self.module).make
        return function(reader, options)


TARGETS = {
    "hf": Target(
        "converters.targets.hf", "Hugging Face, experts fused", ("dtype", "text_only", "shard_bytes")
    ),
    "hf-experts": Target(
        "converters.targets.hf", "Hugging Face, one tensor per expert", ("dtype", "text_only", "shard_bytes")
    ),
    "meta": Target("converters.targets.meta", "Meta", ("dtype", "text_only", "shards")),
    "gguf": Target(
        "converters.targets.gguf", "GGUF (llama.cpp)", ("dtype", "text_only", "shard_bytes"),
        dtypes=("bf16", "f16", "f32", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0"),
    ),
    "compressed-tensors": Target(
        "converters.targets.compressed", "compressed-tensors", ("text_only", "shard_bytes"), floats=False
    ),
}  # fmt: skip
