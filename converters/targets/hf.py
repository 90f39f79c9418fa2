"""Hugging Face's layout, experts fused or one tensor each, multimodal or text only."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import replace
from typing import Any

import torch

from converters.arch_io import arch_from_config
from converters.encoders import DTYPES, Plain
from converters.names import Row, as_matrix, canonical_rows, hf_rows
from converters.reader import Reader
from converters.targets import DEFAULT_SHARD_BYTES, Options, Output, OutputFile, Piece
from converters.writer import TensorSpec, plan_shards
from l4tool.core.arch import Arch
from l4tool.core.errors import CheckpointError

DTYPE_KEYS = ("dtype", "torch_dtype")
IMAGE_FILES = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
# What text_config may leave to the top level of a multimodal config.json.
INHERITED = ("bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings", "transformers_version")


def make(reader: Reader, options: Options) -> Output:
    """See `converters.targets.Target.make`."""
    dtype = DTYPES[options.dtype] if options.dtype else reader.dtype
    config = output_config(reader, options.text_only, dtype)
    arch = output_arch(reader, options.text_only, dtype)
    rows = hf_rows(arch) if options.to == "hf" else canonical_rows(arch)
    kept = [row for row in rows if row.parts]  # a tied lm_head is the embedding
    made = {"config.json": (json.dumps(config, indent=2) + "\n").encode()}
    files = shard(kept, lambda row: Plain(dtype), lambda row: dtype, options.shard_bytes)
    return Output(files, made, () if arch.vision else IMAGE_FILES, has_index=True)


def shard(
    rows: Sequence[Row],
    encoder_of: Callable[[Row], Plain],
    dtype_of: Callable[[Row], torch.dtype],
    shard_bytes: int | None,
) -> list[OutputFile]:
    """safetensors shards of these rows, filled in their order."""
    specs = [TensorSpec(row.stored, row.shape, dtype_of(row)) for row in rows]
    by_name = {row.stored: row for row in rows}
    files = []
    for plan in plan_shards(specs, shard_bytes or DEFAULT_SHARD_BYTES):
        flat = tuple(replace(spec, shape=flat_shape(spec.shape)) for spec in plan.specs)
        inside = {spec.name for spec in plan.specs}
        pieces = [Piece(row, encoder_of(row)) for row in rows if row.stored in inside]
        files.append(OutputFile(replace(plan, specs=flat), pieces))
    assert sum(len(file.pieces) for file in files) == len(by_name)
    return files


def flat_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """[rows, cols] of what has more dimensions; vectors and scalars as they are."""
    return as_matrix(shape) if len(shape) > 2 else shape


def output_arch(reader: Reader, text_only: bool, dtype: torch.dtype) -> Arch:
    """The architecture of what is written."""
    name = str(dtype).removeprefix("torch.")
    if not text_only:
        return replace(reader.arch, dtype=name)
    return Arch(text=reader.arch.text, vision=None, dtype=name)


def output_config(reader: Reader, text_only: bool, dtype: torch.dtype) -> dict[str, Any]:
    """config.json of an unquantized output. Raises CheckpointError should it not say the same architecture."""
    config = {key: deepcopy(value) for key, value in reader.config.items() if key != "quantization_config"}
    _set_dtype(config, str(dtype).removeprefix("torch."))
    if text_only and reader.arch.vision is not None:
        config = _text_only(config)
    wanted = output_arch(reader, text_only, dtype)
    if arch_from_config(config, "the new config.json") != _without_generation(wanted, config):
        raise CheckpointError(
            f"{reader.path / 'config.json'}: its architecture changes when it is rewritten for this layout",
            hint="report this config.json: it says something in a way that convert does not know",
        )
    return config


def _without_generation(arch: Arch, config: dict[str, Any]) -> Arch:
    """Stop ids that generation_config.json adds are not config.json's to say."""
    said = arch_from_config(config, "the new config.json").text.eos_token_ids
    assert set(said) <= set(arch.text.eos_token_ids)
    return replace(arch, text=replace(arch.text, eos_token_ids=said))


def _set_dtype(config: dict[str, Any], name: str) -> None:
    """Under the key that the file uses, wherever it says a dtype; at the top level if it says none."""
    said = False
    parts = [part for part in (config, config.get("text_config"), config.get("vision_config")) if part]
    for part in parts:
        for key in DTYPE_KEYS:
            if part.get(key) is not None:
                part[key], said = name, True
    if not said:
        config["dtype"] = name


def _text_only(config: dict[str, Any]) -> dict[str, Any]:
    """The text_config as a config.json of its own."""
    text: dict[str, Any] = {
        "architectures": ["Llama4ForCausalLM"],
        **config["text_config"],
        "model_type": "llama4_text",
    }
    text["architectures"] = ["Llama4ForCausalLM"]
    for key in (*DTYPE_KEYS, *INHERITED):
        if text.get(key) is None and config.get(key) is not None:
            text[key] = config[key]
    return text
