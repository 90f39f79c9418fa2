"""INT4 and FP8 weights computed as stored, against transformers + compressed-tensors on the same folder."""

import importlib

import pytest
import torch

from batch.kernels import ops, reference
from batch.kernels.linears import DenseLinear, Fp8Linear, FusedLinear, Int4Linear, Linear
from batch.model.model import load_model
from batch.model.weights import tensors_of
from converters.detect import open_checkpoint
from tests import checkpoints
from tests.batch.model.driver import Driver, Row, theirs
from tests.batch.model.test_text_parity import TOLERANCE, difference, random_ids, their_logits, typical_difference


@pytest.fixture(scope="module")
def quantized(scout_tiny, maverick_tiny, tmp_path_factory):
    made = {}

    def make(arch, kind, group_size=128):
        if (arch, kind, group_size) not in made:
            source = {"scout": scout_tiny, "maverick": maverick_tiny}[arch]
            folder = tmp_path_factory.mktemp("quantized") / "model"
            made[arch, kind, group_size] = checkpoints.compress(source, folder, kind, group_size)
        return made[arch, kind, group_size]

    return make


def logits_of(folder, ids, dtype=torch.float32, piece=10**9):
    return Driver(load_model(open_checkpoint(folder), "cpu", dtype)).logits(Row(ids), piece)


@pytest.mark.parametrize("arch, kind, group_size", [("scout", "int4-all", 128), ("maverick", "int4", 64)])
def test_weight_only_int4_equals_transformers(quantized, arch, kind, group_size):
    folder = quantized(arch, kind, group_size)
    ids = random_ids(70, seed=1)
    expected = their_logits(theirs(folder), ids)
    assert difference(logits_of(folder, ids), expected) < TOLERANCE
    assert difference(logits_of(folder, ids, piece=1), expected) < TOLERANCE
    with ops.reference_only():
        assert difference(logits_of(folder, ids), expected) < TOLERANCE


@pytest.fixture
def scales_per_token(monkeypatch):
    """compressed-tensors gives 2-D inputs (the experts') one scale for all tokens; the format, and vLLM, one each."""
    forward = "compressed_tensors.quantization.lifecycle.forward"
    original = importlib.import_module(forward).compute_dynamic_scales_and_zp

    def per_token(value, args, *rest, **options):
        scale, zero = original(value if value.ndim == 3 else value[None], args, *rest, **options)
        return scale.reshape(*value.shape[:-1], 1), zero.reshape(*value.shape[:-1], 1)

    monkeypatch.setattr(f"{forward}.compute_dynamic_scales_and_zp", per_token)


@pytest.mark.parametrize("arch, kind", [("scout", "fp8"), ("maverick", "mixed")])
def test_fp8_with_dynamic_activations_equals_transformers(quantized, scales_per_token, arch, kind):
    """Exactly, until some activation on the edge between two e4m3 values falls to either side: later tokens see it."""
    folder = quantized(arch, kind)
    ids = random_ids(70, seed=2)
    expected = their_logits(theirs(folder), ids)
    with ops.reference_only():
        by_reference = logits_of(folder, ids)
    for logits in (logits_of(folder, ids), by_reference):
        per_token = (logits - expected).norm(dim=-1) / expected.norm(dim=-1)
        assert per_token.quantile(0.2) < TOLERANCE
        assert per_token.median() < 0.03


@pytest.mark.parametrize("kind", ["int4-all", "fp8", "mixed"])
def test_bfloat16_is_as_close_to_float32_as_transformers_is(quantized, scales_per_token, kind):
    folder = quantized("scout", kind)
    ids = random_ids(70, seed=3)
    exact = logits_of(folder, ids)
    noise = typical_difference(their_logits(theirs(folder, torch.bfloat16), ids), exact)
    assert typical_difference(logits_of(folder, ids, torch.bfloat16), exact) < 1.3 * noise
    assert typical_difference(logits_of(folder, ids, torch.bfloat16, piece=3), exact) < 1.3 * noise


def test_fp8_linear_equals_per_token_fake_quantization():
    """One linear against compressed-tensors' own quantizer, given 3-D input so that it scales per token."""
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp

    torch.manual_seed(0)
    x, w = torch.randn(9, 128), torch.randn(32, 128) * torch.rand(32, 1)
    scale = (w.abs().amax(1, keepdim=True) / 448).bfloat16()
    part = Fp8Linear((w / scale.float()).to(torch.float8_e4m3fn), scale, dynamic_activations=True)
    args = QuantizationArgs(num_bits=8, type="float", strategy="token", symmetric=True, dynamic=True)
    token_scale, zero = compute_dynamic_scales_and_zp(x[None], args, torch.nn.Identity())
    faked = fake_quantize(x[None], token_scale, zero, args)[0]
    expected = faked @ (part.weight.float() * scale.float()).T
    for kernels in (ops, reference):
        torch.testing.assert_close(kernels.linear(x, part), expected, rtol=1e-4, atol=1e-4)


def test_nothing_is_expanded_in_memory(quantized):
    folder = quantized("scout", "int4-all")
    reader = open_checkpoint(folder)
    model = load_model(reader, "cpu", torch.bfloat16)
    stored = sum(info.nbytes for name, info in reader.tensors().items() if not name.endswith("weight_shape"))
    assert model.weights_nbytes == stored
    kinds = {tensor.dtype for tensor in tensors_of(model.text.weights)}
    assert kinds == {torch.int32, torch.bfloat16}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_negative_scales(dtype):
    torch.manual_seed(1)
    packed = torch.randint(-(2**31), 2**31 - 1, (64, 32), dtype=torch.int32)
    scale = (torch.randn(64, 2) * 0.01).bfloat16()
    assert (scale < 0).any()
    part = Int4Linear(packed, scale, 128)
    for rows in (1, 5, 40, 200):
        x = torch.randn(rows, 256).to(dtype)
        expected = x.double() @ reference.dequantize_int4(part, torch.float32).double().T
        tolerance = 1e-5 if dtype == torch.float32 else 6e-3
        assert difference(ops.linear(x, part).double(), expected) < tolerance


def test_fused_parts_of_different_kinds():
    torch.manual_seed(2)
    packed = torch.randint(-(2**31), 2**31 - 1, (32, 16), dtype=torch.int32)
    parts = (
        DenseLinear(torch.randn(48, 128)),
        Int4Linear(packed, torch.rand(32, 1).bfloat16(), 128),
        Fp8Linear(torch.randn(16, 128).to(torch.float8_e4m3fn), torch.rand(16, 1).bfloat16(), False),
    )
    x = torch.randn(7, 128)
    fused: Linear = FusedLinear(parts)
    expected = torch.cat([reference.linear(x, part) for part in parts], dim=-1)
    torch.testing.assert_close(ops.linear(x, fused), expected, rtol=1e-4, atol=1e-4)
