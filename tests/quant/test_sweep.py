"""One pass over files: digests as hashlib gives them, values as torch counts them."""

import hashlib

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from converters.safetensors_io import SafetensorsFile
from converters.writer import TensorSpec, plan_shards
from converters.writing.hashing import StreamedDigest, shard_digest
from quant import sweep as sweep_module
from quant.sweep import FLOATS, FileJob, sweep


def read(path, digest=None, chunk=None, monkeypatch=None):
    if chunk is not None:
        monkeypatch.setattr(sweep_module, "CHUNK_BYTES", chunk)
    file = SafetensorsFile(path)
    job = FileJob(path, path.stat().st_size, tuple(file.tensors.values()), digest)
    seen = []
    sweep([job], 2, seen.append)
    assert sum(seen) == job.nbytes and job.error is None
    return job


@pytest.mark.parametrize("dtype", FLOATS)
def test_every_bit_pattern(dtype, tmp_path):
    """All codes of the small types; of the others the ends of every class."""
    bits, mask, _ = FLOATS[dtype]
    if np.dtype(bits).itemsize <= 2:
        codes = np.arange(2 ** (8 * np.dtype(bits).itemsize), dtype=np.uint32).astype(bits)
    else:
        info = torch.finfo(dtype)
        values = [0.0, -0.0, 1.0, info.max, -info.max, info.tiny, info.smallest_normal / 2]
        values += [float("inf"), float("-inf"), float("nan"), -float("nan")]
        codes = torch.tensor(values, dtype=dtype).numpy().view(bits)
        assert mask == np.iinfo(bits).max // 2
    whole = torch.from_numpy(codes.view(f"i{codes.itemsize}").copy()).view(dtype)
    save_file({"x": whole}, tmp_path / "x.safetensors")
    values = read(tmp_path / "x.safetensors").values["x"]
    wide = whole.double() if dtype != torch.float64 else whole
    assert values.nan == int(wide.isnan().sum()) and values.inf == int(wide.isinf().sum())
    assert values.zeros == int((wide == 0).sum()) and values.count == len(codes)
    assert values.first == (int((~wide.isfinite()).nonzero()[0]),)


def test_places_and_counts_across_chunks(tmp_path, monkeypatch):
    x = torch.randn(37, 5, 11)
    x[20, 3, 7], x[30, 0, 0], x[36, 4, 10] = float("inf"), float("nan"), float("nan")
    x[1] = 0
    tensors = {"a": torch.zeros(3, dtype=torch.bfloat16), "n": torch.arange(9), "x": x, "e": torch.empty(0, 4)}
    save_file(tensors, tmp_path / "x.safetensors")
    values = read(tmp_path / "x.safetensors", chunk=64, monkeypatch=monkeypatch).values
    assert (values["x"].nan, values["x"].inf, values["x"].zeros) == (2, 1, 55)
    assert values["x"].first == (20, 3, 7)
    assert values["a"].zeros == values["a"].count == 3 and values["a"].first is None
    assert values.keys() == {"a", "x", "e"}


@pytest.mark.parametrize("chunk", [2**12, 2**22])
def test_the_digest_of_the_whole_file(tmp_path, monkeypatch, chunk):
    save_file({"i": torch.arange(5000), "x": torch.randn(3000).bfloat16()}, tmp_path / "x.safetensors")
    job = read(tmp_path / "x.safetensors", hashlib.sha256(), chunk, monkeypatch)
    assert job.nbytes == job.size
    assert job.digest.hexdigest() == hashlib.sha256((tmp_path / "x.safetensors").read_bytes()).hexdigest()
    assert job.values["x"].count == 3000


def test_integers_without_a_digest_are_not_read(tmp_path):
    save_file({"i": torch.arange(5000), "x": torch.randn(30)}, tmp_path / "x.safetensors")
    assert read(tmp_path / "x.safetensors").nbytes == 120


@pytest.mark.parametrize("piece", [1, 7, 64, 10**6])
def test_the_digest_of_a_quantize_run(tmp_path, piece):
    specs = [
        TensorSpec("a", (3, 5), torch.float32),
        TensorSpec("b", (0, 2), torch.int8),
        TensorSpec("c", (), torch.int8),
    ]
    (plan,) = plan_shards(specs)
    raw = plan.header + bytes(range(plan.nbytes - len(plan.header)))
    (tmp_path / plan.file_name).write_bytes(raw)
    spans = sorted((plan.starts[spec.name], plan.starts[spec.name] + spec.nbytes) for spec in plan.specs)
    running = StreamedDigest(len(plan.header), spans)
    for start in range(0, len(raw), piece):
        running.update(raw[start : start + piece])
    assert running.hexdigest() == shard_digest(tmp_path / plan.file_name, plan)


def test_a_file_that_shrinks_is_reported(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"x": torch.randn(3000)}, path)
    tensors = tuple(SafetensorsFile(path).tensors.values())
    path.write_bytes(path.read_bytes()[:-8])
    job = FileJob(path, path.stat().st_size, tensors)
    sweep([job], 1, lambda count: None)
    assert "ends at byte" in str(job.error) and not job.values
