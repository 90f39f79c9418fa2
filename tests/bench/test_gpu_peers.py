"""bench/gpu_peers.py on a CPU: torch's products agree with the kernels', what torch lacks is named, the table."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCH = Path(__file__).resolve().parents[2] / "bench"
sys.path.insert(0, str(BENCH))
import gpu_flex  # noqa: E402
import gpu_peers  # noqa: E402

sys.path.remove(str(BENCH))
SHAPES = gpu_peers.Shapes(experts=2, hidden=32, inner=128, heads=4, kv_heads=2, head_dim=16, block=16)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(gpu_peers, "timed", lambda work, device, rounds=1: (work(), 1e-6)[1])


def test_products_agree(device):
    bf16, fp8 = gpu_peers.products(SHAPES, [3], device)
    assert bf16.difference is not None and bf16.difference < gpu_peers.MOST
    assert fp8.why or fp8.difference < gpu_peers.MOST  # torch has no FP8 product on a CPU


def test_attention_is_compared_or_says_why(device):
    cases = {"decode": (2, 1, 20), "prefill": (1, 5, 9)}
    for row in gpu_peers.attention(SHAPES, cases, device):
        may_lack = "varlen" in row.case or device.type == "cuda"
        assert (may_lack and row.why) or row.difference < gpu_peers.MOST, row


@pytest.mark.parametrize("queries, keys", [(1, 20), (1, 16), (5, 9), (37, 70), (64, 64)])
def test_tiles_see_their_pages(queries, keys, monkeypatch):
    """What FlexAttention is told to look at, on a device, is all that its mask lets it see, and whole where it says."""
    q, k, v = torch.randn(2, queries, 4, 16), torch.randn(2, keys, 2, 16), torch.randn(2, keys, 2, 16)
    made, make = [], gpu_flex.BlockMask.from_kv_blocks
    monkeypatch.setattr(gpu_flex.BlockMask, "from_kv_blocks", lambda *a, **o: made.append(make(*a, **o)) or made[0])
    gpu_flex.paged(q, k, v, keys, 0.25, page=16, tile=8)
    (mask,) = made
    pages, tiles = 2 * -(-keys // 16), -(-queries // 8)
    for b in range(2):
        for tile in range(tiles):
            rows = torch.arange(8 * tile, min(8 * tile + 8, queries))[:, None]
            for page in range(pages):
                sees = mask.mask_mod(torch.tensor(b), torch.tensor(0), rows, torch.arange(16 * page, 16 * page + 16))
                partial = mask.kv_indices[b, 0, tile, : mask.kv_num_blocks[b, 0, tile]].tolist()
                whole = mask.full_kv_indices[b, 0, tile, : mask.full_kv_num_blocks[b, 0, tile]].tolist()
                assert sees.any() == (page in partial + whole) and (page not in whole or sees.all())


def test_the_table():
    rows = [
        gpu_peers.Row("a", 1e-6, 2e-6, 0.001),
        gpu_peers.Row("b", 1e-6, 2e-6, 0.5),
        gpu_peers.Row("c", 1e-6, why="not on this card"),
    ]
    assert gpu_peers.lines(rows) == [
        ["a", "1", "2", "2.00", ""],
        ["b", "1", "2", "2.00", "the results differ: the ratio means nothing"],
        ["c", "1", "-", "-", "not on this card"],
    ]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_it_says_so():
    done = subprocess.run([sys.executable, BENCH / "gpu_peers.py"], capture_output=True, text=True)
    assert done.returncode == 1 and "needs a CUDA device" in done.stderr and "Traceback" not in done.stderr
