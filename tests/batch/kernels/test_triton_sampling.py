"""Tokens drawn by the kernel against those that the CPU draws of the same logits."""

import itertools
import math

import pytest
import torch

pytest.importorskip("triton")
from batch.engine import sampler
from batch.engine.sampler import draw
from batch.kernels import ops
from batch.requests import SamplingParams

FILTERS = {"top_k": (0, 1, 3, 200, 5000), "top_p": (1.0, 0.0, 0.5, 0.9, 0.999), "min_p": (0.0, 0.05, 1.0)}


def every_filter():
    for number, values in enumerate(itertools.product(*FILTERS.values())):
        chosen = dict(zip(FILTERS, values, strict=True))
        yield SamplingParams(1, temperature=(0.3, 1.0, 1.9)[number % 3], seed=number, **chosen)


def on_device(logits, params, steps, device, **options):
    with ops.cuda_only():
        return draw(logits.to(device), params, steps, **options).result()


def logits_of(kind, rows, vocab):
    logits = 3 * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(rows + vocab))
    if kind == "bfloat16":  # full of ties
        return logits.bfloat16().float()
    if kind == "forbidden":
        logits[:, 5:] = -math.inf
    if kind == "equal":
        logits[:] = torch.tensor([-0.0, 0.0, -2.5])[torch.arange(rows) % 3][:, None]
    return logits


@pytest.mark.parametrize("kind, vocab", [
    ("float32", 1500), ("bfloat16", 1500), ("forbidden", 1500), ("equal", 1500), ("bfloat16", 7),
])  # fmt: skip
def test_tokens_are_those_of_the_cpu(kind, vocab, device):
    params = list(every_filter())
    logits = logits_of(kind, len(params), vocab)
    steps = list(range(len(params)))
    expected = [found.token for found in draw(logits, params, steps).result()]
    assert [found.token for found in on_device(logits, params, steps, device)] == expected


@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
@pytest.mark.parametrize("candidates", [1, 8])
def test_what_is_not_among_the_first_candidates(kind, candidates, device, monkeypatch):
    """Without filters, in a flat distribution: nearly all draws are of the rest."""
    monkeypatch.setattr(sampler, "FIRST_CANDIDATES", candidates)
    params = [SamplingParams(1, temperature=4.0, seed=seed) for seed in range(60)]
    logits = logits_of(kind, len(params), 1100)
    expected = [found.token for found in draw(logits, params, [3] * 60).result()]
    assert [found.token for found in on_device(logits, params, [3] * 60, device)] == expected
    best = logits.topk(candidates).indices.tolist()
    assert sum(token not in row for token, row in zip(expected, best, strict=True)) > 40


def test_greedy_rows_and_rules_beside_draws(device):
    logits = logits_of("float32", 4, 300)
    params = [SamplingParams(1, temperature=t, seed=9, logprobs=n) for t, n in ((0, 2), (1, None), (0, None), (0.7, 0))]
    asked = logits.clone()
    asked[:, ::2] = -math.inf
    expected = draw(logits, params, [0] * 4, asked).result()
    ours = on_device(logits, params, [0] * 4, device, asked=asked.to(device))
    assert [found.token for found in ours] == [found.token for found in expected]
    assert [found.logprob is None for found in ours] == [False, True, True, False]
    assert ours[3].logprob.logprob == pytest.approx(expected[3].logprob.logprob, abs=1e-5)


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_a_row_that_is_not_finite(broken, device):
    logits = logits_of("float32", 3, 300)
    logits[1, 7] = broken
    params = [SamplingParams(1, temperature=1.0, top_p=0.9)] * 3
    tokens = [found.token for found in on_device(logits, params, [0] * 3, device)]
    assert tokens[1] is None and None not in (tokens[0], tokens[2])


def test_a_row_does_not_depend_on_its_company(device):
    params = list(every_filter())[::7]
    logits = logits_of("float32", len(params), 1500)
    together = on_device(logits, params, [1] * len(params), device)
    for place in (0, 3, len(params) - 1):
        alone = on_device(logits[place : place + 1], [params[place]], [1], device)
        assert alone[0].token == together[place].token
