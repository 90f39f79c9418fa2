"""`plan`'s figures against what the engine really allocates."""

import pytest
import torch

from batch.backends.embedded import EmbeddedOptions, engine_config
from batch.backends.memory import default_kv_bytes
from batch.engine.engine import Engine
from batch.model.model import load_model
from batch.requests import SamplingParams
from converters.detect import open_checkpoint
from quant import memory, outlook, pipeline
from quant.fitting import Demand, Hardware
from quant.gpus import Gpu
from quant.schemes import make_recipe
from tests import checkpoints

SCHEMES = ["bfloat16", "int4", "mixed", "fp8"]


@pytest.fixture(scope="module", params=["scout_tiny", "maverick_tiny", "scout_tiny_text"])
def source(request):
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module", params=SCHEMES)
def case(source, request, tmp_path_factory):
    """(checkpoint in a scheme, what was foretold for a GPU of 4 GiB before it was made)."""
    reader = open_checkpoint(source)
    asked = outlook.Question(Hardware(Gpu("any", 4 * 2**30, ""), 1), Demand(4096), 8 * 2**30)
    if request.param == "bfloat16":
        return source, outlook.stored(reader, asked).fitting
    recipe, out = make_recipe(request.param), tmp_path_factory.mktemp("quantized") / "model"
    foretold = outlook.quantized(reader, recipe, asked).fitting
    pipeline.quantize(reader, out, recipe, pipeline.Options())
    return out, foretold


def test_weights_in_memory(case):
    folder, foretold = case
    assert load_model(open_checkpoint(folder)).weights_nbytes == foretold.weight_bytes


def test_kv_cache(case):
    """The engine, given the bytes that were foretold, makes the pools that were foretold."""
    folder, foretold = case
    model = load_model(open_checkpoint(folder))
    # Pools of the foretold GiB would be slow to zero here: their size is a parameter like any other.
    kv_bytes = 2**24
    config = engine_config(model, EmbeddedOptions(kv_memory_bytes=kv_bytes, block_size=foretold.block_tokens))
    assert foretold.block_tokens == memory.largest_block(model.arch.text)  # what engines on GPUs take
    engine = Engine(model, config)
    text = model.arch.text
    need = memory.blocks_for(text, 4096, config.block_size)
    pools = memory.pools(text, kv_bytes, config.block_size, 2, config.max_seqs, need)
    added = engine.add(0, [1] * 100, SamplingParams(max_tokens=4096 - 100))
    assert added.error is None
    held = memory.BlockNeed(engine.blocks.full.num_blocks, engine.blocks.chunked.num_blocks)
    assert held == pools
    assert engine.runner.kv.nbytes == memory.blocks_bytes(text, pools, config.block_size)
    assert engine.blocks.need(4096) == need
    assert memory.kv_bytes(text, 4096, 2, config.block_size) == foretold.kv_bytes_per_sequence


def test_the_cache_that_a_device_gets(case, monkeypatch):
    """With the weights on a GPU of 4 GiB, what CUDA then calls free gives the cache that was foretold."""
    folder, foretold = case
    model = load_model(open_checkpoint(folder))
    free_bytes = 4 * 2**30 - memory.CONTEXT_BYTES - model.weights_nbytes
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free_bytes, 4 * 2**30))
    device = torch.device("cuda")
    assert default_kv_bytes(device, memory.step_bytes(model.arch.text)) == foretold.kv_bytes


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("scheme", SCHEMES)
def test_what_cuda_allocates(scheme, tmp_path):
    """Weights and cache on a real device, within 5 %."""
    folder = checkpoints.make(tmp_path / "source", preset="mini")
    total_bytes = torch.cuda.mem_get_info()[1]
    asked = outlook.Question(Hardware(Gpu("this", total_bytes, ""), 1), Demand(4096), 8 * 2**30)
    reader = open_checkpoint(folder)
    if scheme == "bfloat16":
        foretold = outlook.stored(reader, asked).fitting
    else:
        foretold = outlook.quantized(reader, make_recipe(scheme), asked).fitting
        pipeline.quantize(reader, tmp_path / "out", make_recipe(scheme), pipeline.Options())
        folder = tmp_path / "out"
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    model = load_model(open_checkpoint(folder), "cuda")
    assert torch.cuda.memory_allocated() - before == pytest.approx(foretold.weight_bytes, rel=0.05)
    loaded = torch.cuda.memory_allocated()
    config = engine_config(model, EmbeddedOptions(device="cuda"))
    assert config.kv_bytes == pytest.approx(foretold.kv_bytes, rel=0.05)
    engine = Engine(model, config)
    added = engine.add(0, [1] * 100, SamplingParams(max_tokens=4096 - 100))
    assert added.error is None
    held = memory.BlockNeed(foretold.full_blocks, foretold.chunked_blocks)
    wanted = memory.blocks_bytes(model.arch.text, held, foretold.block_tokens)
    assert torch.cuda.memory_allocated() - loaded == pytest.approx(wanted, rel=0.05)
    engine.close()
