"""Which sequence computes how many tokens in the next step. Policy only: block counts are in blocks.py.

Sequences keep the order in which they came. A step first serves those that decode, then those still in their
prompt, oldest first, then admits new ones, until the token budget or the blocks run out. An older sequence that
lacks a block takes it from the youngest running one, which goes back to the head of the queue and will be
recomputed; the youngest itself just waits. So the oldest always moves on: no deadlock, nobody starves.
"""

from __future__ import annotations

from collections import deque

from batch.engine.blocks import BlockManager
from batch.engine.sequence import Piece, Sequence


class Scheduler:
    """`max_seqs` sequences at most run at a time; a step has at most `max_batch_tokens` ≥ max_seqs tokens.

    Every sequence added must fit into the pools alone (`BlockManager.fits_alone(max_len)`).
    """

    def __init__(self, blocks: BlockManager, max_seqs: int, max_batch_tokens: int) -> None:
        assert 0 < max_seqs <= max_batch_tokens, f"{max_seqs} sequences do not fit a step of {max_batch_tokens} tokens"
        self.blocks = blocks
        self.max_seqs = max_seqs
        self.max_batch_tokens = max_batch_tokens
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.num_preemptions = 0
        self._plan: dict[int, Piece] = {}
        self._budget = 0

    def add(self, sequence: Sequence) -> None:
        assert self.blocks.fits_alone(sequence.max_len), "this sequence can never fit"
        self.waiting.append(sequence)

    def schedule(self) -> list[Piece]:
        """The next step; empty only when nothing is left to do. Blocks for it are already held."""
        self._plan = {}
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
            self._admit()
        return list(self._plan.values())

    def finish(self, sequence: Sequence) -> None:
        """The sequence is over (or abandoned): its blocks are free again."""
        self.blocks.release(sequence.held)
        if sequence in self.running:
            self.running.remove(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)

    def preempt(self, sequence: Sequence) -> None:
        """Back to the head of the queue, without blocks; its tokens stay."""
        self.running.remove(sequence)
        self.blocks.release(sequence.held)
        sequence.num_computed = 0
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

    def _admit(self) -> None:
        """Start waiting sequences while the blocks for all known tokens of everyone running remain, and one spare
        block each: optimistic about output, so that memory is used, but not so that prompts push each other out."""
        free_full, free_chunked = self.blocks.full.num_free, self.blocks.chunked.num_free
        for sequence in self.running:
            need = self.blocks.need(len(sequence.tokens))
            free_full -= max(need.full - sequence.held.full.length, 0) + 1
            free_chunked -= max(need.chunked - sequence.held.chunked.length, 0) + 1
        while self.waiting and self._budget > 0 and len(self.running) < self.max_seqs:
            need = self.blocks.need(len(self.waiting[0].tokens))
            free_full -= need.full
            free_chunked -= need.chunked
            if self.running and min(free_full, free_chunked) < 0:
                break
            free_full -= 1
            free_chunked -= 1
            sequence = self.waiting.popleft()
            self.running.append(sequence)
            self._give_turn(sequence)
