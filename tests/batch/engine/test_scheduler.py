"""Scheduling policy on real block pools, without a model: a "step" books what was planned and appends a token."""

import time

from hypothesis import given, settings
from hypothesis import strategies as st

from batch.engine.blocks import BlockManager
from batch.engine.scheduler import FIRST_TOKENS, WINDOW, Scheduler
from batch.engine.sequence import Sequence
from batch.requests import SamplingParams

BLOCK, CHUNK = 8, 32


def make_sequence(name, prompt_len, max_tokens):
    sampling = SamplingParams(max_tokens=max_tokens)
    tokens = [1] * prompt_len
    return Sequence(name, tokens, prompt_len, sampling, prompt_len + max_tokens, stop_ids=frozenset())


def make_scheduler(full=64, chunked=64, max_seqs=8, max_batch_tokens=40, first_alone=False):
    return Scheduler(BlockManager(full, chunked, BLOCK, CHUNK), max_seqs, max_batch_tokens, first_alone)


def book(scheduler, plan):
    """What the engine does after a step."""
    for piece in plan:
        assert piece.start == piece.sequence.num_computed
        piece.sequence.num_computed = piece.end
        if piece.wants_logits:
            piece.sequence.append(2, None)
        if piece.sequence.is_over:
            scheduler.finish(piece.sequence)


def check_plan(scheduler, plan):
    """The promises that the model relies on."""
    assert 0 < sum(piece.length for piece in plan) <= scheduler.max_batch_tokens
    assert len({id(piece.sequence) for piece in plan}) == len(plan)
    assert len(scheduler.running) <= scheduler.max_seqs
    for piece in plan:
        assert piece.sequence in scheduler.running
        assert piece.length > 0 and piece.start // CHUNK == (piece.end - 1) // CHUNK
        held = piece.sequence.held
        assert held.chunk_start == piece.start // CHUNK * CHUNK
        assert held.full.length == -(-piece.end // BLOCK)
        assert held.chunked.length == -(-(piece.end - held.chunk_start) // BLOCK) <= CHUNK // BLOCK


def check_blocks(scheduler):
    """Every block is free or in exactly one table; waiting sequences hold none."""
    for kind in ("full", "chunked"):
        pool = getattr(scheduler.blocks, kind)
        held = [b for s in scheduler.running for b in getattr(s.held, kind).ids.tolist()]
        assert len(held) == len(set(held)) == pool.num_used
        assert sorted(held + pool._free) == list(range(pool.num_blocks))
        assert all(getattr(s.held, kind).length == 0 for s in scheduler.waiting)


def test_a_large_step_is_filled_at_once():
    """However many wait: where weights come from disk, a step that is not full costs as much as a full one."""
    scheduler = make_scheduler(full=1024, chunked=1024, max_seqs=500, max_batch_tokens=4000)
    for name in range(300):
        scheduler.add(make_sequence(name, 10, 3))
    plan = scheduler.schedule()
    check_plan(scheduler, plan)
    assert len(plan) == 300 and len(scheduler.admitted) == 300 and not scheduler.waiting


def test_decodes_come_first_and_the_rest_of_the_budget_is_prefill():
    scheduler = make_scheduler(max_batch_tokens=20)
    short, long = make_sequence("short", 4, 9), make_sequence("long", 50, 5)
    scheduler.add(short)
    scheduler.add(long)
    first = scheduler.schedule()
    assert [(p.sequence.handle, p.start, p.end) for p in first] == [("short", 0, 4), ("long", 0, 16)]
    book(scheduler, first)
    second = scheduler.schedule()
    # One decode token, then the prompt up to the chunk's end at 32.
    assert [(p.sequence.handle, p.start, p.end) for p in second] == [("short", 4, 5), ("long", 16, 32)]
    book(scheduler, second)
    assert [(p.start, p.end) for p in scheduler.schedule()] == [(5, 6), (32, 50)]


def test_the_oldest_takes_blocks_from_the_youngest_which_starts_again_with_its_output():
    scheduler = make_scheduler(full=4, chunked=4)
    sequences = [make_sequence(i, 7, 20) for i in range(2)]
    for sequence in sequences:
        scheduler.add(sequence)
    tokens_when_preempted = None
    while scheduler.running or scheduler.waiting:
        plan = scheduler.schedule()
        check_plan(scheduler, plan)
        check_blocks(scheduler)
        if scheduler.num_preemptions and tokens_when_preempted is None:
            assert list(scheduler.waiting) == [sequences[1]] and sequences[1].num_computed == 0
            tokens_when_preempted = len(sequences[1].tokens)
        book(scheduler, plan)
    assert tokens_when_preempted > 7
    assert [s.num_generated for s in sequences] == [20, 20]
    assert scheduler.num_preemptions == 1


def test_admission_leaves_room_for_prompts_already_running():
    scheduler = make_scheduler(full=10, chunked=10, max_batch_tokens=8)
    for i in range(3):
        scheduler.add(make_sequence(i, 32, 2))
    # A prompt of 4 blocks and a spare one each: two of them fill 10 blocks, however small the first pieces are.
    running = []
    for _ in range(9):
        book(scheduler, scheduler.schedule())
        running.append([s.handle for s in scheduler.running])
    assert running == [[0]] * 4 + [[1]] * 4 + [[1, 2]] and scheduler.num_preemptions == 0


def steps_of(answers, max_seqs=4):
    """Steps that answers of these lengths take in all, and the order in which they began."""
    scheduler = make_scheduler(1024, 1024, max_seqs, max_batch_tokens=64)
    for name, length in enumerate(answers):
        scheduler.add(make_sequence(name, 8, length))
    steps, began = 0, []
    while scheduler.running or scheduler.waiting:
        book(scheduler, scheduler.schedule())
        began += [s.handle for s in scheduler.admitted]
        steps += 1
    return steps, began


def test_as_many_run_as_have_a_whole_chunk_each():
    """A sequence of more than a chunk never needs more chunked blocks: none is kept free for it."""
    scheduler = make_scheduler(full=1000, chunked=5 * CHUNK // BLOCK, max_seqs=5, max_batch_tokens=500)
    for name in range(5):
        scheduler.add(make_sequence(name, 2 * CHUNK + 3, 9))
    scheduler.schedule()
    assert len(scheduler.running) == 5
    short = make_scheduler(full=1000, chunked=5, max_seqs=5, max_batch_tokens=500)
    for name in range(5):
        short.add(make_sequence(name, 3, 9))
    short.schedule()
    assert len(short.running) == 3  # five blocks: two for each of two, the one it needs and the next, and one more


def test_a_long_answer_does_not_begin_last():
    # 15 short answers, then a long one: in input order it would run alone for most of its steps.
    steps, began = steps_of([10] * 15 + [40])
    assert began[0] == 15
    assert steps == 50  # 190 tokens in four places take 48 at least; the 15 short ones take five turns of three places


def test_a_line_in_a_stream_of_longer_ones_is_passed_over_only_so_often():
    _, began = steps_of([5] + [6] * (3 * WINDOW), max_seqs=2)
    assert began.index(0) == WINDOW


def test_the_first_answer_comes_before_others_take_its_time():
    scheduler = make_scheduler(first_alone=True)
    for name, tokens in enumerate((20, 6, 30)):
        scheduler.add(make_sequence(name, 8, tokens))
    steps = []
    while scheduler.running or scheduler.waiting:
        plan = scheduler.schedule()
        check_plan(scheduler, plan)
        steps.append(sorted(p.sequence.handle for p in plan))
        book(scheduler, plan)
    assert steps[:7] == [[1]] * 6 + [[0, 2]]
    long = make_scheduler(first_alone=True)
    for name in range(2):
        long.add(make_sequence(name, 8, FIRST_TOKENS + 1))
    assert len(long.schedule()) == 2  # an answer that may be long would keep the others waiting


def test_the_cost_of_a_step_does_not_grow_with_the_square_of_the_sequences():
    def seconds_per_sequence(count):
        scheduler = make_scheduler(8 * count, 8 * count, count, max_batch_tokens=16 * count)
        for name in range(count):
            scheduler.add(make_sequence(name, 8, 3))
        began = time.process_time()
        while scheduler.running or scheduler.waiting:
            book(scheduler, scheduler.schedule())
        return (time.process_time() - began) / count

    few, many = min(seconds_per_sequence(500) for _ in range(3)), min(seconds_per_sequence(8000) for _ in range(2))
    assert many < 4 * few


@st.composite
def workloads(draw):
    max_seqs = draw(st.integers(1, 6))
    full, chunked = draw(st.integers(1, 24)), draw(st.integers(1, 12))
    scheduler = make_scheduler(full, chunked, max_seqs, draw(st.integers(max_seqs, 64)), draw(st.booleans()))
    longest = min(full * BLOCK, 10**9 if chunked * BLOCK >= CHUNK else chunked * BLOCK)
    sequences = []
    for name in range(draw(st.integers(1, 12))):
        total = draw(st.integers(2, max(2, longest)))
        prompt = draw(st.integers(1, total - 1))
        sequences.append(make_sequence(name, prompt, total - prompt))
    arrivals = draw(st.lists(st.integers(0, 30), min_size=len(sequences), max_size=len(sequences)))
    return scheduler, sorted(zip(arrivals, sequences, strict=True), key=lambda pair: pair[0])


@settings(max_examples=200, deadline=None)
@given(workloads())
def test_every_workload_finishes_and_blocks_are_conserved(workload):
    scheduler, arrivals = workload
    total = sum(s.max_len for _, s in arrivals)
    arrived, step = [], 0
    while arrivals or scheduler.running or scheduler.waiting:
        while arrivals and (arrivals[0][0] <= step or not (scheduler.running or scheduler.waiting)):
            arrived.append(arrivals.pop(0)[1])
            scheduler.add(arrived[-1])
        oldest = next(iter(scheduler.running), None)
        before = oldest and (len(oldest.tokens), oldest.num_computed)
        plan = scheduler.schedule()
        check_plan(scheduler, plan)
        check_blocks(scheduler)
        book(scheduler, plan)
        # Whoever was admitted first moves on in every step: that is why nothing can hang.
        assert oldest is None or (len(oldest.tokens), oldest.num_computed) > before
        assert all(s.passed_over < 2 * WINDOW for s in scheduler.waiting)
        step += 1
        assert step <= 4 * total * 12
    assert all(s.finish_reason == "length" and len(s.tokens) == s.max_len for s in arrived)
    assert scheduler.blocks.full.num_used == scheduler.blocks.chunked.num_used == 0


@settings(max_examples=30, deadline=None)
@given(workloads(), st.randoms())
def test_sequences_may_be_ended_or_preempted_from_outside_at_any_time(workload, random):
    scheduler, arrivals = workload
    for _, sequence in arrivals:
        scheduler.add(sequence)
    while scheduler.running or scheduler.waiting:
        plan = scheduler.schedule()
        book(scheduler, plan)
        if len(scheduler.running) > 1 and random.random() < 0.2:
            scheduler.preempt(scheduler.youngest)
        live = [*scheduler.running, *scheduler.waiting]
        if live and random.random() < 0.2:
            scheduler.finish(random.choice(live))
        check_blocks(scheduler)
