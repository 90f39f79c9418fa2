"""The compressed-tensors layout: per-expert Linears, some of them stored as quantized parts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from converters import quant_config
from converters.findings import Finding
from converters.folder import CheckpointFolder
from converters.names import COMPRESSED, TEXT_PREFIX, Part, Row, is_linear
from converters.quant_config import LinearFormat, QuantizationSpec, parse_quantization
from converters.table_reader import TableReader
from l4tool.core.errors import CheckpointError
from l4tool.core.placeholder import is_placeholder

FLOATS = (torch.bfloat16, torch.float16, torch.float32)
SHAPE_DTYPES = (torch.int64, torch.int32)
CODE_DTYPES = {True: (torch.int32,), False: (torch.int8,)}  # of integers, packed or not
WORD_BITS = 32
ACTIVATION_SCALES = (
    "input_scale", "input_zero_point", "output_scale", "output_zero_point", "q_scale", "k_scale", "v_scale",
    "q_zero_point", "k_zero_point", "v_zero_point",
)  # fmt: skip
QUANTIZED = ("weight_scale", "weight_packed", "weight_zero_point", "weight_shape")  # signs of a quantized module
Expected = tuple[str, tuple[int, ...], tuple[torch.dtype, ...]]  # last name, shape, allowed dtypes


def open_compressed(folder: CheckpointFolder, rows: list[Row], foreign: bool = False) -> TableReader:
    """A reader whose `tensors()` lists the stored parts of quantized Linears under canonical names
    (`….gate_proj.weight_packed`, `.weight_scale`, `.weight_shape`, …, or FP8 `.weight` and `.weight_scale`).

    `rows` is the unquantized table: per-expert, or fused when the experts are stored unquantized. `foreign`: formats
    that can only be dequantized are opened too. Raises CheckpointError.
    """
    assert folder.quantization is not None
    where = str(folder.path / "config.json")
    spec = parse_quantization(folder.quantization, where)
    table: list[Row] = []
    dtypes: dict[str, tuple[torch.dtype, ...]] = {}
    formats: dict[str, LinearFormat] = {}
    shapes: dict[str, tuple[int, int]] = {}
    for row in rows:
        form = _format(spec, row, folder)
        if form is None:
            table.append(row)
            continue
        prefix, (out, inner) = row.parts[0].name.removesuffix(".weight"), row.shape
        formats[prefix], shapes[prefix] = form, (out, inner)
        module = row.stored.removesuffix(".weight")
        if form.group_size and inner % form.group_size:
            size = form.group_size
            raise CheckpointError(f"{where}: {module} has {inner} inputs, which group_size {size} does not divide")
        for suffix, shape, allowed in stored_parts(form, out, inner):
            stored = f"{module}.{suffix}"
            table.append(Row(stored, shape, (Part(f"{prefix}.{suffix}", shape),)))
            dtypes[stored] = allowed
    if not foreign and (finding := _foreign_feature(folder.path, spec, formats)) is not None:
        raise CheckpointError(finding.message, hint=finding.hint)
    for row in _activation_scales(folder, rows):
        table.append(row)
        dtypes[row.stored] = (folder.stored[row.stored].dtype,)
    reader = TableReader(folder, table, COMPRESSED, dtypes, formats)
    _check_shapes(reader, {prefix: shape for prefix, shape in shapes.items() if formats[prefix].packed})
    return reader


def foreign_finding(reader: TableReader) -> Finding | None:
    """A warning that names the first thing which no kernel computes with; None where all can be run as stored."""
    if reader.quantization is None:
        return None
    prefixes = dict.fromkeys(name.rpartition(".")[0] for name in reader.tensors())
    formats = {prefix: form for prefix in prefixes if (form := reader.linear_format(prefix)) is not None}
    spec = parse_quantization(reader.quantization, str(reader.path / "config.json"))
    return _foreign_feature(reader.path, spec, formats)


def _foreign_feature(path: Path, spec: QuantizationSpec, formats: Mapping[str, LinearFormat]) -> Finding | None:
    what = next((f"it asks for {feature}" for feature in spec.for_activations), None)
    foreign = [prefix for prefix, form in formats.items() if not (form.is_native and is_linear(f"{prefix}.weight"))]
    if foreign and what is None:
        others = f" (and {len(foreign) - 1} more)" if len(foreign) > 1 else ""
        what = f"{foreign[0]}{others} is stored as {formats[foreign[0]]}"
    if what is None:
        return None
    message = f"{path / 'config.json'}: {what}, which cannot be computed with"
    return Finding(
        "foreign-format", message, "config.json", None, 0, f"l4tool convert {path} -o OUT --to hf makes floats"
    )


def stored_parts(form: LinearFormat, out: int, inner: int) -> list[Expected]:
    """What the compressed-tensors library stores of a Linear [out, in], codes first.

    Packed codes and, for groups and channels, packed zero points: b-bit numbers end to end in int32 words, along the
    inputs for codes, along the outputs for zero points; the last word of a line is filled up.
    """
    grid = _grid(form, out, inner)
    whole = form.kind == "fp8"
    codes = (torch.float8_e4m3fn,) if whole else CODE_DTYPES[form.packed]
    parts: list[Expected] = [(form.codes, (out, _words(inner, form) if form.packed else inner), codes)]
    parts.append(("weight_scale", grid, FLOATS))
    if not form.symmetric and form.packed and form.strategy in ("group", "channel"):
        parts.append(("weight_zero_point", (_words(out, form), grid[1]), CODE_DTYPES[True]))
    elif not form.symmetric:
        parts.append(("weight_zero_point", grid, (torch.float8_e4m3fn,) if whole else CODE_DTYPES[False]))
    if form.has_g_idx:
        parts.append(("weight_g_idx", (inner,), (torch.int32,)))
    if form.packed:
        parts.append(("weight_shape", (2,), SHAPE_DTYPES))
    return parts


def _activation_scales(folder: CheckpointFolder, rows: list[Row]) -> Iterator[Row]:
    """Static scales of activations and of the KV cache, wherever they lie: weights do without them, a copy does not."""
    modules = {row.stored.rpartition(".")[0] for row in rows}
    modules |= {module.rpartition(".")[0] for module in modules if ".self_attn." in module}
    prefix = "" if folder.arch.vision is not None else TEXT_PREFIX
    for name, tensor in folder.stored.items():
        module, _, last = name.rpartition(".")
        if last in ACTIVATION_SCALES and module in modules:
            yield Row(name, tensor.shape, (Part(prefix + name, tensor.shape),))


def _grid(form: LinearFormat, out: int, inner: int) -> tuple[int, ...]:
    """Shape of the scales."""
    if form.block is not None:
        return -(-out // form.block[0]), -(-inner // form.block[1])
    if form.group_size is not None:
        return out, inner // form.group_size
    return (out, 1) if form.strategy == "channel" else (1,)


def _words(count: int, form: LinearFormat) -> int:
    return -(-count * form.num_bits // WORD_BITS)


def _format(spec: QuantizationSpec, row: Row, folder: CheckpointFolder) -> LinearFormat | None:
    """The row's format. A router that only its class makes a target, and that lies there as floats, is not quantized:
    the library's older versions left routers out of `ignore`, and no runtime quantizes them."""
    if not row.stored.endswith(".weight") or len(row.shape) != 2 or not row.parts:
        return None  # norms, biases, embeddings of the vision tower, fused experts: no Linear
    module, name = row.stored.removesuffix(".weight"), row.parts[0].name
    if is_linear(name):
        return spec.format_of(module)
    is_plain = row.stored in folder.stored and not any(f"{module}.{part}" in folder.stored for part in QUANTIZED)
    classes: tuple[str, ...] = quant_config.LINEAR
    if name.endswith(".router.weight"):
        classes = () if is_plain else quant_config.ROUTER
    elif name.endswith(".embed_tokens.weight"):
        classes = quant_config.EMBEDDING
    form = spec.format_of(module, classes)
    if form is not None and is_plain:
        raise CheckpointError(
            f"{folder.path / 'config.json'}: quantization_config quantizes {module}, which lies there unquantized",
            hint="router, embeddings, lm_head and the vision tower belong into its ignore list",
        )
    return form


def _check_shapes(reader: TableReader, shapes: dict[str, tuple[int, int]]) -> None:
    """`weight_shape` is data, not header: it must say the Linear's own [out, in]."""
    absent = {path for path in reader.weight_files() if is_placeholder(path)}
    for prefix, shape in shapes.items():
        info = reader.tensors().get(f"{prefix}.weight_shape")
        if info is None or info.file in absent:
            continue  # reported as missing, or a header only
        wanted, found = list(shape), reader.read(info.name).tolist()
        if found != wanted:
            message = f"{info.file}: tensor '{info.name}' says {found}, it must say {wanted}"
            stored = reader.stored_name(info.name)
            reader.folder.report(CheckpointError(message), [Finding("shape", message, info.file.name, stored)])
