"""Runs engines on the device of strict_device.py, in a process of its own: what FOLDER CASE brings, as JSON."""

import contextlib
import dataclasses
import json
import sys

import numpy as np
import torch

from batch.engine import engine as engines
from batch.engine.engine import Engine, EngineConfig
from batch.engine.graphs import DecodeGraphs
from batch.engine.scheduler import Scheduler
from batch.engine.scorer import Scorer, Target
from batch.kernels import ops, triton_attention
from batch.model import model as models
from batch.model import slices, text
from batch.requests import ImageTiles, SamplingParams
from converters.detect import open_checkpoint
from tests import strict_device
from tests.batch.engine.test_graphs import Recorder
from tests.strict_device import DEVICE, StrictMode

STEPS = 4
GREEDY = SamplingParams(STEPS)
DRAWN = SamplingParams(STEPS, temperature=0.8, seed=5)
CASES = {
    "drawn": [DRAWN, dataclasses.replace(DRAWN, top_p=0.9), dataclasses.replace(DRAWN, top_k=40, logprobs=2)],
    "rules": [
        dataclasses.replace(DRAWN, repetition_penalty=1.2, min_tokens=3),
        dataclasses.replace(GREEDY, presence_penalty=0.5, frequency_penalty=0.3),
        dataclasses.replace(GREEDY, logit_bias=((7, 3.0), (9, -2.0))),
    ],
    "slices": [GREEDY] * 3,
    "graphs": [GREEDY, dataclasses.replace(DRAWN, min_p=0.1), GREEDY],  # with FP8 keys
    "pictures": [GREEDY] * 2,
}


def text_requests():
    generator = torch.Generator().manual_seed(3)
    return [(torch.randint(0, 2000, (length,), generator=generator).tolist(), ()) for length in (3, 31, 6)]


def picture_requests(model):
    vision, rng = model.arch.vision, np.random.default_rng(0)
    shape = (vision.num_channels, vision.image_size, vision.image_size)
    for tiles in (1, 3):
        picture = ImageTiles(rng.integers(0, 256, (tiles, *shape), np.uint8), (max(tiles - 1, 1), 1))
        yield [5, *[model.arch.image_token_id] * (tiles * vision.tokens_per_tile), 9], (picture,)


def outputs(folder, case, device, mode=None):
    """What every sequence got. On the device launching may not wait, reading the tokens may."""
    model = models.load_model(
        open_checkpoint(folder), device, "float32", kv_dtype="fp8" if case == "graphs" else "auto"
    )
    engine = Engine(model, EngineConfig(64, 8, 4 << 20, 16, overlap=True), eos_token_ids=(0,))
    recorder = Recorder()
    if case == "graphs" and mode is not None:
        engine.runner.graphs = DecodeGraphs(model, engine.runner.kv, engine.blocks, 8, recorder)
    launch = engines.launch

    def watched(*args):
        if mode is None:
            return launch(*args)
        with mode.no_waiting():
            return launch(*args)

    engines.launch = watched
    requests = list(picture_requests(model)) if case == "pictures" else text_requests()
    added = [
        engine.add(number, prompt, sampling, images)
        for number, ((prompt, images), sampling) in enumerate(zip(requests, CASES[case], strict=True))
    ]
    try:
        while engine.has_work:
            engine.step()
    finally:
        engines.launch = launch
    return [[sequence.output, sequence.error] for sequence in added], recorder.replayed


def run(folder, case):
    if case == "slices":
        text.slices = lambda step: slices.slices(step, 14)
    ahead, look_ahead = [], Scheduler.look_ahead
    Scheduler.look_ahead = lambda scheduler, plan: ahead.append(look_ahead(scheduler, plan)) or ahead[-1]
    with ops.cuda_only(), StrictMode() as mode:
        ours, replayed = outputs(folder, case, DEVICE, mode)
    taken = sum(map(bool, ahead))
    Scheduler.look_ahead = look_ahead
    with ops.cuda_only() if case == "graphs" else contextlib.nullcontext():  # which the CPU's own kernels do without
        expected, _ = outputs(folder, case, "cpu")
    return {"launched_ahead": taken, "replayed": replayed, "ours": ours, "expected": expected}


def scores(folder):
    """Scoring reads back; what is checked is that host and device are kept apart."""
    found = []
    for device in (DEVICE, torch.device("cpu")):
        with StrictMode() if device == DEVICE else ops.cuda_only(), ops.cuda_only():
            model = models.load_model(open_checkpoint(folder), device, "float32")
            engine = Engine(model, EngineConfig(64, 8, 4 << 20, 16), eos_token_ids=())
            targets = [Target(prompt, 1) for prompt, _ in text_requests()]
            done = dict(Scorer([engine]).run(targets))
            found.append([[done[n].error, done[n].scores.nll] for n in range(len(targets))])
    return {"ours": found[0], "expected": found[1]}


if __name__ == "__main__":
    torch.set_num_threads(1)
    strict_device.run_kernels_here()
    models.resolve_device = torch.device
    triton_attention.PROGRAMS = 1
    with torch.inference_mode():
        folder, name = sys.argv[1:]
        print(json.dumps(scores(folder) if name == "scores" else run(folder, name)))
