"""`plan`'s figures against what the engine really allocates."""

import pytest
import torch

from batch.backends.embedded import EmbeddedOptions, engine_config
from batch.backends.memory import default_kv_bytes, free_device_bytes
from batch.backends.profiling import worst_step_bytes
from batch.engine.engine import Engine
from batch.engine.image_features import TILES_AT_ONCE
from batch.model.model import load_model
from batch.requests import SamplingParams
from converters.detect import open_checkpoint
from l4tool.core.errors import DeviceError
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


def pretend_free(monkeypatch, free_bytes, total_bytes, share=1.0, reserved_bytes=0):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free_bytes, total_bytes))
    # torch's own function runs: it wants a device with a number.
    monkeypatch.setattr(torch.cuda.memory, "_lazy_init", lambda: None)
    monkeypatch.setattr(torch._C, "_cuda_getMemoryFraction", lambda number: share, raising=False)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: reserved_bytes)


def test_the_cache_that_a_device_gets(case, monkeypatch):
    """With the weights on a GPU of 4 GiB, what CUDA then calls free gives the cache that was foretold."""
    folder, foretold = case
    model = load_model(open_checkpoint(folder))
    free_bytes = 4 * 2**30 - memory.CONTEXT_BYTES - model.weights_nbytes
    pretend_free(monkeypatch, free_bytes, 4 * 2**30)
    device = torch.device("cuda", 0)
    assert default_kv_bytes(device, memory.step_bytes(model.arch.text)) == foretold.kv_bytes


def test_a_limit_on_the_process_counts(monkeypatch):
    pretend_free(monkeypatch, free_bytes=1000, total_bytes=2000, share=0.5, reserved_bytes=300)
    assert free_device_bytes(torch.device("cuda", 0)) == 700
    pretend_free(monkeypatch, free_bytes=100, total_bytes=2000, share=0.5, reserved_bytes=300)
    assert free_device_bytes(torch.device("cuda", 0)) == 100
    pretend_free(monkeypatch, free_bytes=1000, total_bytes=2000, share=0.1, reserved_bytes=300)
    assert free_device_bytes(torch.device("cuda", 0)) == 0


class Scale:
    """A meter that counts what the model was given."""

    def __init__(self, monkeypatch, model):
        self.tokens, self.rows, self.tiles = [], [], 0
        forward, encode = type(model).forward, type(model).encode_images

        def weighed(model, step, kv):
            self.tokens.append(len(step.token_ids))
            self.rows.append(len(step.logits_rows))
            return forward(model, step, kv)

        def encoded(model, images):
            self.tiles += sum(len(image.pixels) for image in images)
            return encode(model, images)

        monkeypatch.setattr(type(model), "forward", weighed)
        monkeypatch.setattr(type(model), "encode_images", encoded)

    def start(self):
        assert not self.tokens

    def peak(self):
        return 1000 * max(self.tokens) + max(self.rows)

    def kept(self):
        return 1_000_000


@pytest.mark.parametrize("room_bytes, largest", [(1 << 30, 1_096_006), (100_000, None)])
def test_the_largest_step_is_run(scout_tiny, monkeypatch, room_bytes, largest):
    model = load_model(open_checkpoint(scout_tiny))
    scale = Scale(monkeypatch, model)
    seen = worst_step_bytes(model, 96, 6, 16, room_bytes, scale)
    assert sum(scale.tokens) >= 96 + 6 and scale.tiles == TILES_AT_ONCE
    assert seen == largest or (largest is None and seen < 1_096_006)  # with little room, in several steps


def test_what_fails_for_lack_of_memory_is_measured_again_smaller(scout_tiny, monkeypatch):
    model = load_model(open_checkpoint(scout_tiny))
    scale, forward = Scale(monkeypatch, model), type(model).forward
    starts = []
    monkeypatch.setattr(scale, "start", lambda: starts.append(scale.tokens.clear()))

    def limited(model, step, kv):
        found = forward(model, step, kv)
        if len(step.token_ids) > 50:
            raise torch.OutOfMemoryError("none left")
        return found

    monkeypatch.setattr(type(model), "forward", limited)
    assert worst_step_bytes(model, 96, 6, 16, 1 << 30, scale) == 1_000_000 + 48_000 + 6
    assert len(starts) == 2


def test_a_model_that_never_fits_is_not_measured_for_ever(scout_tiny, monkeypatch):
    """So small a device that a round has steps enough to grow again, and fails again."""
    model = load_model(open_checkpoint(scout_tiny))
    scale, forward, starts = Scale(monkeypatch, model), type(model).forward, []
    monkeypatch.setattr(scale, "start", lambda: starts.append(scale.tokens.clear()))
    monkeypatch.setattr("batch.engine.failures.GOOD_STEPS_TO_GROW", 2)

    def limited(model, step, kv):
        if len(step.token_ids) > 10:
            raise torch.OutOfMemoryError("none left")
        return forward(model, step, kv)

    monkeypatch.setattr(type(model), "forward", limited)
    assert worst_step_bytes(model, 96, 6, 16, 1 << 30, scale) > 0 and len(starts) == 3


def test_what_a_device_is_seen_to_need_counts(scout_tiny, monkeypatch, capsys):
    model = load_model(open_checkpoint(scout_tiny))
    model.device = torch.device("cuda", 0)  # nothing is run on it
    pretend_free(monkeypatch, 2**32, 2**32)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    bound = memory.step_bytes(model.arch.text)
    for seen, expected in ((bound // 2, bound), (2 * bound, 2 * bound)):
        monkeypatch.setattr("batch.backends.embedded.worst_step_bytes", lambda *asked, seen=seen: seen)
        kv_bytes = engine_config(model, EmbeddedOptions()).kv_bytes
        assert kv_bytes == memory.device_kv_bytes(2**32, expected)
    assert capsys.readouterr().err.count("the KV cache is smaller") == 1


def test_no_memory_for_pictures_beside_the_weights(scout_tiny, monkeypatch):
    model = load_model(open_checkpoint(scout_tiny))
    model.device = torch.device("cuda", 0)
    pretend_free(monkeypatch, 2**32, 2**32)

    def full(*asked):
        raise torch.OutOfMemoryError("none left")

    monkeypatch.setattr("batch.backends.embedded.worst_step_bytes", full)
    with pytest.raises(DeviceError, match="no memory for a step: none left"):
        engine_config(model, EmbeddedOptions())


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
    try:
        added = engine.add(0, [1] * 100, SamplingParams(max_tokens=4096 - 100))
        assert added.error is None
        held = memory.BlockNeed(foretold.full_blocks, foretold.chunked_blocks)
        wanted = memory.blocks_bytes(model.arch.text, held, foretold.block_tokens)
        assert torch.cuda.memory_allocated() - loaded == pytest.approx(wanted, rel=0.05)
    finally:  # or it would be all that the next ones lack
        engine.close()
        torch.cuda.empty_cache()
