"""Drawing the next token of many sequences at once.

A draw is argmax(logit / T + g) over the tokens that the filters keep, where g is Gumbel noise (so the argmax follows
the softmax exactly). The noise is a hash of (seed, step, token id): a token does not depend on what else is in the
batch, and float rounding elsewhere can change it only where two candidates tie.

Filters run in the order of transformers' logits processors: temperature, top-k, top-p of what is left, min-p.
Legend: N rows, V vocabulary, R non-greedy rows, K candidates per row.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from batch.kernels import ops
from batch.kernels.transfer import fetch, send
from batch.requests import SamplingParams, TokenLogprob

FIRST_CANDIDATES = 128  # enough for most draws of a trained model; a row that needs more looks at its whole vocabulary
GREEDY_BELOW = 1e-5  # temperatures under this are greedy: dividing by them would only overflow
MAX_SCRATCH_ELEMENTS = 1 << 22  # float64 elements of one slice of rows: 32 MiB a temporary

_MASK64 = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_MIX1, _MIX2 = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


@dataclass(frozen=True)
class Draw:
    """What became of one row: a token, or None when its logits are not finite."""

    token: int | None
    logprob: TokenLogprob | None = None


def derive_seed(seed: int, *counters: int) -> int:
    """A 64-bit key from a seed and counters (step, choice …): splitmix64, one round per counter."""
    key = seed & _MASK64
    for counter in counters:
        key = _splitmix((key + _GOLDEN * (counter + 1)) & _MASK64)
    return key


class Drawing:
    """Tokens that have been drawn on the device, int64 [N], and are on their way to the host with all that is asked of
    them: what comes after them on the device is not waited for."""

    def __init__(
        self, tokens: torch.Tensor, best: torch.Tensor, raw: torch.Tensor, params: list[SamplingParams]
    ) -> None:
        self.tokens = tokens
        self._params = params
        self._both = fetch(torch.stack([tokens, torch.isfinite(best).long()]))
        self._logprobs = [fetch(found) for found in _logprobs(raw, params, tokens)]
        self._event: torch.cuda.Event | None = None
        if tokens.is_cuda:
            self._event = torch.cuda.current_stream(tokens.device).record_event()

    def result(self) -> list[Draw]:
        """Waits for them."""
        if self._event is not None:
            self._event.synchronize()
        ids, finite = self._both.tolist()
        logprobs = self._listed(ids)
        return [Draw(token, logprobs.get(i)) if finite[i] else Draw(None) for i, token in enumerate(ids)]

    def _listed(self, tokens: list[int]) -> dict[int, TokenLogprob]:
        """Those of the rows that ask."""
        if not self._logprobs:
            return {}
        chosen, best, best_ids = (found.tolist() for found in self._logprobs)
        found = {}
        for at, i in enumerate(_asking(self._params)):
            top = tuple(zip(best_ids[at], best[at], strict=True))[: self._params[i].logprobs or 0]
            found[i] = TokenLogprob(tokens[i], chosen[at], top)
        return found


def draw(
    logits: torch.Tensor, params: list[SamplingParams], steps: list[int], asked: torch.Tensor | None = None
) -> Drawing:
    """One token per row of logits (float32 [N, V]); `steps[i]` counts row i's tokens drawn before.

    `asked` are the logits after the requests' own rules (penalties, grammars), where there are any: tokens are drawn
    from these, while log-probabilities stay the model's own.
    """
    raw, logits = logits, logits if asked is None else asked
    best, tokens = _best(logits)
    rows = [i for i, p in enumerate(params) if p.temperature >= GREEDY_BELOW]
    if rows:
        keys = [_signed(derive_seed(params[i].seed, steps[i])) for i in rows]
        _draw_rows(logits, tokens, rows, keys, [params[i] for i in rows])
    return Drawing(tokens, best, raw, params)


def _draw_rows(
    logits: torch.Tensor, tokens: torch.Tensor, rows: list[int], keys: list[int], params: list[SamplingParams]
) -> None:
    """Put the tokens of some rows into `tokens` [N]."""
    kernels = ops.cuda_kernels(logits)
    if kernels is not None:
        sent = send(draw_parameters(rows, keys, params), logits.device)
        kernels.draw(logits.contiguous(), tokens, *sent, FIRST_CANDIDATES)
        return
    slice_rows = max(1, MAX_SCRATCH_ELEMENTS // logits.shape[1])
    for start in range(0, len(rows), slice_rows):
        part = slice(start, start + slice_rows)
        index = torch.tensor(rows[part], device=logits.device)
        mine = torch.tensor(keys[part], device=logits.device)
        tokens[index] = _draw(logits[index], mine, params[part], FIRST_CANDIDATES)


def draw_parameters(rows: list[int], keys: list[int], params: list[SamplingParams]) -> list[torch.Tensor]:
    """What a kernel asks for: float64 [R, 3] and int64 [R, 3], see triton_sampling.py."""
    limits = [(p.temperature, p.top_p, math.log(p.min_p) if p.min_p > 0 else -math.inf) for p in params]
    whole = [(row, key, p.top_k) for row, key, p in zip(rows, keys, params, strict=True)]
    return [torch.tensor(limits, dtype=torch.float64), torch.tensor(whole)]


def _best(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The largest logit of each row and its token, [N] each; a NaN counts as the largest, so it shows every broken
    row. On a CPU numpy's argmax is ten times as fast as torch's."""
    if logits.device.type != "cpu":
        best, tokens = logits.max(dim=-1)
        return best, tokens
    tokens = torch.from_numpy(logits.numpy().argmax(axis=1))
    return logits[torch.arange(len(tokens)), tokens], tokens


def keep_mask(values: torch.Tensor, total: torch.Tensor, params: list[SamplingParams]) -> torch.Tensor:
    """Which candidates the filters keep, bool [R, K].

    values: float64 [R, K], logit / T of candidates, best first; total: float64 [R], logsumexp over the vocabulary.
    """
    device, width = values.device, values.shape[1]
    top_k = torch.tensor([p.top_k or width for p in params], device=device).clamp(max=width)  # [R]
    top_p = torch.tensor([p.top_p for p in params], dtype=torch.float64, device=device)
    min_p = torch.tensor([p.min_p for p in params], dtype=torch.float64, device=device)
    kept = values >= values.gather(1, top_k[:, None] - 1)  # ties with the k-th stay, as in transformers
    kept_sum = torch.logsumexp(values.masked_fill(~kept, -math.inf), dim=1)  # [R]
    cut = torch.tensor([p.top_k > 0 for p in params], device=device)
    norm = torch.where(cut, kept_sum, total)
    probs = torch.exp(values - norm[:, None])
    # Mass of the better candidates, the same for all of one value: which of them comes first means nothing.
    rising = -values
    equals = torch.searchsorted(rising, rising).clamp_(max=width - 1)  # NaN is nowhere
    before = (probs.cumsum(dim=1) - probs).gather(1, equals)
    # top_p 1 keeps all, whatever the rounding of the sum; the best value always stays.
    kept &= (before < top_p[:, None]) | (top_p[:, None] >= 1)
    kept &= values >= values[:, :1] + torch.log(min_p)[:, None]  # p ≥ min_p · p_max
    kept &= values > -math.inf  # what a grammar forbids
    kept |= values == values[:, :1]
    return kept


def gumbel_noise(keys: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Gumbel(0, 1) noise, float64, from int64 keys [R, 1], token ids [R or 1, K]: splitmix64(key + id · golden)."""
    x = keys + ids * _signed(_GOLDEN)  # int64 arithmetic wraps, which is what a hash wants
    x = (x ^ _shift_right(x, 30)) * _signed(_MIX1)
    x = (x ^ _shift_right(x, 27)) * _signed(_MIX2)
    x = x ^ _shift_right(x, 31)
    uniform = (_shift_right(x, 11).to(torch.float64) + 0.5) * 2.0**-53  # in (0, 1)
    return uniform.log_().neg_().log_().neg_()


def _is_unfiltered(p: SamplingParams) -> bool:
    return p.top_k == 0 and p.top_p >= 1 and p.min_p <= 0


def _draw(logits: torch.Tensor, keys: torch.Tensor, params: list[SamplingParams], most_candidates: int) -> torch.Tensor:
    """Tokens int64 [R] of non-greedy rows: logits float32 [R, V], keys int64 [R].

    Looks at the few best candidates only. A row without filters draws from those that are better than the last of them
    and one more, "the rest", with the probability of all other tokens; if that wins, one of them is drawn in the same
    way. A row whose filters reach past its candidates is drawn again from more of them.
    """
    vocab = logits.shape[1]
    width = min(most_candidates, vocab)
    temperature = torch.tensor([p.temperature for p in params], dtype=torch.float64, device=logits.device)[:, None]
    values, ids = logits.topk(width, dim=1)  # [R, K], best first
    scaled = values.double() / temperature
    total = torch.logsumexp(logits / temperature.float(), dim=1).double()  # [R]
    unfiltered = torch.tensor([_is_unfiltered(p) for p in params], device=logits.device)  # [R]
    inside = values > values[:, -1:] if width < vocab else torch.ones_like(values, dtype=torch.bool)
    kept = torch.where(unfiltered[:, None], inside, keep_mask(scaled, total, params))
    noisy = (scaled + gumbel_noise(keys[:, None], ids)).masked_fill_(~kept, -math.inf)
    best, place = noisy.max(dim=1)  # [R]
    tokens = ids.gather(1, place[:, None])[:, 0]
    if width == vocab:
        return tokens
    rest = _log_rest(scaled.masked_fill(~inside, -math.inf), total) + gumbel_noise(keys, torch.full_like(keys, vocab))
    has_rest = scaled[:, -1] > -math.inf  # otherwise a grammar forbids all others, whatever the rounding of `total`
    others = (unfiltered & has_rest & (rest > best)).nonzero()[:, 0]
    if len(others):
        limit = values[others, -1:]
        tokens[others] = _draw_other(logits[others], limit, temperature[others], keys[others])
    # Candidates suffice where a filter already refuses the last of them, and all of the top k are among them.
    past_end = kept[:, -1] | torch.tensor([p.top_k >= width for p in params], device=logits.device)
    short = (past_end & ~unfiltered).nonzero()[:, 0]
    if len(short):
        chosen = [params[i] for i in short.tolist()]
        tokens[short] = _draw(logits[short], keys[short], chosen, 16 * width)
    return tokens


def _draw_other(
    logits: torch.Tensor, limit: torch.Tensor, temperature: torch.Tensor, keys: torch.Tensor
) -> torch.Tensor:
    """Tokens int64 [R] of logits float32 [R, V] that are no better than `limit` [R, 1]."""
    ids = torch.arange(logits.shape[1], device=logits.device)[None, :]
    scaled = (logits.double() / temperature).masked_fill_(logits > limit, -math.inf)
    return scaled.add_(gumbel_noise(keys[:, None], ids)).argmax(dim=1)


def _log_rest(scaled: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
    """Log of the mass outside the candidates, float64 [R]: log(exp(total) - Σ exp(scaled)); -inf when none is left."""
    inside = torch.exp(torch.logsumexp(scaled, dim=1) - total)  # [R]
    return total + torch.log1p(-inside.clamp(max=1.0))


def _asking(params: list[SamplingParams]) -> list[int]:
    return [i for i, p in enumerate(params) if p.logprobs is not None]


def _logprobs(logits: torch.Tensor, params: list[SamplingParams], tokens: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Natural-log probabilities before temperature and filters, for the R rows that ask: of their tokens [R], of the
    most probable K [R, K], and these tokens [R, K]. Nothing where nobody asks."""
    rows = _asking(params)
    if not rows:
        return ()
    if len(rows) < len(params):
        (index,) = send([torch.tensor(rows)], logits.device)
        logits, tokens = logits[index], tokens[index]  # [R, V], [R]
    total = torch.logsumexp(logits, dim=1, keepdim=True)
    chosen = (logits.gather(1, tokens[:, None]) - total)[:, 0]
    width = min(max(params[i].logprobs or 0 for i in rows), logits.shape[1])
    values, ids = logits.topk(width, dim=1)
    return chosen, values - total, ids


def _splitmix(x: int) -> int:
    x = ((x ^ (x >> 30)) * _MIX1) & _MASK64
    x = ((x ^ (x >> 27)) * _MIX2) & _MASK64
    return x ^ (x >> 31)


def _signed(x: int) -> int:
    """The same 64 bits as a signed number, which is what torch.int64 takes."""
    x &= _MASK64
    return x - (1 << 64) if x >> 63 else x


def _shift_right(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical shift of int64."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
