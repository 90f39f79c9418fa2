"""The sampler against transformers' logits processors, the exact distribution, and itself in other company."""

import itertools
import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from batch.engine import sampler
from batch.engine.sampler import derive_seed, draw, keep_mask
from batch.requests import SamplingParams


def params(**fields):
    return SamplingParams(max_tokens=1, **fields)


def reference_kept(logits, p):
    """Which tokens transformers leaves in the game."""
    chain = LogitsProcessorList([TemperatureLogitsWarper(p.temperature)])
    if p.top_k:
        chain.append(TopKLogitsWarper(p.top_k))
    if p.top_p < 1:
        chain.append(TopPLogitsWarper(p.top_p))
    if p.min_p > 0:
        chain.append(MinPLogitsWarper(p.min_p))
    return chain(torch.zeros(1, 1, dtype=torch.long), logits[None].clone())[0] > -math.inf


filters = st.fixed_dictionaries({
    "temperature": st.sampled_from([0.3, 0.7, 1.0, 1.7]),
    "top_k": st.sampled_from([0, 1, 3, 20, 1000, 5000]),
    "top_p": st.sampled_from([1.0, 0.05, 0.5, 0.9, 0.997]),
    "min_p": st.sampled_from([0.0, 0.02, 0.3]),
})  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32), scale=st.sampled_from([0.1, 1.0, 4.0]), chosen=filters)
def test_kept_tokens_are_those_of_transformers(seed, scale, chosen):
    logits = torch.randn(1500, generator=torch.Generator().manual_seed(seed)) * scale
    p = params(**chosen)
    scaled = (logits.double() / p.temperature)[None]
    values, ids = scaled.topk(1500)
    ours = torch.zeros(1500, dtype=torch.bool)
    ours[ids[0][keep_mask(values, scaled.logsumexp(1), [p])[0]]] = True
    # Their sums are float32 and start at the other end: only a token exactly at the edge may differ.
    differing = (ours != reference_kept(logits.double(), p)).sum()
    assert differing == 0


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32), chosen=filters, first=st.sampled_from([4, 64, 512]))
def test_draws_come_from_the_kept_set_however_few_candidates_are_looked_at_first(seed, chosen, first):
    logits = torch.randn(1, 1500, generator=torch.Generator().manual_seed(seed)) * 2
    p = params(**chosen, seed=seed)
    assume(p.top_k or p.top_p < 1 or p.min_p)  # without filters the candidates split the draw in two
    tokens = [draw(logits, [p], [step]).result()[0].token for step in range(8)]
    kept = reference_kept(logits[0].double(), p)
    assert all(kept[token] for token in tokens)
    before, sampler.FIRST_CANDIDATES = sampler.FIRST_CANDIDATES, first
    try:
        assert tokens == [draw(logits, [p], [step]).result()[0].token for step in range(8)]
    finally:
        sampler.FIRST_CANDIDATES = before


@pytest.mark.parametrize("first", [1, 3, 128])
@pytest.mark.parametrize("chosen", [{}, {"temperature": 0.6}, {"top_k": 5}, {"top_p": 0.8}, {"min_p": 0.2}])
def test_frequencies_follow_the_distribution(chosen, first, monkeypatch):
    monkeypatch.setattr(sampler, "FIRST_CANDIDATES", first)
    logits = torch.tensor([2.0, 1.5, 1.0, 0.5, 0.0, -0.5, -1.0, -3.0])
    p = params(**({"temperature": 1.0} | chosen))
    kept = reference_kept(logits, p)
    expected = torch.softmax((logits / p.temperature).masked_fill(~kept, -math.inf), 0)
    draws = 20_000
    rows = logits.expand(draws, -1)
    seeds = [params(**({"temperature": 1.0} | chosen), seed=s) for s in range(draws // 10)]
    drawn = draw(rows, [s for s in seeds for _ in range(10)], list(range(10)) * len(seeds)).result()
    counts = torch.bincount(torch.tensor([d.token for d in drawn]), minlength=8).double()
    assert counts[~kept].sum() == 0
    wanted = expected[kept] * draws
    chi_square = ((counts[kept] - wanted) ** 2 / wanted).sum()
    # 99.99 % quantile of chi-square with 7 degrees of freedom; the draws are fixed, so this cannot flicker.
    assert chi_square < 29.9


def test_consecutive_draws_of_one_sequence_are_independent():
    logits = torch.zeros(1, 4)
    p = params(temperature=1.0, seed=7)
    tokens = [draw(logits, [p], [step]).result()[0].token for step in range(4000)]
    pairs = torch.bincount(torch.tensor([4 * a + b for a, b in itertools.pairwise(tokens)]), minlength=16)
    wanted = 3999 / 16
    assert ((pairs - wanted) ** 2 / wanted).sum() < 44.3  # 99.99 %, 15 degrees of freedom


def test_seeds_and_steps_give_different_keys():
    keys = {derive_seed(seed, step) for seed in range(100) for step in range(100)}
    assert len(keys) == 10_000 and derive_seed(-1, 3) == derive_seed(2**64 - 1, 3)


@settings(max_examples=20, deadline=None)
@given(
    st.lists(st.tuples(filters, st.integers(-(2**70), 2**70), st.integers(0, 1000)), min_size=1, max_size=9),
    st.randoms(),
)
def test_a_row_does_not_depend_on_its_company(rows, random):
    logits = torch.randn(len(rows), 300, generator=torch.Generator().manual_seed(1))
    asked = [params(**chosen, seed=seed) for chosen, seed, _ in rows]
    asked[0] = params(temperature=0.0, logprobs=3)
    steps = [step for _, _, step in rows]
    together = draw(logits, asked, steps).result()
    order = list(range(len(rows)))
    random.shuffle(order)
    shuffled = draw(logits[order], [asked[i] for i in order], [steps[i] for i in order]).result()
    for at, i in enumerate(order):
        alone = draw(logits[i : i + 1], [asked[i]], [steps[i]]).result()[0]
        assert alone.token == together[i].token == shuffled[at].token


def test_greedy_is_the_argmax_and_tiny_temperatures_are_greedy():
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(2))
    asked = [params(temperature=t) for t in (0.0, 1e-9, 1e-320)]
    assert [d.token for d in draw(logits, asked, [0, 0, 0]).result()] == logits.argmax(1).tolist()


def test_logprobs_are_the_untempered_log_softmax():
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(3)) * 3
    asked = [params(logprobs=0), params(), params(temperature=0.2, top_k=2, logprobs=5)]
    draws = draw(logits, asked, [0, 0, 0]).result()
    expected = logits.log_softmax(-1)
    assert draws[1].logprob is None and draws[0].logprob.top == ()
    for row in (0, 2):
        assert draws[row].logprob.token_id == draws[row].token
        assert draws[row].logprob.logprob == pytest.approx(expected[row, draws[row].token].item(), abs=1e-5)
    values, ids = expected[2].topk(5)
    assert [i for i, _ in draws[2].logprob.top] == ids.tolist()
    assert [v for _, v in draws[2].logprob.top] == pytest.approx(values.tolist(), abs=1e-5)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_a_row_that_is_not_finite_is_reported_and_alone(temperature, broken):
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(4))
    logits[1, 7] = broken
    draws = draw(logits, [params(temperature=temperature)] * 3, [0, 0, 0]).result()
    assert draws[1].token is None and draws[0].token is not None and draws[2].token is not None
