"""Plans of the published models: sizes, shards, units, memory; and the arithmetic of what fits."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from converters.arch_io import arch_from_config
from converters.names import canonical_shapes
from converters.reader import TensorInfo
from converters.writing.encoder import Copy
from converters.writing.plan import BASE_BYTES, make_budget, split
from quant import memory
from quant.plan import build_plan
from quant.schemes import make_recipe
from tests import checkpoints
from tests.converters import published

ROOT = Path(__file__).resolve().parents[2]
GIB = 2**30


class Headers:
    """A reader of a checkpoint that exists only as config.json."""

    def __init__(self, config):
        self.arch = arch_from_config(config, "config.json")
        self.infos = {}
        for name, shape in canonical_shapes(self.arch).items():
            size = 2 * torch.Size(shape).numel()
            self.infos[name] = TensorInfo(name, shape, torch.bfloat16, size, Path("x"))

    def tensors(self):
        return self.infos


@pytest.fixture(scope="module")
def scout():
    return Headers(published.scout())


@pytest.fixture(scope="module")
def maverick():
    return Headers(published.maverick())


@pytest.mark.parametrize(
    ("options", "scout_gb", "maverick_gb"),
    [
        ({"scheme": "int4", "shared_experts": False}, 73.8, 229),
        ({"scheme": "int4"}, 64.9, 216),
        ({"scheme": "mixed", "attention": "fp8"}, 64.8, 217),
        ({"scheme": "fp8"}, 114.6, 408),
        ({"scheme": "fp8", "attention": "fp8"}, 111.6, 405),
    ],
)
def test_sizes_of_the_published_models(options, scout_gb, maverick_gb, scout, maverick):
    """The table in docs/formats.md."""
    recipe = make_recipe(**options)
    for reader, expected in ((scout, scout_gb), (maverick, maverick_gb)):
        plan = build_plan(reader, recipe, "cpu")
        assert plan.output_bytes / 1e9 == pytest.approx(expected, abs=0.06 if reader is scout else 0.6)
        assert max(shard.nbytes for shard in plan.shards) <= 5e9
        assert sum(len(shard.specs) for shard in plan.shards) == len({s.name for p in plan.shards for s in p.specs})


def test_units_cover_every_row_once_within_the_budget(maverick):
    plan = build_plan(maverick, make_recipe("int4"), "cpu")
    for memory_bytes, jobs in ((8 * GIB, 2), (BASE_BYTES + 16 * 2**20, 4), (8 * GIB, 256)):
        budget = make_budget(plan, memory_bytes, jobs)
        assert budget.jobs * budget.unit_bytes <= memory_bytes - BASE_BYTES
        for items in plan.items[:3] + plan.items[-1:]:
            for item in items:
                units = list(split(item, budget))
                assert [unit.start for unit in units] == [0, *(unit.stop for unit in units[:-1])]
                assert units[-1].stop == item.rows
                assert sum(unit.nbytes for unit in units) == item.info.nbytes
                if isinstance(item.encoder, Copy):
                    continue
                most = max(item.encoder.scratch_bytes(item.info, unit.stop - unit.start) for unit in units)
                assert most <= budget.unit_bytes


def test_parts_of_a_tensor_share_a_shard(scout):
    plan = build_plan(scout, make_recipe("int4"), "cpu", max_shard_bytes=10**8)
    for shard, items in zip(plan.shards, plan.items, strict=True):
        names = {part.name for item in items for part in item.encoder.parts(item.info, item.stored)}
        assert names == {spec.name for spec in shard.specs}


def test_kv_cache_of_scout(scout):
    """192 KiB per token while every layer keeps it, 48 KiB past the first chunk."""
    arch = scout.arch.text
    assert memory.kv_bytes(arch, 1) == 192 * 1024
    assert memory.kv_bytes(arch, 8192) == 8192 * 192 * 1024
    assert memory.kv_bytes(arch, 8193) - memory.kv_bytes(arch, 8192) == 48 * 1024
    assert memory.kv_bytes(arch, 8193, block_size=32) - memory.kv_bytes(arch, 8192) == 32 * 48 * 1024
    for num_bytes in (0, 192 * 1024 - 1, 192 * 1024, 5 * GIB):
        tokens = memory.kv_tokens(arch, num_bytes)
        assert memory.kv_bytes(arch, tokens) <= num_bytes < memory.kv_bytes(arch, tokens + 1)
    assert memory.kv_tokens(arch, 10**15) == 10485760


def test_scout_fits_one_h100_in_int4_only(scout):
    int4 = build_plan(scout, make_recipe("int4"), "cpu").output_bytes
    fit = memory.fit(scout.arch.text, int4)
    assert fit.fits and int(79.1 * GIB) - 8 <= int4 + fit.kv_bytes + fit.reserved_bytes <= int(79.1 * GIB)
    assert fit.kv_tokens == memory.kv_tokens(scout.arch.text, fit.kv_bytes, block_size=32)
    assert 250_000 < fit.kv_tokens < 350_000
    assert not memory.fit(scout.arch.text, build_plan(scout, make_recipe("fp8"), "cpu").output_bytes).fits


@pytest.fixture(scope="module")
def many_experts(tmp_path_factory):
    return checkpoints.make(tmp_path_factory.mktemp("many") / "model", layers=1, experts=128, text_only=True)


@pytest.mark.parametrize("scheme", ["--int4", "--fp8"])
def test_anonymous_memory_does_not_grow_with_the_model(scheme, many_experts, tmp_path):
    """80 MB of weights; what the run itself allocates at its peak stays far below that."""
    source = many_experts
    code = f"""
import os, threading, time
import quant.kernels.int4, quant.kernels.fp8
from l4tool.main import main
import quant.pipeline

def anonymous():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon")) * 1024

main(["quantize", {str(source)!r}, "-o", {str(tmp_path / "warm")!r}, "{scheme}"])
before, peak, stop = anonymous(), 0, False

def watch():
    global peak
    while not stop:
        peak = max(peak, anonymous())
        time.sleep(0.001)

watcher = threading.Thread(target=watch)
watcher.start()
code = main(["quantize", {str(source)!r}, "-o", {str(tmp_path / "out")!r}, "{scheme}", "--jobs", "2"])
stop = True
watcher.join()
print("RESULT", code, peak - before, peak)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert "RESULT" in done.stdout, done.stderr
    result, growth, peak = map(int, done.stdout.split("RESULT")[1].split())
    assert result == 0
    assert growth < 32 * 2**20
    assert peak < 2**30
