"""The built-in backend: one engine in this process. Requests in, texts out."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

import torch

from batch.backends.base import RequestSource
from batch.backends.loading import load_streamed, load_whole
from batch.backends.memory import default_kv_bytes, free_device_bytes, give_back_cached
from batch.backends.profiling import DeviceMeter, worst_step_bytes
from batch.backends.stop_strings import Decode, StopWatcher
from batch.backends.warm_up import warm_up
from batch.engine.engine import Engine, EngineConfig
from batch.engine.sampler import derive_seed
from batch.engine.sequence import Sequence
from batch.engine.stats import EngineStats
from batch.model.model import Model
from batch.requests import Choice, GenerationResult, PreparedRequest, TokenMask
from converters.detect import open_checkpoint
from converters.reader import Reader
from l4tool.core.console import note
from l4tool.core.errors import DeviceError, UsageError
from l4tool.core.sizes import format_bytes
from quant.memory import (
    CPU_BLOCK,
    DEFAULT_MAX_BATCH_TOKENS,
    DEFAULT_MAX_SEQS,
    LARGEST_BLOCK,
    largest_block,
    step_bytes,
)


class Detokenizer(Protocol):
    """What the backend needs of a tokenizer."""

    def decode(self, ids: list[int], skip_special: bool) -> str: ...


@dataclass(frozen=True)
class EmbeddedOptions:
    """None means: chosen here. `activations` "int8": what INT4 weights are multiplied with. `kv_dtype` "fp8": what the
    cache holds on a CUDA device. `kv_memory_bytes` is the KV cache alone; `block_size` is in tokens. So many engines as
    `memory_share` says have this memory to themselves. `first_alone`: see `Scheduler`. `stream_weights`: layers are
    read from disk while it runs, in a process that takes `memory_bytes` at most."""

    device: str = "cpu"
    dtype: str | None = None
    activations: str = "auto"
    kv_dtype: str = "auto"
    prefix_cache: bool = True
    max_batch_tokens: int | None = None
    kv_memory_bytes: int | None = None
    max_seqs: int | None = None
    block_size: int | None = None
    memory_share: int = 1
    first_alone: bool = False
    stream_weights: bool = False
    memory_bytes: int | None = None


@dataclass(eq=False)
class _Job:
    """One request while it runs: its sequences by choice index, and their results."""

    request: PreparedRequest
    sequences: list[Sequence] = field(default_factory=list)
    watchers: list[StopWatcher] = field(default_factory=list)
    choices: dict[int, Choice] = field(default_factory=dict)
    is_over: bool = False


class EmbeddedBackend:
    """Loads a checkpoint (or takes a loaded model) and runs requests on it; `run` may be called again and again.

    `eos_token_ids` replaces the checkpoint's own; () makes every completion run to max_tokens.
    Raises UsageError, DeviceError, CheckpointError.
    """

    def __init__(
        self,
        model: str | Path | Model,
        tokenizer: Detokenizer,
        options: EmbeddedOptions | None = None,
        eos_token_ids: Iterable[int] | None = None,
    ) -> None:
        options = options or EmbeddedOptions()
        self.tokenizer = tokenizer
        self._own: Model | None = None
        if isinstance(model, Model):
            config = engine_config(model, options)
        else:
            reader = open_checkpoint(model)
            with warm_up(reader, options.device, options.dtype, options.activations):
                model, config = load(reader, options)
            self._own = model
        try:
            self.engine = Engine(model, config, eos_token_ids)
        except BaseException:
            self._close_model()
            raise

    @property
    def stats(self) -> EngineStats:
        return self.engine.stats

    def run(self, source: RequestSource) -> Iterator[GenerationResult]:
        """Results in the order in which they finish; one per request, whatever happens to it."""
        stats, resumed_s = self.stats, time.perf_counter()
        with contextlib.closing(self._run(source)) as results:
            for result in results:
                left_s = time.perf_counter()
                stats.run_s += left_s - resumed_s
                yield result
                resumed_s = time.perf_counter()
                stats.output_wait_s += resumed_s - left_s
                stats.run_s += resumed_s - left_s
        stats.run_s += time.perf_counter() - resumed_s

    def _run(self, source: RequestSource) -> Generator[GenerationResult, None, None]:
        jobs: dict[int, _Job] = {}  # by id(): keys are the caller's and may repeat
        try:
            while True:
                yield from self._feed(source, jobs)
                if not self.engine.has_work:
                    return
                for sequence in self.engine.step():
                    yield from self._look_at(sequence, jobs)
        finally:
            for job in jobs.values():
                self._abandon(job)

    def close(self) -> None:
        """Free the weights and the KV cache."""
        self.engine.close()
        self._close_model()
        if torch.cuda.is_available():
            give_back_cached()

    def _close_model(self) -> None:
        if self._own is not None:
            self._own.close()

    def _feed(self, source: RequestSource, jobs: dict[int, _Job]) -> Iterator[GenerationResult]:
        """Pull requests while the engine has use for them; wait for one only when there is nothing else to do, or when
        a step costs reading all weights, whatever its size."""
        while self.engine.wants_more:
            began_s = time.perf_counter()
            request = source.take(wait=self.engine.model.is_streamed or not self.engine.has_work)
            self.stats.input_wait_s += time.perf_counter() - began_s
            if request is None:
                return
            job = _Job(request)
            jobs[id(job)] = job
            yield from self._start(job, jobs)

    def _start(self, job: _Job, jobs: dict[int, _Job]) -> Iterator[GenerationResult]:
        request, sampling = job.request, job.request.sampling
        masks: list[TokenMask | None] = [None] * request.n
        if request.grammar is not None:
            try:  # in a worker it is compiled again
                masks = [request.grammar.start() for _ in range(request.n)]
            except Exception as error:
                del jobs[id(job)]
                yield GenerationResult(request.key, [], len(request.prompt), "grammar_error", str(error))
                return
        for index, mask in enumerate(masks):
            seed = derive_seed(sampling.seed, index) if index else sampling.seed
            asked = replace(sampling, seed=seed)
            sequence = self.engine.add((job, index), request.prompt, asked, request.images, mask)
            job.sequences.append(sequence)
            if request.stop:
                job.watchers.append(StopWatcher(self._decoder(request), request.stop))
            if sequence.is_over:
                yield from self._look_at(sequence, jobs)
            if job.is_over:
                return

    def _look_at(self, sequence: Sequence, jobs: dict[int, _Job]) -> Iterator[GenerationResult]:
        """A sequence got a token, ended or failed: yields its request's result if that is now complete."""
        assert isinstance(sequence.handle, tuple)
        job, index = sequence.handle
        if job.is_over:
            return
        if sequence.error is not None:
            self._abandon(job)
            del jobs[id(job)]
            code, message = sequence.error
            yield GenerationResult(job.request.key, [], len(job.request.prompt), code, message)
            return
        stopped_text = self._stop_at(job, index, sequence)
        if not sequence.is_over:
            return
        job.choices[index] = self._choice(job.request, index, sequence, stopped_text)
        if len(job.choices) == job.request.n:
            job.is_over = True
            del jobs[id(job)]
            choices = [job.choices[i] for i in range(job.request.n)]
            cached = job.sequences[0].num_cached_at_start
            yield GenerationResult(job.request.key, choices, len(job.request.prompt), cached_tokens=cached)

    def _stop_at(self, job: _Job, index: int, sequence: Sequence) -> str | None:
        """The text before a stop string if the last token completed one (the sequence then ends), else None."""
        if not job.watchers or not sequence.num_generated:
            return None
        if sequence.tokens[-1] in sequence.stop_ids:
            return None
        text = job.watchers[index].find(sequence.output)
        if text is not None:
            self.engine.finish(sequence, "stop")
            sequence.finish_reason = "stop"  # also where max_tokens ended it at the same token
        return text

    def _choice(self, request: PreparedRequest, index: int, sequence: Sequence, text: str | None) -> Choice:
        """`token_ids` are all tokens drawn, the one that ended it included; the text has neither a stop string nor,
        unless special tokens are echoed, the stop token."""
        output = sequence.output
        if text is None:
            ended = bool(output) and output[-1] in sequence.stop_ids and not request.echo_special
            text = self._decoder(request)(output[:-1] if ended else output)
        assert sequence.finish_reason is not None
        logprobs = sequence.logprobs if request.sampling.logprobs is not None else None
        return Choice(index, output, text, sequence.finish_reason, logprobs)

    def _decoder(self, request: PreparedRequest) -> Decode:
        return lambda ids: self.tokenizer.decode(ids, skip_special=not request.echo_special)

    def _abandon(self, job: _Job) -> None:
        """Take all that is left of a request out of the engine."""
        job.is_over = True
        for sequence in job.sequences:
            if not sequence.is_over:
                self.engine.finish(sequence, "stop")


def load(reader: Reader, options: EmbeddedOptions) -> tuple[Model, EngineConfig]:
    """The model as the options want it, and what its engine may use. Raises UsageError, DeviceError, CheckpointError,
    InputMissing."""
    if not options.stream_weights:
        kinds = (options.device, options.dtype, options.activations)
        model = load_whole(reader, *kinds, options.memory_share, options.kv_dtype)
        return model, engine_config(model, options)
    if options.kv_dtype != "auto":
        raise UsageError(f"--kv-dtype {options.kv_dtype} needs a CUDA device", hint="leave out --weights stream")
    asked = (options.memory_bytes, options.max_batch_tokens, options.max_seqs, options.kv_memory_bytes)
    model, room = load_streamed(reader, options.device, options.dtype, options.activations, *asked)
    filled = replace(
        options, max_batch_tokens=room.max_batch_tokens, max_seqs=room.max_seqs, kv_memory_bytes=room.kv_bytes
    )
    return model, engine_config(model, filled)


def engine_config(model: Model, options: EmbeddedOptions) -> EngineConfig:
    """Options with their defaults filled in. Raises UsageError."""
    text = model.arch.text
    max_batch_tokens = options.max_batch_tokens or DEFAULT_MAX_BATCH_TOKENS
    most = CPU_BLOCK if model.device.type == "cpu" else LARGEST_BLOCK
    block_size = options.block_size or largest_block(text, most)
    if text.attention_chunk_size % block_size:
        raise UsageError(
            f"a block size of {block_size} does not divide the attention chunk of {text.attention_chunk_size} tokens",
            hint=f"use a block size of {largest_block(text)}",
        )
    max_seqs = min(options.max_seqs or DEFAULT_MAX_SEQS, max_batch_tokens)
    kv_bytes = options.kv_memory_bytes
    if kv_bytes is None:
        step = _step_bytes(model, max_batch_tokens, max_seqs, block_size)
        kv_bytes = default_kv_bytes(model.device, step) // options.memory_share
    return EngineConfig(
        max_batch_tokens, max_seqs, kv_bytes, block_size, options.prefix_cache, options.first_alone,
        overlap=model.device.type == "cuda",
    )  # fmt: skip


def _step_bytes(model: Model, max_batch_tokens: int, max_seqs: int, block_size: int) -> int:
    """What a step may take: the bound that `plan` computes with, or more where a device is seen to need more."""
    bound = step_bytes(model.arch.text, max_batch_tokens)
    if model.device.type != "cuda":
        return bound
    room_bytes, meter = free_device_bytes(model.device) // 2, DeviceMeter(model.device)
    try:
        seen = worst_step_bytes(model, max_batch_tokens, max_seqs, block_size, room_bytes, meter)
    except torch.OutOfMemoryError as error:
        raise DeviceError(
            f"beside the weights {model.device} has no memory for a step: {error}",
            hint="quantize the checkpoint, or take a device with more memory",
        ) from error
    give_back_cached()
    if seen > bound:
        note(f"a step takes {format_bytes(seen)} on {model.device}, not {format_bytes(bound)}: the KV cache is smaller")
    return max(bound, seen)
