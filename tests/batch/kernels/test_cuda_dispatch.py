"""What cuda.py makes of every kind of weight, those that no kernel knows included, against reference.py."""

import pytest
import torch

from batch.kernels import ops, reference
from batch.kernels.linears import DenseLinear, Experts, FusedLinear, Int4Linear
from tests.batch.kernels.test_triton_experts import error, gate_up, weight

pytestmark = pytest.mark.usefixtures("poisoned")
KINDS = ["dense", "int4", "int4-joined", "fp8-static", "groups of 16", "mixed"]


def make(kind, rows, columns, device):
    """One weight: "groups of 16" is INT4 that the kernels do not know."""
    if kind == "groups of 16":
        packed = torch.randint(-(2**31), 2**31 - 1, (rows, columns // 8), dtype=torch.int32).to(device)
        return Int4Linear(packed, (torch.randn(rows, columns // 16) * 0.02).to(device, torch.bfloat16), 16)
    return weight("int4" if kind == "mixed" else kind, rows, columns, torch.float32, device)


def make_gated(kind, rows, columns, device):
    if kind == "mixed":
        return FusedLinear((make("dense", rows, columns, device), make("int4", rows, columns, device)))
    if kind == "groups of 16":
        return FusedLinear((make(kind, rows, columns, device), make(kind, rows, columns, device)))
    return gate_up(kind, rows, columns, torch.float32, device)


@pytest.mark.parametrize("kind", KINDS)
def test_mlp_and_linear(kind, device):
    gated, down = make_gated(kind, 128, 128, device), make(kind, 128, 128, device)
    x = torch.randn(3, 128, device=device)
    with ops.cuda_only():
        got, products = ops.mlp(x, gated, down), ops.linear(x, gated)
    assert error(got, reference.mlp(x, gated, down)) < 2e-5
    assert error(products, reference.linear(x, gated)) < 2e-5


@pytest.mark.parametrize("kind", KINDS)
def test_moe(kind, device):
    experts = Experts(
        tuple(make_gated(kind, 128, 128, device) for _ in range(3)),
        tuple(make(kind, 128, 128, device) for _ in range(3)),
    )
    router, shared = DenseLinear(torch.randn(3, 128, device=device)), make_gated(kind, 128, 128, device)
    x, down = torch.randn(7, 128, device=device), make(kind, 128, 128, device)
    with ops.cuda_only():
        got = ops.moe(x, router, experts, shared, down)
    for ours, theirs in zip(got, reference.moe(x, router, experts, shared, down), strict=True):
        assert error(ours, theirs) < 2e-5
