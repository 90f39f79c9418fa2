"""Shared beginnings: what is found again, what is evicted, who waits for whom, and that no answer changes by it."""

from random import Random

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from batch.engine.blocks import NO_HIT, BlockManager, BlockPool, SequenceBlocks
from batch.engine.engine import Engine, EngineConfig
from batch.engine.image_features import FeatureCache, SequenceImages
from batch.engine.prefix import PrefixKeys
from batch.engine.scheduler import WINDOW, Scheduler
from batch.engine.sequence import Sequence
from batch.requests import ImageTiles, SamplingParams

BLOCK, CHUNK = 16, 32  # the tiny models' attention chunk
PAIR_BYTES = 64 << 10  # one full and one chunked block of the tiny Scout in float32
IMAGE = 4095


def keys_of(tokens, images=None, size=BLOCK):
    return list(PrefixKeys(size, images).of(tokens))


# -- keys


@given(st.lists(st.integers(0, 3), max_size=80), st.lists(st.integers(0, 3), max_size=80), st.integers(0, 80))
def test_keys_are_equal_exactly_as_far_as_the_tokens_are(first, second, shared):
    second = first[:shared] + second
    ours, theirs = keys_of(first, size=4), keys_of(second, size=4)
    for i, (a, b) in enumerate(zip(ours, theirs, strict=False)):
        assert (a == b) == (first[: 4 * i + 4] == second[: 4 * i + 4])
    assert len(ours) == len(first) // 4 and len(set(ours)) == len(ours)


@given(st.lists(st.integers(0, 200_000), max_size=100), st.lists(st.integers(0, 100), max_size=5))
def test_keys_grow_with_the_tokens_and_stay(tokens, cuts):
    keys = PrefixKeys(8, None)
    for cut in sorted(cuts):
        assert keys.of(tokens[:cut]) == keys_of(tokens[:cut], size=8)
    assert keys.of(tokens) == keys_of(tokens, size=8)


def tiles(seed, count=1, grid=None):
    pixels = np.random.default_rng(seed).integers(0, 256, (count, 3, 4, 4), np.uint8)
    return ImageTiles(pixels, grid or (1, max(1, count - 1)))


def illustrated_keys(*images):
    """Text of one block and a half, then 10 rows per tile, then text; blocks of 8."""
    prompt = [1] * 12 + [IMAGE] * (10 * sum(len(i.pixels) for i in images)) + [2] * 10
    return keys_of(prompt, SequenceImages(prompt, images, IMAGE, 10), size=8)


def test_keys_tell_pictures_apart_and_their_order():
    a, b, pair = tiles(1), tiles(2), tiles(3, 2)
    ours = illustrated_keys(a, b)
    assert ours == illustrated_keys(tiles(1), tiles(2)) and len(ours) == 5
    for other in (illustrated_keys(b, a), illustrated_keys(a, a), illustrated_keys(pair)):
        differs = [i for i, (x, y) in enumerate(zip(ours, other, strict=True)) if x != y]
        assert differs == list(range(differs[0], 5)) and differs[0] == (2 if other[1] == ours[1] else 1)
    assert tiles(3, 6, (1, 5)).digest != tiles(3, 6, (5, 1)).digest


# -- blocks


def test_pool_keeps_what_has_a_key_until_it_is_needed_longest_unused_first():
    pool = BlockPool(4)
    first, second = pool.take(2), pool.take(1)
    for block, key in zip(first + second, (b"a", b"b", b"c"), strict=True):
        pool.publish(block, key)
    pool.give_back(first)
    pool.give_back(second)
    assert pool.num_free == 4 and pool.find([b"a", b"b", b"x", b"c"]) == first
    assert pool.take(1) == [3]  # the one that holds nothing
    pool.share(first[:1])
    assert pool.take(1) == first[1:] and pool.find([b"b"]) == []  # "b" was freed before "a" and "c"
    assert pool.take(1) == second and pool.num_free == 0
    with pytest.raises(AssertionError):
        pool.take(1)
    assert pool.find([b"a"]) == first[:1]


def test_the_beginning_of_what_is_given_back_outlives_its_end():
    pool = BlockPool(3)
    blocks = pool.take(3)
    for block, key in zip(blocks, (b"a", b"b", b"c"), strict=True):
        pool.publish(block, key)
    pool.give_back(blocks)
    assert pool.take(2) == [blocks[2], blocks[1]] and pool.find([b"a", b"b"]) == blocks[:1]


def test_pool_frees_a_block_when_its_last_holder_lets_go():
    pool = BlockPool(2)
    blocks = pool.take(1)
    pool.publish(blocks[0], b"a")
    pool.share(blocks)
    pool.give_back(blocks)
    assert pool.num_used == 1
    pool.forget(blocks)
    pool.give_back(blocks)
    assert pool.num_used == 0 and pool.find([b"a"]) == []
    with pytest.raises(AssertionError):
        pool.give_back(blocks)


def computed(blocks, tokens):
    """A sequence that has computed these tokens, piece by piece as chunks allow."""
    held, keys = SequenceBlocks(), keys_of(tokens)
    for start in range(0, len(tokens), CHUNK):
        end = min(start + CHUNK, len(tokens))
        blocks.enter_chunk(held, start)
        blocks.grow(held, end)
        blocks.publish(held, keys, start, end)
    return held


def test_a_hit_needs_the_chunked_blocks_of_its_last_chunk_only():
    blocks = BlockManager(num_full=8, num_chunked=3, block_size=BLOCK, chunk_size=CHUNK)
    tokens = list(range(86))
    blocks.release(computed(blocks, tokens))  # three chunked blocks for five blocks of text: the first two are gone
    keys = keys_of(tokens)
    assert blocks.find_prefix(keys, 86).num_tokens == 80
    assert blocks.find_prefix(keys, 79).num_tokens == 64  # ends where a chunk does
    assert blocks.find_prefix(keys, 63).num_tokens in (32, 48)
    assert blocks.find_prefix(keys, 31) == NO_HIT
    hit = blocks.find_prefix(keys, 86)
    assert len(hit.full) == 5 and len(hit.chunked) == 1 and hit.chunk_start == 64
    held = SequenceBlocks()
    blocks.adopt(held, hit)
    assert held.full.ids.tolist() == hit.full and held.chunk_start == 64 and blocks.full.num_used == 5


def test_blocks_that_somebody_holds_cost_nothing_and_idle_ones_do():
    blocks = BlockManager(8, 8, BLOCK, CHUNK)
    tokens = list(range(30))
    held = computed(blocks, tokens)
    hit = blocks.find_prefix(keys_of(tokens), 29)
    assert hit.num_tokens == 16
    need = blocks.need_after(hit, 30)
    assert (need.full, need.chunked) == (1, 1)
    need = blocks.need_after(hit, 100)  # later chunks are its own
    assert (need.full, need.chunked) == (6, 2)
    blocks.release(held)
    need = blocks.need_after(hit, 30)
    assert (need.full, need.chunked) == (2, 2)


# -- scheduling


def sequence_of(name, tokens, max_tokens=2):
    sampling = SamplingParams(max_tokens=max_tokens)
    made = Sequence(name, list(tokens), len(tokens), sampling, len(tokens) + max_tokens, stop_ids=frozenset())
    made.keys = PrefixKeys(BLOCK, None)
    return made


def scheduler_of(full=64, chunked=64, max_seqs=8, max_batch_tokens=200):
    return Scheduler(BlockManager(full, chunked, BLOCK, CHUNK), max_seqs, max_batch_tokens)


def book(scheduler, plan):
    """What the engine does after a step."""
    for piece in plan:
        scheduler.book(piece)
        if piece.wants_logits:
            piece.sequence.append(2, None)
        if piece.sequence.is_over:
            scheduler.finish(piece.sequence)


def pieces(scheduler):
    plan = scheduler.schedule()
    book(scheduler, plan)
    return [(p.sequence.handle, p.start, p.end) for p in plan]


def test_a_sequence_waits_for_blocks_that_a_running_one_computes():
    scheduler = scheduler_of()
    shared = list(range(40))
    for name in "ab":
        scheduler.add(sequence_of(name, [*shared, ord(name)]))
    scheduler.add(sequence_of("c", range(100, 120)))
    assert pieces(scheduler) == [("a", 0, 32), ("c", 0, 20)]
    assert pieces(scheduler) == [("c", 20, 21), ("a", 32, 41), ("b", 32, 41)]


def test_many_choices_of_one_prompt_compute_it_once():
    scheduler = scheduler_of(max_seqs=20)
    for i in range(10):
        scheduler.add(sequence_of(i, range(32)))  # its last block is computed for its last token
    assert pieces(scheduler) == [(0, 0, 32)]
    assert pieces(scheduler) == [(0, 32, 33)] + [(i, 16, 32) for i in range(1, 10)]


def test_whoever_finds_its_beginning_cached_comes_first_but_not_for_ever():
    scheduler = scheduler_of(full=9, chunked=8, max_seqs=1)
    popular = list(range(40))
    scheduler.add(sequence_of("first", popular))
    book(scheduler, scheduler.schedule())
    old = sequence_of("old", range(500, 600))
    scheduler.add(old)
    served = []
    for i in range(2 * WINDOW):
        scheduler.add(sequence_of(i, [*popular, i]))
    while old.num_computed < 100:
        for name, start, _ in pieces(scheduler):
            if name not in served:
                served.append(name)
                assert name in ("first", "old") or start == 32
    assert served[0] == "first" and served.index("old") == WINDOW + 1
    assert served[1:WINDOW] == list(range(WINDOW - 1))


@st.composite
def workloads(draw):
    """Sequences with common beginnings in a tree, on pools that are mostly too small for all."""
    max_seqs = draw(st.integers(1, 6))
    full, chunked = draw(st.integers(2, 24)), draw(st.integers(1, 12))
    scheduler = scheduler_of(full, chunked, max_seqs, draw(st.integers(max_seqs, 64)))
    longest = min(full * BLOCK, 10**9 if chunked * BLOCK >= CHUNK else chunked * BLOCK)
    sequences = []
    for name in range(draw(st.integers(1, 12))):
        total = draw(st.integers(2, longest))
        prompt = draw(st.integers(1, total - 1))
        branch = draw(st.integers(0, prompt))
        tokens = [1] * branch + [draw(st.integers(2, 3))] * (prompt - branch)
        sequences.append(sequence_of(name, tokens, total - prompt))
    arrivals = draw(st.lists(st.integers(0, 30), min_size=len(sequences), max_size=len(sequences)))
    return scheduler, sorted(zip(arrivals, sequences, strict=True), key=lambda pair: pair[0])


def check_pools(scheduler, contents):
    """Holders are counted right, and what has a key holds what the key says (as far as `contents` was written)."""
    for kind in ("full", "chunked"):
        pool = getattr(scheduler.blocks, kind)
        tables = [getattr(s.held, kind).ids.tolist() for s in scheduler.running]
        counts = np.bincount([b for table in tables for b in table], minlength=pool.num_blocks)
        assert counts.tolist() == list(pool._holders)
        held = np.flatnonzero(counts).tolist()
        assert sorted([*held, *pool._free, *pool._idle]) == list(range(pool.num_blocks))
        assert set(pool._idle) <= set(pool._key_of) and not set(pool._free) & set(pool._key_of)
        assert {key: block for block, key in pool._key_of.items()} == pool._block_of
        for block, key in pool._key_of.items():
            assert contents[kind][block] == key
        assert all(getattr(s.held, kind).length == 0 for s in scheduler.waiting)


def write(scheduler, plan, contents):
    """What the model writes: per block, the key of all tokens up to its last, once they are known."""
    for piece in plan:
        sequence, held = piece.sequence, piece.sequence.held
        keys = keys_of(sequence.tokens)
        for position in range(piece.start, piece.end):
            i = position // BLOCK
            key = keys[i] if (i + 1) * BLOCK <= piece.end else None
            for kind, table, first in (("full", held.full, 0), ("chunked", held.chunked, held.chunk_start // BLOCK)):
                block = int(table.ids[i - first])
                assert getattr(scheduler.blocks, kind)._holders[block] == 1, "wrote into a shared block"
                contents[kind][block] = key


@settings(max_examples=200, deadline=None)
@given(workloads(), st.randoms(use_true_random=False))
def test_every_block_found_holds_what_its_key_says_and_nothing_hangs(workload, random):
    scheduler, arrivals = workload
    contents = {"full": {}, "chunked": {}}
    everyone = [s for _, s in arrivals]
    step = 0
    while arrivals or scheduler.running or scheduler.waiting:
        while arrivals and (arrivals[0][0] <= step or not (scheduler.running or scheduler.waiting)):
            scheduler.add(arrivals.pop(0)[1])
        eldest = next(iter(scheduler.running), None)
        before = eldest and (len(eldest.tokens), eldest.num_computed)
        plan = scheduler.schedule()
        assert 0 < sum(piece.length for piece in plan) <= scheduler.max_batch_tokens
        for piece in plan:
            held = piece.sequence.held
            assert piece.length > 0 and piece.start // CHUNK == (piece.end - 1) // CHUNK
            assert held.full.length == -(-piece.end // BLOCK) and held.chunk_start == piece.start // CHUNK * CHUNK
            assert held.chunked.length == -(-(piece.end - held.chunk_start) // BLOCK)
        write(scheduler, plan, contents)
        check_pools(scheduler, contents)
        book(scheduler, plan)
        check_pools(scheduler, contents)
        assert eldest is None or (len(eldest.tokens), eldest.num_computed) > before
        assert all(s.passed_over < 2 * WINDOW for s in scheduler.waiting)
        if len(scheduler.running) > 1 and random.random() < 0.1:
            scheduler.preempt(scheduler.youngest)
        step += 1
        assert step < 10_000
    assert all(s.finish_reason == "length" and len(s.tokens) == s.max_len for s in everyone)
    assert scheduler.blocks.full.num_used == scheduler.blocks.chunked.num_used == 0


# -- the engine


def engine_of(model, kv_bytes=16 << 20, max_batch_tokens=64, max_seqs=8, prefix_cache=True):
    return Engine(model, EngineConfig(max_batch_tokens, max_seqs, kv_bytes, BLOCK, prefix_cache), eos_token_ids=())


def run(engine, requests, preempting=None):
    """(prompt, sampling, images) each → the finished sequences; now and then the youngest loses its blocks."""
    sequences = [engine.add(i, prompt, sampling, images) for i, (prompt, sampling, images) in enumerate(requests)]
    while engine.has_work:
        engine.step()
        if preempting and len(engine.scheduler.running) > 1 and preempting.random() < 0.15:
            engine.scheduler.preempt(engine.scheduler.youngest)
    assert engine.blocks.full.num_used == engine.blocks.chunked.num_used == 0
    return sequences


def outcome(sequence):
    assert sequence.error is None
    return sequence.output, sequence.logprobs  # floats included: equal to the last bit


def picture(model, tiles, seed):
    side = model.arch.vision.image_size
    pixels = np.random.default_rng(seed).integers(0, 256, (tiles, 3, side, side), np.uint8)
    return ImageTiles(pixels, (1, max(1, tiles - 1)))


def fresh(image):
    """The same picture as another line would bring it."""
    return ImageTiles(image.pixels.copy(), image.grid)


@pytest.fixture(scope="module")
def lines(scout):
    """Requests in three families with common beginnings, across several chunks and through pictures, and what each
    one answers alone without a cache."""
    random = Random(3)
    text = [random.randrange(2048) for _ in range(400)]
    rows = scout.arch.vision.tokens_per_tile
    images = (picture(scout, 3, 1), picture(scout, 1, 2), picture(scout, 1, 3))
    look = [scout.arch.image_token_id] * rows
    requests = []
    for i in range(15):
        own = [random.randrange(2048) for _ in range(random.choice((1, 5, 16, 40)))]
        sampling = SamplingParams(10, temperature=(i % 2) * 0.9, seed=i, logprobs=3)
        if i % 3 == 2:
            seen = (images[0], images[1 + i % 2]) if i % 4 else (images[0],)
            prompt = text[:20] + look * 3 + text[20:27] + look * (len(seen) - 1) + own
            requests.append((prompt, sampling, seen))
        else:
            requests.append((text[(i % 3) * 150 :][: random.choice((31, 32, 48, 100, 140))] + own, sampling, ()))
    alone = [outcome(run(engine_of(scout, prefix_cache=False), [line])[0]) for line in requests]
    return requests, alone


def test_a_hit_changes_no_bit(scout, lines):
    requests, alone = lines
    engine = engine_of(scout)
    for _ in range(2):  # the second time nearly everything is there
        assert [outcome(s) for s in run(engine, requests)] == alone
    assert engine.stats.prefix_cache_hit_rate > 0.6 and engine.stats.image_encodings == 3
    without = engine_of(scout, prefix_cache=False)
    assert [outcome(s) for s in run(without, requests)] == alone
    assert without.stats.prefix_cache_hit_rate == 0 and without.stats.image_encodings > 5


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_neither_hits_nor_evictions_nor_preemptions_change_a_bit(scout, lines, data):
    requests, alone = lines
    order = data.draw(st.lists(st.sampled_from(range(len(requests))), min_size=2, max_size=12))
    max_seqs = data.draw(st.integers(1, 9))
    engine = engine_of(
        scout, data.draw(st.integers(14, 60)) * PAIR_BYTES, data.draw(st.integers(max_seqs + 8, 200)), max_seqs
    )
    chosen = [(p, s, tuple(map(fresh, images))) for p, s, images in (requests[i] for i in order)]
    found = run(engine, chosen, Random(data.draw(st.integers(0, 1000))))
    assert [outcome(s) for s in found] == [alone[i] for i in order]


def test_pictures_in_a_cached_beginning_are_not_encoded(scout):
    look = [scout.arch.image_token_id] * scout.arch.vision.tokens_per_tile
    images = (picture(scout, 3, 1), picture(scout, 1, 2))
    prompt = [5] * 20 + look * 3 + [6] * 7 + look
    engine = engine_of(scout)
    run(engine, [([*prompt, *range(30)], SamplingParams(2), images)])
    assert (engine.stats.image_encodings, engine.stats.image_encodings_saved) == (2, 0)
    engine.features.clear()
    (found,) = run(engine, [([*prompt, *range(20, 30)], SamplingParams(2), tuple(map(fresh, images)))])
    assert found.num_cached == 32  # all of the first picture, nothing of the second
    assert (engine.stats.image_encodings, engine.stats.image_encodings_saved) == (3, 1)
    other = [[8] * 20 + look * 3, SamplingParams(2), (fresh(images[0]),)]
    engine.features.clear()
    run(engine, [other, other])  # the same picture behind another beginning, twice
    assert (engine.stats.image_encodings, engine.stats.image_encodings_saved) == (4, 2)


@pytest.mark.parametrize(("text", "hit"), [(9, 64), (3, 48)])
def test_a_picture_cut_by_the_end_of_a_hit_is_encoded_and_right(scout, text, hit):
    images = (picture(scout, 2, 8), picture(scout, 12, 9))
    sampling = SamplingParams(6, logprobs=2)
    prompt = [5] * text + [scout.arch.image_token_id] * (14 * scout.arch.vision.tokens_per_tile)
    engine = engine_of(scout)
    run(engine, [([*prompt, *range(20)], sampling, images)])
    engine.features.clear()
    (found,) = run(engine, [(prompt, sampling, tuple(map(fresh, images)))])
    (alone,) = run(engine_of(scout, prefix_cache=False), [(prompt, sampling, images)])
    assert found.num_cached == hit < len(prompt) and outcome(found) == outcome(alone)
    assert engine.stats.image_encodings == 3  # the second one again: some of its tokens were left


def test_features_are_kept_by_content_within_their_bytes():
    import torch

    calls = []

    def encode(images):
        calls.append(len(images))
        return [torch.full((4, 8), float(image.pixels.sum())) for image in images]

    cache = FeatureCache(encode, max_bytes=2 * 4 * 8 * 4)
    a, b, c = tiles(1), tiles(2), tiles(3)
    first = cache.encode([a, b, tiles(1)])
    assert calls == [2] and torch.equal(first[0], first[2]) and not torch.equal(first[0], first[1])
    assert torch.equal(cache.encode([tiles(2)])[0], first[1]) and calls == [2]
    cache.encode([c])
    assert cache.num_bytes == cache.max_bytes
    cache.encode([b])
    assert calls == [2, 1]
    assert torch.equal(cache.encode([a])[0], first[0]) and calls == [2, 1, 1]  # was dropped for c
    assert (cache.num_encoded, cache.num_saved) == (4, 3)
    cache.clear()
    assert cache.num_bytes == 0


def test_a_sequence_whose_output_is_not_finite_leaves_nothing_behind(scout, monkeypatch):
    import torch

    forward = type(scout).forward
    prompt = list(range(60))
    engine = engine_of(scout)
    broken = [True]
    monkeypatch.setattr(
        type(scout), "forward", lambda m, step, kv: forward(m, step, kv) * (torch.nan if broken[0] else 1)
    )
    (failed,) = [engine.add(0, prompt, SamplingParams(3))]
    while engine.has_work:
        engine.step()
    assert failed.error[0] == "model_error"
    broken[0] = False
    (again,) = run(engine, [(prompt, SamplingParams(3), ())])
    assert again.num_cached == 0 and again.num_generated == 3
