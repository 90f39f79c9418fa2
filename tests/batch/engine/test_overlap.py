"""Steps launched before the tokens of the last are read: the same answers, whoever ends, fails or is pushed out."""

import weakref

import pytest
import torch

from batch.engine.engine import Engine, EngineConfig
from batch.engine.flight import launch
from batch.engine.sampler import Drawing
from batch.engine.scheduler import Scheduler
from batch.requests import SamplingParams
from l4tool.core.errors import DeviceError
from tests.batch.engine.test_engine import BLOCK, random_prompts


@pytest.fixture
def launched(monkeypatch):
    """How many sequences were in each step that was launched ahead."""
    counts, look_ahead = [], Scheduler.look_ahead

    def counted(scheduler, plan):
        found = look_ahead(scheduler, plan)
        counts.append(len(found))
        return found

    monkeypatch.setattr(Scheduler, "look_ahead", counted)
    return counts


def engine_of(model, overlap, kv_bytes=16 << 20, eos_token_ids=()):
    config = EngineConfig(64, 8, kv_bytes, BLOCK, overlap=overlap)
    return Engine(model, config, eos_token_ids=eos_token_ids)


def outputs(engine, prompts, samplings):
    added = [engine.add(n, prompt, asked) for n, (prompt, asked) in enumerate(zip(prompts, samplings, strict=True))]
    while engine.has_work:
        engine.step()
    assert engine.blocks.full.num_used == engine.blocks.chunked.num_used == 0
    return [(s.output, s.finish_reason, s.error, s.logprobs) for s in added]


def samplings():
    lengths = (1, 2, 3, 20, 33, 40, 17, 9, 12, 30)
    return [
        SamplingParams(n, temperature=n % 3 * 0.6, seed=n, logprobs=1 if n % 2 else None,
                       repetition_penalty=1.1 if n == 17 else 1.0)
        for n in lengths
    ]  # fmt: skip


@pytest.mark.parametrize("kv_bytes", [16 << 20, 14 * (64 << 10)])  # plenty; or so little that some are pushed out
def test_answers_are_the_same(scout, launched, kv_bytes):
    prompts = random_prompts()
    plain = outputs(engine_of(scout, False, kv_bytes), prompts, samplings())
    assert not launched
    engine = engine_of(scout, True, kv_bytes)
    ours = outputs(engine, prompts, samplings())
    assert ours == plain and sum(map(bool, launched)) > 5
    assert (engine.stats.preemptions > 0) == (kv_bytes < 16 << 20)


def test_an_end_token_is_the_last(scout, launched):
    prompts, asked = random_prompts((5, 9, 30)), [SamplingParams(30)] * 3
    free = outputs(engine_of(scout, False), prompts, asked)
    stops = {free[0][0][4], free[1][0][12]}
    plain = outputs(engine_of(scout, False, eos_token_ids=stops), prompts, asked)
    assert outputs(engine_of(scout, True, eos_token_ids=stops), prompts, asked) == plain
    assert {len(output) for output, *_ in plain} != {30} and 3 in launched


def test_whoever_is_finished_from_outside_gets_nothing_more(scout):
    engine = engine_of(scout, True)
    first, second = (engine.add(n, [n + 1] * 5, SamplingParams(20)) for n in range(2))
    while first.num_generated < 4:
        engine.step()
    engine.finish(first, "stop")
    assert engine.step() == [second] and first.num_generated == 4
    while second.num_generated < 8:
        engine.step()
    engine.finish(second, "stop")
    assert not engine.has_work
    third = engine.add(2, [7] * 5, SamplingParams(6))
    assert engine.step() == []  # what was on its way is nobody's
    while engine.has_work:
        engine.step()
    assert third.output == outputs(engine_of(scout, False), [[7] * 5], [SamplingParams(6)])[0][0]


def test_whoever_comes_is_admitted(scout):
    engine = engine_of(scout, True)
    first = engine.add(0, [1] * 5, SamplingParams(14))
    while first.num_generated < 3:
        engine.step()
    second = engine.add(1, [2] * 5, SamplingParams(3))
    before = first.num_generated
    while not second.num_generated:
        engine.step()
    assert first.num_generated <= before + 2  # what was on its way, and the step that admits
    engine.finish(first, "stop")
    engine.finish(second, "stop")


def test_a_launch_that_fails_is_repeated(scout, monkeypatch):
    prompts, asked = random_prompts((5, 9)), [SamplingParams(12)] * 2
    expected = outputs(engine_of(scout, False), prompts, asked)
    failures = []

    def failing(runner, plan, token_ids=None):
        if token_ids is not None and len(failures) < 3:
            failures.append(plan)
            raise torch.OutOfMemoryError("none left")
        return launch(runner, plan, token_ids)

    monkeypatch.setattr("batch.engine.engine.launch", failing)
    assert outputs(engine_of(scout, True), prompts, asked) == expected and len(failures) == 3


def test_tokens_that_do_not_arrive(scout, monkeypatch):
    result, broken = Drawing.result, []

    def lost(drawing):
        if broken and broken.pop():
            raise RuntimeError("lost on the way")
        return result(drawing)

    monkeypatch.setattr(Drawing, "result", lost)
    prompts, asked = random_prompts((5, 9)), [SamplingParams(12)] * 2
    expected = outputs(engine_of(scout, True), prompts, asked)
    engine = engine_of(scout, True)
    added = [engine.add(n, prompt, asked[0]) for n, prompt in enumerate(prompts)]
    for _ in range(4):
        engine.step()
    broken.append(True)
    while engine.has_work:
        engine.step()
    assert [(s.output, s.finish_reason) for s in added] == [row[:2] for row in expected]


def test_what_nobody_waits_for_is_not_read(scout, monkeypatch):
    engine = engine_of(scout, True)
    first = engine.add(0, [1] * 5, SamplingParams(20, logprobs=1))
    while first.num_generated < 3:
        engine.step()
    engine.finish(first, "stop")
    second = engine.add(1, [2] * 5, SamplingParams(3))
    with monkeypatch.context() as context:
        context.setattr(Drawing, "result", lambda drawing: 1 / 0)
        assert engine.step() == []
    while engine.has_work:
        engine.step()
    assert second.error is None and len(second.output) == 3 and len(first.output) == 3


def test_the_next_step_does_not_hold_the_last_ones_logits(scout, monkeypatch):
    seen = []

    def noted(drawing, tokens, best, raw, params):
        seen.append(weakref.ref(raw))
        make(drawing, tokens, best, raw, params)

    make = Drawing.__init__
    monkeypatch.setattr(Drawing, "__init__", noted)
    engine = engine_of(scout, True)
    engine.add(0, [1] * 5, SamplingParams(9, logprobs=1))
    for _ in range(4):
        engine.step()
    assert engine._flight is not None and len(seen) == 5
    assert all(raw() is None for raw in seen)


def test_a_device_that_fails_ends_the_run(scout, monkeypatch):
    engine = engine_of(scout, True)
    sequence = engine.add(0, [1] * 5, SamplingParams(20))
    for _ in range(3):
        engine.step()

    def gone(drawing):
        raise torch.AcceleratorError("gone")

    monkeypatch.setattr(Drawing, "result", gone)
    with pytest.raises(DeviceError, match="the device failed"):
        engine.step()
    engine.finish(sequence, "stop")
    engine.close()
