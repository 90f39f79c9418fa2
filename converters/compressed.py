"""The compressed-tensors layout: per-expert Linears, some of them stored as quantized parts."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from converters import quant_config
from converters.findings import Finding
from converters.folder import CheckpointFolder
from converters.names import COMPRESSED, Part, Row, is_linear
from converters.quant_config import LinearFormat, QuantizationSpec, parse_quantization
from converters.table_reader import TableReader
from l4tool.core.errors import CheckpointError
from l4tool.core.placeholder import is_placeholder

SCALE_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SHAPE_DTYPES = (torch.int64, torch.int32)
PACK_FACTOR = 8  # 4-bit values in an int32


def open_compressed(folder: CheckpointFolder, rows: list[Row]) -> TableReader:
    """A reader whose `tensors()` lists the stored parts of quantized Linears under canonical names
    (`….gate_proj.weight_packed`, `.weight_scale`, `.weight_shape`, or FP8 `.weight` and `.weight_scale`).

    `rows` is the unquantized table: per-expert, or fused when the experts are stored unquantized.
    """
    assert folder.quantization is not None
    where = str(folder.path / "config.json")
    spec = parse_quantization(folder.quantization, where)
    table: list[Row] = []
    dtypes: dict[str, tuple[torch.dtype, ...]] = {}
    formats: dict[str, LinearFormat] = {}
    for row in rows:
        scheme = _format(spec, row, where)
        if scheme is None:
            table.append(row)
            continue
        prefix = row.parts[0].name.removesuffix(".weight")
        formats[prefix] = scheme
        for part_row, allowed in _quantized_rows(row, prefix, scheme, where):
            table.append(part_row)
            dtypes[part_row.stored] = allowed
    reader = TableReader(folder, table, COMPRESSED, dtypes, formats)
    _check_shapes(reader, formats)
    return reader


def _format(spec: QuantizationSpec, row: Row, where: str) -> LinearFormat | None:
    """The row's format; an error for a module that this tool computes unquantized only."""
    if not row.stored.endswith(".weight") or len(row.shape) != 2 or not row.parts:
        return None  # norms, biases, embeddings of the vision tower, fused experts: no Linear
    module, name = row.stored.removesuffix(".weight"), row.parts[0].name
    if is_linear(name):
        return spec.format_of(module)
    classes: tuple[str, ...] = quant_config.LINEAR
    if name.endswith(".router.weight"):
        classes = quant_config.ROUTER
    elif name.endswith(".embed_tokens.weight"):
        classes = quant_config.EMBEDDING
    if spec.format_of(module, classes) is not None:
        raise CheckpointError(
            f"{where}: quantization_config quantizes {module}, which this tool reads unquantized only",
            hint="router, embeddings, lm_head and the vision tower belong into its ignore list",
        )
    return None


def _quantized_rows(
    row: Row, prefix: str, scheme: LinearFormat, where: str
) -> Iterator[tuple[Row, tuple[torch.dtype, ...]]]:
    """The stored parts of one quantized Linear [out, in], with the dtypes that each may have."""
    module = row.stored.removesuffix(".weight")
    out, inner = row.shape
    parts: list[tuple[str, tuple[int, ...], tuple[torch.dtype, ...]]]
    if scheme.kind == "int4":
        group = scheme.group_size or 0
        if inner % group or inner % PACK_FACTOR:
            raise CheckpointError(f"{where}: {module} has {inner} inputs, which group_size {group} does not divide")
        parts = [
            ("weight_packed", (out, inner // PACK_FACTOR), (torch.int32,)),
            ("weight_scale", (out, inner // group), SCALE_DTYPES),
            ("weight_shape", (2,), SHAPE_DTYPES),
        ]
    else:
        parts = [("weight", (out, inner), (torch.float8_e4m3fn,)), ("weight_scale", (out, 1), SCALE_DTYPES)]
    for suffix, shape, allowed in parts:
        yield Row(f"{module}.{suffix}", shape, (Part(f"{prefix}.{suffix}", shape),)), allowed


def _check_shapes(reader: TableReader, formats: dict[str, LinearFormat]) -> None:
    """`weight_shape` is data, not header: it must say what the packed tensor's own shape implies."""
    absent = {path for path in reader.weight_files() if is_placeholder(path)}
    for prefix, scheme in formats.items():
        if scheme.kind != "int4":
            continue
        info = reader.tensors().get(f"{prefix}.weight_packed")
        if info is None or f"{prefix}.weight_shape" not in reader.tensors():
            continue  # reported as missing
        if reader.tensors()[f"{prefix}.weight_shape"].file in absent:
            continue  # a header only
        wanted = [info.shape[0], info.shape[1] * PACK_FACTOR]
        found = reader.read(f"{prefix}.weight_shape").tolist()
        if found != wanted:
            message = f"{info.file}: tensor '{prefix}.weight_shape' says {found}, it must say {wanted}"
            name = reader.stored_name(f"{prefix}.weight_shape")
            reader.folder.report(CheckpointError(message), [Finding("shape", message, info.file.name, name)])
