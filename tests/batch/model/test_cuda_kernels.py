"""Whole models through the Triton kernels against the CPU's, in float32: every kind of layer and weight."""

import pytest
import torch

from batch.kernels import ops
from batch.kernels.linears import Fp8Linear, FusedLinear, Int4Linear
from batch.model.model import load_model
from converters.detect import open_checkpoint
from l4tool.core.errors import DeviceError
from tests import checkpoints
from tests.batch.model.driver import Driver, Row
from tests.batch.model.test_text_parity import difference, random_ids

# FP8 activations at a rounding edge may fall either way, which moves what follows by per cents.
FORMS = [
    ("scout", None, 128, 1e-4), ("scout", "mixed", 128, 5e-2), ("maverick", "int4", 64, 1e-4),
]  # fmt: skip


def make_folder(request, tmp_path, arch, kind, group_size):
    source = request.getfixturevalue(f"{arch}_tiny")
    return source if kind is None else checkpoints.compress(source, tmp_path / "model", kind, group_size)


def logits_of(folder, device, ids, pieces):
    """Logits [tokens, V] on the CPU, with the tokens given in pieces."""
    driver = Driver(load_model(open_checkpoint(folder), device, "float32"), num_blocks=32)
    row, found = Row(ids), []
    for count in pieces:
        found.append(driver.step([(row, count)], all_logits=True)[0].cpu())
    return torch.cat(found)


@pytest.mark.parametrize("arch, kind, group_size, most", FORMS)
def test_logits_equal_the_cpus(arch, kind, group_size, most, request, tmp_path, device, monkeypatch):
    folder = make_folder(request, tmp_path, arch, kind, group_size)
    ids, pieces = random_ids(33, seed=1), (31, 1, 1)  # to the end of the chunk of 32 tokens, and past it
    monkeypatch.setattr("batch.kernels.triton_attention.PROGRAMS", 1)
    with ops.cuda_only():
        got = logits_of(folder, device, ids, pieces)
    assert difference(got, logits_of(folder, "cpu", ids, pieces)) < most


def test_linears_over_one_input_are_one(scout_tiny, tmp_path, device):
    for kind, form in (("int4-all", Int4Linear), ("fp8", Fp8Linear)):
        folder = checkpoints.compress(scout_tiny, tmp_path / kind, kind, 128)
        plain = load_model(open_checkpoint(folder), "cpu", "float32").text.weights.layer(0)
        with ops.cuda_only():
            joined = load_model(open_checkpoint(folder), device, "float32").text.weights.layer(0)
        ours, theirs = joined.feed_forward.experts.gate_up[1], plain.feed_forward.experts.gate_up[1]
        assert isinstance(ours, form) and isinstance(theirs, FusedLinear)
        assert ours.out_features == theirs.out_features
        first = 0
        for part in theirs.parts:
            for whole, half in zip(ours.tensors(), part.tensors(), strict=True):
                assert torch.equal(whole[first : first + part.out_features].cpu().float(), half.float())
            first += part.out_features


@pytest.mark.parametrize("arch, kind, group_size, most", FORMS)
def test_decoding_steps_can_be_captured(arch, kind, group_size, most, request, tmp_path, device):
    folder = make_folder(request, tmp_path, arch, kind, group_size)
    with ops.cuda_only():
        model = load_model(open_checkpoint(folder), device, "float32")
        cache = model.allocate_kv(4, 4, 8).layers[0]
        layers = [layer.feed_forward for layer in model.text.weights.layers]
        experts = [layer.experts for layer in layers if hasattr(layer, "experts")]
        assert ops.captures(experts, cache, device, model.dtype)
        with ops.reference_only():
            assert not ops.captures(experts, cache, device, model.dtype)


def test_a_cache_in_8_bits(scout_tiny, device, monkeypatch):
    monkeypatch.setattr("batch.kernels.triton_attention.PROGRAMS", 1)
    reader, ids = open_checkpoint(scout_tiny), random_ids(12, seed=2)
    with pytest.raises(DeviceError, match="--kv-dtype fp8 needs a CUDA device"):
        load_model(reader, "cpu", "float32", kv_dtype="fp8")
    with ops.cuda_only():
        plain = load_model(reader, device, "float32")
        model = load_model(reader, device, "float32", kv_dtype="fp8")
        got = decoded(model, ids)
    assert plain.kv_bytes_per_block("full", 16) == 4 * model.kv_bytes_per_block("full", 16)
    with ops.reference_only():
        # A value at a rounding edge may fall either way.
        assert difference(got, decoded(model, ids)) < 5e-2


def decoded(model, ids):
    driver, row = Driver(model, num_blocks=16), Row(ids)
    assert driver.kv.layers[0].k.dtype == torch.float8_e4m3fn
    return torch.cat([driver.step([(row, count)], all_logits=True)[0].cpu() for count in (len(ids) - 2, 2)])
