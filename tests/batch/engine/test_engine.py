"""The engine end to end on tiny checkpoints: transformers' generate() is the oracle."""

import contextlib
import dataclasses
from random import Random

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from batch.engine.engine import Engine, EngineConfig
from batch.kernels import ops
from batch.requests import ImageTiles, SamplingParams
from l4tool.core.errors import DeviceError

BLOCK = 16  # two blocks are one attention chunk of the tiny models
PAIR_BYTES = {"scout": 64 << 10, "maverick": 64 << 10}  # one full and one chunked block in float32
LENGTHS = (1, 5, 31, 32, 33, 64, 70, 100, 150, 17)  # up to five attention chunks


def random_prompts(lengths=LENGTHS, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 2048, (n,), generator=generator).tolist() for n in lengths]


def generate(reference, prompt, max_new_tokens, **inputs):
    """Greedy tokens of transformers, up to and including an end token."""
    output = reference.generate(
        torch.tensor([prompt]), do_sample=False, max_new_tokens=max_new_tokens,
        eos_token_id=reference.config.text_config.eos_token_id, pad_token_id=0, **inputs,
    )  # fmt: skip
    return output[0, len(prompt) :].tolist()


def make_engine(model, kv_bytes=16 << 20, max_batch_tokens=64, max_seqs=8, **options):
    return Engine(model, EngineConfig(max_batch_tokens, max_seqs, kv_bytes, BLOCK), **options)


def run(engine, prompts, sampling, images=None):
    """All prompts through one engine; returns their sequences."""
    if isinstance(sampling, SamplingParams):
        sampling = [sampling] * len(prompts)
    images = images or [()] * len(prompts)
    sequences = [
        engine.add(i, p, s, pictures) for i, (p, s, pictures) in enumerate(zip(prompts, sampling, images, strict=True))
    ]
    while engine.has_work:
        engine.step()
    assert engine.blocks.full.num_used == engine.blocks.chunked.num_used == 0
    return sequences


@pytest.fixture(scope="package")
def expected(scout_reference, maverick_reference):
    references = {"scout": scout_reference, "maverick": maverick_reference}
    return {name: [generate(r, p, 40) for p in random_prompts()] for name, r in references.items()}


@pytest.mark.parametrize("name", ["scout", "maverick"])
@pytest.mark.parametrize(
    ("blocks", "max_batch_tokens", "max_seqs", "preempts"),
    [(64, 4096, 10, False), (64, 16, 8, False), (14, 64, 8, True), (12, 7, 5, True)],
)
def test_greedy_tokens_equal_generate(request, expected, name, blocks, max_batch_tokens, max_seqs, preempts):
    model = request.getfixturevalue(name)
    engine = make_engine(model, blocks * PAIR_BYTES[name], max_batch_tokens, max_seqs)
    sequences = run(engine, random_prompts(), SamplingParams(40))
    assert [s.output for s in sequences] == expected[name]
    assert (engine.stats.preemptions > 0) == preempts
    assert engine.stats.output_tokens >= sum(map(len, expected[name]))


def test_chunked_blocks_are_bounded_whatever_the_length(scout):
    engine = make_engine(scout, max_batch_tokens=500, max_seqs=3)
    sequences = run(engine, random_prompts((400, 900, 1500)), SamplingParams(4))
    assert all(s.finish_reason == "length" for s in sequences)
    assert engine.stats.peak_chunked_blocks <= 3 * 32 // BLOCK
    assert engine.stats.peak_full_blocks >= 1500 // BLOCK


@pytest.fixture(scope="package")
def sampled(scout):
    """Requests with every kind of sampling, and what each draws alone."""
    prompts = random_prompts((3, 40, 33, 70, 12, 64), seed=5)
    sampling = [
        SamplingParams(12, temperature=1.0, seed=1),
        SamplingParams(12, temperature=0.7, top_p=0.9, seed=2),
        SamplingParams(12, temperature=1.3, top_k=40, seed=3),
        SamplingParams(12, temperature=1.0, min_p=0.1, seed=4),
        SamplingParams(12),
        SamplingParams(12, temperature=1.0, seed=1),
    ]
    alone = [run(make_engine(scout), [p], s)[0].output for p, s in zip(prompts, sampling, strict=True)]
    return prompts, sampling, alone


@settings(max_examples=10, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_a_line_and_its_seed_alone_decide_the_output(scout, sampled, data):
    prompts, sampling, alone = sampled
    order = data.draw(st.lists(st.sampled_from(range(6)), min_size=1, max_size=8))
    random = Random(data.draw(st.integers(0, 1000)))
    max_seqs = data.draw(st.integers(1, 9))
    engine = make_engine(
        scout, data.draw(st.integers(6, 24)) * PAIR_BYTES["scout"], data.draw(st.integers(max_seqs + 8, 200)), max_seqs
    )
    sequences = [engine.add(i, prompts[i], sampling[i]) for i in order]
    while engine.has_work:
        engine.step()
        if len(engine.scheduler.running) > 1 and random.random() < 0.1:
            engine.scheduler.preempt(engine.scheduler.youngest)
    for sequence in sequences:
        assert sequence.output == alone[sequence.handle]


def test_logprobs_equal_transformers(scout, scout_reference):
    prompts = random_prompts((40, 9))
    sequences = run(make_engine(scout, max_batch_tokens=16), prompts, SamplingParams(6, logprobs=4))
    for sequence in sequences:
        with torch.no_grad():
            logits = scout_reference(torch.tensor([sequence.tokens])).logits[0]
        expected = logits.log_softmax(-1)[sequence.prompt_len - 1 : -1]
        assert len(sequence.logprobs) == 6
        for row, token, found in zip(expected, sequence.output, sequence.logprobs, strict=True):
            values, ids = row.topk(4)
            assert found.token_id == token
            assert found.logprob == pytest.approx(row[token].item(), abs=2e-4)
            assert [i for i, _ in found.top] == ids.tolist()
            assert [v for _, v in found.top] == pytest.approx(values.tolist(), abs=2e-4)


# -- images


def picture(arch, tiles, seed):
    side = arch.vision.image_size
    pixels = np.random.default_rng(seed).integers(0, 256, (tiles, 3, side, side), np.uint8)
    return ImageTiles(pixels, (1, max(1, tiles - 1)))


def image_prompt(arch, pictures, seed):
    """Text, then each picture's image tokens, each followed by text."""
    parts = random_prompts((7,) * (len(pictures) + 1), seed)
    prompt = list(parts[0])
    for image, text in zip(pictures, parts[1:], strict=True):
        prompt += [arch.image_token_id] * (len(image.pixels) * arch.vision.tokens_per_tile) + text
    return prompt


@pytest.fixture(scope="package")
def illustrated(scout, scout_reference):
    """Prompts with one tile, several tiles, several pictures, and transformers' greedy tokens for them."""
    arch = scout.arch
    pictures = [
        (picture(arch, 1, 1),),
        (picture(arch, 3, 2),),
        (picture(arch, 1, 3), picture(arch, 5, 4), picture(arch, 1, 5)),
    ]
    prompts = [image_prompt(arch, p, seed) for seed, p in enumerate(pictures)]
    expected = []
    for prompt, images in zip(prompts, pictures, strict=True):
        pixels = torch.from_numpy(np.concatenate([i.pixels for i in images])).float()
        expected.append(generate(scout_reference, prompt, 8, pixel_values=(pixels / 255 - 0.5) / 0.5))
    return prompts, pictures, expected


@pytest.mark.parametrize(("max_batch_tokens", "blocks"), [(4096, 64), (9, 64), (50, 14)])
def test_images_end_to_end(scout, illustrated, max_batch_tokens, blocks):
    prompts, pictures, expected = illustrated
    engine = make_engine(scout, blocks * PAIR_BYTES["scout"], max_batch_tokens)
    plain = random_prompts((40,))
    sequences = run(engine, prompts + plain, SamplingParams(8), [*pictures, ()])
    assert [s.output for s in sequences[:3]] == expected


def test_images_are_encoded_once_and_forgotten(scout, illustrated, monkeypatch):
    prompts, pictures, _ = illustrated
    encoded = []
    encode = type(scout).encode_images
    monkeypatch.setattr(type(scout), "encode_images", lambda m, images: encoded.extend(images) or encode(m, images))
    engine = make_engine(scout, max_batch_tokens=9)
    sequences = [engine.add(i, prompts[i], SamplingParams(2), pictures[i]) for i in range(3)]
    held = []
    while engine.has_work:
        engine.step()
        held.append(sum(s.images.num_bytes for s in sequences if s.images is not None))
    assert sorted(map(id, encoded)) == sorted(id(image) for images in pictures for image in images)
    row_bytes = scout.arch.text.hidden_size * 4
    largest = 5 * scout.arch.vision.tokens_per_tile * row_bytes
    assert 0 < max(held) <= largest + 2 * 3 * scout.arch.vision.tokens_per_tile * row_bytes
    assert held[-1] == 0 and engine.stats.peak_image_bytes >= largest


def test_pictures_of_unfinished_sequences_hold_back_new_requests(scout, illustrated, monkeypatch):
    prompts, pictures, expected = illustrated
    monkeypatch.setattr("batch.engine.engine.MAX_PIXEL_BYTES", pictures[2][1].pixels.nbytes)
    engine = make_engine(scout)
    sequences = [engine.add(0, prompts[0], SamplingParams(8), pictures[0])]
    assert engine.wants_more
    sequences.append(engine.add(2, prompts[2], SamplingParams(8), pictures[2]))
    assert not engine.wants_more
    while engine.has_work:
        engine.step()
    assert engine.wants_more and [s.output for s in sequences] == [expected[0], expected[2]]


# -- requests that cannot run


@pytest.mark.parametrize(
    ("prompt", "code", "text"),
    [
        ([], "empty_prompt", "no tokens"),
        ([1] * 4096, "context_length_exceeded", "4096"),
        ([1, 10**6], "invalid_token", "4095"),
        ([-1], "invalid_token", "4095"),
    ],
)
def test_impossible_requests_are_refused_with_a_reason(scout, prompt, code, text):
    engine = make_engine(scout)
    sequence = engine.add(0, prompt, SamplingParams(5))
    assert sequence.error[0] == code and text in sequence.error[1]
    assert not engine.has_work


def test_image_tokens_and_images_must_agree(scout):
    engine = make_engine(scout)
    image = picture(scout.arch, 1, 0)
    for prompt, images in (([1, 2], (image,)), (image_prompt(scout.arch, (image,), 0), ())):
        assert engine.add(0, prompt, SamplingParams(5), images).error[0] == "image_mismatch"


def test_images_for_a_text_model_are_refused(scout):
    model = type(scout)(dataclasses.replace(scout.arch, vision=None), scout.text, None, scout.device, scout.dtype)
    sequence = make_engine(model).add(0, [1, 2], SamplingParams(5), (picture(scout.arch, 1, 0),))
    assert sequence.error[0] == "images_not_supported"


def test_max_tokens_is_clipped_at_the_context(scout):
    engine = make_engine(scout, kv_bytes=64 << 20, max_batch_tokens=4096, eos_token_ids=())
    (sequence,) = run(engine, random_prompts((4090,)), SamplingParams(100))
    assert sequence.num_generated == 6 and sequence.finish_reason == "length"


def test_no_tokens_asked_no_tokens_drawn(scout):
    sequence = make_engine(scout).add(0, [1, 2], SamplingParams(0))
    assert sequence.finish_reason == "length" and sequence.output == []


def test_a_request_larger_than_the_cache_is_refused_with_numbers(scout):
    engine = make_engine(scout, kv_bytes=10 * PAIR_BYTES["scout"])
    fits = engine.add(0, [1] * 20, SamplingParams(4))
    sequence = engine.add(1, [1] * 1000, SamplingParams(200))
    assert sequence.error[0] == "kv_cache_too_small"
    for number in ("1000 + 200", "640 KiB", "--kv-memory"):
        assert number in sequence.error[1]
    while engine.has_work:
        engine.step()
    assert fits.num_generated == 4


def test_pools_are_rebalanced_for_a_longer_request_and_nothing_is_lost(scout, expected):
    engine = make_engine(scout, kv_bytes=30 * PAIR_BYTES["scout"], max_seqs=20)
    before = engine.blocks.full.num_blocks
    assert before == 30
    sequences = [engine.add(i, p, SamplingParams(40)) for i, p in enumerate(random_prompts())]
    for _ in range(10):
        engine.step()
    long = engine.add(99, random_prompts((800,), seed=9)[0], SamplingParams(5))
    assert long.error is None and engine.blocks.full.num_blocks > before
    while engine.has_work:
        engine.step()
    assert [s.output for s in sequences] == expected["scout"] and long.num_generated >= 1


def test_kv_memory_below_one_block_is_an_error(scout):
    with pytest.raises(DeviceError, match="no block"):
        make_engine(scout, kv_bytes=1000)


# -- when something goes wrong inside a step


def test_out_of_memory_makes_steps_smaller_and_loses_nothing(scout, expected, monkeypatch, capsys):
    forward = type(scout).forward

    def limited(model, step, kv):
        if len(step.token_ids) > 11:
            raise torch.OutOfMemoryError("this device is small")
        return forward(model, step, kv)

    monkeypatch.setattr(type(scout), "forward", limited)
    engine = make_engine(scout, max_batch_tokens=200)
    sequences = run(engine, random_prompts(), SamplingParams(40))
    assert [s.output for s in sequences] == expected["scout"]
    assert engine.scheduler.max_batch_tokens < 200
    said = [line for line in capsys.readouterr().err.splitlines() if "ran out of memory" in line]
    assert 1 <= len(said) <= 5 and "a step of 200 tokens" in said[0]


def test_out_of_memory_for_good_is_an_error_and_not_a_loop(scout, monkeypatch):
    def never(model, step, kv):
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")

    monkeypatch.setattr(type(scout), "forward", never)
    sequences = run(make_engine(scout), random_prompts((5, 50)), SamplingParams(3))
    assert [s.error[0] for s in sequences] == ["model_error"] * 2


def test_a_failing_sequence_does_not_take_its_mates_down(scout, expected, monkeypatch):
    forward = type(scout).forward

    def poisoned(model, step, kv):
        if (step.token_ids == 4000).any():
            raise ValueError("poison")
        logits = forward(model, step, kv)
        bad = (step.token_ids == 3999).any() and len(step.token_ids) == 1
        return torch.full_like(logits, torch.nan) if bad else logits

    monkeypatch.setattr(type(scout), "forward", poisoned)
    prompts = random_prompts()
    sequences = run(make_engine(scout), [*prompts[:4], [1, 2, 4000], *prompts[4:]], SamplingParams(40))
    failed = sequences.pop(4)
    assert failed.error == ("model_error", "ValueError: poison")
    assert [s.output for s in sequences] == expected["scout"]
    (broken,) = run(make_engine(scout), [[3999]], SamplingParams(3))
    assert "not finite" in broken.error[1]


@pytest.mark.parametrize("kernels", [contextlib.nullcontext, ops.reference_only])
def test_nothing_is_read_from_slots_that_a_sequence_did_not_write(scout, expected, kernels):
    engine = make_engine(scout, max_seqs=10, max_batch_tokens=200)
    for layer in engine.runner.kv.layers:
        layer.k.fill_(torch.nan)
        layer.v.fill_(torch.nan)  # what a sequence gone wrong may leave behind in its blocks
    with kernels():
        sequences = run(engine, random_prompts(), SamplingParams(10))
    assert [s.output for s in sequences] == [tokens[:10] for tokens in expected["scout"]]


def test_a_model_that_only_fails_stops_the_run(scout, monkeypatch):
    def broken(model, step, kv):
        raise ImportError("no such kernel")

    monkeypatch.setattr(type(scout), "forward", broken)
    with pytest.raises(ImportError, match="no such kernel"):
        run(make_engine(scout), random_prompts((5,) * 20), SamplingParams(3))


def test_a_failing_image_fails_its_own_sequence_only(scout, illustrated, monkeypatch):
    prompts, pictures, expected = illustrated
    encode = type(scout).encode_images

    def picky(model, images):
        if any(image is pictures[1][0] for image in images):
            raise ValueError("cannot look at this")
        return encode(model, images)

    monkeypatch.setattr(type(scout), "encode_images", picky)
    sequences = run(make_engine(scout), prompts, SamplingParams(8), pictures)
    assert sequences[1].error[0] == "image_error" and "cannot look" in sequences[1].error[1]
    assert [sequences[0].output, sequences[2].output] == [expected[0], expected[2]]


def test_a_device_that_is_gone_is_not_the_images_fault(scout, illustrated, monkeypatch):
    prompts, pictures, _ = illustrated

    def gone(model, images):
        raise torch.AcceleratorError("an illegal address")

    monkeypatch.setattr(type(scout), "encode_images", gone)
    with pytest.raises(DeviceError, match="the device failed: an illegal address"):
        run(make_engine(scout), prompts, SamplingParams(8), pictures)
