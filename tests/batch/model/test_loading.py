"""Devices, dtypes and the byte counts that the engine plans with."""

from dataclasses import replace

import pytest
import torch

from batch.model.model import load_model, resolve_device
from batch.model.weights import Loader, load_text
from converters.detect import open_checkpoint
from l4tool.core.errors import CheckpointError, DeviceError, UsageError


def test_missing_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(DeviceError, match="not available") as caught:
        resolve_device("cuda")
    assert "--device cpu" in caught.value.hint


@pytest.mark.parametrize("device", ["tpu9", "cuda:x", "meta"])
def test_wrong_device(device):
    with pytest.raises(UsageError):
        resolve_device(device)


@pytest.mark.parametrize("dtype", ["int8", torch.float64, "bf16"])
def test_wrong_dtype(scout_tiny, dtype):
    with pytest.raises(UsageError, match="is not supported"):
        load_model(open_checkpoint(scout_tiny), "cpu", dtype)


def test_checkpoint_dtype_is_the_default_and_bytes_are_counted(scout_tiny):
    reader = open_checkpoint(scout_tiny)
    model = load_model(reader)
    assert model.dtype == torch.bfloat16
    assert model.weights_nbytes == sum(info.nbytes for info in reader.tensors().values())
    for kind, layers in (("full", 1), ("chunked", 3)):
        text = model.arch.text
        assert model.kv_bytes_per_block(kind, 16) == 2 * layers * 16 * text.num_kv_heads * text.head_dim * 2
    kv = model.allocate_kv(5, 3, 16)
    assert kv.nbytes == 5 * model.kv_bytes_per_block("full", 16) + 3 * model.kv_bytes_per_block("chunked", 16)
    assert {layer.k.shape[0] for layer in kv.layers} == {5, 3}


def test_too_large_a_cache_is_a_device_error(scout):
    with pytest.raises(DeviceError, match="KV cache") as caught:
        scout.allocate_kv(10**12, 1, 16)
    assert "--kv-memory" in caught.value.hint


def test_more_than_one_expert_per_token_is_refused(scout_tiny):
    reader = open_checkpoint(scout_tiny)
    loader = Loader(reader, torch.device("cpu"), torch.float32)
    with pytest.raises(CheckpointError, match="top-1"):
        load_text(loader, replace(reader.arch.text, experts_per_token=2))


def test_weights_are_the_models_own(scout_tiny):
    """The reader may be closed once the model is loaded, dense weights being copies."""
    reader = open_checkpoint(scout_tiny)
    model = load_model(reader)
    before = model.text.weights.embed.clone()
    reader.close()
    assert torch.equal(model.text.weights.embed, before)


def test_a_device_needs_triton(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    assert resolve_device("cuda:1") == torch.device("cuda:1")
    assert resolve_device("cuda") == torch.device("cuda:0")  # with a number, which torch.cuda's functions ask for
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(DeviceError, match="needs Triton") as error:
        resolve_device("cuda:1")
    assert "l4tool[cuda]" in error.value.hint
    assert resolve_device("cpu") == torch.device("cpu")


def test_kernels_are_launched_on_the_models_device(scout_tiny, monkeypatch):
    chosen = []

    def choose(device):
        chosen.append(device)
        raise KeyboardInterrupt  # there is no such device to go on with

    monkeypatch.setattr("batch.model.model.resolve_device", torch.device)
    monkeypatch.setattr(torch.cuda, "set_device", choose)
    with pytest.raises(KeyboardInterrupt):
        load_model(open_checkpoint(scout_tiny), "cuda:1")
    assert chosen == [torch.device("cuda:1")]
