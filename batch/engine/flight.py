"""A step between its launch and the moment when its tokens are read.

On a device the next step may be launched meanwhile (see `Scheduler.look_ahead`), so whoever was in this one may have
ended, or lost its blocks, before it lands.
"""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass

import torch

from batch.engine.logit_rules import apply_rules
from batch.engine.runner import Runner
from batch.engine.sampler import Draw, Drawing, draw
from batch.engine.scheduler import Scheduler
from batch.engine.sequence import Piece, Sequence
from batch.engine.stats import StepSeconds


@dataclass(frozen=True)
class Flight:
    """A step on the device whose tokens have not been read. `launching`: what that took, without the reading."""

    plan: list[Piece]
    drawing: Drawing
    launching: StepSeconds

    @property
    def tokens(self) -> torch.Tensor:
        """What was drawn, int64 [N], where it was drawn."""
        return self.drawing.tokens

    def live(self, scheduler: Scheduler) -> list[Piece]:
        """The pieces whose sequences run still, and are where the step found them."""
        return [piece for piece in self.plan if not piece.ahead or _is_live(piece, scheduler)]

    def land(self, live: list[Piece]) -> tuple[list[tuple[Sequence, Draw]], StepSeconds]:
        """Waits for the tokens: those of `live` pieces, and what the step took of the host's time."""
        began = time.perf_counter()
        draws = iter(self.drawing.result())
        found = [(piece, next(draws)) for piece in self.plan if piece.wants_logits]
        wanted = set(map(id, live))
        took = self.launching.and_sampling(time.perf_counter() - began)
        return [(piece.sequence, drew) for piece, drew in found if id(piece) in wanted], took


def launch(runner: Runner, plan: list[Piece], token_ids: torch.Tensor | None = None) -> Flight:
    """Compute a step and draw its tokens, without waiting for either where the device computes by itself. `token_ids`
    int64 [T]: the step's tokens, where the host does not know them yet."""
    drawing = [piece.sequence for piece in plan if piece.wants_logits]
    ahead = token_ids is not None
    times = [time.perf_counter()]
    step = runner.build(plan, token_ids)
    times.append(time.perf_counter())
    logits = runner.forward(step)  # float32 [N, V]
    times.append(time.perf_counter())
    steps = [s.num_generated + ahead for s in drawing]
    asked = apply_rules(logits, [s.rules for s in drawing], steps)
    drawn = draw(logits, [s.sampling for s in drawing], steps, asked)
    times.append(time.perf_counter())
    build_s, model_s, sample_s = (after - before for before, after in itertools.pairwise(times))
    return Flight(plan, drawn, StepSeconds(build_s, model_s, sample_s))


def _is_live(piece: Piece, scheduler: Scheduler) -> bool:
    return piece.sequence in scheduler.running and piece.sequence.num_computed == piece.start
