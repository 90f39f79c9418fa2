"""Drawing tokens: sampler.py's draw, of whole rows, in one launch and without asking the host for anything.

Every filter keeps the logits from some value up, so a row's filters are one threshold. It is searched digit by digit
among the float32 numbers in order: a pass over the row adds up, for each of 16 prefixes, how many logits (top-k) or how
much probability (top-p) lie there or above. Rows without filters look at their first candidates, then at the rest as
one, as sampler.py does, so that both draw the same tokens.

Legend: N rows of logits, R rows that draw, V vocabulary.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK = 1024  # logits of a row that are looked at together
GOLDEN = tl.constexpr(-7046029254386353131)  # splitmix64's numbers, as int64
MIX1 = tl.constexpr(-4658895280553007687)
MIX2 = tl.constexpr(-7723592293110705685)
NOTHING = tl.constexpr(0x007FFFFF)  # the place of -infinity


@triton.jit
def _shift_right(x: tl.tensor, BITS: tl.constexpr) -> tl.tensor:
    """Logical shift of int64."""
    return (x >> BITS) & ((1 << (64 - BITS)) - 1)


@triton.jit
def _gumbel(key: tl.tensor, ids: tl.tensor) -> tl.tensor:
    """As `sampler.gumbel_noise`: float64 from an int64 key and int64 ids."""
    x = key + ids * GOLDEN
    x = (x ^ _shift_right(x, 30)) * MIX1
    x = (x ^ _shift_right(x, 27)) * MIX2
    x = x ^ _shift_right(x, 31)
    uniform = (_shift_right(x, 11).to(tl.float64) + 0.5) * 1.1102230246251565e-16  # 2 ** -53
    return -tl.log(-tl.log(uniform))


@triton.jit
def _load(row: tl.tensor, first: tl.tensor, vocab: tl.tensor, BLOCK: tl.constexpr) -> tl.tensor:
    """Logits first … first + BLOCK - 1, with one zero only; -infinity behind the last."""
    place = first + tl.arange(0, BLOCK)
    values = tl.load(row + place, mask=place < vocab, other=float("-inf"))
    return tl.where(values == 0, 0.0, values)


@triton.jit
def _places(values: tl.tensor) -> tl.tensor:
    """float32 → uint32 in the same order."""
    bits = values.to(tl.uint32, bitcast=True)
    return tl.where(bits >= 0x80000000, bits ^ 0xFFFFFFFF, bits | 0x80000000)


@triton.jit
def _search(
    row: tl.tensor, vocab: tl.tensor, wanted: tl.tensor, top: tl.tensor, inverse: tl.tensor, rounds: tl.tensor,
    BY_MASS: tl.constexpr, BLOCK: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """The last place that with all above it holds `wanted` logits or, BY_MASS, as much of exp((logit - top) · inverse);
    as far as `rounds` digits say it."""
    digit = tl.arange(0, 16).to(tl.uint32)
    found = tl.zeros((), tl.uint32)
    shift = tl.full((), 28, tl.uint32)
    for _ in range(0, rounds):
        edges = found + (digit << shift)
        sums = tl.zeros((BLOCK, 16), tl.float32)
        for first in range(0, vocab, BLOCK):
            values = _load(row, first, vocab, BLOCK)
            weight = (
                tl.exp((values - top) * inverse) if BY_MASS else (first + tl.arange(0, BLOCK) < vocab).to(tl.float32)
            )
            sums += tl.where(_places(values)[:, None] >= edges[None, :], weight[:, None], 0.0)
        enough = tl.sum((tl.sum(sums, 0) >= wanted).to(tl.int32), 0)
        found += tl.maximum(enough - 1, 0).to(tl.uint32) << shift
        shift -= 4
    return found


@triton.jit
def _mass_from(
    row: tl.tensor, vocab: tl.tensor, threshold: tl.tensor, top: tl.tensor, inverse: tl.tensor, BLOCK: tl.constexpr
) -> tl.tensor:
    """Sum of exp((logit - top) · inverse) from a place up."""
    sums = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, vocab, BLOCK):
        values = _load(row, first, vocab, BLOCK)
        sums += tl.where(_places(values) >= threshold, tl.exp((values - top) * inverse), 0.0)
    return tl.sum(sums, 0)


@triton.jit
def _draw(
    logits: tl.tensor, tokens: tl.tensor, reals: tl.tensor, whole: tl.tensor, vocab: tl.tensor, candidates: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    """One row. reals float64 [R, 3]: temperature, top_p, log(min_p). whole int64 [R, 3]: row of logits, key, top_k."""
    number = tl.program_id(0)
    temperature, top_p = tl.load(reals + 3 * number), tl.load(reals + 3 * number + 1)
    log_min_p = tl.load(reals + 3 * number + 2)
    place, key, top_k = tl.load(whole + 3 * number), tl.load(whole + 3 * number + 1), tl.load(whole + 3 * number + 2)
    row = logits + place * vocab
    inverse = (1.0 / temperature).to(tl.float32)
    highest = tl.full((BLOCK,), float("-inf"), tl.float32)
    low_bits = tl.zeros((BLOCK,), tl.uint32)
    for first in range(0, vocab, BLOCK):
        values = _load(row, first, vocab, BLOCK)
        highest = tl.maximum(highest, values)
        low_bits = tl.maximum(low_bits, values.to(tl.uint32, bitcast=True) & 0xFFFF)
    top = tl.max(highest, 0)
    rounds, below = 8, 0
    if tl.max(low_bits, 0) == 0:  # logits that were bfloat16: half of the digits tell them apart
        rounds, below = 4, 0xFFFF
    threshold = tl.zeros((), tl.uint32)
    mass = _mass_from(row, vocab, threshold, top, inverse, BLOCK)
    is_free = (top_k == 0) & (top_p >= 1) & (log_min_p == float("-inf"))
    has_rest = is_free & (candidates < vocab)
    if has_rest:
        threshold = _search(row, vocab, candidates, top, inverse, rounds, False, BLOCK)
        has_rest = (threshold | below) > NOTHING  # a grammar may forbid all others
        threshold = (threshold | below) + 1  # candidates are better than the last of so many: ties are of the rest
    elif not is_free:
        norm = mass
        if top_k > 0:
            threshold = _search(row, vocab, tl.minimum(top_k, vocab), top, inverse, rounds, False, BLOCK)
            norm = _mass_from(row, vocab, threshold, top, inverse, BLOCK)
        if top_p < 1:
            wanted = (top_p * norm).to(tl.float32)
            threshold = tl.maximum(threshold, _search(row, vocab, wanted, top, inverse, rounds, True, BLOCK))
        threshold = tl.minimum(threshold, _places(top))
    best = tl.full((), float("-inf"), tl.float64)
    token = tl.zeros((), tl.int64)
    inside = tl.zeros((), tl.float32)
    least = top.to(tl.float64) / temperature + log_min_p
    for first in range(0, vocab, BLOCK):
        values = _load(row, first, vocab, BLOCK)
        kept = (_places(values) >= threshold) & (values > float("-inf"))
        if tl.max(kept.to(tl.int32), 0) > 0:
            scaled = values.to(tl.float64) / temperature
            kept = kept & ((scaled >= least) | (values == top))
            ids = (first + tl.arange(0, BLOCK)).to(tl.int64)
            noisy = tl.where(kept, scaled + _gumbel(key, ids), float("-inf"))
            found, at = tl.max(noisy, 0, return_indices=True)
            token = tl.where(found > best, first + at, token)
            best = tl.maximum(best, found)
            inside += tl.sum(tl.where(kept, tl.exp((values - top) * inverse), 0.0), 0)
    if has_rest:
        left = 1.0 - tl.minimum(inside / mass, 1.0).to(tl.float64)
        rest = top.to(tl.float64) / temperature + tl.log(mass.to(tl.float64)) + tl.log(left)
        if rest + _gumbel(key, tl.cast(vocab, tl.int64)) > best:
            best = tl.full((), float("-inf"), tl.float64)
            for first in range(0, vocab, BLOCK):
                values = _load(row, first, vocab, BLOCK)
                ids = (first + tl.arange(0, BLOCK)).to(tl.int64)
                noisy = values.to(tl.float64) / temperature + _gumbel(key, ids)
                noisy = tl.where((_places(values) < threshold) & (ids < vocab), noisy, float("-inf"))
                found, at = tl.max(noisy, 0, return_indices=True)
                token = tl.where(found > best, first + at, token)
                best = tl.maximum(best, found)
    tl.store(tokens + place, token)


def draw(logits: torch.Tensor, tokens: torch.Tensor, reals: torch.Tensor, whole: torch.Tensor, candidates: int) -> None:
    """tokens int64 [N] get those of the R rows of logits float32 [N, V] that draw. reals float64 [R, 3]: temperature,
    top_p, log(min_p); whole int64 [R, 3]: row, key of its noise, top_k (0: none). `candidates`: how many a row without
    filters looks at before it looks at the rest."""
    assert logits.is_contiguous() and logits.dtype == torch.float32
    _draw[(whole.shape[0],)](logits, tokens, reals, whole, logits.shape[1], candidates, BLOCK=BLOCK, num_warps=8)
