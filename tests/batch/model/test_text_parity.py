"""Logits and greedy tokens against transformers, float32: attention chunks of 32, floor_scale 16."""

import pytest
import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from batch.kernels import ops
from batch.model.rope import inverse_frequencies
from tests.batch.model.driver import Driver, Row, ours, theirs

TOLERANCE = 1e-4


def difference(a, b):
    return ((a - b).norm() / b.norm()).item()


def typical_difference(a, b):
    """Median over tokens: in low precision a token near a tie between two experts may take the other one."""
    return ((a - b).norm(dim=-1) / b.norm(dim=-1)).median().item()


def random_ids(count, seed, vocab=2000):
    return torch.randint(vocab, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def their_logits(model, ids, **inputs):
    with torch.inference_mode():
        return model(input_ids=torch.tensor([ids]), **inputs).logits[0].float()


@pytest.mark.parametrize("count", [1, 31, 32, 33, 107])
@pytest.mark.parametrize("piece", [10**9, 7])
def test_prompts_across_chunks_and_floor_scale(pair, count, piece):
    model, reference = pair
    ids = random_ids(count, seed=count)
    logits = Driver(model).logits(Row(ids), piece)
    assert difference(logits, their_logits(reference, ids)) < TOLERANCE
    assert torch.equal(logits.argmax(-1), their_logits(reference, ids).argmax(-1))


def test_reference_kernels_alone(pair):
    model, reference = pair
    ids = random_ids(90, seed=1)
    with ops.reference_only():
        whole = Driver(model).logits(Row(ids))
        stepwise = Driver(model).logits(Row(ids), 1)
    assert difference(whole, their_logits(reference, ids)) < TOLERANCE
    assert difference(stepwise, their_logits(reference, ids)) < TOLERANCE


def test_text_only_export_and_sdpa(scout_tiny_text):
    ids = random_ids(70, seed=2)
    logits = Driver(ours(scout_tiny_text)).logits(Row(ids))
    assert difference(logits, their_logits(theirs(scout_tiny_text, attention="sdpa"), ids)) < TOLERANCE


def test_bfloat16_follows_transformers_as_closely_as_float32_does(scout_tiny):
    """The bfloat16 model differs from transformers' bfloat16 no more than that differs from float32."""
    ids = random_ids(80, seed=3)
    exact = their_logits(theirs(scout_tiny), ids)
    rounded = their_logits(theirs(scout_tiny, torch.bfloat16), ids)
    logits = Driver(ours(scout_tiny, torch.bfloat16)).logits(Row(ids))
    noise = typical_difference(rounded, exact)
    assert typical_difference(logits, rounded) < 1.5 * noise
    assert typical_difference(logits, exact) < 1.5 * noise


@pytest.mark.parametrize("reference_only", [False, True])
def test_sequences_of_different_lengths_in_one_step(pair, reference_only):
    model, reference = pair
    rows = [Row(random_ids(count, seed=count)) for count in (5, 30, 47, 81)]
    driver = Driver(model)
    logits = {id(row): [] for row in rows}
    with ops.reference_only() if reference_only else torch.inference_mode():
        for piece in (5, 9, 1, 16, 1, 1, 13, 29, 32, 32):
            work = []
            for row in rows:
                count = next(driver.pieces(row, piece), 0)
                if count:
                    work.append((row, count))
            if work:
                for (row, _), out in zip(work, driver.step(work, all_logits=True), strict=True):
                    logits[id(row)].append(out)
    for row in rows:
        assert row.done == len(row.tokens)
        assert difference(torch.cat(logits[id(row)]), their_logits(reference, row.tokens)) < TOLERANCE


def test_greedy_tokens_equal_generate(pair):
    model, reference = pair
    prompts = [random_ids(count, seed=10 + count) for count in (3, 29, 50)]
    driver = Driver(model)
    rows = [Row(list(prompt)) for prompt in prompts]
    for row in rows:
        while row.done < len(row.tokens):
            last = driver.step([(row, next(driver.pieces(row, 17)))])[0]
        row.tokens.append(int(last[-1].argmax()))
    for _ in range(39):
        for row, logits in zip(rows, driver.step([(row, 1) for row in rows]), strict=True):
            row.tokens.append(int(logits[-1].argmax()))
    for row, prompt in zip(rows, prompts, strict=True):
        expected = reference.generate(
            torch.tensor([prompt]), max_new_tokens=40, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        assert row.tokens == expected[0].tolist()


@pytest.mark.parametrize("low, high", [(1.0, 1.0), (1.0, 4.0)])
def test_rope_scaling_equals_transformers(scout, scout_tiny, low, high):
    from dataclasses import replace

    from transformers import AutoConfig

    scaling = replace(scout.arch.text.rope_scaling, low_freq_factor=low, high_freq_factor=high)
    config = AutoConfig.from_pretrained(scout_tiny).text_config
    config.rope_parameters = dict(config.rope_parameters, low_freq_factor=low, high_freq_factor=high)
    expected, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    got = inverse_frequencies(replace(scout.arch.text, rope_scaling=scaling))
    assert torch.isfinite(got).all()
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=0)
