"""Shards written in any order, from any thread, across interruptions: the safetensors library reads them."""

import json
import os
import random
import resource
import stat
import threading

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from converters.detect import open_checkpoint
from converters.safetensors_io import DTYPES, read_header
from converters.writer import ShardFile, TensorSpec, exists, plan_shards, write_index
from l4tool.core.errors import WriteError
from tests import checkpoints


def tensors():
    generator = torch.Generator().manual_seed(0)
    made = {}
    for number, dtype in enumerate(DTYPES.values()):
        shape = (7 + number, 3, 5) if number % 2 else (11 + number,)
        raw = torch.randint(0, 2, shape, generator=generator)
        made[f"t{number}"] = raw.to(dtype)
    return made | {"scalar": torch.tensor(1.5), "empty": torch.empty(0, 4), "big": torch.arange(1000.0).view(100, 10)}


def specs(made):
    return [TensorSpec(name, tuple(tensor.shape), tensor.dtype) for name, tensor in made.items()]


def same(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and a.tolist() == b.tolist()


def write_all(folder, plans, made):
    for plan in plans:
        shard = ShardFile(folder, plan)
        for spec in plan.specs:
            shard.write(spec.name, made[spec.name])
        shard.finish()
    write_index(folder, plans)


@pytest.mark.parametrize("limit", [1, 500, 10**9])
def test_the_library_reads_what_is_written(tmp_path, limit):
    made = tensors()
    plans = plan_shards(specs(made), limit)
    write_all(tmp_path, plans, made)
    found = {}
    for plan in plans:
        path = tmp_path / plan.file_name
        assert path.stat().st_size == plan.nbytes and exists(tmp_path, plan)
        with safe_open(path, "pt") as file:
            assert file.metadata() == {"format": "pt"}
        found |= load_file(path)
        for stored in read_header(path)[0].values():
            assert stored.start % stored.dtype.itemsize == 0
            assert plan.starts[stored.name] == stored.start
    assert found.keys() == made.keys()
    assert all(same(found[name], tensor) for name, tensor in made.items())
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in made.values())
    assert index["weight_map"] == {spec.name: plan.file_name for plan in plans for spec in plan.specs}
    assert not list(tmp_path.glob("*.part"))


def test_a_plan_keeps_to_the_limit_and_to_the_order():
    made = [TensorSpec(f"t{n}", (n + 1, 8), torch.bfloat16) for n in range(40)]
    plans = plan_shards(made, 2000)
    assert [spec.name for plan in plans for spec in plan.specs] == [spec.name for spec in made]
    assert all(sum(spec.nbytes for spec in plan.specs) <= 2000 for plan in plans)
    assert plans == plan_shards(list(made), 2000)
    assert plans[0].file_name == f"model-00001-of-{len(plans):05d}.safetensors"
    huge = plan_shards([made[0], TensorSpec("huge", (5000, 8), torch.bfloat16), made[1]], 2000)
    assert [[spec.name for spec in plan.specs] for plan in huge] == [["t0"], ["huge"], ["t1"]]
    assert plan_shards([]) == []
    with pytest.raises(ValueError, match="twice"):
        plan_shards([made[0], made[0]])


def test_parts_of_one_linear_stay_together():
    made = [TensorSpec(f"l{n}.{part}", (100,), torch.int32) for n in range(9) for part in ("packed", "scale", "shape")]
    plans = plan_shards(made, 3000, together=lambda spec: spec.name.split(".")[0])
    assert [len(plan.specs) for plan in plans] == [6, 6, 6, 6, 3]
    alone = plan_shards(made, 1000, together=lambda spec: spec.name.split(".")[0])
    assert [len(plan.specs) for plan in alone] == [3] * 9


def test_rows_in_any_order_from_many_threads(tmp_path):
    made = {f"t{n}": torch.randn(64, 33, generator=torch.Generator().manual_seed(n)) for n in range(6)}
    (plan,) = plan_shards(specs(made))
    pieces = [(name, row, row + 4) for name in made for row in range(0, 64, 4)]
    random.Random(3).shuffle(pieces)
    shard = ShardFile(tmp_path, plan)

    def work(mine):
        for name, row, stop in mine:
            shard.write(name, made[name][row:stop], row)

    threads = [threading.Thread(target=work, args=(pieces[n::4],)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    shard.finish()
    found = load_file(tmp_path / plan.file_name)
    assert all(torch.equal(found[name], tensor) for name, tensor in made.items())


def test_strided_tensors_are_written_as_they_read(tmp_path):
    weight = torch.arange(60.0).view(6, 10).T
    (plan,) = plan_shards([TensorSpec("w", (10, 6), torch.float32)])
    shard = ShardFile(tmp_path, plan)
    shard.write("w", weight[5:], 5)
    shard.write("w", weight[:5])
    shard.finish()
    assert torch.equal(load_file(tmp_path / plan.file_name)["w"], weight)


def test_what_does_not_fit_is_refused(tmp_path):
    (plan,) = plan_shards([TensorSpec("w", (10, 6), torch.float32)])
    shard = ShardFile(tmp_path, plan)
    with pytest.raises(ValueError, match="does not fit"):
        shard.write("w", torch.zeros(10, 6, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="does not fit"):
        shard.write("w", torch.zeros(10, 5))
    with pytest.raises(ValueError, match="does not fit"):
        shard.write("w", torch.zeros(60))
    with pytest.raises(ValueError, match=r"rows 8\.\.11 of 10"):
        shard.write("w", torch.zeros(3, 6), 8)
    with pytest.raises(KeyError):
        shard.write("v", torch.zeros(3, 6))
    shard.write("w", torch.zeros(4, 6), 2)
    with pytest.raises(ValueError, match="written before"):
        shard.write("w", torch.zeros(4, 6), 5)
    with pytest.raises(ValueError, match=r"1 tensor\(s\) are not complete: w"):
        shard.finish()
    assert shard.missing() == ["w"]
    assert not (tmp_path / plan.file_name).exists() and not exists(tmp_path, plan)
    shard.close()
    shard.close()


def test_resume_keeps_what_was_marked(tmp_path):
    made = {"a": torch.randn(8, 4), "b": torch.randn(8, 4)}
    (plan,) = plan_shards(specs(made))
    first = ShardFile(tmp_path, plan, resume=True)
    first.write("a", made["a"])
    first.write("b", made["b"][:3])
    first.sync()
    first.close()
    second = ShardFile(tmp_path, plan, resume=True)
    second.mark("a")
    second.mark("b", 0, 3)
    assert second.missing() == ["b"]
    second.write("b", made["b"][3:], 3)
    second.finish()
    resumed = (tmp_path / plan.file_name).read_bytes()
    write_all(tmp_path, [plan], made)
    assert (tmp_path / plan.file_name).read_bytes() == resumed


def test_a_part_of_another_plan_is_not_kept(tmp_path):
    (old,) = plan_shards([TensorSpec("w", (10, 6), torch.float32)])
    (new,) = plan_shards([TensorSpec("x", (10, 6), torch.float32)])
    assert old.nbytes == new.nbytes and old != new
    shard = ShardFile(tmp_path, old)
    shard.write("w", torch.ones(10, 6))
    shard.close()
    shard = ShardFile(tmp_path, new, resume=True)
    assert read_header(shard.part)[0].keys() == {"x"}
    assert os.pread(shard._fd, 240, new.starts["x"]) == bytes(240)
    shard.write("x", torch.ones(10, 6))
    shard.finish()
    assert exists(tmp_path, new) and not exists(tmp_path, old)


@pytest.mark.parametrize("mask, mode", [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_mode_by_umask(tmp_path, mask, mode):
    before = os.umask(mask)
    try:
        write_all(tmp_path, plan_shards(specs({"a": torch.ones(2)})), {"a": torch.ones(2)})
    finally:
        os.umask(before)
    assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()} == {mode}


def test_write_errors(tmp_path):
    (plan,) = plan_shards([TensorSpec("w", (10, 6), torch.float32)])
    with pytest.raises(WriteError, match="cannot write"):
        ShardFile(tmp_path / "nowhere", plan)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    (large,) = plan_shards([TensorSpec("w", (1000, 100), torch.float32)])
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(WriteError, match=r"cannot write .*\.part: File too large") as caught:
            ShardFile(tmp_path, large)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "ulimit" in caught.value.hint


def test_a_full_disk(tmp_path):
    """/dev/full takes an open and refuses every byte with ENOSPC, as a full disk does."""
    (plan,) = plan_shards([TensorSpec("w", (10, 6), torch.float32)])
    shard = ShardFile(tmp_path, plan)
    os.dup2(os.open("/dev/full", os.O_RDWR), shard._fd)
    with pytest.raises(WriteError, match="No space left") as caught:
        shard.write("w", torch.ones(10, 6))
    assert "free some space" in caught.value.hint
    shard.close()


def test_our_header_is_the_librarys_byte_for_byte(tmp_path):
    """Same names, one dtype, sorted: then the library's own layout is ours."""
    made = {name: torch.randn(3, 4) for name in ("a", "b", "c")}
    (plan,) = plan_shards(specs(made))
    write_all(tmp_path, [plan], made)
    save_file(made, tmp_path / "theirs.safetensors", metadata={"format": "pt"})
    assert (tmp_path / plan.file_name).read_bytes() == (tmp_path / "theirs.safetensors").read_bytes()


def test_a_checkpoint_written_again_reads_the_same(scout_tiny, tmp_path):
    stored = checkpoints.load(scout_tiny)
    folder = checkpoints.copy(scout_tiny, tmp_path / "model")
    for path in checkpoints.shards(folder):
        path.unlink()
    write_all(folder, plan_shards(specs(stored), 10**6), stored)
    ours, plain = open_checkpoint(folder), open_checkpoint(scout_tiny)
    assert all(torch.equal(ours.read(name), plain.read(name)) for name in plain.tensors())
