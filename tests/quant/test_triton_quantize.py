"""Quantization on a device against the specification, bit for bit."""

from pathlib import Path

import pytest
import torch

from converters.reader import TensorInfo
from converters.writing.encoder import Scratch
from l4tool.core.errors import DeviceError
from quant import ops
from quant.encoders import Fp8, Int4, _to
from tests.triton_device import device, poisoned  # noqa: F401

pytest.importorskip("triton")
from quant.kernels import triton_quantize

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
pytestmark = pytest.mark.usefixtures("poisoned")


def weight(rows, columns, dtype):
    """Spread like real ones, with outliers, an all-zero group, tiny values, and ties."""
    w = torch.randn(rows, columns) * torch.exp(torch.randn(rows, 1))
    w.view(-1)[:: max(rows * columns // 20, 1)] *= 8
    w[0, :32] = 0
    w[1, :32] *= 1e-30 if dtype != torch.float16 else 1e-4
    w[2, :32] = torch.arange(32) * 0.5 - 8
    return w.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", ["absmax", "mse"])
@pytest.mark.parametrize("turned", [False, True])
def test_int4(dtype, method, turned, device):  # noqa: F811
    w = weight(37, 64, dtype)
    expected = ops.int4_reference(w, 32, method)
    there = w.T.contiguous().to(device).T if turned else w.to(device)
    got = triton_quantize.int4(there, 32, method)
    for ours, theirs in zip(got, (expected.packed, expected.scale, expected.error, expected.square), strict=True):
        assert torch.equal(ours.cpu(), theirs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("turned", [False, True])
def test_fp8(dtype, turned, device):  # noqa: F811
    w = weight(5, 200, dtype)
    expected = ops.fp8_reference(w)
    there = w.T.contiguous().to(device).T if turned else w.to(device)
    got = triton_quantize.fp8(there)
    assert torch.equal(got[0].cpu().view(torch.uint8), expected.weight.view(torch.uint8))
    for ours, theirs in zip(got[1:], (expected.scale, expected.error, expected.square), strict=True):
        assert torch.equal(ours.cpu(), theirs)


def test_what_has_no_triton_goes_by_the_specification(device, monkeypatch):  # noqa: F811
    w = weight(5, 64, torch.bfloat16)
    there = w.to("cuda" if device.type == "cuda" else "meta")  # anything but a CPU
    asked = []
    monkeypatch.setattr(ops, "_require_finite", lambda *given: None)
    monkeypatch.setattr(ops, "_has_triton", lambda: False)
    monkeypatch.setattr(ops, "int4_reference", lambda *given: asked.append(given))
    monkeypatch.setattr(ops, "fp8_reference", lambda *given: asked.append(given))
    ops.int4(there, 32, "mse")
    ops.fp8(there)
    assert [given[1:] for given in asked] == [(32, "mse"), ()]


def test_an_older_card_does_fp8_by_the_specification(device, monkeypatch):  # noqa: F811
    there = weight(5, 64, torch.bfloat16).to("cuda" if device.type == "cuda" else "meta")
    asked = []
    monkeypatch.setattr(ops, "_require_finite", lambda *given: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(ops, "fp8_reference", asked.append)
    ops.fp8(there)
    assert len(asked) == 1 and asked[0] is there


def test_weights_go_to_the_device_as_they_lie(device):  # noqa: F811
    w = torch.randn(6, 8)
    for source in (w, w.T, w.T[2:5], w[2:5]):
        there = _to(source, "cuda" if device.type == "cuda" else "meta")
        assert there.shape == source.shape and (there.stride(0) == 1) == (source.stride(0) == 1)
    assert _to(w, "cpu") is w


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_equals_cpu():
    for dtype in DTYPES:
        w = weight(300, 640, dtype)
        for method in ("absmax", "mse"):
            ours, theirs = ops.int4(w, 128, method), ops.int4(w.cuda(), 128, method)
            assert all(
                torch.equal(getattr(ours, f), getattr(theirs, f)) for f in ("packed", "scale", "error", "square")
            )
        ours8, theirs8 = ops.fp8(w), ops.fp8(w.cuda())
        assert torch.equal(ours8.weight.view(torch.uint8), theirs8.weight.view(torch.uint8))
        assert torch.equal(ours8.scale, theirs8.scale)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory.\nmore"), torch.AcceleratorError("gone")])
@pytest.mark.parametrize("encoder", [Int4(32, "mse"), Fp8()])
def test_a_device_that_fails_is_one_clear_error(encoder, error, monkeypatch):
    def failing(*arguments):
        raise error

    monkeypatch.setattr(ops, encoder.kind, failing)
    w = weight(8, 64, torch.bfloat16)
    info = TensorInfo("expert", tuple(w.shape), w.dtype, w.nbytes, Path("none"))
    with pytest.raises(DeviceError, match="failed: ") as raised:
        encoder.encode(w, info, "expert.weight", 0, Scratch())
    assert "--jobs" in raised.value.hint and "\n" not in str(raised.value)
