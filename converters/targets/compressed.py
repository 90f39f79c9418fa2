"""compressed-tensors as the source stores it: other shards, without the vision tower, the same bits."""

from __future__ import annotations

import json
from copy import deepcopy
from dataclasses import replace
from typing import Any

import torch

from converters.encoders import Plain
from converters.names import TEXT_PREFIX, Row
from converters.quant_config import parse_quantization
from converters.reader import Reader
from converters.targets import Options, Output
from converters.targets.hf import IMAGE_FILES, output_config, shard
from l4tool.core.errors import CheckpointError, UsageError

PATTERN = "re:"


def make(reader: Reader, options: Options) -> Output:
    """See `converters.targets.Target.make`."""
    if reader.quantization is None or not hasattr(reader, "rows"):
        raise UsageError(
            f"{reader.path} is not quantized, and convert changes no values",
            hint=f"use `l4tool quantize {reader.path} --int4 -o OUT` (or --fp8, --mixed)",
        )
    rows: list[Row] = [row for row in reader.rows if row.parts]
    strip = options.text_only and reader.arch.vision is not None
    if strip:
        rows = [replace(row, stored=row.stored.removeprefix(TEXT_PREFIX)) for row in rows if _is_text(row)]
    infos = reader.tensors()

    def dtype_of(row: Row) -> torch.dtype:
        return infos[row.parts[0].name].dtype

    config = output_config(reader, options.text_only, reader.dtype)
    config["quantization_config"] = _stripped(reader) if strip else deepcopy(reader.quantization)
    made = {"config.json": (json.dumps(config, indent=2) + "\n").encode()}
    files = shard(rows, lambda row: Plain(dtype_of(row)), dtype_of, options.shard_bytes)
    return Output(files, made, IMAGE_FILES if options.text_only else (), has_index=True)


def _is_text(row: Row) -> bool:
    return row.parts[0].name.startswith(TEXT_PREFIX)


def _stripped(reader: Reader) -> dict[str, Any]:
    """quantization_config with the modules' text-only names. Raises CheckpointError where a module would then have
    another format."""
    assert reader.quantization is not None
    old, new = reader.quantization, deepcopy(reader.quantization)
    new["ignore"] = [_strip(name) for name in new.get("ignore") or []]
    for group in (new.get("config_groups") or {}).values():
        group["targets"] = [_strip(name) for name in group["targets"]]
    before, after = parse_quantization(old, "config.json"), parse_quantization(new, "the new config.json")
    for name in reader.tensors():
        module = name.rpartition(".")[0]
        if name.startswith(TEXT_PREFIX) and before.format_of(module) != after.format_of(
            module.removeprefix(TEXT_PREFIX)
        ):
            raise CheckpointError(
                f"{reader.path / 'config.json'}: quantization_config would mean another format for {module} "
                "once the vision tower and its prefix are gone",
                hint="leave --text-only away, or convert to --to hf --text-only and quantize again",
            )
    return new


def _strip(name: str) -> str:
    """`language_model.` off a name, or off the beginning of a pattern, however its dot is spelled."""
    if not name.startswith(PATTERN):
        return name.removeprefix(TEXT_PREFIX)
    body = name.removeprefix(PATTERN).removeprefix("^")
    for prefix in (TEXT_PREFIX, TEXT_PREFIX.replace(".", r"\.")):
        body = body.removeprefix(prefix)
    return PATTERN + body
