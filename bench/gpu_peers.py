#!/usr/bin/env python3
"""torch's own grouped products and paged attention beside the Triton kernels, on one card, at Scout's shapes.

  python bench/gpu_peers.py

Alternately, medians; the ratio is torch's time by ours: below 1, torch's would be the better choice. Results are
compared, too. What torch cannot do on this card is named with its reason.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

import gpu_flex  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from gpu_measure import timed  # noqa: E402

from batch.kernels.linears import DenseLinear, Fp8Linear  # noqa: E402
from batch.kernels.paging import LayerCache, PagedBatch  # noqa: E402
from l4tool.core.console import table  # noqa: E402

ROUNDS = 5
MOST = 0.02  # of the largest value: a larger difference is no rounding of bfloat16's

Work = Callable[[], torch.Tensor]


@dataclass(frozen=True)
class Shapes:
    """Of the experts, and of attention: heads, kv heads, head_dim, tokens per block."""

    experts: int = 16
    hidden: int = 5120
    inner: int = 8192
    heads: int = 40
    kv_heads: int = 8
    head_dim: int = 128
    block: int = 32


@dataclass(frozen=True)
class Row:
    """Seconds of a case and how far the results are apart; `why`: torch's op does not run here."""

    case: str
    ours_s: float
    torch_s: float | None = None
    difference: float | None = None
    why: str = ""


def compare(case: str, ours: Work, theirs: Work, device: torch.device) -> Row:
    """Times both alternately, after one call of each that does not count."""
    expected = ours()
    try:
        found = theirs()
    except (RuntimeError, ValueError, NotImplementedError, TypeError) as error:
        return Row(case, timed(ours, device), why=str(error).strip().partition("\n")[0])
    difference = float((found.float() - expected.float()).abs().max() / expected.float().abs().max())
    pairs = [(timed(ours, device, 3), timed(theirs, device, 3)) for _ in range(ROUNDS)]
    mine, other = (sorted(times)[ROUNDS // 2] for times in zip(*pairs, strict=True))
    return Row(case, mine, other, difference)


def products(shapes: Shapes, tokens_each: list[int], device: torch.device) -> list[Row]:
    """Down projections of all experts, over rows that are sorted by expert."""
    from batch.kernels.triton_banks import Bank
    from batch.kernels.triton_experts import product
    from batch.kernels.triton_rows import dispatch, prepare

    experts, rows_found = shapes.experts, []
    weights = 0.02 * torch.randn(experts, shapes.hidden, shapes.inner, device=device).bfloat16()
    scales = torch.full((experts, shapes.hidden, 1), 0.001, device=device, dtype=torch.bfloat16)
    eights = (weights / scales).clamp(-448, 448).to(torch.float8_e4m3fn)
    for scheme in ("bf16", "fp8"):
        if scheme == "bf16":
            bank = Bank.of([DenseLinear(weight) for weight in weights], gated=False)
        else:
            bank = Bank.of([Fp8Linear(*pair, True) for pair in zip(eights, scales, strict=True)], gated=False)
        assert bank is not None
        for count in tokens_each:
            rows = count * experts
            expert = torch.arange(rows, device=device) // count
            logits = torch.full((rows, experts), -4.0, device=device).scatter(1, expert[:, None], 4.0).bfloat16()
            x = torch.randn(rows, shapes.inner, device=device).bfloat16()
            _, _, tiles = dispatch(logits)
            ready = prepare(x, bank)
            ends = count * torch.arange(1, experts + 1, device=device, dtype=torch.int32)

            def theirs(ready: Any = ready, x: torch.Tensor = x, ends: torch.Tensor = ends, scheme: str = scheme) -> Any:
                if scheme == "bf16":
                    return F.grouped_mm(x, weights.mT, offs=ends)
                by_row = F.ScalingType.RowWise
                return F.scaled_grouped_mm(
                    ready.rows, eights.mT, ready.extra, by_row, scales[..., 0].float(), by_row, offs=ends,
                    use_fast_accum=True,
                )  # fmt: skip

            def ours(ready: Any = ready, bank: Bank = bank, tiles: Any = tiles) -> torch.Tensor:
                return product(ready, bank, tiles)

            rows_found.append(compare(f"experts, {scheme}, {count} tokens each", ours, theirs, device))
    return rows_found


def attention(shapes: Shapes, cases: dict[str, tuple[int, int, int]], device: torch.device) -> list[Row]:
    """Cases: sequences, queries of each, keys of each."""
    from batch.kernels.triton_attention import paged_attention

    found = []
    for case, (sequences, queries, keys) in cases.items():
        width = -(-keys // shapes.block)
        shape = (sequences * width, shapes.block, shapes.kv_heads, shapes.head_dim)
        cache = LayerCache(*torch.randn(2, *shape, device=device).bfloat16())
        blocks = torch.randperm(shape[0], device=device).int().view(sequences, width)
        starts = queries * torch.arange(sequences + 1, device=device, dtype=torch.int32)
        lengths = torch.full((sequences,), keys, device=device, dtype=torch.int32)
        batch = PagedBatch(blocks, starts, lengths, queries, keys)
        q = torch.randn(sequences * queries, shapes.heads, shapes.head_dim, device=device).bfloat16()
        scale = shapes.head_dim**-0.5

        def ours(q: torch.Tensor = q, cache: LayerCache = cache, batch: PagedBatch = batch) -> torch.Tensor:
            return paged_attention(q, cache, batch, shapes.head_dim**-0.5)

        def theirs(
            q: torch.Tensor = q, cache: LayerCache = cache, batch: PagedBatch = batch, scale: float = scale
        ) -> torch.Tensor:
            from torch.nn.attention.varlen import varlen_attn

            options: dict[str, Any] = {"seqused_k": batch.cached_len, "block_table": batch.block_table}
            out = varlen_attn(
                q, cache.k, cache.v, batch.query_start, None, batch.max_query_len, batch.max_context_len, scale=scale,
                window_size=(-1, 0), enable_gqa=True, **options,
            )  # fmt: skip
            assert isinstance(out, torch.Tensor)
            return out.flatten(1)

        found.append(compare(f"attention, {case}: varlen_attn", ours, theirs, device))
        k, v = (part[blocks.long()].flatten(1, 2)[:, :keys] for part in (cache.k, cache.v))  # [S, C, K, D]
        name = f"attention, {case}: FlexAttention"
        try:
            flex = gpu_flex.paged(q.unflatten(0, (sequences, queries)), k, v, keys, scale)
        except (RuntimeError, TypeError, AttributeError) as error:
            found.append(Row(name, timed(ours, device), why=str(error).strip().partition("\n")[0]))
            continue
        found.append(compare(name, ours, flex, device))
    return found


def lines(rows: list[Row]) -> list[list[str]]:
    """As a table shows them."""
    shown = []
    for row in rows:
        if row.torch_s is None or row.difference is None:
            shown.append([row.case, f"{row.ours_s * 1e6:.0f}", "-", "-", row.why])
            continue
        note = "" if row.difference <= MOST else "the results differ: the ratio means nothing"
        ratio = f"{row.torch_s / row.ours_s:.2f}"
        shown.append([row.case, f"{row.ours_s * 1e6:.0f}", f"{row.torch_s * 1e6:.0f}", ratio, note])
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    arguments = parser.parse_args()

    from gpu_device import require_cuda

    device = require_cuda(arguments.device)
    shapes = Shapes()
    rows = products(shapes, [1, 4, 16, 128, 512], device)
    cases = {
        "decoding, 256 sequences, 1,024 keys": (256, 1, 1024), "decoding, 16 sequences, 8,192 keys": (16, 1, 8192),
        "prefill of 2,048": (1, 2048, 2048), "2,048 behind 6,144": (1, 2048, 8192),
    }  # fmt: skip
    rows += attention(shapes, cases, device)
    print(table(lines(rows), ["case", "ours µs", "torch µs", "torch / ours", "note"]))


if __name__ == "__main__":
    main()
