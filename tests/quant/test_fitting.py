"""Weights and KV cache on GPUs: split as stated, and held by the engine's own block accounting."""

from dataclasses import replace

import pytest

from batch.engine.blocks import BlockManager, SequenceBlocks
from converters.arch_io import arch_from_config
from converters.names import canonical_shapes
from l4tool.core.errors import UsageError
from l4tool.core.sizes import parse_tokens
from quant import memory
from quant.fitting import Demand, Hardware, Weights, cannot_split, fit_on, weigh, would_fit
from quant.gpus import GPUS, parse_gpu
from tests.converters import published

GIB = 2**30
SCOUT_INT4, SCOUT_FP8 = int(60.4 * GIB), int(106.8 * GIB)


@pytest.fixture(scope="module")
def scout():
    return arch_from_config(published.scout(), "config.json")


@pytest.fixture(scope="module")
def maverick():
    return arch_from_config(published.maverick(), "config.json")


def on(arch, weight_bytes, gpu="h100", count=1, context=8192, concurrency=1):
    return fit_on(arch, Weights(weight_bytes, 0, 0), Hardware(parse_gpu(gpu), count), Demand(context, concurrency))


def elements(shape):
    product = 1
    for size in shape:
        product *= size
    return product


def test_every_tensor_is_split_or_copied(scout):
    """Router, norms, vision tower and projector are on every GPU; everything else is on one of them once."""
    shapes = canonical_shapes(scout)
    model = weigh(scout, ((name, 2 * elements(shape)) for name, shape in shapes.items()))
    text = scout.text
    router_and_norms = text.num_layers * (text.num_experts + 2) * text.hidden_size + text.hidden_size
    vision = sum(elements(shape) for name, shape in shapes.items() if not name.startswith("language_model."))
    assert model.replicated == 2 * (router_and_norms + vision)
    assert model.key_value == 2 * text.num_layers * 2 * text.num_kv_heads * text.head_dim * text.hidden_size
    assert sum((model.split, model.key_value, model.replicated)) == 2 * sum(map(elements, shapes.values()))
    assert model.per_gpu(text, 1) == 2 * sum(map(elements, shapes.values()))
    assert model.per_gpu(text, 8) == pytest.approx(model.split / 8 + model.key_value / 8 + model.replicated, abs=2)
    # 40 heads go over 40 GPUs, 8 key/value heads do not: each GPU holds one of them.
    assert model.per_gpu(text, 40) == pytest.approx(model.split / 40 + model.key_value / 8 + model.replicated, abs=2)


@pytest.mark.parametrize(
    ("count", "told"),
    [(1, None), (2, None), (4, None), (8, None), (3, "40 attention heads"), (16, "40 attention heads"),
     (5, "8 key/value heads"), (20, "8 key/value heads"), (40, "inner dimension of 8192")],
)  # fmt: skip
def test_counts_that_do_not_divide(count, told, scout):
    found = cannot_split(scout.text, count)
    assert (found is None) if told is None else (told in found)
    assert on(scout, 1, count=count).fits == (told is None)


@pytest.mark.parametrize("context", [1, 31, 32, 33, 8191, 8192, 8193, 100_000, 262_144])
@pytest.mark.parametrize("gpu", ["h100", "b200"])
def test_the_engine_holds_as_many_sequences_as_said(context, gpu, scout):
    """Real block accounting of pools of the predicted sizes: so many sequences fit, and not one more."""
    found = on(scout, SCOUT_INT4, gpu, context=context)
    blocks = BlockManager(found.full_blocks, found.chunked_blocks, found.block_tokens, scout.text.attention_chunk_size)
    most = 0
    while most <= found.sequences:
        held = SequenceBlocks()
        last = context - 1
        first_of_chunk = last - last % blocks.chunk_size
        full_left = blocks.full.num_free * blocks.block_size
        if full_left < context or blocks.chunked.num_free * blocks.block_size < min(context, blocks.chunk_size):
            break
        for start in range(0, first_of_chunk + 1, blocks.chunk_size):
            blocks.enter_chunk(held, start)
            blocks.grow(held, min(start + blocks.chunk_size, context))
        most += 1
        if most == 256:
            break
    assert most == found.sequences
    used = memory.blocks_bytes(
        scout.text, memory.BlockNeed(found.full_blocks, found.chunked_blocks), found.block_tokens
    )
    assert found.kv_bytes - 2 * memory.blocks_bytes(scout.text, memory.BlockNeed(1, 1), 32) < used <= found.kv_bytes


def test_the_longest_context(scout):
    found = on(scout, SCOUT_INT4)
    assert 0 < found.longest_tokens < scout.text.max_position_embeddings
    assert on(scout, SCOUT_INT4, context=found.longest_tokens).sequences == 1
    beyond = on(scout, SCOUT_INT4, context=found.longest_tokens + 1)
    assert beyond.sequences == 0 and not beyond.fits and beyond.weights_fit


def test_everything_in_sum_is_what_the_gpu_has(scout):
    for weight_bytes in (GIB, SCOUT_INT4):
        found = on(scout, weight_bytes)
        assert found.weight_bytes + found.reserved_bytes + found.kv_bytes == pytest.approx(79.1 * GIB, abs=2)
    assert not on(scout, SCOUT_FP8).weights_fit and on(scout, SCOUT_FP8).kv_bytes == 0


def test_what_would_fit(scout, maverick):
    """FP8 Scout: one H200 or two H100; INT4 Scout: one H100; bf16 Maverick: eight H200."""

    def ways(arch, weight_bytes, gpu, count, **demand):
        asked = Hardware(parse_gpu(gpu), count)
        return [str(way) for way in would_fit(arch, Weights(weight_bytes, 0, 0), asked, Demand(8192, **demand))]

    assert on(scout, SCOUT_INT4).fits and not on(scout, SCOUT_FP8).fits
    assert ways(scout, SCOUT_FP8, "h100", 1) == ["2 × h100", "1 × h200", "1 × b200", "1 × mi300x"]
    assert ways(scout, SCOUT_INT4, "24GiB", 1)[0] == "4 × 24 GiB"
    assert ways(maverick, int(748 * GIB), "h100", 8) == ["8 × h200", "8 × b200", "8 × mi300x"]
    assert ways(maverick, 2000 * GIB, "h100", 8) == []
    assert ways(maverick, int(748 * GIB), "h100", 1) == ["8 × h200", "8 × b200", "4 × mi300x"]
    assert ways(scout, SCOUT_INT4, "h100", 1, concurrency=64) == ["4 × h100", "2 × h200", "1 × b200", "1 × mi300x"]


def test_key_value_heads_are_shared_out(scout):
    """Twice the GPUs, half the bytes of a sequence on each, down to one head."""
    sizes = [on(scout, GIB, count=count).kv_bytes_per_sequence for count in (1, 2, 4, 8)]
    assert sizes == [sizes[0] // divisor for divisor in (1, 2, 4, 8)]
    many = replace(scout, text=replace(scout.text, num_heads=64))
    assert on(many, GIB, count=16).kv_bytes_per_sequence == sizes[-1] and on(many, GIB, count=16).fits


def test_float32_takes_twice_the_cache(scout):
    wide = replace(scout, dtype="float32")
    assert on(wide, GIB).kv_bytes_per_sequence == 2 * on(scout, GIB).kv_bytes_per_sequence


def test_gpus_by_name_and_by_size():
    assert parse_gpu("H100").usable_bytes == memory.H100_USABLE_BYTES
    assert parse_gpu("24GiB").usable_bytes == 24 * GIB and parse_gpu("80GB").usable_bytes == 80 * 10**9
    assert [gpu.usable_bytes for gpu in GPUS] == sorted(gpu.usable_bytes for gpu in GPUS)
    assert len({gpu.name for gpu in GPUS}) == len(GPUS)
    for text in ("", "h1000", "-1", "0", "24 apples", "nan", "1e9", "9" * 400, "9999999TiB"):
        with pytest.raises(UsageError, match="not a GPU") as caught:
            parse_gpu(text)
        assert "a100-40" in caught.value.hint


def test_numbers_of_tokens():
    assert [parse_tokens(text) for text in ("8k", "128K", "1M", " 10m ", "8192")] == [
        8192, 131072, 1048576, 10485760, 8192,
    ]  # fmt: skip
    for text in ("", "0", "-1", "8kk", "1.5k", "k", "1G", "٣", "9" * 30):
        with pytest.raises(UsageError, match="not a number of tokens"):
            parse_tokens(text)
