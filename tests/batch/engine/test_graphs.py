"""Captured decoding steps. Without a device a graph is stood in for by what it records, run again on the same buffers;
a result must then be in the place where the first one was."""

import dataclasses

import pytest
import torch

from batch.engine.engine import Engine, EngineConfig
from batch.engine.graphs import Capturer, DecodeGraphs, can_capture
from batch.kernels import ops
from batch.model.model import load_model
from batch.requests import SamplingParams
from converters.detect import open_checkpoint

BLOCK = 16


class Recorder:
    """Stands in for CUDA's graphs."""

    def __init__(self):
        self.captured = self.replayed = 0

    def __call__(self, run):
        self.captured += 1
        rows = run()

        def replay():
            self.replayed += 1
            rows.hidden.copy_(run().hidden)

        return replay, rows


def decode(engine, prompts, steps):
    sampling = SamplingParams(max_tokens=steps)
    sequences = [engine.add(number, prompt, sampling) for number, prompt in enumerate(prompts)]
    while engine.has_work:
        engine.step()
    assert all(sequence.error is None for sequence in sequences), [sequence.error for sequence in sequences]
    return [sequence.output for sequence in sequences]


def engine_of(model):
    return Engine(model, EngineConfig(64, 8, 4 << 20, BLOCK), eos_token_ids=())


def prompts():
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(0, 2000, (length,), generator=generator).tolist() for length in (3, 31, 6)]


def test_tokens_are_those_of_the_cpu(scout_tiny, device, monkeypatch):
    expected = decode(engine_of(load_model(open_checkpoint(scout_tiny), "cpu", "float32")), prompts(), 3)
    monkeypatch.setattr("batch.kernels.triton_attention.PROGRAMS", 1)
    recorder = Recorder() if device.type == "cpu" else Capturer()
    with ops.cuda_only():
        model = load_model(open_checkpoint(scout_tiny), device, "float32")
        engine = engine_of(model)
        engine.runner.graphs = DecodeGraphs(model, engine.runner.kv, engine.blocks, 8, recorder)
        assert decode(engine, prompts(), 3) == expected
    if device.type == "cpu":
        # The largest size, and that of four for three sequences; the longest prompt enters the next attention chunk at
        # its second token.
        assert (recorder.captured, recorder.replayed) == (2, 2)
    engine.close()
    assert engine.runner.graphs is None


def test_which_steps_are_taken(scout_tiny, device):
    with ops.cuda_only():
        model = load_model(open_checkpoint(scout_tiny), device, "float32")
        engine = engine_of(model)
        assert can_capture(model, engine.runner.kv)
    graphs = DecodeGraphs(model, engine.runner.kv, engine.blocks, 7, Recorder())
    for prompt in ([1], [2]):
        engine.add("a", prompt, SamplingParams(2))
    step = engine.runner.build(engine.scheduler.schedule())
    assert graphs.takes(step)
    for change in (
        {"max_query_len": 2}, {"image_rows": torch.tensor([0])}, {"logits_rows": torch.tensor([1])},
        {"token_ids": torch.zeros(9), "logits_rows": torch.zeros(9)},  # seven sequences take the size of eight
    ):  # fmt: skip
        assert not graphs.takes(dataclasses.replace(step, **change))


@pytest.mark.parametrize("cause", [RuntimeError("not permitted when capturing"), torch.OutOfMemoryError("none left")])
def test_what_cannot_be_captured_runs_all_the_same(scout_tiny, capsys, cause):
    """The CPU's own kernels stand in here: nothing of a captured step is reached."""
    model = load_model(open_checkpoint(scout_tiny), "cpu", "float32")
    expected = decode(engine_of(model), prompts(), 3)

    def refused(run):
        raise cause

    engine = engine_of(model)
    engine.runner.graphs = DecodeGraphs(model, engine.runner.kv, engine.blocks, 8, refused)
    assert decode(engine, prompts(), 3) == expected
    assert engine.runner.graphs is None
    assert capsys.readouterr().err.count(f"captures no steps ({cause})") == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_device_captures_by_itself(scout_tiny):
    engine = engine_of(load_model(open_checkpoint(scout_tiny), "cuda", "bfloat16"))
    assert engine.runner.graphs is not None
    decode(engine, prompts(), 3)
