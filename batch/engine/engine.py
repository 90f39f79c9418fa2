"""Continuous batching: one `step()` takes every running sequence one piece further.

prompt → Sequence (`add`) → Scheduler (plan) → Runner (StepInput, logits) → sampler (tokens) → back to the Sequence.
The engine knows tokens and pixels, no text.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from batch.engine.blocks import BlockManager
from batch.engine.flight import Flight, launch
from batch.engine.image_features import FeatureCache, ImageMismatch, SequenceImages, encoder_of
from batch.engine.logit_rules import LogitRules
from batch.engine.prefix import PrefixKeys
from batch.engine.runner import ImageEncodingError, Runner
from batch.engine.sampler import Draw
from batch.engine.scheduler import WINDOW, Scheduler
from batch.engine.sequence import Piece, Sequence
from batch.engine.stats import EngineStats, StepSeconds
from batch.model.model import Model
from batch.requests import ImageTiles, SamplingParams, TokenMask
from l4tool.core.console import note
from l4tool.core.errors import DeviceError, L4Error
from l4tool.core.sizes import format_bytes
from quant.memory import BlockNeed, pools

MAX_PIXEL_BYTES = 1 << 30  # pictures of unfinished sequences past which no more requests are asked for
FAILURES_IN_A_ROW = 8  # so many sequences failing one after another, and no step between: it is the model, not they
MAX_FEATURE_BYTES = 256 << 20  # image features kept for pictures that come again
STEPS_AHEAD = 4  # requests are pulled for so many steps, so that those with the same beginning can meet
GOOD_STEPS_TO_GROW = 64  # steps without trouble after which a step shrunk for lack of memory may double again


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
        self._good_steps = 0
        self._fewest_tokens = config.max_batch_tokens  # to which steps were ever shrunk
        self._failures_in_a_row = 0
        self._flight: Flight | None = None
        self._pixel_bytes = 0  # of all sequences that wait or run

    # -- the way in and out

    @property
    def has_work(self) -> bool:
        return bool(self.scheduler.running or self.scheduler.waiting)

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
        sequence.error = self._refusal(sequence, images)
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
        sequence.error = self._refusal(sequence, images)
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

    def _refusal(self, sequence: Sequence, images: tuple[ImageTiles, ...]) -> tuple[str, str] | None:
        """Why this sequence can never run (code, message), or None. Attaches its images."""
        text, vision = self.model.arch.text, self.model.arch.vision
        prompt, context = sequence.tokens, text.max_position_embeddings
        if not prompt:
            return "empty_prompt", "the prompt has no tokens"
        if len(prompt) >= context:
            return "context_length_exceeded", f"the prompt has {len(prompt)} tokens; the model's context is {context}"
        if min(prompt) < 0 or max(prompt) >= text.vocab_size:
            return "invalid_token", f"token ids must lie in 0 … {text.vocab_size - 1}"
        if images and (vision is None or self.model.arch.image_token_id is None):
            return "images_not_supported", "this checkpoint has no vision tower, so it cannot read images"
        if vision is not None and self.model.arch.image_token_id is not None:
            try:
                seen = SequenceImages(prompt, images, self.model.arch.image_token_id, vision.tokens_per_tile)
            except ImageMismatch as error:
                return "image_mismatch", str(error)
            sequence.images = seen if images else None
        return self._too_large(sequence)

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
        if isinstance(error, L4Error):
            raise error  # weights that are read while it runs: no fault of these sequences
        if isinstance(error, torch.AcceleratorError):
            raise DeviceError(f"the device failed: {error}", hint="run again; if it stays, use --device cpu") from error
        if isinstance(error, ImageEncodingError):
            return [self._fail(error.sequence, "image_error", f"encoding the images failed: {error}")]
        tokens = sum(piece.length for piece in plan)
        if is_out_of_memory(error) and tokens > 1:
            self._good_steps = 0
            self.features.clear()
            self._limit(tokens // 2)
            if tokens // 2 < self._fewest_tokens:
                self._fewest_tokens = tokens // 2
                note(f"a step of {tokens:,} tokens ran out of memory: the next ones have {tokens // 2:,} at most")
            return []
        if len(plan) > 1:
            # Each alone, so that only the culprit fails; one that was preempted meanwhile waits for its next plan.
            return [s for piece in plan if piece.sequence in self.scheduler.running for s in self._run([piece])]
        self._failures_in_a_row += 1
        if self._failures_in_a_row >= FAILURES_IN_A_ROW:
            raise error
        return [self._fail(plan[0].sequence, "model_error", f"{type(error).__name__}: {error}")]

    def _limit(self, tokens: int) -> None:
        """From now on at most `tokens` a step (and sequences at a time); the youngest go back to the queue."""
        scheduler = self.scheduler
        scheduler.max_batch_tokens = min(tokens, self.config.max_batch_tokens)
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
        self._failures_in_a_row = 0
        self._good_steps += 1
        limit = self.scheduler.max_batch_tokens
        if limit < self.config.max_batch_tokens and self._good_steps >= GOOD_STEPS_TO_GROW:
            self._good_steps = 0
            self._limit(2 * limit)


def is_out_of_memory(error: BaseException) -> bool:
    """torch says it with OutOfMemoryError on devices, with a plain RuntimeError on the CPU."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)
