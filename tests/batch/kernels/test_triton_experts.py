"""The grouped products against reference.py: ragged and empty experts, one token, odd tails, every kind of weight."""

import pytest
import torch

from batch.kernels import reference
from batch.kernels.linears import DenseLinear, Experts, Fp8Linear, FusedLinear, Int4Linear

pytest.importorskip("triton")
from batch.kernels import triton_banks, triton_experts, triton_rows, triton_support
from batch.kernels.triton_banks import Bank

DTYPES = [torch.float32, torch.bfloat16]
MOST = {torch.float32: 2e-5, torch.bfloat16: 8e-3}
KINDS = ["dense", "int4", "int4-joined", "fp8", "fp8-static"]
ASSIGNED = {
    "one token": [2],
    "all to one": [1] * 20,
    "ragged": [0] * 37 + [3] + [1] * 18,
    "mixed": [3, 0, 3, 1, 0, 3, 3, 0, 1],
}

pytestmark = pytest.mark.usefixtures("poisoned")


def error(got, exact):
    assert torch.isfinite(got.float()).all()
    return ((got.double() - exact.double()).norm() / exact.double().norm()).item()


def weight(kind, rows, columns, dtype, device, group=128):
    """One random weight; the signs of INT4 scales are as `quantize` writes them."""
    if kind == "dense":
        return DenseLinear((torch.randn(rows, columns) * 0.1).to(device, dtype))
    if kind.startswith("int4"):
        packed = torch.randint(-(2**31), 2**31 - 1, (rows, columns // 8), dtype=torch.int32)
        return Int4Linear(
            packed.to(device), (torch.randn(rows, columns // group) * 0.02).to(device, torch.bfloat16), group
        )
    values, scale = torch.randn(rows, columns).to(torch.float8_e4m3fn), torch.rand(rows, 1) * 0.1
    return Fp8Linear(values.to(device), scale.to(device, torch.bfloat16), kind == "fp8")


def gate_up(kind, rows, columns, dtype, device, group=128):
    if kind.endswith("joined"):
        return weight(kind, 2 * rows, columns, dtype, device, group)
    halves = [weight(kind, rows, columns, dtype, device, group) for _ in range(2)]
    return DenseLinear(torch.cat([half.weight for half in halves])) if kind == "dense" else FusedLinear(tuple(halves))


def logits_for(assigned, experts, dtype, device):
    logits = torch.randn(len(assigned), experts)
    logits[torch.arange(len(assigned)), torch.tensor(assigned)] = 4 + torch.rand(len(assigned))
    return logits.to(device, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", ASSIGNED)
def test_routed_experts(kind, dtype, case, device):
    experts, hidden, inner = 4, 128, 256
    ups = tuple(gate_up(kind, inner, hidden, dtype, device) for _ in range(experts))
    downs = tuple(weight(kind, hidden, inner, dtype, device) for _ in range(experts))
    x = torch.randn(len(ASSIGNED[case]), hidden).to(device, dtype)
    logits = logits_for(ASSIGNED[case], experts, dtype, device)
    banks = Bank.of(ups, True), Bank.of(downs, False)
    got = triton_experts.routed_experts(x, logits, *banks)
    best, expert = logits.max(-1)
    expected = reference.routed_experts(x, expert, reference.sigmoid(best).to(dtype), Experts(ups, downs))
    # A value of e4m3 at a rounding edge falls either way.
    assert error(got, expected) < (3e-2 if kind == "fp8" else MOST[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind, rows, columns", [
    ("dense", 70, 48), ("dense", 200, 144), ("int4", 72, 256), ("fp8", 130, 128), ("fp8", 40, 144),
    ("fp8-static", 64, 208),
])  # fmt: skip
@pytest.mark.parametrize("tokens", [1, 19, 150])
def test_linear(kind, rows, columns, tokens, dtype, device):
    one = weight(kind, rows, columns, dtype, device)
    x = torch.randn(tokens, columns).to(device, dtype)
    got = triton_experts.linear(x, Bank.of([one], False))
    assert error(got, reference.linear(x, one)) < (2e-2 if kind == "fp8" else MOST[dtype])


@pytest.mark.parametrize("group", [32, 64, 128])
def test_group_sizes_and_turned_scales(group, device):
    one = weight("int4", 48, 256, torch.float32, device, group)
    one = Int4Linear(one.packed, one.scale.T.contiguous().T, group)
    x = torch.randn(5, 256, device=device)
    assert error(triton_experts.linear(x, Bank.of([one], False)), reference.linear(x, one)) < 2e-5


def test_k_is_shared_where_tiles_are_few(device):
    one = weight("int4", 64, 4096, torch.float32, device)
    x = torch.randn(3, 4096, device=device)
    assert triton_experts.splits_for(1, 32) == 8
    assert error(triton_experts.linear(x, Bank.of([one], False)), reference.linear(x, one)) < 2e-5


@pytest.mark.parametrize("splits, programs, steps", [(8, 1, 64), (2, 1, 8), (1, 1, 7), (1, 500, 64), (4, 100, 64)])
def test_splits(splits, programs, steps):
    assert triton_experts.splits_for(programs, steps) == splits


@pytest.mark.parametrize("experts, tokens", [(2, 1), (5, 16), (16, 300), (128, 70)])
def test_dispatch_orders_by_expert(experts, tokens, device):
    logits = torch.randn(tokens, experts, device=device)
    logits[:, 1] -= 100  # nobody's
    score, order, tiles = triton_rows.dispatch(logits)
    best, expert = logits.max(-1)
    torch.testing.assert_close(score, best.sigmoid())
    assert torch.equal(order.long(), expert.argsort(stable=True))
    seen = []
    for owner, first, end in tiles.table.T.tolist():
        if owner >= 0:
            rows = range(first, min(first + tiles.rows, end))
            assert len(rows) and (expert[order[rows.start : rows.stop].long()] == owner).all()
            seen += rows
    assert sorted(seen) == list(range(tokens))
    assert tiles.count == (tokens - min(tokens, experts)) // tiles.rows + min(tokens, experts)


def test_tokens_are_quantized_as_in_the_reference(device):
    x = torch.randn(40, 256, device=device) * torch.logspace(-4, 4, 40, device=device)[:, None]
    x[3] = 0
    x[5, :200] *= 1e-4  # below e4m3's normal numbers once divided by the scale
    bank = Bank.of([weight("fp8", 16, 256, torch.float32, device)], False)
    made = triton_rows.prepare(x, bank)
    values, scale = reference.quantize_fp8_tokens(x)
    torch.testing.assert_close(made.extra, scale[:, 0])
    differ = made.rows.float() != values
    assert differ.float().mean() < 1e-3  # a division rounded the other way


def test_nan_stays_nan(device):
    one = weight("fp8", 16, 128, torch.float32, device)
    x = torch.randn(2, 128, device=device)
    x[1, 7] = float("nan")
    got = triton_experts.linear(x, Bank.of([one], False))
    assert torch.isfinite(got[0]).all() and got[1].isnan().all()


def test_unlike_weights_have_no_bank(device):
    dense, int4 = weight("dense", 64, 128, torch.float32, device), weight("int4", 64, 128, torch.float32, device)
    odd_group = Int4Linear(int4.packed, int4.scale.expand(64, 8).contiguous(), 16)
    turned = DenseLinear(torch.randn(128, 64, device=device).T)
    fused = FusedLinear((dense, int4))
    for weights, gated in (
        ([dense, int4], False),
        ([odd_group], False),
        ([turned], False),
        ([fused], True),
        ([fused], False),
    ):
        assert Bank.of(weights, gated) is None


def test_older_devices_do_without_fp8(device, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    knows_fp8 = triton_support.knows_fp8.__wrapped__
    assert not knows_fp8(torch.device("cuda")) and knows_fp8(torch.device("cpu"))
    monkeypatch.setattr(triton_banks, "knows_fp8", lambda device: False)
    assert Bank.of([weight("fp8", 64, 128, torch.float32, device)], False) is None
    assert Bank.of([weight("int4", 64, 128, torch.float32, device)], False) is not None
