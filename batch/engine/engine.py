"""Continuous batching: one `step()` takes every running sequence one piece further.

prompt → Sequence (`add`) → Scheduler (plan) → Runner (StepInput, logits) → sampler (tokens) → back to the Sequence.
The engine knows tokens and pixels, no text.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable
from dataclasses import dataclass

from batch.engine.admission import refusal
from batch.engine.blocks import BlockManager
from batch.engine.failures import StepLimit, is_out_of_memory, raise_unless_theirs
from batch.engine.flight import Flight, launch
from batch.engine.image_features import FeatureCache, encoder_of
from batch.engine.logit_rules import LogitRules
from batch.engine.prefix import PrefixKeys
from batch.engine.runner import ImageEncodingError, Runner
from batch.engine.sampler import Draw
from batch.engine.scheduler import WINDOW, Scheduler
from batch.engine.sequence import Piece, Sequence
from batch.engine.stats import EngineStats, StepSeconds
from batch.model.model import Model
from batch.requests import ImageTiles, SamplingParams, TokenMask
from l4tool.core.errors import DeviceError
from l4tool.core.sizes import format_bytes
from quant.memory import BlockNeed, pools

MAX_PIXEL_BYTES = 1 << 30  # pictures of unfinished sequences past which no more requests are asked for
MAX_FEATURE_BYTES = 256 << 20  # image features kept for pictures that come again
STEPS_AHEAD = 4  # requests are pulled for so many steps, so that those with the same beginning can meet


@dataclass(frozen=True)
class EngineConfig:
    """Limits of one engine: tokens per step, sequences at a time, bytes of KV cache, tokens per KV block.

    `prefix_cache` False: nothing that was computed for one sequence is used for another. `first_alone`: see Scheduler.
    `overlap`: while sequences only decode, the next step is on the device before the tokens of the last are read, so
    that the device does not wait for the host; a sequence that ends computes one token for nothing.
    """

    max_batch_tokens: int
    max_seqs: int
    kv_bytes: int
    block_size: int
    prefix_cache: bool = True
    first_alone: bool = False
    overlap: bool = False


class Engine:
    """Owns the KV cache and the sequences; one thread calls it.

    `eos_token_ids` (the checkpoint's own unless given) end every sequence, beside its own stop ids.
    Raises DeviceError when `kv_bytes` does not hold a single block of each kind.
    """

    def __init__(self, model: Model, config: EngineConfig, eos_token_ids: Iterable[int] | None = None) -> None:
        self.model = model
        self.config = config
        text = model.arch.text
        self.eos_token_ids = frozenset(text.eos_token_ids if eos_token_ids is None else eos_token_ids)
        self._longest = BlockNeed(1, 1)
        split = self._split(self._longest)
        if split is None:
            raise DeviceError(
                f"{format_bytes(config.kv_bytes)} of KV memory hold no block of {config.block_size} tokens",
                hint="give --kv-memory a larger size",
            )
        self.blocks = BlockManager(split.full, split.chunked, config.block_size, text.attention_chunk_size)
        self.scheduler = Scheduler(self.blocks, config.max_seqs, config.max_batch_tokens, config.first_alone)
        self.features = FeatureCache(encoder_of(model), MAX_FEATURE_BYTES if config.prefix_cache else 0)
        self.runner = Runner(model, self.blocks, self.features, config.max_seqs)
        self.stats = EngineStats()
        self._step_limit = StepLimit(config.max_batch_tokens)
        self._flight: Flight | None = None
        self._pixel_bytes = 0  # of all sequences that wait or run

    # -- the way in and out

    @property
    def has_work(self) -> bool:
        return bool(self.scheduler.running or self.scheduler.waiting)

    @property
    def num_out_of_memory(self) -> int:
        """How often it ran out of memory and went on with less at a time."""
        return self._step_limit.num_halved + self.features.num_halved

    @property
    def wants_more(self) -> bool:
        """False when the next steps are already full: whoever feeds the engine should then stop pulling requests.
        While all places are taken, some wait all the same, for the scheduler to choose from."""
        scheduler = self.scheduler
        room = max(scheduler.max_seqs - len(scheduler.running), min(WINDOW, scheduler.max_seqs))
        return (
            len(scheduler.waiting) < room
            and scheduler.num_new_tokens < STEPS_AHEAD * scheduler.max_batch_tokens
            and self._pixel_bytes < MAX_PIXEL_BYTES
        )

    def add(
        self, handle: object, prompt: list[int], sampling: SamplingParams, images: tuple[ImageTiles, ...] = (),
        mask: TokenMask | None = None,
    ) -> Sequence:  # fmt: skip
        """Queue one completion, whose tokens `mask` allows. One that can never run comes back with `error` set.

        A prompt that fits while prompt + max_tokens passes the model's context gets as many tokens as fit
        (finish_reason "length").
        """
        context = self.model.arch.text.max_position_embeddings
        stop_ids = self.eos_token_ids | sampling.stop_token_ids
        sequence = Sequence(
            handle=handle, tokens=list(prompt), prompt_len=len(prompt), sampling=sampling,
            max_len=min(len(prompt) + sampling.max_tokens, context), stop_ids=stop_ids,
            rules=LogitRules.of(prompt, sampling, stop_ids, mask),
        )  # fmt: skip
        sequence.error = refusal(sequence, images, self.model.arch) or self._too_large(sequence)
        if sequence.error is None and sampling.max_tokens == 0:
            sequence.finish_reason = "length"
        if sequence.is_over:
            sequence.images = None
        else:
            if self.config.prefix_cache:
                sequence.keys = PrefixKeys(self.config.block_size, sequence.images)
            self.scheduler.add(sequence)
            self._pixel_bytes += sequence.images.pixel_bytes if sequence.images is not None else 0
        return sequence

    def scored(
        self, handle: object, tokens: list[int], score_from: int, images: tuple[ImageTiles, ...] = ()
    ) -> Sequence:
        """A sequence of which nothing is drawn, for a `Scorer` to run; the engine does not queue it. One that can never
        run comes back with `error` set."""
        sequence = Sequence(
            handle=handle, tokens=tokens, prompt_len=len(tokens), sampling=SamplingParams(0), max_len=len(tokens),
            stop_ids=frozenset(), score_from=score_from,
        )  # fmt: skip
        sequence.error = refusal(sequence, images, self.model.arch) or self._too_large(sequence)
        if sequence.error is None and self.config.prefix_cache:
            sequence.keys = PrefixKeys(self.config.block_size, sequence.images)
        return sequence

    def finish(self, sequence: Sequence, reason: str) -> None:
        """End a sequence from outside (a stop string was seen, or nobody wants it any more)."""
        sequence.finish_reason = sequence.finish_reason or reason
        self._release(sequence)

    def close(self) -> None:
        """Drop the KV cache and the image features."""
        self._flight = None
        self.runner.close()
        self.features.clear()

    # -- one step

    def step(self) -> list[Sequence]:
        """Move on by one step; returns the sequences that got a token or ended. Needs `has_work`."""
        if self._flight is not None:
            flight, self._flight = self._flight, None
            return self._land(flight)
        began = time.perf_counter()
        plan = self.scheduler.schedule()
        self.stats.schedule_s += time.perf_counter() - began
        assert plan, "nothing to do"
        for sequence in self.scheduler.admitted:
            self.stats.count_start(sequence)
        return self._run(plan)

    def _run(self, plan: list[Piece]) -> list[Sequence]:
        try:
            flight = launch(self.runner, plan)
        except Exception as error:
            return self._recover(plan, error)
        return self._land(flight)

    def _land(self, flight: Flight) -> list[Sequence]:
        """Read a step's tokens, once the next step is on its way where that can be. Sequences that have ended or lost
        their blocks since it was launched get nothing of it."""
        live = flight.live(self.scheduler)
        if not live:
            return []
        following = self._launch_ahead(flight) if self.config.overlap and len(live) == len(flight.plan) else None
        try:
            found, took = flight.land(live)
        except Exception as error:
            return self._recover(live, error)
        self._flight = following
        self._count(live, took)
        return self._advance(live, [sequence for sequence, _ in found], [drew for _, drew in found])

    def _launch_ahead(self, flight: Flight) -> Flight | None:
        """The step after one whose tokens nobody has seen, where there is no choice in it."""
        plan = self.scheduler.look_ahead(flight.plan)
        # What fails here fails again, and is then dealt with, when the step is taken in the ordinary way.
        with contextlib.suppress(Exception):
            return launch(self.runner, plan, flight.tokens) if plan else None
        return None

    def _advance(self, plan: list[Piece], drawing: list[Sequence], draws: list[Draw]) -> list[Sequence]:
        """The step was computed: book it, hand out the tokens, let go of what is over."""
        for piece in plan:
            self.scheduler.book(piece)
            if piece.sequence.images is not None:
                piece.sequence.images.forget(piece.end)
        for sequence, drew in zip(drawing, draws, strict=True):
            if drew.token is None:
                sequence.error = ("model_error", "the model's output is not finite (NaN or infinity)")
            else:
                sequence.append(drew.token, drew.logprob)
            if sequence.is_over:
                self._release(sequence)
        return drawing

    # -- when something is wrong

    def _too_large(self, sequence: Sequence) -> tuple[str, str] | None:
        need = self.blocks.need(sequence.max_len)
        if self.blocks.fits_alone(sequence.max_len) or self._rebalance(need):
            return None
        full_bytes, chunked_bytes = self._block_bytes()
        return "kv_cache_too_small", (
            f"prompt and completion ({sequence.prompt_len} + {sequence.max_len - sequence.prompt_len} tokens) need "
            f"{format_bytes(need.full * full_bytes + need.chunked * chunked_bytes)} of KV cache, which has "
            f"{format_bytes(self.config.kv_bytes)}; raise --kv-memory or lower max_tokens"
        )

    def _recover(self, plan: list[Piece], error: Exception) -> list[Sequence]:
        """A step failed; nothing of it was booked, so it can be repeated smaller. Returns the sequences that end."""
        raise_unless_theirs(error)
        if isinstance(error, ImageEncodingError):
            return [self._fail(error.sequence, "image_error", f"encoding the images failed: {error}")]
        tokens = sum(piece.length for piece in plan)
        if is_out_of_memory(error) and tokens > 1:
            self.features.clear()
            self._step_limit.halve(tokens)
            self._keep_limit()
            return []
        if len(plan) > 1:
            # Each alone, so that only the culprit fails; one that was preempted meanwhile waits for its next plan.
            return [s for piece in plan if piece.sequence in self.scheduler.running for s in self._run([piece])]
        self._step_limit.failed(error)
        return [self._fail(plan[0].sequence, "model_error", f"{type(error).__name__}: {error}")]

    def _keep_limit(self) -> None:
        """As many tokens a step (and sequences at a time) as the limit says; the youngest go back to the queue."""
        scheduler, tokens = self.scheduler, self._step_limit.tokens
        scheduler.max_batch_tokens = tokens
        scheduler.max_seqs = min(tokens, self.config.max_seqs)
        while len(scheduler.running) > scheduler.max_seqs:
            scheduler.preempt(scheduler.youngest)

    def _fail(self, sequence: Sequence, code: str, message: str) -> Sequence:
        sequence.error = (code, message)
        self._release(sequence)
        return sequence

    def _release(self, sequence: Sequence) -> None:
        if sequence.images is not None:
            self._pixel_bytes -= sequence.images.pixel_bytes
            sequence.images = None
        self.scheduler.finish(sequence)

    # -- memory and books

    def _block_bytes(self) -> tuple[int, int]:
        """Bytes of one block over all layers of its kind: full, chunked."""
        size = self.config.block_size
        return self.model.kv_bytes_per_block("full", size), self.model.kv_bytes_per_block("chunked", size)

    def _split(self, at_least: BlockNeed) -> BlockNeed | None:
        text, config = self.model.arch.text, self.config
        return pools(text, config.kv_bytes, config.block_size, self.model.kv_dtype.itemsize, config.max_seqs, at_least)

    def _rebalance(self, need: BlockNeed) -> bool:
        """Divide the KV memory anew so that a longer request than any before fits; running ones are recomputed."""
        longest = BlockNeed(max(need.full, self._longest.full), max(need.chunked, self._longest.chunked))
        live = [*self.scheduler.running, *self.scheduler.waiting]
        for held in (self.blocks.need(s.max_len) for s in live):
            longest = BlockNeed(max(longest.full, held.full), max(longest.chunked, held.chunked))
        split = self._split(longest)
        if split is None:
            return False
        while self.scheduler.running:
            self.scheduler.preempt(self.scheduler.youngest)
        self.runner.close()  # the old cache goes before the new one comes
        self._longest = longest
        self.blocks = BlockManager(split.full, split.chunked, self.blocks.block_size, self.blocks.chunk_size)
        self.scheduler.blocks = self.blocks
        self.runner = Runner(self.model, self.blocks, self.features, self.config.max_seqs)
        return True

    def _count(self, plan: list[Piece], took: StepSeconds) -> None:
        stats = self.stats
        stats.count_step(plan, took)
        stats.count_memory(self.blocks, self.features)
        stats.preemptions = self.scheduler.num_preemptions
        stats.weights_read_bytes, stats.weights_wait_s = self.model.weights_read()
        self._step_limit.went_well()
        self._keep_limit()
