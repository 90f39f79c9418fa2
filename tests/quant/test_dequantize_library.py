"""Every stored format, any shape: parts as the compressed-tensors library writes them, floats as it decompresses."""

from dataclasses import replace

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from compressed_tensors.quantization import QuantizationConfig
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from converters.compressed import stored_parts
from converters.quant_config import parse_quantization
from converters.reader import TensorInfo
from l4tool.core.errors import CheckpointError
from quant.dequantize import read_linear
from tests import checkpoints

INT_FORMATS = ("pack-quantized", "int-quantized", "naive-quantized")
FLOAT_FORMATS = ("float-quantized", "naive-quantized")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class Memory:
    """One Linear of a checkpoint, its parts in memory."""

    def __init__(self, parts, form):
        self.parts, self.form, self.read_rows = parts, form, {}

    def tensors(self):
        return {
            f"x.{name}": TensorInfo(f"x.{name}", tuple(t.shape), t.dtype, t.nbytes, "memory")
            for name, t in self.parts.items()
        }

    def linear_format(self, prefix):
        return self.form

    def read(self, name, rows=None):
        tensor = self.parts[name.removeprefix("x.")]
        found = tensor if rows is None else tensor[rows]
        self.read_rows[name.removeprefix("x.")] = len(found)
        return found


@st.composite
def cases(draw):
    """(out, in, weights of a group, format, dtype of the weight)."""
    number = draw(st.sampled_from(["int", "int", "float"]))
    strategy = draw(st.sampled_from(["tensor", "channel", "group", "block"]))
    bits = draw(st.integers(2, 8)) if number == "int" else 8
    args = {"num_bits": bits, "type": number, "strategy": strategy, "symmetric": draw(st.booleans()), "dynamic": False}
    out, inner = draw(st.integers(1, 75)), draw(st.integers(1, 140))
    stored_as = draw(st.sampled_from(INT_FORMATS if number == "int" else FLOAT_FORMATS))
    if strategy == "group":
        args["group_size"] = draw(st.sampled_from([1, 4, 8, 12, 32, 64, 128]))
        inner = args["group_size"] * draw(st.integers(1, 4))
        if (stored_as, bits, args["symmetric"]) == ("pack-quantized", 4, False):
            out = max(out, 9)  # the library cannot read its own 4-bit zero points if they fit one int32
    if strategy == "block":
        args["block_structure"] = [draw(st.integers(1, 40)), draw(st.integers(1, 70))]
    return out, inner, args, stored_as, draw(st.sampled_from(DTYPES))


def compressed(out, inner, args, stored_as, dtype, seed=0):
    """(the library's parts, its floats, our form of it)."""
    config = checkpoints.quantization_config("int4")
    config["config_groups"]["group_0"] = {"targets": ["Linear"], "weights": args, "format": stored_as}
    scheme = QuantizationConfig(**config).config_groups["group_0"]
    form = parse_quantization(config, "config.json").format_of("x")
    weight = (torch.randn(out, inner, generator=torch.Generator().manual_seed(seed)) + 0.3).to(dtype)
    scale, zero = checkpoints.library_qparams(weight, scheme.weights)
    compressor = BaseCompressor.get_value_from_registry(scheme.format)
    state = {"weight": weight, "weight_scale": scale, "weight_zero_point": zero}
    parts = compressor.compress(state, scheme)
    return parts, compressor.decompress(parts, scheme)["weight"], form


@settings(max_examples=250, deadline=None, suppress_health_check=list(HealthCheck))
@given(case=cases(), seed=st.integers(0, 99), data=st.data())
def test_parts_and_floats_are_the_librarys(case, seed, data):
    out, inner = case[:2]
    parts, floats, form = compressed(*case, seed)
    found = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in parts.items()}
    table = {name: (shape, dtypes) for name, shape, dtypes in stored_parts(form, out, inner)}
    assert found.keys() == table.keys()
    for name, (shape, dtype) in found.items():
        assert shape == table[name][0] and dtype in table[name][1], name
    start = data.draw(st.integers(0, out))
    rows = slice(start, data.draw(st.integers(start, out)))
    back = read_linear(Memory(parts, form), "x")
    assert back.dtype == floats.dtype and torch.equal(back, floats)
    assert torch.equal(read_linear(Memory(parts, form), "x", rows), floats[rows])


def groups(bits, stored_as, symmetric=True, size=32):
    return {"num_bits": bits, "type": "int", "strategy": "group", "group_size": size, "symmetric": symmetric,
            "dynamic": False}, stored_as  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits, stored_as", [(3, "pack-quantized"), (4, "pack-quantized"), (8, "int-quantized")])
def test_groups_of_inputs_that_do_not_lie_together(bits, stored_as, symmetric, dtype):
    """`weight_g_idx`, of older libraries: input j of the file was input order[j] when it was grouped."""
    parts, floats, form = compressed(40, 96, *groups(bits, stored_as, symmetric), dtype)
    order = torch.randperm(96, generator=torch.Generator().manual_seed(1))
    if form.packed:
        codes = unpack_from_int32(parts["weight_packed"], bits, torch.Size((40, 96)))[:, order]
        parts["weight_packed"] = pack_to_int32(codes.contiguous(), bits)
    else:
        parts["weight"] = parts["weight"][:, order]
    reader = Memory(parts | {"weight_g_idx": (torch.arange(96) // 32)[order].int()}, ordered(form))
    assert torch.equal(read_linear(reader, "x"), floats[:, order])
    assert torch.equal(read_linear(reader, "x", slice(33, 40)), floats[33:40, order])


def ordered(form):
    return replace(form, has_g_idx=True)


@pytest.mark.parametrize("bad", [-1, 3])
def test_groups_that_do_not_exist_are_named(bad):
    parts, _, form = compressed(4, 96, *groups(4, "pack-quantized"), torch.bfloat16)
    order = torch.arange(96).int() // 32
    order[5] = bad
    with pytest.raises(CheckpointError, match=r"x.weight_g_idx.* there are 3 groups"):
        read_linear(Memory(parts | {"weight_g_idx": order}, ordered(form)), "x")


def test_a_range_of_rows_reads_no_others():
    parts, _, form = compressed(256, 64, *groups(4, "pack-quantized", symmetric=False), torch.bfloat16)
    reader = Memory(parts, form)
    read_linear(reader, "x", slice(70, 75))
    assert reader.read_rows == {"weight_packed": 5, "weight_scale": 5, "weight_zero_point": 2}  # 8 outputs a word


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_byte_of_fp8(dtype):
    """All 256 codes, subnormals, zeros of both signs and NaN."""
    parts, _, form = compressed(
        5, 256, {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True, "dynamic": False},
        "float-quantized", dtype,
    )  # fmt: skip
    codes = torch.arange(256, dtype=torch.uint8).repeat(5, 1).view(torch.float8_e4m3fn)
    parts["weight"], scale = codes, torch.tensor([[1.0], [-0.37], [3e-5], [1e4], [0.0]]).to(dtype)
    parts["weight_scale"] = scale
    back, expected = read_linear(Memory(parts, form), "x"), codes.to(dtype) * scale
    assert torch.equal(back.isnan(), expected.isnan())
    assert torch.equal(back.nan_to_num(), expected.nan_to_num())
    assert torch.equal(back.signbit()[~back.isnan()], expected.signbit()[~expected.isnan()])
