"""A placeholder opens like the shard it stands for, and nobody gets its zeros for weights."""

import shutil

import pytest
from safetensors import safe_open

from converters.detect import open_checkpoint
from converters.safetensors_io import read_header
from l4tool.core.errors import InputMissing
from l4tool.core.placeholder import filled, is_placeholder, write_placeholder
from quant import pipeline
from quant.schemes import make_recipe
from tests import checkpoints


def hollow(source, folder):
    """A copy of a checkpoint in which every shard is a placeholder."""
    checkpoints.copy(source, folder)
    for shard in checkpoints.shards(folder):
        data = shard.read_bytes()
        write_placeholder(shard, data[: 8 + int.from_bytes(data[:8], "little")], len(data), "org/name@abc")
    return folder


def test_it_opens_with_the_same_tensors_and_takes_no_room(scout_tiny, tmp_path):
    folder = hollow(scout_tiny, tmp_path / "model")
    theirs, ours = open_checkpoint(scout_tiny), open_checkpoint(folder)
    assert [(i.name, i.shape, i.dtype, i.nbytes) for i in ours.tensors().values()] == [
        (i.name, i.shape, i.dtype, i.nbytes) for i in theirs.tensors().values()
    ]
    for shard in checkpoints.shards(folder):
        assert shard.stat().st_size == (scout_tiny / shard.name).stat().st_size
        assert shard.stat().st_blocks * 512 < 64 * 1024
        with safe_open(shard, "pt") as file, safe_open(scout_tiny / shard.name, "pt") as original:
            assert set(file.keys()) == set(original.keys())


def test_weights_are_refused(scout_tiny, tmp_path):
    folder = hollow(scout_tiny, tmp_path / "model")
    reader = open_checkpoint(folder)
    for name in reader.tensors():
        with pytest.raises(InputMissing, match="header only"):
            reader.read(name)
    with pytest.raises(InputMissing, match="header only"):
        pipeline.quantize(reader, tmp_path / "out", make_recipe("int4"), pipeline.Options())
    assert not (tmp_path / "out").exists()


def test_shards_are_filled_one_by_one(scout_tiny, tmp_path):
    """The reader stays open: a shard is mapped only once its bytes are there."""
    folder = hollow(scout_tiny, tmp_path / "model")
    reader, original = open_checkpoint(folder), open_checkpoint(scout_tiny)
    shard = checkpoints.shards(folder)[1]
    mine = [info.name for info in reader.tensors().values() if info.file == shard]
    copied = tmp_path / "download"
    shutil.copy(scout_tiny / shard.name, copied)
    copied.rename(shard)
    assert is_placeholder(shard)  # killed here, it would still not be trusted
    with pytest.raises(InputMissing):
        reader.read(mine[0])
    filled(shard)
    assert not is_placeholder(shard)
    assert all(reader.read(name).equal(original.read(name)) for name in mine)
    other = next(info.name for info in reader.tensors().values() if info.file != shard)
    with pytest.raises(InputMissing):
        reader.read(other)


def test_a_quantized_checkpoint_opens_too(scout_tiny, tmp_path):
    """Its weight_shape tensors are data, which a placeholder does not have."""
    quantized = tmp_path / "int4"
    pipeline.quantize(open_checkpoint(scout_tiny), quantized, make_recipe("int4"), pipeline.Options())
    folder = hollow(quantized, tmp_path / "model")
    assert open_checkpoint(folder).tensors().keys() == open_checkpoint(quantized).tensors().keys()


def test_a_download_that_was_cut_short_is_left_alone(tmp_path):
    part = tmp_path / "model.safetensors.part"
    part.write_bytes(b"half of it")
    header = (2).to_bytes(8, "little") + b"{}"
    write_placeholder(tmp_path / "model.safetensors", header, 10, "org/name")
    assert part.read_bytes() == b"half of it"
    assert read_header(tmp_path / "model.safetensors") == ({}, {})
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "model.safetensors", "model.safetensors.header-only", "model.safetensors.part",
    ]  # fmt: skip
