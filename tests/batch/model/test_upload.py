"""Weights on their way to a device: every stride and dtype, buffers smaller than a tensor, tensors read ahead."""

import pytest
import torch

from batch.kernels import ops
from batch.model.loading import load_weights
from batch.model.upload import BUFFERS, Upload
from batch.model.weights import tensors_of
from converters.detect import open_checkpoint
from tests import checkpoints


@pytest.mark.parametrize("buffer_bytes", [64, 4096])
def test_what_arrives_is_what_was_sent(buffer_bytes, device):
    sender = Upload(device, buffer_bytes)
    source = torch.randn(40, 24)
    whole = torch.zeros(3, 40, 24, device=device)
    turned = torch.zeros(24, 40, device=device).T
    cast, empty = torch.zeros(40, 24, dtype=torch.bfloat16, device=device), torch.zeros(0, 24, device=device)
    for _ in range(BUFFERS + 1):  # buffers are used again while others are on their way
        for target in (whole[1], turned, cast):
            sender.copy(target, source.T.contiguous().T)
            sender.copy(target, source)
    sender.copy(empty, source[:0])
    sender.copy(whole[2], source[:, ::2].repeat(1, 2))
    assert torch.equal(whole[1].cpu(), source) and torch.equal(turned.cpu(), source)
    assert torch.equal(cast.cpu(), source.bfloat16()) and not whole[0].any()
    assert torch.equal(whole[2].cpu(), source[:, ::2].repeat(1, 2))


def test_eight_bit_floats_and_words(device):
    sender = Upload(device, 100)
    for source in (torch.randn(30, 16).to(torch.float8_e4m3fn), torch.randint(-9, 9, (30, 16), dtype=torch.int32)):
        target = torch.zeros(30, 16, device=device).to(source.dtype)
        sender.copy(target, source)
        assert torch.equal(target.cpu().view(torch.uint8), source.view(torch.uint8))


@pytest.mark.parametrize("kind", [None, "int4", "fp8"])
def test_loading_for_a_device_gives_the_same_weights(scout_tiny, kind, tmp_path, device, monkeypatch):
    folder = scout_tiny if kind is None else checkpoints.compress(scout_tiny, tmp_path / "model", kind, 128)
    reader = open_checkpoint(folder)
    plain = [tensor.cpu() for tensor in tensors_of(load_weights(reader, torch.device("cpu"), torch.float32, "auto"))]
    asked = []

    def to_nowhere(self, name, rows=None):
        asked.append(name)
        info = self.tensors()[name]
        return torch.empty(info.shape, dtype=info.dtype, device="meta")

    monkeypatch.setattr(type(reader), "read", to_nowhere)  # nothing may come through the map
    with ops.cuda_only():
        ours = [tensor.cpu() for tensor in tensors_of(load_weights(reader, device, torch.float32, "auto"))]
    assert asked
    assert torch.equal(sorted_values(ours), sorted_values(plain))


def sorted_values(tensors):
    """Whatever is joined or turned."""
    return torch.cat([tensor.double().flatten() for tensor in tensors]).sort().values
