"""Linears as floats: the specification, the compressed-tensors library, and the fast kernel agree bit for bit."""

import pytest
import torch

from converters.detect import open_checkpoint
from quant import ops, reference
from quant.dequantize import int4_floats, read_linear
from tests import checkpoints


@pytest.mark.parametrize("kind", ["int4-all", "fp8", "mixed"])
def test_what_the_library_decompresses(scout_tiny, tmp_path, kind):
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    folder = checkpoints.compress(scout_tiny, tmp_path / kind, kind)
    reader, stored = open_checkpoint(folder), checkpoints.load(folder)
    theirs = QuantizationConfig(**checkpoints.quantization_config(kind))
    count = 0
    for name in open_checkpoint(scout_tiny).tensors():
        prefix = name.removesuffix(".weight")
        if reader.linear_format(prefix) is None:
            continue
        scheme = checkpoints.library_scheme(theirs, prefix)
        parts = {key.removeprefix(f"{prefix}."): value for key, value in stored.items() if key.startswith(f"{prefix}.")}
        back = BaseCompressor.get_value_from_registry(scheme.format).decompress(parts, scheme)["weight"]
        assert torch.equal(read_linear(reader, prefix), back), prefix
        assert torch.equal(read_linear(reader, prefix, slice(3, 70)), back[3:70])
        count += 1
    assert count == 4 * (4 + 3 + 12)


def test_an_unquantized_linear_is_read_as_it_is(scout_tiny):
    reader = open_checkpoint(scout_tiny)
    prefix = "language_model.model.layers.0.feed_forward.experts.1.up_proj"
    assert torch.equal(read_linear(reader, prefix, slice(2, 9)), reader.read(f"{prefix}.weight")[2:9])


@pytest.mark.parametrize("scale_dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_every_code_and_many_scales(scale_dtype):
    q = torch.arange(-8, 8, dtype=torch.int8).repeat(40, 8)
    reach = 3 if scale_dtype == torch.float16 else 30
    scale = (torch.randn(40, 4) * torch.logspace(-reach, reach, 40)[:, None]).to(scale_dtype)
    scale[0] = 0
    expected = q.float().unflatten(1, (4, 32)) * scale.float()[..., None]
    back = int4_floats(reference.int4_pack(q), scale)
    assert back.dtype == scale_dtype and torch.equal(back, expected.flatten(1).to(scale_dtype))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_errors_are_those_of_the_quantizing_kernel(dtype, transposed):
    torch.manual_seed(0)
    weight = torch.randn(1300, 384).to(dtype)
    weight = weight.T.contiguous().T if transposed else weight
    made = ops.int4(weight, 128, "mse")
    back = int4_floats(made.packed, made.scale)
    error, square, largest = ops.compare(weight, back, 128)
    assert torch.equal(error, made.error) and torch.equal(square, made.square)
    assert largest == float((weight.float() - back.float()).abs().max())


def test_nan_and_a_last_narrow_block_come_through():
    weight, back = torch.ones(5, 200), torch.ones(5, 200)
    back[2, 199], back[4, 150] = 3.0, float("nan")
    error, square, largest = ops.compare(weight, back, 128)
    assert error[:4].tolist() == [0, 0, 4, 0] and error[4].isnan()
    assert square.tolist() == [200.0] * 5 and largest != largest
