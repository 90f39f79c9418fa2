"""What the largest step takes of a device's memory, found by running it on made-up requests."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch

from batch.backends.memory import give_back_cached
from batch.engine.engine import Engine, EngineConfig
from batch.engine.image_features import TILES_AT_ONCE
from batch.model.model import Model
from batch.requests import ImageTiles, SamplingParams
from quant.memory import BlockNeed, blocks_bytes, ceil_div

ROUNDS = 3  # steps that were shrunk grow again in a long round, so this could go on for ever


class Meter(Protocol):
    """Measures the most memory taken at a time, in bytes above what was taken at the start."""

    def start(self) -> None: ...

    def peak(self) -> int: ...

    def kept(self) -> int:
        """What stays taken beside what is in use, as the memory of graphs does."""
        ...


class DeviceMeter:
    """What torch allocates on one CUDA device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._before = 0

    def start(self) -> None:
        torch.cuda.synchronize(self._device)
        torch.cuda.reset_peak_memory_stats(self._device)
        self._before = torch.cuda.memory_allocated(self._device)

    def peak(self) -> int:
        torch.cuda.synchronize(self._device)
        return torch.cuda.max_memory_allocated(self._device) - self._before

    def kept(self) -> int:
        torch.cuda.synchronize(self._device)
        give_back_cached()
        return torch.cuda.memory_reserved(self._device) - torch.cuda.memory_allocated(self._device)


def worst_step_bytes(
    model: Model, max_batch_tokens: int, max_seqs: int, block_size: int, room_bytes: int, meter: Meter
) -> int:
    """Bytes that a step of `max_batch_tokens` tokens takes, `max_seqs` of which draw a token with filters on, or the
    vision tower's largest step; and what the graphs of decoding steps keep. Its own KV cache, of at most `room_bytes`,
    does not count and is gone afterwards. Raises DeviceError where nothing fits."""
    length = max(max_batch_tokens // max_seqs, 1)
    blocks = max_seqs * (ceil_div(length + 1, block_size) + 1)
    needed = blocks_bytes(model.arch.text, BlockNeed(blocks, blocks), block_size, model.kv_dtype.itemsize)
    config = EngineConfig(max_batch_tokens, max_seqs, min(needed, room_bytes), block_size, prefix_cache=False)
    engine = Engine(model, config, eos_token_ids=())
    for _ in range(ROUNDS):
        before = engine.num_out_of_memory
        meter.start()
        _largest_steps(engine, length)
        if engine.num_out_of_memory == before:
            break  # else what failed was larger than what will run: measured again, smaller
    taken = meter.peak() + meter.kept()
    engine.close()
    return taken


def _largest_steps(engine: Engine, length: int) -> None:
    """Pictures, prompts of `length` tokens for all sequences, and a step that decodes them."""
    vision = engine.model.arch.vision
    if vision is not None:
        side = vision.image_size
        tiles = np.zeros((TILES_AT_ONCE, vision.num_channels, side, side), np.uint8)
        engine.features.encode([ImageTiles(tiles, (TILES_AT_ONCE - 1, 1))])
    sampling = SamplingParams(max_tokens=2, temperature=1.0, top_p=0.9)  # the second in a decoding step
    for number in range(engine.config.max_seqs):
        engine.add(number, [0] * length, sampling)
    while engine.has_work:
        engine.step()
