"""Teacher-forced scoring: what one or two models make of tokens that are given, position by position.

All models take the same steps: the same pieces of the same sequences, each on its own KV cache, so that their logits
for a position are there together, are compared, and are dropped. The engines must be idle; their blocks are used, and
what their caches know of a prompt is not computed again, up to the first position that is scored.

Legend: M models, N scored rows of a step, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from batch.engine.blocks import PrefixHit
from batch.engine.engine import Engine
from batch.engine.failures import StepLimit, is_out_of_memory, raise_unless_theirs
from batch.engine.runner import ImageEncodingError
from batch.engine.sequence import Piece
from batch.engine.sequence import Sequence as EngineSequence
from batch.engine.token_scores import kl_bin, score_rows
from batch.kernels.transfer import send
from batch.requests import ImageTiles, TokenScores

LOGITS_BYTES = 256 << 20  # of all models' logits at a time


@dataclass(frozen=True)
class Target:
    """Tokens of which those from `score_from` ≥ 1 on are scored, each after all before it."""

    tokens: list[int]
    score_from: int
    images: tuple[ImageTiles, ...] = ()


@dataclass(eq=False)
class Scored:
    """A target on its way: one sequence for each model. When it is over it has all its scores, or an `error` (code,
    message, place of the model that it comes from)."""

    target: Target
    sequences: list[EngineSequence] = field(default_factory=list)
    scores: TokenScores = field(default_factory=TokenScores)
    error: tuple[str, str, int] | None = None

    @property
    def num_computed(self) -> int:
        return self.sequences[0].num_computed

    @property
    def is_over(self) -> bool:
        return self.error is not None or self.num_computed == len(self.sequences[0].tokens)


@dataclass(frozen=True)
class _Turn:
    """Tokens start … end - 1 of one target, in every model."""

    scored: Scored
    start: int
    end: int


class Scorer:
    """Scores targets with the models of idle engines; the first engine's limits hold for all."""

    def __init__(self, engines: Sequence[Engine]) -> None:
        self.engines = engines
        self._step_limit = StepLimit(min(engine.config.max_batch_tokens for engine in engines))
        self.max_seqs = min(engine.config.max_seqs for engine in engines)
        size = engines[0].model.arch.text.vocab_size
        self.max_rows = max(1, LOGITS_BYTES // (4 * size * len(engines)))
        self._running: list[Scored] = []
        self._waiting: list[Scored] = []
        self._place = 0  # of the model that computes

    def run(self, targets: Sequence[Target]) -> Iterator[tuple[int, Scored]]:
        """(place, result) of each target, in the order in which they end."""
        assert not any(engine.has_work for engine in self.engines), "an engine is at work"
        all_of_them = [self._prepare(target) for target in targets]  # first: pools may be divided anew by it
        places = {id(scored): place for place, scored in enumerate(all_of_them)}
        self._running, self._waiting = [], [scored for scored in all_of_them if scored.error is None]
        yield from ((places[id(scored)], scored) for scored in all_of_them if scored.error is not None)
        try:
            while self._running or self._waiting:
                for scored in self._step(self._plan()):
                    yield places[id(scored)], scored
        finally:
            for scored in self._running:
                self._release(scored)
            self._running = []

    def _prepare(self, target: Target) -> Scored:
        scored = Scored(target)
        scored.scores.nll = [0.0] * len(self.engines)
        for place, engine in enumerate(self.engines):
            # What follows the last token is nobody's question.
            sequence = engine.scored(scored, target.tokens[:-1], target.score_from, target.images)
            scored.sequences.append(sequence)
            if sequence.error is not None:
                scored.error = (*sequence.error, place)
                break
        return scored

    # -- what the next step does

    def _plan(self) -> list[_Turn]:
        """Those that run go on, the oldest first, then others begin while blocks for all of them remain."""
        turns = self._go_on()
        while self._running and not turns:  # they hold each other's blocks: the oldest, alone, always moves on
            self._give_up(self._running[-1])
            turns = self._go_on()
        budget = self._step_limit.tokens - sum(turn.end - turn.start for turn in turns)
        rooms = [self._room(place) for place in range(len(self.engines))]
        while self._waiting and budget and len(self._running) < self.max_seqs:
            hits = self._hits(self._waiting[0])
            if not self._fits(self._waiting[0], hits, rooms) and self._running:
                break
            turn = self._start(self._waiting.pop(0), hits, budget)
            if turn is None:
                break
            turns.append(turn)
            budget -= turn.end - turn.start
        assert turns, "nothing to do"
        return turns

    def _go_on(self) -> list[_Turn]:
        budget, turns = self._step_limit.tokens, []
        for scored in self._running:
            if budget and (turn := self._turn(scored, budget)) is not None:
                turns.append(turn)
                budget -= turn.end - turn.start
        return turns

    def _start(self, scored: Scored, hits: list[PrefixHit], budget: int) -> _Turn | None:
        """Let it run, with what the caches have of it."""
        self._running.append(scored)
        for engine, sequence, hit in zip(self.engines, scored.sequences, hits, strict=True):
            engine.blocks.adopt(sequence.held, hit)
            sequence.num_computed = sequence.num_cached = hit.num_tokens
        return self._turn(scored, budget)

    def _turn(self, scored: Scored, budget: int) -> _Turn | None:
        """As many tokens as budget, chunks and blocks of every model allow; None where that is none."""
        start = scored.num_computed
        end = min(start + budget, len(scored.sequences[0].tokens))
        for engine, sequence in zip(self.engines, scored.sequences, strict=True):
            engine.blocks.enter_chunk(sequence.held, start)
            end = min(end, start + engine.blocks.room(sequence.held, start))
        if end <= start:
            return None
        for engine, sequence in zip(self.engines, scored.sequences, strict=True):
            engine.blocks.grow(sequence.held, end)
        return _Turn(scored, start, end)

    def _hits(self, scored: Scored) -> list[PrefixHit]:
        """The same number of cached tokens in every model, none of them at a position whose logits are wanted."""
        most = scored.target.score_from - 1
        while True:
            hits = [
                engine.blocks.find_prefix(sequence.block_keys, most)
                for engine, sequence in zip(self.engines, scored.sequences, strict=True)
            ]
            shortest = min(hit.num_tokens for hit in hits)
            if all(hit.num_tokens == shortest for hit in hits):
                return hits
            most = shortest

    def _room(self, place: int) -> list[int]:
        """Blocks of one model (full, chunked) that no running target will need."""
        blocks = self.engines[place].blocks
        lacking = [blocks.lacking(s.sequences[place].held, len(s.sequences[place].tokens)) for s in self._running]
        return [
            blocks.full.num_free - sum(full for full, _ in lacking),
            blocks.chunked.num_free - sum(chunked for _, chunked in lacking),
        ]

    def _fits(self, scored: Scored, hits: list[PrefixHit], rooms: list[list[int]]) -> bool:
        """Whether there are blocks for it in `rooms`; then it takes them there."""
        needs = [
            engine.blocks.need_after(hit, len(sequence.tokens))
            for engine, sequence, hit in zip(self.engines, scored.sequences, hits, strict=True)
        ]
        if any(need.full > room[0] or need.chunked > room[1] for need, room in zip(needs, rooms, strict=True)):
            return False
        for need, room in zip(needs, rooms, strict=True):
            room[0] -= need.full
            room[1] -= need.chunked
        return True

    def _give_up(self, scored: Scored) -> None:
        """Back to the head of the queue, with nothing."""
        self._release(scored)
        self._running.remove(scored)
        scored.scores = TokenScores(nll=[0.0] * len(self.engines))
        for sequence in scored.sequences:
            sequence.num_computed = 0
        self._waiting.insert(0, scored)

    def _release(self, scored: Scored) -> None:
        """Its blocks are free; those of its prompt stay findable, unless it failed."""
        for engine, sequence in zip(self.engines, scored.sequences, strict=True):
            keep = sequence.num_cached if scored.error is not None else scored.target.score_from
            engine.blocks.release(sequence.held, keep)

    # -- the step

    def _step(self, turns: list[_Turn]) -> list[Scored]:
        """Run them; returns those that are over."""
        try:
            found = self._compute(turns)
        except Exception as error:
            return self._recover(turns, error)
        self._step_limit.went_well()
        over, first = [], 0
        for turn, pieces in zip(turns, self._pieces(turns), strict=True):
            count = pieces[0].end - pieces[0].logits_from
            self._add(turn.scored, *(part[..., first : first + count] for part in found))
            first += count
            for engine, piece in zip(self.engines, pieces, strict=True):
                engine.scheduler.book(piece)
                if piece.sequence.images is not None:
                    piece.sequence.images.forget(piece.end)
            if turn.scored.is_over:
                over.append(self._end(turn.scored))
        return over

    def _compute(self, turns: list[_Turn]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """nll float64 [M, N], KL float64 [N] and same_top bool [N] of the rows that the turns want, in their order."""
        pieces = self._pieces(turns)
        rows = []
        for place, engine in enumerate(self.engines):
            self._place = place
            step = engine.runner.build([each[place] for each in pieces])
            rows.append(engine.runner.rows(step))
        wanted = [
            token
            for turn, each in zip(turns, pieces, strict=True)
            for token in turn.scored.target.tokens[each[0].logits_from + 1 : turn.end + 1]
        ]
        (targets,) = send([torch.tensor(wanted, dtype=torch.int64)], rows[0].hidden.device)  # [N]
        nll, kl = np.empty((len(rows), len(wanted))), np.empty(len(wanted))
        same = np.empty(len(wanted), np.bool_)
        for first in range(0, len(wanted), self.max_rows):
            part = slice(first, first + self.max_rows)
            scores = score_rows([each.exact(part) for each in rows], targets[part])
            nll[:, part], kl[part], same[part] = scores.nll, scores.kl, scores.same_top
        return nll, kl, same

    def _pieces(self, turns: list[_Turn]) -> list[list[Piece]]:
        """Of each turn, one piece for each model."""
        return [[Piece(sequence, turn.start, turn.end) for sequence in turn.scored.sequences] for turn in turns]

    def _add(self, scored: Scored, nll: np.ndarray, kl: np.ndarray, same: np.ndarray) -> None:
        if not (np.isfinite(nll).all() and np.isfinite(kl).all()):
            bad = int(np.flatnonzero(~np.isfinite(nll).all(axis=1))[0]) if not np.isfinite(nll).all() else 0
            scored.error = ("model_error", "the model's output is not finite (NaN or infinity)", bad)
            return
        scores = scored.scores
        scores.tokens += nll.shape[1]
        scores.nll = [before + float(more.sum()) for before, more in zip(scores.nll, nll, strict=True)]
        if len(self.engines) > 1 and len(kl):
            scores.kl += float(kl.sum())
            scores.kl_max = max(scores.kl_max, float(kl.max()))
            scores.kl_bins.update(map(kl_bin, kl.tolist()))
            scores.same_top += int(same.sum())

    def _end(self, scored: Scored) -> Scored:
        self._release(scored)
        self._running.remove(scored)
        for sequence in scored.sequences:
            sequence.images = None
        return scored

    def _recover(self, turns: list[_Turn], error: Exception) -> list[Scored]:
        """A step failed; nothing of it was booked, so it can be repeated smaller. As the engine does it."""
        raise_unless_theirs(error)
        if isinstance(error, ImageEncodingError):
            (scored,) = (t.scored for t in turns if error.sequence in t.scored.sequences)
            place = scored.sequences.index(error.sequence)
            scored.error = ("image_error", f"encoding the images failed: {error}", place)
            return [self._end(scored)]
        tokens = sum(turn.end - turn.start for turn in turns)
        if is_out_of_memory(error) and tokens > 1:
            self._step_limit.halve(tokens)
            return []
        if len(turns) > 1:
            return [scored for turn in turns for scored in self._step([turn])]
        self._step_limit.failed(error)
        scored = turns[0].scored
        scored.error = ("model_error", f"{type(error).__name__}: {error}", self._place)
        return [self._end(scored)]
