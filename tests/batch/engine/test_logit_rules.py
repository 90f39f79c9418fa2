"""Penalties, biases, least lengths and token masks: against plain formulas, in any company, through preemption."""

import math

import numpy as np
import pytest
import torch
from transformers import RepetitionPenaltyLogitsProcessor

from batch.engine import sampler
from batch.engine.logit_rules import LogitRules, apply_rules
from batch.engine.sampler import draw
from batch.requests import SamplingParams
from tests.batch.engine.test_engine import make_engine, random_prompts, run

VOCAB = 100


class OnlyThese:
    """A real mask for tests: a cycle of allowed sets, then the stop token."""

    def __init__(self, sets, stop):
        self.sets, self.stop, self.place, self.is_done = sets, stop, 0, False

    def allowed(self):
        return self.sets[self.place] if self.place < len(self.sets) else {self.stop}

    def fill(self, row):
        bits = np.zeros(len(row) * 32, np.uint8)
        bits[list(self.allowed())] = 1
        row[:] = np.packbits(bits, bitorder="little").view(np.int32)

    def accept(self, token):
        ok = token in self.allowed()
        self.place += 1
        self.is_done = token == self.stop
        return ok


def rules_of(prompt=(), drawn=(), stop=frozenset(), mask=None, **fields):
    rules = LogitRules.of(list(prompt), SamplingParams(9, **fields), stop, mask)
    for token in drawn:
        assert rules.accept(token)
    return rules


def logits_of(rows, seed=0):
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed))


def test_no_rules_touch_nothing():
    logits = logits_of(3)
    assert rules_of() is None
    assert apply_rules(logits, [None] * 3, [0] * 3) is logits
    before = logits.clone()
    changed = apply_rules(logits, [None, rules_of(logit_bias=((5, 3.0),)), None], [0] * 3)
    assert torch.equal(logits, before) and torch.equal(changed[::2], before[::2])
    assert torch.equal((changed - before).nonzero(), torch.tensor([[1, 5]]))


def test_presence_and_frequency_penalty():
    logits, drawn = logits_of(1), [7, 7, 3]
    (changed,) = apply_rules(logits, [rules_of([9], drawn, presence_penalty=0.5, frequency_penalty=0.25)], [3])
    expected = logits[0].clone()
    expected[7] -= 0.5 + 2 * 0.25
    expected[3] -= 0.5 + 0.25
    assert torch.equal(changed, expected)  # the prompt's 9 does not count


def test_repetition_penalty_is_that_of_transformers():
    logits, prompt, drawn = logits_of(1), [1, 2, 2, 50], [3, 1]
    theirs = RepetitionPenaltyLogitsProcessor(1.3)(torch.tensor([prompt + drawn]), logits.clone())
    assert torch.equal(apply_rules(logits, [rules_of(prompt, drawn, repetition_penalty=1.3)], [2]), theirs)


def test_min_tokens_keeps_stop_tokens_away():
    logits, stop = logits_of(2), frozenset({5, 6})
    changed = apply_rules(logits, [rules_of(stop=stop, min_tokens=3)] * 2, [2, 3])
    assert changed[0, [5, 6]].tolist() == [-math.inf] * 2 and torch.equal(changed[1], logits[1])


@pytest.mark.parametrize("vocab", [64, 100, 202048])
def test_masks_are_bits(vocab):
    logits = torch.randn(3, vocab, generator=torch.Generator().manual_seed(1))
    allowed = {0, 1, 31, 32, 63, vocab - 1}
    changed = apply_rules(logits, [None, rules_of(mask=OnlyThese([allowed], 0)), None], [0] * 3)
    assert set(torch.isfinite(changed[1]).nonzero()[:, 0].tolist()) == allowed
    assert torch.equal(changed[::2], logits[::2])


@pytest.mark.parametrize("fields", [{}, {"top_p": 0.9}, {"top_k": 50}, {"min_p": 0.01}, {"top_k": 200, "top_p": 0.99}])
def test_draws_stay_inside_a_mask(fields):
    """Also where rounding leaves the forbidden rest a sliver of probability: many draws, few allowed tokens."""
    vocab, allowed, rows = 3000, {17, 999, 2998}, 400
    logits = torch.randn(rows, vocab, generator=torch.Generator().manual_seed(2)) * 8
    params = [SamplingParams(9, temperature=1.0, seed=i, **fields) for i in range(rows)]
    asked = apply_rules(logits, [rules_of(mask=OnlyThese([allowed], 0)) for _ in range(rows)], [0] * rows)
    tokens = {drew.token for drew in draw(logits, params, [0] * rows, asked).result()}
    assert tokens <= allowed and len(tokens) > 1


def test_the_rest_has_no_chance_outside_a_mask(monkeypatch):
    """Where rounding leaves the rest a sliver and the noise makes the most of it."""
    noise = sampler.gumbel_noise
    monkeypatch.setattr(
        sampler, "gumbel_noise", lambda keys, ids: noise(keys, ids) + torch.where(ids == 3000, 1000.0, 0.0)
    )
    logits = torch.randn(50, 3000, generator=torch.Generator().manual_seed(3)) * 8
    params = [SamplingParams(9, temperature=1.0, seed=i) for i in range(50)]
    asked = apply_rules(logits, [rules_of(mask=OnlyThese([{17, 999, 2998}], 0)) for _ in range(50)], [0] * 50)
    assert {drew.token for drew in draw(logits, params, [0] * 50, asked).result()} <= {17, 999, 2998}


def test_logprobs_stay_the_models_own():
    logits = logits_of(1)
    asked = apply_rules(logits, [rules_of(mask=OnlyThese([{4}], 0))], [0])
    (drew,) = draw(logits, [SamplingParams(9, logprobs=2)], [0], asked).result()
    expected = torch.log_softmax(logits[0], 0)
    assert drew.token == 4 and drew.logprob.logprob == pytest.approx(expected[4].item(), abs=1e-5)
    assert [token for token, _ in drew.logprob.top] == expected.topk(2).indices.tolist()


def engine_outputs(model, prompts, sampling, masks, **options):
    engine = make_engine(model, **options)
    sequences = [engine.add(i, p, s, (), m) for i, (p, s, m) in enumerate(zip(prompts, sampling, masks, strict=True))]
    while engine.has_work:
        engine.step()
    assert engine.blocks.full.num_used == engine.blocks.chunked.num_used == 0
    assert all(s.error is None for s in sequences), [s.error for s in sequences]
    return [s.output for s in sequences], engine.stats


def mixed(n=8):
    prompts = random_prompts([20 + 5 * i for i in range(n)])
    kinds = [
        {},
        {"presence_penalty": 1.5, "frequency_penalty": 0.5},
        {"repetition_penalty": 1.5},
        {"logit_bias": ((7, 50.0),)},
        {},
        {"min_tokens": 30},
        {},
        {"temperature": 0.0},
    ]
    sampling = [SamplingParams(40, **({"temperature": 1.0} | kinds[i % 8]), seed=i) for i in range(n)]
    return prompts, sampling


def masks_of(n=8):
    return [OnlyThese([set(range(i, 2000, 3))] * 25, 2000) if i in (4, 6) else None for i in range(n)]


def test_rules_do_not_depend_on_company_or_preemption(scout):
    prompts, sampling = mixed()
    stops = [SamplingParams(**{**vars(s), "stop_token_ids": frozenset({2000})}) for s in sampling]
    alone = [engine_outputs(scout, [p], [s], [m])[0][0] for p, s, m in zip(prompts, stops, masks_of(), strict=True)]
    together, _ = engine_outputs(scout, prompts, stops, masks_of())
    tight, stats = engine_outputs(scout, prompts, stops, masks_of(), kv_bytes=640 << 10)
    assert stats.preemptions > 0
    assert together == alone and tight == alone
    for place in (4, 6):
        *said, last = alone[place]
        assert len(said) == 25 and last == 2000 and all(token % 3 == place % 3 for token in said)
    assert alone[3].count(7) > 30


def test_rows_without_a_mask_are_those_of_a_batch_without(scout):
    prompts, sampling = mixed()
    plain, _ = engine_outputs(scout, prompts, sampling, [None] * 8)
    stops = [SamplingParams(**{**vars(s), "stop_token_ids": frozenset({2000})}) if i in (4, 6) else s
             for i, s in enumerate(sampling)]  # fmt: skip
    masked, _ = engine_outputs(scout, prompts, stops, masks_of())
    for place in set(range(8)) - {4, 6}:
        assert masked[place] == plain[place]
    assert masked[4] != plain[4]


def test_a_mask_that_goes_wrong_ends_its_own_answer(scout):
    class Broken(OnlyThese):
        def accept(self, token):
            return False

    prompts = random_prompts([10, 12, 14])
    engine = make_engine(scout)
    sampling = SamplingParams(5, temperature=1.0)
    masks = [None, Broken([set(range(50))] * 9, 60), None]
    sequences = [engine.add(i, p, sampling, (), m) for i, (p, m) in enumerate(zip(prompts, masks, strict=True))]
    while engine.has_work:
        engine.step()
    assert sequences[1].error[0] == "grammar_error"
    free = run(make_engine(scout), prompts, sampling)
    assert [sequences[i].output for i in (0, 2)] == [free[i].output for i in (0, 2)]
