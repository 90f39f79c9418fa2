"""What bench/gpu.py measures: the card's own limits, single products, and an engine on made-up requests."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from gpu_random import FORMATS
from limits import Costs, Step, decode_step, prefill_step
from machine import Machine

from batch.engine.engine import Engine, EngineConfig
from batch.engine.sampler import draw
from batch.kernels.linears import DenseLinear, Experts, Fp8Linear, Int4Linear
from batch.model.model import Model
from batch.requests import ImageTiles, SamplingParams
from converters.reader import TensorInfo
from converters.writing.encoder import Scratch
from quant.encoders import Int4

QUANTIZE_THREADS = 4
DECODE_PROMPT, SHORT_PROMPT, DECODE_STEPS = 300, 64, 64
MANY = 64  # sequences; more have short prompts, so that they fit beside INT4 weights in 80 GB
NUM_SPECIAL = 2048  # ids that no prompt may hold: the last of the vocabulary
COPY_BYTES, MATMUL_SIZE = 2 << 30, 8192
GREEDY, DRAWN = SamplingParams(1), SamplingParams(1, temperature=0.6, top_p=0.9)


def timed(work: Callable[[], object], device: torch.device, rounds: int = 7) -> float:
    """Median seconds of one call, after one that does not count."""
    work()
    seconds = []
    for _ in range(rounds):
        synchronize(device)
        began = time.perf_counter()
        work()
        synchronize(device)
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure_card(device: torch.device, copy_bytes: int = COPY_BYTES, size: int = MATMUL_SIZE) -> Machine:
    """Bytes per second of a copy, read and written, and bf16 FLOP per second of a large product."""
    both = torch.empty((2, copy_bytes), dtype=torch.uint8, device=device)
    copy_s = timed(lambda: both[0].copy_(both[1]), device)
    a = torch.randn(size, size, device=device).bfloat16()
    flops = 2 * size**3 / timed(lambda: a @ a, device)
    return Machine(1, 2 * copy_bytes / copy_s, flops, flops)


# -- products


@dataclass(frozen=True)
class ProductFigures:
    """A layer's routed experts over `tokens` tokens each: seconds, and shares of the copy's and the matmul's rate."""

    scheme: str
    tokens: int
    seconds: float
    of_bandwidth: float
    of_flops: float


def random_experts(scheme: str, experts: int, hidden: int, inner: int, device: torch.device) -> Experts:
    def weight(rows: int, columns: int) -> DenseLinear | Int4Linear | Fp8Linear:
        if scheme == "bf16":
            return DenseLinear(torch.randn(rows, columns, device=device, dtype=torch.bfloat16) * 0.02)
        if scheme == "fp8":
            values = torch.randn(rows, columns, device=device, dtype=torch.bfloat16).to(torch.float8_e4m3fn)
            return Fp8Linear(values, torch.full((rows, 1), 0.02, device=device, dtype=torch.bfloat16), True)
        packed = torch.randint(-(2**31), 2**31 - 1, (rows, columns // 8), dtype=torch.int32, device=device)
        group = FORMATS["int4"].group_size or columns
        scale = torch.full((columns // group, rows), 0.005, device=device, dtype=torch.bfloat16).T
        return Int4Linear(packed, scale, group)

    gate_up = tuple(weight(2 * inner, hidden) for _ in range(experts))
    return Experts(gate_up, tuple(weight(hidden, inner) for _ in range(experts)))


def measure_products(
    scheme: str, tokens_each: list[int], machine: Machine, device: torch.device,
    run: Callable[[torch.Tensor, torch.Tensor, Experts], object], experts: int = 16, hidden: int = 5120,
    inner: int = 8192,
) -> list[ProductFigures]:  # fmt: skip
    """`run(x, logits, experts)` with as many tokens for each expert, in random order."""
    weights = random_experts(scheme, experts, hidden, inner, device)
    weight_bytes = sum(t.nbytes for part in (*weights.gate_up, *weights.down) for t in part.tensors())
    found = []
    for count in tokens_each:
        rows = count * experts
        x = torch.randn(rows, hidden, device=device).bfloat16()
        chosen = torch.arange(rows, device=device)[torch.randperm(rows, device=device)] % experts
        logits = torch.full((rows, experts), -4.0, device=device)
        logits = logits.scatter(1, chosen[:, None], 4.0).bfloat16()
        seconds = timed(lambda x=x, logits=logits: run(x, logits, weights), device)
        flops = 2 * rows * 3 * hidden * inner
        found.append(
            ProductFigures(
                scheme, count, seconds, weight_bytes / seconds / machine.read_bytes_s,
                flops / seconds / machine.bf16_flops,
            )
        )  # fmt: skip
    return found


def draw_seconds(rows: int, device: torch.device, vocab: int = 202048) -> float:
    """Seconds to draw a token of each row of logits that were bfloat16."""
    logits = (3 * torch.randn(rows, vocab, device=device)).bfloat16().float()
    return timed(lambda: draw(logits, [DRAWN] * rows, [0] * rows).result(), device)


def quantize_rate(device: torch.device, rows: int = 8192, columns: int = 5120, count: int = 16) -> float:
    """Bytes of bfloat16 per second that INT4 quantization takes from host memory, by as many threads as the pipeline
    has: matrices as fused experts lie, by columns, packed words back on the host."""
    encoder = Int4(128, "mse", str(device))
    weight = torch.randn(columns, rows).bfloat16().T
    info = TensorInfo("expert", (rows, columns), torch.bfloat16, weight.nbytes, Path("none"))

    def encode(number: int) -> None:
        encoder.encode(weight, info, "expert.weight", 0, Scratch())

    with ThreadPoolExecutor(QUANTIZE_THREADS) as pool:
        seconds = timed(lambda: list(pool.map(encode, range(count))), device, rounds=3)
    return count * weight.nbytes / seconds


# -- the engine


@dataclass(frozen=True)
class Rate:
    """Tokens (or pictures) per second, and which share of the machine's limit that is."""

    per_second: float
    of_limit: float


class Unmeasured(Exception):
    """A figure that could not be taken, and why."""


def random_prompts(count: int, length: int, vocab_size: int, seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(vocab_size - NUM_SPECIAL) for _ in range(length)] for _ in range(count)]


def prefill_rate(engine: Engine, length: int, count: int, costs: Costs, machine: Machine) -> Rate:
    """Prompts of `length` tokens, one token drawn of each."""
    prompts = random_prompts(count + 1, length, engine.model.arch.text.vocab_size)
    run_all(engine, prompts[count:], 1)  # compiles what this length needs
    synchronize(engine.model.device)
    began = time.perf_counter()
    run_all(engine, prompts[:count], 1)
    seconds = time.perf_counter() - began
    limit = sum(prefill_step([length]).seconds(costs, machine) for _ in range(count))
    return Rate(count * length / seconds, limit / seconds)


def run_all(engine: Engine, prompts: list[list[int]], new_tokens: int) -> None:
    added = [engine.add(n, prompt, SamplingParams(max_tokens=new_tokens)) for n, prompt in enumerate(prompts)]
    while engine.has_work:
        engine.step()
    failed = [sequence.error for sequence in added if sequence.error is not None]
    if failed:
        raise Unmeasured(f"{len(failed)} of {len(added)} sequences failed: {failed[0]}")


def decode_rate(
    engine: Engine, sequences: int, costs: Costs, machine: Machine, prompt: int | None = None,
    steps: int = DECODE_STEPS, drawn: bool = False,
) -> Rate:  # fmt: skip
    """So many sequences decoding together: `steps` steps, once all prompts are computed and one step is done. `drawn`:
    not greedily, but as the model's own defaults are. Raises Unmeasured where they do not fit the cache."""
    length = prompt or (DECODE_PROMPT if sequences <= MANY else SHORT_PROMPT)
    prompts = random_prompts(sequences, length, engine.model.arch.text.vocab_size)
    sampling = replace(DRAWN if drawn else GREEDY, max_tokens=4 * steps + sequences)
    added = [engine.add(n, ids, sampling) for n, ids in enumerate(prompts)]
    while any(sequence.num_left > 1 or not sequence.num_generated for sequence in added):
        engine.step()
    engine.step()
    lengths = [len(sequence.tokens) for sequence in added]
    synchronize(engine.model.device)
    began = time.perf_counter()
    for _ in range(steps):
        engine.step()
    seconds = time.perf_counter() - began
    found = sum(len(sequence.tokens) for sequence in added) - sum(lengths)
    for sequence in added:
        engine.finish(sequence, "stop")
    wanted: list[Step] = [decode_step([length + step for length in lengths]) for step in range(steps)]
    limit = sum(step.seconds(costs, machine) for step in wanted)
    if found != steps * sequences:
        raise Unmeasured(f"{sequences} sequences drew {found} tokens in {steps} steps: the KV cache is too small")
    return Rate(found / seconds, limit / seconds)


def images_per_second(engine: Engine, tiles: int = 5, count: int = 24) -> float:
    """Pictures of so many tiles through the vision tower, as many together as the engine takes."""
    vision = engine.model.arch.vision
    assert vision is not None
    side, rng = vision.image_size, np.random.default_rng(0)
    images = [
        ImageTiles(rng.integers(0, 256, (tiles, vision.num_channels, side, side), np.uint8), (tiles - 1, 1))
        for _ in range(count)
    ]
    return count / timed(lambda: engine.features.encode(images), engine.model.device, rounds=3)


def engine_of(model: Model, config: EngineConfig) -> Engine:
    """An engine whose sequences end at their length alone, and which finds nothing again."""
    return Engine(model, config, eos_token_ids=())
