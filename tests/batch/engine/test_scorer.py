"""Teacher-forced scores: transformers' logits are the oracle, and nothing about how they are computed shows in them."""

import dataclasses

import numpy as np
import pytest
import torch

from batch.engine import scorer as scoring
from batch.engine.scorer import Scorer, Target
from batch.engine.token_scores import bin_middle, kl_bin, score_rows
from batch.model.model import load_model
from batch.requests import SamplingParams
from converters.detect import open_checkpoint
from tests import checkpoints
from tests.batch.engine.test_engine import PAIR_BYTES, image_prompt, make_engine, picture, random_prompts, run

CUTS = ((2, 1), (31, 5), (33, 32), (40, 39), (70, 33), (150, 1), (17, 16))  # tokens, first scored


def targets():
    prompts = random_prompts([length for length, _ in CUTS], seed=3)
    return [Target(tokens, score_from) for tokens, (_, score_from) in zip(prompts, CUTS, strict=True)]


def oracle(references, tokens, score_from, **inputs):
    """nll per model and token, KL(second ‖ first) and same best token, float64, from transformers' logits."""
    with torch.inference_mode():
        logs = [r(torch.tensor([tokens]), **inputs).logits[0].double().log_softmax(-1) for r in references]
    logs = [log[score_from - 1 : -1] for log in logs]
    nll = [-log.gather(1, torch.tensor(tokens[score_from:])[:, None])[:, 0] for log in logs]
    if len(logs) == 1:
        return nll, None, None
    kl = (logs[1].exp() * (logs[1] - logs[0])).sum(-1)
    return nll, kl, logs[0].argmax(-1) == logs[1].argmax(-1)


def score(engines, wanted):
    """TokenScores in the order of the targets."""
    found = dict(Scorer(engines).run(wanted))
    assert all(e.blocks.full.num_used == e.blocks.chunked.num_used == 0 for e in engines)
    return [found[place].scores for place in range(len(wanted))]


def figures(scores):
    return [(s.tokens, s.nll, s.kl, s.kl_max, dict(s.kl_bins), s.same_top) for s in scores]


@pytest.fixture(scope="package")
def expected(scout_reference, maverick_reference):
    return [oracle([scout_reference, maverick_reference], t.tokens, t.score_from) for t in targets()]


@pytest.fixture(scope="package")
def plain(scout, maverick):
    """Scores in large steps, nothing shared."""
    return score([make_engine(m, max_batch_tokens=500) for m in (scout, maverick)], targets())


def test_scores_are_those_of_transformers_logits(plain, expected):
    for ours, (nll, kl, same) in zip(plain, expected, strict=True):
        assert ours.tokens == len(kl) == sum(ours.kl_bins.values())
        assert ours.nll == pytest.approx([float(each.sum()) for each in nll], rel=1e-5)
        assert (ours.kl, ours.kl_max) == pytest.approx((float(kl.sum()), float(kl.max())), rel=1e-4)
        assert ours.same_top == int(same.sum())
        assert bin_middle(max(ours.kl_bins)) == pytest.approx(ours.kl_max, rel=0.023)


@pytest.mark.parametrize(("blocks", "max_batch_tokens", "max_seqs"), [(64, 7, 5), (12, 64, 7), (11, 500, 2)])
def test_however_a_prompt_is_cut_the_scores_are_the_same(scout, maverick, plain, blocks, max_batch_tokens, max_seqs):
    engines = [make_engine(m, blocks * PAIR_BYTES["scout"], max_batch_tokens, max_seqs) for m in (scout, maverick)]
    for ours, theirs in zip(score(engines, targets()), plain, strict=True):
        assert (ours.tokens, ours.same_top) == (theirs.tokens, theirs.same_top) and ours.kl_bins == theirs.kl_bins
        assert [*ours.nll, ours.kl] == pytest.approx([*theirs.nll, theirs.kl], rel=1e-13)  # sums of sums


def test_rows_of_logits_are_bounded(scout, maverick, plain, monkeypatch):
    monkeypatch.setattr(scoring, "LOGITS_BYTES", 3 * 2 * 4 * 4096)
    seen, real = [], scoring.score_rows
    monkeypatch.setattr(scoring, "score_rows", lambda logits, ids: seen.append(len(ids)) or real(logits, ids))
    monkeypatch.setattr("batch.engine.token_scores.WORK_BYTES", 1)
    again = score([make_engine(m, max_batch_tokens=500) for m in (scout, maverick)], targets())
    assert max(seen) == 3 and [s.nll for s in again] == [s.nll for s in plain]


def test_a_cached_prompt_gives_the_same_and_hides_no_position(scout, plain):
    engine = make_engine(scout)
    prompts = [target.tokens for target in targets()]
    run(engine, prompts, SamplingParams(2))  # now the cache knows the references, too
    before = engine.runner.model, []
    real = engine.runner.build

    def watched(plan):
        before[1].extend((piece.sequence.handle.target.score_from, piece.start) for piece in plan)
        return real(plan)

    engine.runner.build = watched
    again = score([engine], targets())
    assert [s.nll[0] for s in again] == pytest.approx([s.nll[0] for s in plain], rel=1e-13)
    starts = {}
    for score_from, start in before[1]:
        starts.setdefault(score_from, start)
    assert starts[33] == 32 and starts[39] == 32 and starts[16] == 0 and starts[1] == 0


def test_whoever_holds_blocks_that_an_older_one_needs_begins_again(scout, monkeypatch):
    wanted = [Target(tokens, 9) for tokens in random_prompts((150, 150, 150), seed=8)]
    free = score([make_engine(scout, max_batch_tokens=500)], wanted)
    given_up, real = [], Scorer._give_up
    monkeypatch.setattr(Scorer, "_give_up", lambda self, scored: given_up.append(scored) or real(self, scored))
    monkeypatch.setattr(Scorer, "_fits", lambda *_: True)  # as if what was shared had looked like room
    again = score([make_engine(scout, 12 * PAIR_BYTES["scout"], max_batch_tokens=50)], wanted)
    assert given_up and [s.nll[0] for s in again] == pytest.approx([s.nll[0] for s in free], rel=1e-13)
    assert [s.tokens for s in again] == [141] * 3


def test_a_shared_cache_of_two_models_begins_where_both_can(scout, maverick, plain):
    engines = [make_engine(scout), make_engine(maverick)]
    run(engines[0], [target.tokens for target in targets()], SamplingParams(2))  # the other one has nothing
    for ours, theirs in zip(score(engines, targets()), plain, strict=True):
        assert [*ours.nll, ours.kl] == pytest.approx([*theirs.nll, theirs.kl], rel=1e-13)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_is_nowhere_from_itself(scout_tiny, dtype):
    models = [load_model(open_checkpoint(scout_tiny), "cpu", dtype) for _ in range(2)]
    for scores in score([make_engine(model) for model in models], targets()):
        assert (scores.kl, scores.kl_max) == (0.0, 0.0) and scores.same_top == scores.tokens
        assert scores.nll[0] == scores.nll[1]


@pytest.fixture(scope="package")
def seen(scout, scout_reference):
    """Targets with pictures, and transformers' nll of what follows them."""
    pictures = [(picture(scout.arch, 1, 1),), (picture(scout.arch, 1, 3), picture(scout.arch, 5, 4))]
    wanted, nll = [], []
    for seed, images in enumerate(pictures):
        tokens = image_prompt(scout.arch, images, seed) + random_prompts((6,), seed)[0]
        pixels = torch.from_numpy(np.concatenate([i.pixels for i in images])).float()
        wanted.append(Target(tokens, len(tokens) - 6, images))
        nll.append(oracle([scout_reference], tokens, len(tokens) - 6, pixel_values=(pixels / 255 - 0.5) / 0.5)[0][0])
    return wanted, [float(each.sum()) for each in nll]


@pytest.mark.parametrize("max_batch_tokens", [9, 4096])
def test_pictures(scout, seen, max_batch_tokens):
    engine = make_engine(scout, max_batch_tokens=max_batch_tokens)
    found = [scores.nll[0] for scores in score([engine], seen[0])]
    assert found == pytest.approx(seen[1], rel=1e-4)
    found = [scores.nll[0] for scores in score([engine], seen[0])]  # the pictures lie in the cache now
    assert found == pytest.approx(seen[1], rel=1e-4)


def test_what_cannot_run_is_an_error_of_its_own_model(scout, maverick, seen):
    engine = make_engine(scout)
    one = Target([1, 2, 9999, 3], 1)
    found = dict(Scorer([engine]).run([one, Target([1] * 5000, 1), targets()[0]]))
    assert [found[i].error and found[i].error[0] for i in range(3)] == [
        "invalid_token", "context_length_exceeded", None,
    ]  # fmt: skip
    blind = dataclasses.replace(maverick.arch, vision=None)
    other = make_engine(maverick)
    other.model = type(maverick)(blind, maverick.text, None, maverick.device, maverick.dtype)
    (scored,) = dict(Scorer([engine, other]).run(seen[0][:1])).values()
    assert scored.error is not None and scored.error[0] == "images_not_supported" and scored.error[2] == 1


def test_a_failing_target_does_not_take_its_mates_down(scout, plain, monkeypatch):
    rows = type(scout).rows

    def poisoned(model, step, kv):
        if (step.token_ids == 4000).any():
            raise ValueError("poison")
        found = rows(model, step, kv)
        if (step.token_ids == 3999).any():
            return dataclasses.replace(found, hidden=torch.full_like(found.hidden, torch.nan))
        return found

    monkeypatch.setattr(type(scout), "rows", poisoned)
    wanted = [*targets(), Target([5, 4000, 6, 7], 2)]
    found = dict(Scorer([make_engine(scout)]).run(wanted))
    assert found[7].error == ("model_error", "ValueError: poison", 0)
    assert [found[i].scores.nll[0] for i in range(7)] == pytest.approx([s.nll[0] for s in plain], rel=1e-13)
    (broken,) = dict(Scorer([make_engine(scout)]).run([Target([5, 3999, 6, 7], 2)])).values()
    assert broken.error is not None and "not finite" in broken.error[1]


def test_out_of_memory_makes_steps_smaller(scout, plain, monkeypatch):
    rows = type(scout).rows

    def limited(model, step, kv):
        if len(step.token_ids) > 11:
            raise torch.OutOfMemoryError("this device is small")
        return rows(model, step, kv)

    monkeypatch.setattr(type(scout), "rows", limited)
    again = score([make_engine(scout, max_batch_tokens=200)], targets())
    assert [s.nll[0] for s in again] == pytest.approx([s.nll[0] for s in plain], rel=1e-13)


@pytest.mark.parametrize("head", ["dense", "panels"])
def test_logits_of_bfloat16_models_are_not_rounded(scout_tiny, tmp_path, head, monkeypatch):
    from batch.kernels import ops
    from batch.model.head import LogitRows

    monkeypatch.setattr("batch.model.head.BLOCK", 96)
    if head == "dense":
        monkeypatch.setattr(ops, "packer", lambda device, dtype: None)
    elif ops.packer(torch.device("cpu"), torch.bfloat16) is None:
        pytest.skip("weights are packed on CPUs with AVX512-BF16 only")
    model = load_model(open_checkpoint(scout_tiny), "cpu", "bfloat16")
    hidden = torch.randn(5, 256).bfloat16()
    weight = checkpoints.load(scout_tiny)["language_model.lm_head.weight"]
    exact = hidden.double() @ weight.double().T
    rows = LogitRows(hidden, model.text.weights.head())
    torch.testing.assert_close(rows.exact(slice(1, 4)).double(), exact[1:4], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(rows.logits().double(), exact, rtol=1e-2, atol=1e-2)


def test_bins():
    assert kl_bin(0.0) == kl_bin(1e-300) and bin_middle(kl_bin(0.0)) == 0.0
    for value in (1e-9, 0.003, 1.0, 17.0):
        assert bin_middle(kl_bin(value)) == pytest.approx(value, rel=0.023)


def test_one_model_has_no_divergence():
    scores = score_rows([torch.randn(4, 9)], torch.tensor([0, 1, 2, 3]))
    assert scores.nll.shape == (1, 4) and not scores.kl.any()
