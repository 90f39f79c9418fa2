"""Products with weights in panels against reference.py and exact arithmetic: all tile sizes, ragged groups."""

from dataclasses import replace

import pytest
import torch

from batch.kernels import ops, reference, vector_ir
from batch.kernels.linears import DenseLinear, Experts, Fp8Linear, FusedLinear, Int4Linear

if not vector_ir.has_avx512_bf16():
    pytest.skip("this CPU has no AVX512-BF16: weights are not packed in panels", allow_module_level=True)

from batch.kernels import cpu, cpu_activations, cpu_panels, cpu_routing, panels


def pack(parts, gated=False):
    return panels.pack_dense([parts], gated)[0]


int8_too = pytest.mark.parametrize(
    "int8", [False, pytest.param(True, marks=pytest.mark.skipif(not panels.has_int8(), reason="no AVX512-VNNI"))]
)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def error(got, exact):
    return ((got.double() - exact.double()).norm() / exact.double().norm()).item()


def dense(rows, columns):
    return (torch.randn(rows, columns) * 0.1).bfloat16()


def by_columns(weight):
    """The same weight as a fused expert lies on disk: [in, out]."""
    return weight.T.contiguous().T


def int4(rows, columns):
    packed = torch.randint(-(2**31), 2**31 - 1, (rows, columns // 8), dtype=torch.int32)
    return Int4Linear(packed, (torch.randn(rows, columns // 128) * 0.01).bfloat16(), 128)


def int4_panels(parts, gated, int8=False):
    return panels.pack_int4([[part.packed for part in parts]], [[part.scale for part in parts]], gated, int8)[0]


def exact_int4(part):
    """q · scale, not rounded."""
    q = reference.dequantize_int4(Int4Linear(part.packed, torch.ones_like(part.scale), 128), torch.float64)
    return q * part.scale.double().repeat_interleave(128, 1)


@pytest.mark.parametrize("columns", [32, 96, 1024])
@pytest.mark.parametrize("layout", [lambda w: w, by_columns], ids=["by rows", "by columns"])
def test_packing_dense_weights_loses_nothing(columns, layout):
    gate, up, odd = dense(48, columns), dense(48, columns), dense(19, columns)
    assert torch.equal(pack([layout(gate), layout(up)], gated=True).dense(), torch.cat([gate, up]))
    joined = [dense(64, columns), dense(32, columns), dense(32, columns)]
    assert torch.equal(pack([layout(w) for w in joined], gated=False).dense(), torch.cat(joined))
    assert torch.equal(pack([layout(odd)], gated=False).dense(), odd)


@pytest.mark.parametrize("layout", [lambda w: w, by_columns], ids=["by rows", "by columns"])
def test_packing_several_weights_at_once(layout):
    weights = [[dense(32, 64), dense(32, 64)] for _ in range(5)]
    for gated in (False, True):
        made = panels.pack_dense([[layout(part) for part in parts] for parts in weights], gated)
        assert all(torch.equal(ours.dense(), torch.cat(parts)) for ours, parts in zip(made, weights, strict=True))
    parts = [[int4(32, 256)] for _ in range(5)]
    made = panels.pack_int4([[p.packed for p in ps] for ps in parts], [[p.scale for p in ps] for ps in parts], False)
    for ours, (part,) in zip(made, parts, strict=True):
        assert torch.equal(ours.dense(), reference.dequantize_int4(part, torch.bfloat16))


def test_packing_int4_weights_loses_nothing():
    parts = [int4(48, 256), int4(48, 256)]
    expected = torch.cat([reference.dequantize_int4(part, torch.bfloat16) for part in parts])
    assert torch.equal(int4_panels(parts, gated=True).dense(), expected)
    assert torch.equal(int4_panels(parts, gated=False).dense(), expected)


def test_what_can_be_packed():
    assert panels.packs([64], 64, False) and panels.packs([7], 64, False) and panels.packs([16, 16], 64, True)
    assert not panels.packs([64], 48, False), "K in whole cache lines"
    assert not panels.packs([16, 16], 64, False) and not panels.packs([24, 24], 64, True), "parts in whole panels"
    assert panels.packs_int4([32], 256, False, 128) and not panels.packs_int4([32], 256, False, 64)
    assert not panels.packs_int4([32], 192, False, 128) and not panels.packs_int4([16], 256, False, 128)
    assert panels.packs_fp8([32], 64, False) and not panels.packs_fp8([32], 32, False)
    assert not panels.packs_fp8([16], 64, False) and panels.packs_fp8([16, 16], 64, True)


@pytest.mark.parametrize("rows", [*range(1, 14), 24, 25, 100])
def test_dense_product(rows):
    x, w = torch.randn(rows, 96).bfloat16(), dense(80, 96)
    got = ops.linear(x, pack([w], False))
    assert got.shape == (rows, 80)
    assert error(got, x.double() @ w.double().T) < 4e-3


def fp8(rows, columns, dynamic=False):
    """Every e4m3 value but NaN, subnormals and both zeros included."""
    bits = torch.randint(0, 255, (rows, columns), dtype=torch.uint8)
    bits[bits == 127] = 1
    return Fp8Linear(bits.view(torch.float8_e4m3fn), (torch.rand(rows, 1) * 0.01).bfloat16(), dynamic)


def fp8_panels(parts, gated):
    weights, scales = [part.weight for part in parts], [part.scale for part in parts]
    return panels.pack_fp8([weights], [scales], gated, parts[0].dynamic_activations)[0]


def test_packing_fp8_weights_loses_nothing():
    parts = [fp8(48, 128), fp8(48, 128)]
    for gated in (False, True):
        plain = fp8_panels(parts, gated).plain()
        assert torch.equal(plain.weight.view(torch.uint8), torch.cat([part.weight for part in parts]).view(torch.uint8))
        assert torch.equal(plain.scale, torch.cat([part.scale for part in parts]).float())


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("rows", [1, 5, 12, 30])
def test_fp8_product(rows, dynamic):
    x, part = torch.randn(rows, 128).bfloat16(), fp8(64, 128, dynamic)
    got = ops.linear(x, fp8_panels([part], False))
    assert error(got, reference.linear(x.float(), part)) < 4e-3
    gate_up, down = [fp8(64, 128, dynamic), fp8(64, 128, dynamic)], fp8(32, 64, dynamic)
    got = ops.mlp(x, fp8_panels(gate_up, True), fp8_panels([down], False))
    assert error(got, reference.mlp(x, FusedLinear(tuple(gate_up)), down)) < 3e-2


def test_every_fp8_value_is_expanded_exactly():
    """x picks one column at a time; the subnormals are what a shift of bits alone would lose."""
    values = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).reshape(4, 64).repeat(8, 1)
    weight = fp8_panels([Fp8Linear(values, torch.ones(32, 1).bfloat16(), False)], False)
    finite = values.float().nan_to_num(0)
    got = ops.linear(torch.eye(64).bfloat16(), weight).float().T
    column_has_nan = values.float().isnan().any(1, keepdim=True)
    assert torch.equal(torch.where(column_has_nan, finite * 0, got), torch.where(column_has_nan, finite * 0, finite))
    assert got[column_has_nan[:, 0]].isnan().all()


@int8_too
@pytest.mark.parametrize("rows", [*range(1, 14), 24, 25, 100])
def test_int4_product(rows, int8):
    x, part = torch.randn(rows, 384).bfloat16(), int4(96, 384)
    packed = int4_panels([part], False, int8)
    got = ops.linear(x, packed)
    assert error(got, reference.linear(x, packed)) < 6e-3
    assert error(got, x.double() @ exact_int4(part).T) < (1.5e-2 if int8 else 4e-3)


@int8_too
def test_float32_sums_are_as_exact_as_float32(int8, monkeypatch):
    """One row at a time, read before rounding: x of ±1 in bfloat16, so that int8 is exact too."""
    x, part = torch.randint(0, 2, (1, 2560)).bfloat16() * 2 - 1, int4(32, 2560)
    exact = (x.double() @ exact_int4(part).T)[0]
    got = ops.linear(x, int4_panels([part], False, int8))[0]
    half_steps = (got.double() - exact).abs() / (exact.abs() * 2.0**-8 + 1e-6)
    assert half_steps.max() <= 1.01


@pytest.mark.parametrize("kind", ["dense", "int4", pytest.param("int8", marks=int8_too.args[1][1].marks)])
@pytest.mark.parametrize("rows", [1, 5, 30])
def test_gated_mlp(kind, rows):
    x = torch.randn(rows, 128).bfloat16()
    if kind == "dense":
        gate_up = pack([dense(2048, 128), dense(2048, 128)], True)
        down = pack([dense(64, 2048)], False)
    else:
        gate_up = int4_panels([int4(2048, 128), int4(2048, 128)], True, kind == "int8")
        down = int4_panels([int4(64, 2048)], False, kind == "int8")
    assert error(ops.mlp(x, gate_up, down), reference.mlp(x, gate_up, down)) < 1.5e-2


def layer(kind, experts, hidden, inner, shared="same"):
    """(router, Experts, shared gate_up, shared down), packed."""

    def pair(kind):
        if kind == "dense":
            gate_up = pack([dense(inner, hidden), dense(inner, hidden)], True)
            return gate_up, pack([dense(hidden, inner)], False)
        gate_up = int4_panels([int4(inner, hidden), int4(inner, hidden)], True, kind == "int8")
        return gate_up, int4_panels([int4(hidden, inner)], False, kind == "int8")

    pairs = [pair(kind) for _ in range(experts)]
    router = pack([torch.randn(experts, hidden).bfloat16()], False)
    return router, Experts(*zip(*pairs, strict=True)), *pair(kind if shared == "same" else shared)


@pytest.mark.parametrize("kind, shared", [("dense", "same"), ("int4", "same"), ("int4", "dense")])
@pytest.mark.parametrize("tokens", [1, 3, 40, 300])
def test_moe(kind, shared, tokens):
    weights = layer(kind, 5, 128, 256, shared)
    x = torch.randn(tokens, 128).bfloat16()
    for ours, theirs in zip(ops.moe(x, *weights), reference.moe(x, *weights), strict=True):
        assert error(ours, theirs) < 1.5e-2


@pytest.mark.skipif(not panels.has_int8(), reason="no AVX512-VNNI")
@pytest.mark.parametrize("tokens", [1, 40])
def test_moe_with_int8_activations(tokens):
    weights = layer("int8", 5, 128, 256)
    x = torch.randn(tokens, 128).bfloat16()
    for ours, theirs in zip(ops.moe(x, *weights), reference.moe(x, *weights), strict=True):
        assert error(ours, theirs) < 2e-2


def test_moe_where_all_tokens_choose_one_expert():
    _, *rest = layer("dense", 4, 64, 96)
    biased = torch.zeros(4, 64).bfloat16()
    biased[2] = 1
    x = torch.rand(70, 64).bfloat16() + 0.1
    weights = (pack([biased], False), *rest)
    for ours, theirs in zip(ops.moe(x, *weights), reference.moe(x, *weights), strict=True):
        assert error(ours, theirs) < 1.5e-2


def test_many_rows_of_one_weight_are_cut_into_blocks(monkeypatch):
    monkeypatch.setattr(cpu_routing, "BLOCK_BYTES", 1)
    cpu_routing.one_weight.cache_clear()
    assert cpu_routing.block_rows(64) == 48
    try:
        weights = layer("dense", 3, 64, 96)
        x = torch.randn(500, 64).bfloat16()
        for ours, theirs in zip(ops.moe(x, *weights), reference.moe(x, *weights), strict=True):
            assert error(ours, theirs) < 1.5e-2
        assert error(ops.linear(x, weights[0]), reference.linear(x, weights[0])) < 4e-3
    finally:
        cpu_routing.one_weight.cache_clear()


@pytest.mark.parametrize("tokens, experts", [(1, 1), (1, 16), (50, 16), (2000, 3)])
def test_dispatch_equals_routing_by_torch(tokens, experts):
    logits = torch.randn(tokens, experts + 3).bfloat16()[:, :experts]  # rows that lie apart
    score, order, groups = cpu_routing.dispatch(logits, True, 128)
    best, chosen = logits.max(dim=-1)
    assert torch.equal(score, reference.sigmoid(best).bfloat16())
    assert torch.equal(order, chosen.argsort(stable=True))
    table = groups.table[1 : 1 + 3 * groups.table[0]].reshape(-1, 3)
    assert len(table) <= groups.most
    owner = torch.full((2 * tokens,), -1)
    for weight, first, rows in table.tolist():
        assert 0 < rows <= cpu_routing.block_rows(128) and (owner[first : first + rows] == -1).all()
        owner[first : first + rows] = weight
    assert torch.equal(owner[:tokens], chosen[order]) and (owner[tokens:] == experts).all()


def test_int8_rows_equal_the_reference():
    x = torch.randn(9, 256).bfloat16()
    x[3] = 0
    x[4, :128] = 1e-30
    q = cpu_activations.quantize_rows((x[:5], x[5:]))
    values, scale = reference.quantize_int8_groups(x, 128)
    order = torch.tensor(cpu_activations.INT8_ORDER)
    assert torch.equal(q.values.float(), values.unflatten(-1, (-1, 8))[..., order].flatten(1))
    assert torch.equal(q.scale, scale)
    assert torch.equal(q.base.float(), -8 * values.unflatten(-1, (-1, 128)).sum(-1))


def test_a_result_with_spread_rows_is_the_same():
    """Rows 4096 bytes apart would fall into one another's cache lines, so they are given room."""
    gate_up = pack([dense(2048, 64), dense(2048, 64)], True)
    x = torch.randn(20, 64).bfloat16()
    bank, groups = cpu_panels.Bank.of([gate_up]), cpu_routing.one_weight(20, 64)
    spread = cpu_panels.product((x,), bank, groups, spread=True)
    assert spread.stride(0) > 2048
    assert torch.equal(spread, cpu_panels.product((x,), bank, groups))


def test_rows_do_not_depend_on_their_company():
    """Up to the number of rows from which INT4 panels are expanded, whose values are rounded."""
    x = torch.randn(24, 256).bfloat16()
    for weight in (pack([dense(64, 256)], False), int4_panels([int4(64, 256)], False)):
        together = ops.linear(x, weight)
        assert all(torch.equal(ops.linear(x[i : i + n], weight), together[i : i + n]) for i in (0, 7) for n in (1, 5))


def test_not_finite_inputs_stay_not_finite():
    x = torch.randn(3, 128).bfloat16()
    x[1, 5] = float("nan")
    got = ops.linear(x, pack([dense(32, 128)], False))
    assert got[1].isnan().all() and got[0].isfinite().all() and got[2].isfinite().all()


def test_inputs_that_are_not_contiguous():
    wide = torch.randn(6, 256).bfloat16()
    weight = pack([dense(32, 128)], False)
    assert torch.equal(ops.linear(wide[:, :128], weight), ops.linear(wide[:, :128].contiguous(), weight))
    turned = torch.randn(128, 6).bfloat16().T
    assert error(ops.linear(turned, weight), reference.linear(turned, weight)) < 4e-3


def test_the_dispatcher_uses_the_panels(monkeypatch):
    calls = []
    product = cpu_panels.product
    monkeypatch.setattr(cpu_panels, "product", lambda *args, **options: calls.append(1) or product(*args, **options))
    weights = layer("int4", 4, 128, 256)
    cpu.moe(torch.randn(2, 128).bfloat16(), *weights)
    assert len(calls) == 3  # router, gate and up, down: the shared expert goes along
    with ops.reference_only():
        ops.moe(torch.randn(2, 128).bfloat16(), *weights)
    assert len(calls) == 3


def test_kinds_are_not_mixed_in_one_bank():
    part = int4_panels([int4(32, 128)], False)
    other = pack([dense(32, 128)], False)
    assert cpu_panels.same_kind([part, part]) and not cpu_panels.same_kind([part, other])
    assert not cpu_panels.same_kind([part, replace(part, int8_activations=True)])
    assert not cpu_panels.same_kind([DenseLinear(dense(32, 128))])
