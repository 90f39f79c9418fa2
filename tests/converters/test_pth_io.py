""".pth files: planned byte by byte, and read without trusting them. The oracles are torch.load and zipfile."""

import os
import pickle
import zipfile
import zlib

import pytest
import torch

from converters.pth_io import PthFile, plan_pth
from converters.writer import ShardFile, TensorSpec, exists
from l4tool.core.errors import CheckpointError, InputMissing

TENSORS = {
    "a": torch.randn(5, 7).bfloat16(),
    "layers.0.b": torch.randn(33),
    "ü": torch.randn(3, 1, 2).half(),
    "empty": torch.zeros(0, 4),
    "one": torch.tensor(3.0),
}


def specs(tensors):
    return [TensorSpec(name, tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()]


def crc(tensor):
    return zlib.crc32(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())


@pytest.fixture
def written(tmp_path):
    plan = plan_pth("consolidated.00.pth", specs(TENSORS))
    shard = ShardFile(tmp_path, plan)
    for name, tensor in TENSORS.items():
        shard.write(name, tensor)
    shard.write_crcs({name: crc(tensor) for name, tensor in TENSORS.items()})
    shard.finish()
    assert exists(tmp_path, plan)
    return tmp_path / plan.file_name


@pytest.mark.parametrize("mmap", [True, False])
def test_torch_reads_what_is_planned(written, mmap):
    state = torch.load(written, weights_only=True, mmap=mmap)
    assert list(state) == list(TENSORS)
    for name, tensor in TENSORS.items():
        assert state[name].dtype == tensor.dtype and torch.equal(state[name], tensor) and not state[name].requires_grad
        assert state[name].data_ptr() % 64 == 0 or not mmap


def test_zipfile_finds_no_fault(written):
    with zipfile.ZipFile(written) as archive:
        assert archive.testzip() is None
        assert archive.namelist()[0] == "consolidated.00/data.pkl"
    data = bytearray(written.read_bytes())
    plan = plan_pth("consolidated.00.pth", specs(TENSORS))
    data[plan.starts["layers.0.b"]] ^= 1
    written.write_bytes(data)
    with zipfile.ZipFile(written) as archive:
        assert archive.testzip() == "consolidated.00/data/1"


def test_a_plan_is_the_same_at_any_time_and_its_header_never_changes(written):
    plan = plan_pth("consolidated.00.pth", specs(TENSORS))
    assert plan == plan_pth("consolidated.00.pth", specs(TENSORS))
    assert all(at >= len(plan.header) for places in plan.crc_at.values() for at in places)
    assert written.read_bytes().startswith(plan.header) and written.stat().st_size == plan.nbytes
    assert plan != plan_pth("consolidated.00.pth", specs(TENSORS | {"one": torch.ones(1)}))


def test_beyond_4_gib(tmp_path):
    """A sparse file: sizes and offsets past 32 bits, and more elements than an int32 counts."""
    large = 2**31 + 5
    wide = [
        TensorSpec("x", (large,), torch.bfloat16),
        TensorSpec("y", (10,), torch.float32),
        TensorSpec("z", (3, 2**31), torch.bfloat16),
    ]
    plan = plan_pth("wide.pth", wide)
    shard = ShardFile(tmp_path, plan)
    shard.write("y", torch.arange(10.0))
    shard.write_crcs({"x": 0, "y": crc(torch.arange(10.0)), "z": 0})
    shard.mark("x")
    shard.mark("z")
    shard.finish()
    path = tmp_path / "wide.pth"
    state = torch.load(path, weights_only=True, mmap=True)
    assert torch.equal(state["y"], torch.arange(10.0)) and state["z"].shape == (3, 2**31) and state["z"][2, -1] == 0
    with zipfile.ZipFile(path) as archive:
        sizes = [info.file_size for info in archive.infolist() if "/data/" in info.filename]
        assert sizes[:3] == [2 * large, 40, 3 * 2**32] and zlib.crc32(archive.read("wide/data/1")) == crc(state["y"])
    file = PthFile(path)
    assert torch.equal(file.view("y"), torch.arange(10.0)) and file.tensors["z"].start == plan.starts["z"]
    os.unlink(path)


def test_reading_what_torch_saves(tmp_path):
    shared = torch.arange(20.0)
    state = TENSORS | {
        "half of it": shared[10:],
        "all of it": shared,
        "fp8": torch.randn(4, 4).to(torch.float8_e4m3fn),
        "parameter": torch.nn.Parameter(torch.randn(3)),
        "text": "hello",
    }
    torch.save(state, tmp_path / "x.pth")
    file = PthFile(tmp_path / "x.pth")
    assert list(file.tensors) == [name for name in state if name != "text"]
    for name, tensor in file.tensors.items():
        want = state[name].detach()
        got = file.view(name)
        assert got.dtype == want.dtype and tensor.shape == want.shape
        assert torch.equal(got.float(), want.float())
    view = file.view("all of it")
    file.close()
    assert torch.equal(view, shared)  # views outlive the file


class Run:
    def __reduce__(self):
        return os.system, ("touch /tmp/never-made-by-l4tool",)


def repack(path, change):
    """The same archive, each record as `change(name, data)` gives it (None: left out), by zipfile."""
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in records.items():
            new = change(name, data)
            if new is not None:
                archive.writestr(zipfile.ZipInfo(name), new)


def test_a_pickle_that_runs_something(tmp_path):
    torch.save({"a": torch.ones(2), "b": Run()}, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=r"x.pth is not loaded: its pickle wants to run (posix|os)\.system"):
        PthFile(tmp_path / "x.pth")
    assert not os.path.exists("/tmp/never-made-by-l4tool")


HOSTILE = {
    "no zip": (lambda path: path.write_bytes(b"x" * 500), "truncated, or no ZIP archive"),
    "empty": (lambda path: path.write_bytes(b""), "truncated, or no ZIP archive"),
    "old format": (
        lambda path: torch.save(TENSORS, path, _use_new_zipfile_serialization=False), "truncated, or no ZIP archive",
    ),
    "no pickle": (lambda path: repack(path, lambda n, d: None if n.endswith("pkl") else d), "cannot be read"),
    "broken pickle": (lambda path: repack(path, lambda n, d: d[:99] if n.endswith("pkl") else d), "cannot be read"),
    "garbage pickle": (lambda path: repack(path, lambda n, d: b"\x80\x02((((." if n.endswith("pkl") else d), "pickle"),
    "bytes of any size": (
        lambda path: repack(path, lambda n, d: pickled(bytes_of(10**12)) if n.endswith("pkl") else d), "with arguments",
    ),
    "another codec": (
        lambda path: repack(path, lambda n, d: codec_pickle() if n.endswith("pkl") else d), "codec failed",
    ),
    "a short record": (lambda path: repack(path, lambda n, d: d[:8] if n.endswith("data/0") else d), "outside its rec"),
    "big endian": (lambda path: repack(path, lambda n, d: b"big" if n.endswith("order") else d), "big-endian"),
}  # fmt: skip


def bytes_of(count):
    return b"c__builtin__\nbytes\n(" + b"\x8a\x06" + count.to_bytes(6, "little") + b"tR"


def pickled(value):
    return b"\x80\x02}X\x01\x00\x00\x00a" + value + b"s."


def codec_pickle():
    return pickled(b"c_codecs\nencode\n(X\x01\x00\x00\x00aX\x04\x00\x00\x00zlibtR")


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_files(written, case):
    spoil, message = HOSTILE[case]
    spoil(written)
    with pytest.raises(CheckpointError, match=message):
        PthFile(written)


def test_compressed_records(written):
    with zipfile.ZipFile(written) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(written, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in records.items():
            archive.writestr(name, data)
    with pytest.raises(CheckpointError, match="is compressed"):
        PthFile(written)


def test_every_truncation_is_one_clear_error(written):
    data = written.read_bytes()
    for size in range(0, len(data), 97):
        written.write_bytes(data[:size])
        with pytest.raises(CheckpointError):
            PthFile(written)


def test_flipped_bits_never_escape_as_another_error(written):
    data = written.read_bytes()
    generator = torch.Generator().manual_seed(0)
    for _ in range(150):
        at = int(torch.randint(len(data), (1,), generator=generator))
        spoilt = bytearray(data)
        spoilt[at] ^= 1 << int(torch.randint(8, (1,), generator=generator))
        written.write_bytes(spoilt)
        try:
            file = PthFile(written)
            for name in file.tensors:
                file.view(name).sum()
        except CheckpointError:
            pass


def test_no_file(tmp_path):
    with pytest.raises(InputMissing, match="does not exist"):
        PthFile(tmp_path / "x.pth")


def test_the_oracle_agrees_that_the_pickle_is_protocol_2(written):
    with zipfile.ZipFile(written) as archive:
        assert archive.read("consolidated.00/data.pkl")[:2] == pickle.PROTO + b"\x02"
