"""The compressed-tensors layout: per-expert Linears, some of them stored as quantized parts."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from converters import quant_config
from converters.findings import Finding
from converters.folder import CheckpointFolder
from converters.names import COMPRESSED, Part, Row, canonical_shapes, is_linear
from converters.quant_config import LinearFormat, QuantizationSpec, parse_quantization
from converters.table_reader import TableReader
from l4tool.core.errors import CheckpointError
from l4tool.core.placeholder import is_placeholder

SCALE_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SHAPE_DTYPES = (torch.int64, torch.int32)
PACK_FACTOR = 8  # 4-bit values in an int32
ACTIVATION_SCALES = (
    ".input_scale", ".input_zero_point", ".output_scale", ".output_zero_point", ".k_scale", ".v_scale", ".q_scale",
)  # fmt: skip


def open_compressed(folder: CheckpointFolder, rows: list[Row], foreign: bool = False) -> TableReader:
    """A reader whose `tensors()` lists the stored parts of quantized Linears under canonical names
    (`….gate_proj.weight_packed`, `.weight_scale`, `.weight_shape`, or FP8 `.weight` and `.weight_scale`).

    `rows` is the unquantized table: per-expert, or fused when the experts are stored unquantized. `foreign`: formats
    that can only be dequantized are opened too.
    """
    assert folder.quantization is not None
    where = str(folder.path / "config.json")
    spec = parse_quantization(folder.quantization, where, foreign)
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
    if foreign:
        table += _loose_scales(folder)
        dtypes |= {row.stored: (folder.stored[row.stored].dtype,) for row in table if not row.parts}
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
    if scheme.kind == "int4":
        group = scheme.group_size or 0
        if inner % group or inner % PACK_FACTOR:
            raise CheckpointError(f"{where}: {module} has {inner} inputs, which group_size {group} does not divide")
    for suffix, shape, allowed in _parts(scheme, out, inner, f"{where}: {module}"):
        yield Row(f"{module}.{suffix}", shape, (Part(f"{prefix}.{suffix}", shape),)), allowed


StoredPart = tuple[str, tuple[int, ...], tuple[torch.dtype, ...]]  # suffix, shape, allowed dtypes


def _parts(form: LinearFormat, out: int, inner: int, where: str) -> Iterator[StoredPart]:
    """What the compressed-tensors library stores for a Linear [out, in]: its `pack_quantized`, `naive_quantized`."""
    if form.packed:
        yield "weight_packed", (out, _words(inner, form.num_bits)), (torch.int32,)
        yield "weight_shape", (2,), SHAPE_DTYPES
    else:
        yield "weight", (out, inner), (torch.float8_e4m3fn if form.number == "float" else torch.int8,)
    scales = scale_shape(form, out, inner, where)
    yield "weight_scale", scales, SCALE_DTYPES
    if not form.symmetric and form.packed and form.strategy in ("group", "channel"):
        yield "weight_zero_point", (_words(out, form.num_bits), scales[1]), (torch.int32,)  # packed along the outputs
    elif not form.symmetric:
        yield "weight_zero_point", scales, (torch.int8,)
    if form.reordered:
        yield "weight_g_idx", (inner,), (torch.int32,)


def scale_shape(form: LinearFormat, out: int, inner: int, where: str) -> tuple[int, ...]:
    """The shape of `weight_scale`. Raises CheckpointError where groups do not divide the inputs."""
    if form.strategy == "tensor":
        return (1,)
    if form.strategy == "channel":
        return (out, 1)
    if form.strategy == "block":
        height, width = form.block or (1, 1)
        return -(-out // height), -(-inner // width)
    group = form.group_size or 1
    if inner % group:
        raise CheckpointError(f"{where} has {inner} inputs, which group_size {group} does not divide")
    return out, inner // group


def _words(count: int, bits: int) -> int:
    """int32 words that hold `count` codes."""
    return -(-count * bits // 32)


def _loose_scales(folder: CheckpointFolder) -> list[Row]:
    """Scales of activations and of the KV cache, which weights as floats do without: deliberate drops."""
    return [Row(name, folder.stored[name].shape, ()) for name in folder.stored if name.endswith(ACTIVATION_SCALES)]


def _check_shapes(reader: TableReader, formats: dict[str, LinearFormat]) -> None:
    """`weight_shape` is data, not header: it must say what the packed tensor's own shape implies."""
    absent = {path for path in reader.weight_files() if is_placeholder(path)}
    shapes = canonical_shapes(reader.arch)
    for prefix, scheme in formats.items():
        if not scheme.packed:
            continue
        info = reader.tensors().get(f"{prefix}.weight_packed")
        if info is None or f"{prefix}.weight_shape" not in reader.tensors():
            continue  # reported as missing
        if reader.tensors()[f"{prefix}.weight_shape"].file in absent:
            continue  # a header only
        wanted = list(shapes[f"{prefix}.weight"])
        found = reader.read(f"{prefix}.weight_shape").tolist()
        if found != wanted:
            message = f"{info.file}: tensor '{prefix}.weight_shape' says {found}, it must say {wanted}"
            name = reader.stored_name(f"{prefix}.weight_shape")
            reader.folder.report(CheckpointError(message), [Finding("shape", message, info.file.name, name)])
