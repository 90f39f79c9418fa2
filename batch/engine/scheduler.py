"""Which sequence computes how many tokens in the next step. Policy only: block counts are in blocks.py.

Sequences run in the order in which they were admitted. A step first serves those that decode, then those still in
their prompt, oldest first, then admits new ones, until the token budget or the blocks run out. An older sequence that
lacks a block takes it from the youngest running one, which goes back to the head of the queue and will be
recomputed; the youngest itself just waits. So the oldest always moves on: no deadlock, nobody starves.

Who is admitted next is decided in a window at the head of the queue: whoever finds the most of its beginning in the
cache, before that is evicted; among equals whoever may take the most steps, so that a batch does not end with one long
answer that was begun last. A sequence that lacks a block which a running one is about to compute waits for it.

Nothing here is linear in the number of sequences per sequence: thousands may run and wait.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from itertools import islice

from batch.engine.blocks import NO_HIT, BlockManager, PrefixHit
from batch.engine.sequence import Piece, Sequence

WINDOW = 64  # waiting sequences that are looked at; also how many younger ones may be admitted before one
FIRST_TOKENS = 64  # `first_alone`: answers that may be longer than this do not run alone


class Scheduler:
    """`max_seqs` sequences at most run at a time; a step has at most `max_batch_tokens` ≥ max_seqs tokens.

    Every sequence added must fit into the pools alone (`BlockManager.fits_alone(max_len)`). `running` holds sequences
    in the order of their admission, `waiting` the queue, each with the tokens that it will have to compute as far as is
    known now. `admitted` are the sequences that the last `schedule` admitted.
    `first_alone`: before anything else runs, one sequence with a short answer does, so that a run has an early result.
    """

    def __init__(self, blocks: BlockManager, max_seqs: int, max_batch_tokens: int, first_alone: bool = False) -> None:
        assert 0 < max_seqs <= max_batch_tokens, f"{max_seqs} sequences do not fit a step of {max_batch_tokens} tokens"
        self.blocks = blocks
        self.max_seqs = max_seqs
        self.max_batch_tokens = max_batch_tokens
        self.waiting: OrderedDict[Sequence, int] = OrderedDict()
        self.running: dict[Sequence, None] = {}
        self.admitted: list[Sequence] = []
        self.num_preemptions = 0
        self.num_new_tokens = 0  # sum over `waiting`
        self._first_alone = first_alone
        self._first: Sequence | None = None  # runs alone
        self._plan: dict[int, Piece] = {}
        self._budget = 0
        self._left_waiting = 0  # after the last step was planned

    def add(self, sequence: Sequence) -> None:
        assert self.blocks.fits_alone(sequence.max_len), "this sequence can never fit"
        self.waiting[sequence] = 0
        self._look_up(sequence)

    @property
    def youngest(self) -> Sequence:
        """The running sequence that was admitted last."""
        return next(reversed(self.running))

    def schedule(self) -> list[Piece]:
        """The next step; empty only when nothing is left to do. Blocks for it are already held."""
        self._plan = {}
        self.admitted = []
        self._budget = self.max_batch_tokens
        preempted_before = self.num_preemptions
        decoding: list[Sequence] = []
        in_prompt: list[Sequence] = []
        for sequence in self.running:
            (decoding if sequence.num_left == 1 else in_prompt).append(sequence)
        for sequence in (*decoding, *in_prompt):
            if self._budget == 0:
                break
            if sequence in self.running:  # one that was preempted in this loop has lost its place, and with it its turn
                self._give_turn(sequence)
        if self.num_preemptions == preempted_before and self.waiting and self._may_admit():
            self._admit()
        self._left_waiting = len(self.waiting)
        return list(self._plan.values())

    def look_ahead(self, plan: list[Piece]) -> list[Piece]:
        """The step after `plan`, whose tokens are not known yet, where that can be no other than one more token of each
        running sequence, in blocks that they hold; else nothing, also where somebody has come who may be admitted."""
        if self.admitted or len(self.waiting) > self._left_waiting or len(plan) != len(self.running):
            return []
        ahead = [Piece(piece.sequence, piece.end, piece.end + 1, ahead=True) for piece in plan]
        return ahead if all(self._goes_on(piece) for piece in plan) else []

    def _goes_on(self, piece: Piece) -> bool:
        """One token, after which there is surely a next step, but for what the token itself may end."""
        sequence, end = piece.sequence, piece.end
        return (
            piece.length == 1 and piece.wants_logits and sequence.rules is None
            and end + 1 < sequence.max_len and self.blocks.holds(sequence.held, end, end + 1)
        )  # fmt: skip

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
            del self.running[sequence]
        elif sequence in self.waiting:
            self.num_new_tokens -= self.waiting.pop(sequence)

    def preempt(self, sequence: Sequence) -> None:
        """Back to the head of the queue, without blocks; its tokens stay."""
        del self.running[sequence]
        self.blocks.release(sequence.held)
        sequence.num_computed = sequence.num_cached = 0
        sequence.is_resumed = True
        self.waiting[sequence] = sequence.num_left
        self.waiting.move_to_end(sequence, last=False)
        self.num_new_tokens += sequence.num_left
        self.num_preemptions += 1
        lost = self._plan.pop(id(sequence), None)
        if lost is not None:
            self._budget += lost.length

    def _give_turn(self, sequence: Sequence) -> None:
        """Plan as many tokens as chunk, budget and blocks allow, preempting younger sequences for the first one."""
        start, held = sequence.num_computed, sequence.held
        end = start + min(sequence.num_left, self._budget)
        if not self.blocks.holds(held, start, end):
            self.blocks.enter_chunk(held, start)
            while (room := self.blocks.room(held, start)) <= 0:
                youngest = self.youngest
                if youngest is sequence:
                    return
                self.preempt(youngest)
            end = start + min(sequence.num_left, self._budget, room)
            self.blocks.grow(held, end)
        self._plan[id(sequence)] = Piece(sequence, start, end)
        self._budget -= end - start

    # -- admission

    def _may_admit(self) -> bool:
        return self._budget > 0 and len(self.running) < (1 if self._first in self.running else self.max_seqs)

    def _admit(self) -> None:
        """Start waiting sequences while the blocks for all known tokens of everyone running remain, and one spare
        block each: optimistic about output, so that memory is used, but not so that prompts push each other out."""
        room = _Room(self.blocks.full.num_free, self.blocks.chunked.num_free)
        for sequence in self.running:
            room.take(*self.blocks.lacking(sequence.held, len(sequence.tokens)), self._spare(sequence))
        in_progress = {key for sequence in self.running for key in self._coming_keys(sequence)}
        while self.waiting and self._may_admit():
            window = list(islice(self.waiting, WINDOW))
            if self._first_alone:
                self._first_alone, self._first = False, self._quickest(window)
            started = self._admit_from(window, room, in_progress)
            self._count_passed_over(window, started)
            if len(started) < len(window):
                break  # else all that were looked at run now, and a large step may have room for the next

    def _admit_from(self, window: list[Sequence], room: _Room, in_progress: set[bytes]) -> set[Sequence]:
        """Start those of the window that may; returns them."""
        started: set[Sequence] = set()
        for sequence in self._by_preference(window):
            if not self._may_admit():
                break
            hit = self._look_up(sequence)  # again: the blocks of those admitted meanwhile may have been taken from it
            if self._should_wait(sequence, in_progress):
                continue
            need = self.blocks.need_after(hit, len(sequence.tokens))
            if self.running and not room.has(need.full, need.chunked):
                break
            room.take(need.full, need.chunked, self._spare(sequence))
            self._start(sequence, hit)
            started.add(sequence)
            in_progress.update(self._coming_keys(sequence))
        return started

    def _spare(self, sequence: Sequence) -> int:
        """Chunked blocks to keep free for it: one, unless it needs a whole chunk already and so never more."""
        whole = self.blocks.chunk_size // self.blocks.block_size
        return int(self.blocks.need(len(sequence.tokens)).chunked < whole)

    def _start(self, sequence: Sequence, hit: PrefixHit) -> None:
        self.num_new_tokens -= self.waiting.pop(sequence)
        self.running[sequence] = None
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
        to_compute = sequence.num_left - sequence.num_cached
        self.num_new_tokens += to_compute - self.waiting[sequence]
        self.waiting[sequence] = to_compute
        return hit

    def _by_preference(self, window: list[Sequence]) -> list[Sequence]:
        """Those that have waited enough, in order; then those with the longest cached beginning, of these the ones that
        may take the most steps, oldest first."""
        for sequence in window:
            self._look_up(sequence)
        return sorted(window, key=self._preference)

    def _preference(self, sequence: Sequence) -> tuple[int, int, float]:
        """The smallest is admitted first."""
        if sequence is self._first or self._is_urgent(sequence):
            return (0 if sequence is self._first else 1, 0, 0)
        return (2, -sequence.num_cached, -self._most_steps(sequence))

    def _most_steps(self, sequence: Sequence) -> float:
        """Steps that it takes at most: one for each token to be drawn, and its share of those that compute prompts."""
        return sequence.max_len - len(sequence.tokens) + sequence.num_left / self.max_batch_tokens

    def _quickest(self, window: list[Sequence]) -> Sequence | None:
        """Whoever is over first, where that is soon."""
        first = min(window, key=self._most_steps)
        return first if first.max_len - first.prompt_len <= FIRST_TOKENS else None

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

    def _count_passed_over(self, window: list[Sequence], started: set[Sequence]) -> None:
        younger = 0
        for sequence in reversed(window):
            if sequence in started:
                younger += 1
            else:
                sequence.passed_over += younger


@dataclass
class _Room:
    """Free blocks that are not spoken for."""

    full: int
    chunked: int

    def has(self, full: int, chunked: int) -> bool:
        return full <= self.full and chunked <= self.chunked

    def take(self, full: int, chunked: int, spare_chunked: int) -> None:
        """These, and a spare block of each kind."""
        self.full -= full + 1
        self.chunked -= chunked + spare_chunked
