"""Fused kernels against the torch specification and compressed-tensors: the same bits."""

import itertools

import numba
import numpy as np
import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import dequantize, quantize
from compressed_tensors.quantization.utils import calculate_qparams

from l4tool.core.errors import CheckpointError
from quant import ops, reference
from quant.kernels.bits import to_float

W4 = QuantizationArgs(num_bits=4, type="int", strategy="group", group_size=128, symmetric=True)
W8 = QuantizationArgs(num_bits=8, type="float", strategy="channel", symmetric=True)
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@numba.njit
def _widen(source, out):
    for i in range(source.size):
        out[i] = to_float(source[i])


def weight(rows, cols, dtype=torch.bfloat16, seed=0, transposed=False, outliers=True):
    """Rows of different spread, a few outliers, one zero row and one zero group; optionally stored [in, out]."""
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(rows, cols, generator=g) * torch.exp(torch.randn(rows, 1, generator=g)) * 0.02
    if outliers:
        w.view(-1)[torch.randint(w.numel(), (w.numel() // 200 + 1,), generator=g)] *= 6
    w[rows // 2] = 0
    w[0, :8] = 0
    w = w.to(dtype)
    return w.T.contiguous().T if transposed else w


def assert_int4_equals_reference(w, group_size, method):
    result, expected = ops.int4(w, group_size, method), ops.int4_reference(w, group_size, method)
    assert torch.equal(result.scale.view(torch.int16), expected.scale.view(torch.int16))
    for field in ("packed", "error", "square"):
        assert torch.equal(getattr(result, field), getattr(expected, field)), field


@pytest.mark.parametrize("method", ["absmax", "mse"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("transposed", [False, True])
def test_int4_equals_reference(dtype, transposed, method):
    assert_int4_equals_reference(weight(130, 384, dtype, transposed=transposed), 128, method)


@pytest.mark.parametrize("group_size", [8, 32, 64, 256])
def test_int4_other_group_sizes(group_size):
    for transposed in (False, True):
        assert_int4_equals_reference(weight(70, 512, seed=3, transposed=transposed), group_size, "mse")


@pytest.mark.parametrize("method", ["absmax", "mse"])
def test_int4_extreme_values(method):
    w = weight(64, 256)
    w[1] *= 1e-38
    w[2] = torch.tensor(1e-40)
    w[3] *= 1e30
    w[4] = torch.tensor([1.0, -1.0]).repeat(128)
    w[5, ::2], w[5, 1::2] = -0.0, 0.0
    assert_int4_equals_reference(w, 128, method)


def test_slices_of_a_bigger_tensor():
    """Views with a row stride, as the gate and up halves of a fused tensor are."""
    fused = weight(256, 640).T.contiguous()
    for view in (fused[:256, 100:200].T, fused.T[100:200, :256], weight(300, 512)[40:200, 128:384]):
        assert_int4_equals_reference(view, 128, "mse")


def test_rows_do_not_depend_on_the_split():
    w = weight(200, 256, transposed=True)
    whole = ops.int4(w, 128, "mse")
    for bounds in ((0, 1, 200), (0, 64, 65, 131, 200)):
        parts = [ops.int4(w[a:b], 128, "mse") for a, b in itertools.pairwise(bounds)]
        for field in ("packed", "scale", "error", "square"):
            assert torch.equal(torch.cat([getattr(p, field) for p in parts]), getattr(whole, field))


@pytest.mark.parametrize("dtype", DTYPES)
def test_int4_absmax_bytes_equal_compressed_tensors(dtype):
    w = weight(96, 512, dtype)
    groups = w.unflatten(-1, (-1, 128))
    scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), W4)
    scale = scale.bfloat16()
    result = ops.int4(w, 128, "absmax")
    if dtype != torch.float16:  # it would keep float16 scales; ours are bfloat16 whatever the source
        live = groups.abs().amax(-1) > 0
        assert torch.equal(result.scale[live], scale[live])
    theirs = quantize(w, result.scale, zero, W4, dtype=torch.int8)
    assert torch.equal(result.packed, pack_to_int32(theirs, 4))
    assert torch.equal(unpack_from_int32(result.packed, 4, w.shape), reference.int4_unpack(result.packed))
    back = dequantize(theirs, result.scale, zero, W4)
    assert torch.equal(back, reference.int4_dequantize(theirs, result.scale))
    assert result.scale.isfinite().all() and (result.scale != 0).all()


@pytest.mark.parametrize("cols", [328, 131])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("transposed", [False, True])
def test_fp8_equals_reference_and_compressed_tensors(dtype, transposed, cols):
    w = weight(130, cols, dtype, transposed=transposed)
    result = ops.fp8(w)
    q, scale = reference.fp8_quantize(w)
    assert torch.equal(result.weight.view(torch.uint8), q.view(torch.uint8))
    assert torch.equal(result.scale, scale)
    error, square = reference.squared_error(w, reference.fp8_dequantize(q, scale), reference.FP8_BLOCK)
    assert torch.equal(result.error, error) and torch.equal(result.square, square)
    theirs = quantize(w, scale, None, W8, dtype=torch.float8_e4m3fn)
    assert torch.equal(result.weight.view(torch.uint8), theirs.view(torch.uint8))
    if dtype == torch.bfloat16:
        low, high = w.amin(-1, keepdim=True), w.amax(-1, keepdim=True)
        assert torch.equal(calculate_qparams(low, high, W8)[0][:65], scale[:65])
    assert torch.equal(dequantize(theirs, scale, None, W8), reference.fp8_dequantize(q, scale))


def test_fp8_encoding_of_every_bfloat16():
    """Rows end in 448, so the scale is 1 and the quotient is the value itself."""
    values = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    values = values[values.isfinite() & (values.abs() <= 448)]
    values = torch.cat([values, torch.zeros(-len(values) % 64, dtype=torch.bfloat16)]).view(-1, 64)
    w = torch.cat([values, torch.full((len(values), 1), 448.0, dtype=torch.bfloat16)], 1)
    result = ops.fp8(w)
    assert (result.scale == 1).all()
    assert torch.equal(result.weight.view(torch.uint8), w.to(torch.float8_e4m3fn).view(torch.uint8))


@pytest.mark.parametrize(("outliers", "limit"), [(False, 0.0970), (True, 0.1145)])
def test_mse_error_is_below_the_table(outliers, limit):
    """Relative Frobenius error on the two weight families of docs/formats.md."""
    g = torch.Generator().manual_seed(1)
    w = torch.randn(512, 2560, generator=g) * torch.exp(0.3 * torch.randn(512, 1, generator=g)) / 50
    if outliers:
        w.view(-1)[torch.randint(w.numel(), (w.numel() // 1000,), generator=g)] *= 6
    result = ops.int4(w.bfloat16(), 128, "mse")
    assert (result.error.sum() / result.square.sum()).sqrt() < limit


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("transposed", [False, True])
def test_nonfinite_weights_are_named(bad, transposed):
    w = weight(100, 256)
    w[71, 130] = bad
    w = w.T.contiguous().T if transposed else w
    for run in (lambda: ops.int4(w, 128, "mse", name="a.weight"), lambda: ops.fp8(w, name="a.weight")):
        with pytest.raises(CheckpointError, match=r"a\.weight\[71, 130\] is -?(nan|inf)"):
            run()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_16_bit_value_is_read_exactly(dtype):
    stored = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    expected = stored.view(dtype).float()
    source = stored.numpy() if dtype == torch.float16 else stored.view(torch.uint16).numpy()
    out = np.empty(source.size, np.float32)
    _widen(source, out)
    got, is_nan = torch.from_numpy(out), expected.isnan()
    assert torch.equal(got.isnan(), is_nan)
    assert torch.equal(got[~is_nan].view(torch.int32), expected[~is_nan].view(torch.int32))  # the sign of zero too
