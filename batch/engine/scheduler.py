"""Which sequence computes how many tokens in the next step. Policy only: block counts are in blocks.py.

Sequences run in the order in which they were admitted. A step first serves those that decode, then those still in
their prompt, oldest first, then admits new ones, until the token budget or the blocks run out. An older sequence that
lacks a block takes it from the youngest running one, which goes back to the head of the queue and will be
recomputed; the youngest itself just waits. So the oldest always moves on: no deadlock, nobody starves.

Who is admitted next is decided in a window at the head of the queue: whoever finds the most of its beginning in the
cache, before that is evicted. A sequence that lacks a block which a running one is about to compute waits for it.
"""

from __future__ import annotations

from collections import deque
from itertools import islice

from batch.engine.blocks import NO_HIT, BlockManager, PrefixHit
from batch.engine.sequence import Piece, Sequence

WINDOW = 64  # waiting sequences that are looked at; also how many younger ones may be admitted before one


class Scheduler:
    """`max_seqs` sequences at most run at a time; a step has at most `max_batch_tokens` ≥ max_seqs tokens.

    Every sequence added must fit into the pools alone (`BlockManager.fits_alone(max_len)`).
    `admitted` are the sequences that the last `schedule` admitted.
    """

    def __init__(self, blocks: BlockManager, max_seqs: int, max_batch_tokens: int) -> None:
        assert 0 < max_seqs <= max_batch_tokens, f"{max_seqs} sequences do not fit a step of {max_batch_tokens} tokens"
        self.blocks = blocks
        self.max_seqs = max_seqs
        self.max_batch_tokens = max_batch_tokens
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.admitted: list[Sequence] = []
        self.num_preemptions = 0
        self._plan: dict[int, Piece] = {}
        self._budget = 0

    def add(self, sequence: Sequence) -> None:
        assert self.blocks.fits_alone(sequence.max_len), "this sequence can never fit"
        self._look_up(sequence)
        self.waiting.append(sequence)

    @property
    def num_new_tokens(self) -> int:
        """Tokens that waiting sequences will have to compute, as far as is known now."""
        return sum(s.num_left - s.num_cached for s in self.waiting)

    def schedule(self) -> list[Piece]:
        """The next step; empty only when nothing is left to do. Blocks for it are already held."""
        self._plan = {}
        self.admitted = []
        self._budget = self.max_batch_tokens
        preempted_before = self.num_preemptions
        for decoding in (True, False):
            for sequence in list(self.running):
                if self._budget == 0:
                    break
                # A sequence preempted in this loop has lost its place, and with it its turn.
                if (sequence.num_left == 1) == decoding and sequence in self.running:
                    self._give_turn(sequence)
        if self.num_preemptions == preempted_before:
            while self.waiting and self._may_admit() and self._admit():
                pass  # all that were looked at run now: a large step has room for the next
        return list(self._plan.values())

    def book(self, piece: Piece) -> None:
        """The piece was computed; the blocks that it completed can be shared from now on."""
        sequence = piece.sequence
        sequence.num_computed = piece.end
        if sequence.keys is not None and piece.end // self.blocks.block_size > piece.start // self.blocks.block_size:
            self.blocks.publish(sequence.held, sequence.block_keys, piece.start, piece.end)

    def finish(self, sequence: Sequence) -> None:
        """The sequence is over (or abandoned): its blocks are free again. Those of its prompt stay findable, unless
        it failed: then none that it computed itself."""
        keep = sequence.prompt_len if sequence.error is None else sequence.num_cached
        self.blocks.release(sequence.held, keep)
        if sequence in self.running:
            self.running.remove(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)

    def preempt(self, sequence: Sequence) -> None:
        """Back to the head of the queue, without blocks; its tokens stay."""
        self.running.remove(sequence)
        self.blocks.release(sequence.held)
        sequence.num_computed = sequence.num_cached = 0
        sequence.is_resumed = True
        self.waiting.appendleft(sequence)
        self.num_preemptions += 1
        lost = self._plan.pop(id(sequence), None)
        if lost is not None:
            self._budget += lost.length

    def _give_turn(self, sequence: Sequence) -> None:
        """Plan as many tokens as chunk, budget and blocks allow, preempting younger sequences for the first one."""
        start = sequence.num_computed
        self.blocks.enter_chunk(sequence.held, start)
        while (room := self.blocks.room(sequence.held, start)) <= 0:
            youngest = self.running[-1]
            if youngest is sequence:
                return
            self.preempt(youngest)
        end = start + min(sequence.num_left, self._budget, room)
        self.blocks.grow(sequence.held, end)
        self._plan[id(sequence)] = Piece(sequence, start, end)
        self._budget -= end - start

    # -- admission

    def _may_admit(self) -> bool:
        return self._budget > 0 and len(self.running) < self.max_seqs

    def _admit(self) -> bool:
        """Start waiting sequences while the blocks for all known tokens of everyone running remain, and one spare
        block each: optimistic about output, so that memory is used, but not so that prompts push each other out.
        True: all of the window were started."""
        admitted_before = len(self.admitted)
        free_full, free_chunked = self.blocks.full.num_free, self.blocks.chunked.num_free
        for sequence in self.running:
            need = self.blocks.need(len(sequence.tokens))
            free_full -= max(need.full - sequence.held.full.length, 0) + 1
            free_chunked -= max(need.chunked - sequence.held.chunked.length, 0) + 1
        window = list(islice(self.waiting, WINDOW))
        in_progress = {key for sequence in self.running for key in self._coming_keys(sequence)}
        for sequence in self._by_preference(window):
            if not self._may_admit():
                break
            hit = self._look_up(sequence)  # again: the blocks of those admitted meanwhile may have been taken from it
            if self._should_wait(sequence, in_progress):
                continue
            need = self.blocks.need_after(hit, len(sequence.tokens))
            free_full -= need.full
            free_chunked -= need.chunked
            if self.running and min(free_full, free_chunked) < 0:
                break
            free_full -= 1
            free_chunked -= 1
            self._start(sequence, hit)
            in_progress.update(self._coming_keys(sequence))
        self._count_passed_over(window)
        return len(self.admitted) - admitted_before == len(window)

    def _start(self, sequence: Sequence, hit: PrefixHit) -> None:
        self.waiting.remove(sequence)
        self.running.append(sequence)
        self.admitted.append(sequence)
        self.blocks.adopt(sequence.held, hit)
        sequence.num_computed = hit.num_tokens
        self._give_turn(sequence)

    def _look_up(self, sequence: Sequence) -> PrefixHit:
        """What the cache has of it, in whole blocks; its last token must be computed, to know what comes next."""
        hit = NO_HIT
        if sequence.keys is not None:
            hit = self.blocks.find_prefix(sequence.block_keys, len(sequence.tokens) - 1)
        sequence.num_cached = hit.num_tokens
        return hit

    def _by_preference(self, window: list[Sequence]) -> list[Sequence]:
        """Those that have waited enough, in order; then those with the longest cached beginning, oldest first."""
        for sequence in window:
            self._look_up(sequence)
        return sorted(window, key=lambda s: (not self._is_urgent(s), 0 if self._is_urgent(s) else -s.num_cached))

    def _is_urgent(self, sequence: Sequence) -> bool:
        return sequence.is_resumed or sequence.passed_over >= WINDOW

    def _coming_keys(self, sequence: Sequence) -> list[bytes]:
        """Keys of the blocks that a running sequence's prefill has still to compute."""
        if sequence.num_left == 1:
            return []
        return sequence.block_keys[sequence.num_computed // self.blocks.block_size :]

    def _should_wait(self, sequence: Sequence, in_progress: set[bytes]) -> bool:
        """The first block that it lacks is on its way."""
        place = sequence.num_cached // self.blocks.block_size
        if self._is_urgent(sequence) or (place + 1) * self.blocks.block_size >= len(sequence.tokens):
            return False
        return bool(in_progress) and sequence.block_keys[place] in in_progress

    def _count_passed_over(self, window: list[Sequence]) -> None:
        started, younger = set(map(id, self.admitted)), 0
        for sequence in reversed(window):
            if id(sequence) in started:
                younger += 1
            else:
                sequence.passed_over += younger
