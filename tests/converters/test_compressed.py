"""Checkpoints written by the compressed-tensors library read back part by part."""

import shutil

import pytest
import torch

from converters.detect import open_checkpoint
from converters.names import is_linear
from l4tool.core.errors import CheckpointError
from tests import checkpoints

CASES = [
    ("scout_tiny", "int4"),
    ("scout_tiny", "mixed"),
    ("scout_tiny_text", "int4-all"),
    ("scout_tiny_text", "mixed"),
    ("maverick_tiny", "fp8"),
    ("maverick_tiny", "mixed"),
]
EXPERT = "language_model.model.layers.0.feed_forward.experts.1.down_proj"


@pytest.fixture(scope="module")
def int4(scout_tiny, tmp_path_factory):
    return checkpoints.compress(scout_tiny, tmp_path_factory.mktemp("int4") / "model", "int4")


@pytest.mark.parametrize("fixture, kind", CASES)
def test_every_part_is_read(request, tmp_path, fixture, kind):
    source = request.getfixturevalue(fixture)
    folder = checkpoints.compress(source, tmp_path / "model", kind)
    plain, reader = open_checkpoint(source), open_checkpoint(folder)
    assert reader.layout == "compressed-tensors" and reader.quantization["quant_method"] == "compressed-tensors"
    stored = checkpoints.load(folder)
    prefix = "" if reader.arch.vision else "language_model."
    assert {name.removeprefix(prefix) for name in reader.tensors()} == stored.keys()
    for name, info in reader.tensors().items():
        tensor, wanted = reader.read(name), stored[name.removeprefix(prefix)]
        assert tensor.dtype == wanted.dtype == info.dtype and tuple(tensor.shape) == info.shape
        assert torch.equal(tensor.view(-1).view(torch.uint8), wanted.view(-1).view(torch.uint8)), name
        assert info.nbytes == wanted.nbytes
    quantized = 0
    for name in plain.tensors():
        module = name.removesuffix(".weight")
        scheme = reader.linear_format(module)
        quantized += scheme is not None
        if not is_linear(name):
            assert scheme is None
        if scheme is None:
            assert torch.equal(reader.read(name), plain.read(name))
        elif scheme.kind == "int4":
            assert f"{module}.weight" not in reader.tensors()
            assert {f"{module}.weight_{part}" for part in ("packed", "scale", "shape")} <= reader.tensors().keys()
        else:
            assert reader.tensors()[name].dtype == torch.float8_e4m3fn
            assert reader.tensors()[f"{module}.weight_scale"].shape == (plain.tensors()[name].shape[0], 1)
    experts = sum(".experts." in name for name in plain.tensors())
    assert quantized == (experts if kind == "int4" else sum(map(is_linear, plain.tensors())))


def test_nibbles_and_scales_give_the_weight_back(int4, scout_tiny):
    """Element 8j+k in bits 4k..4k+3, stored as q+8; weight ≈ q · scale within half a step and bf16's rounding."""
    reader, plain = open_checkpoint(int4), open_checkpoint(scout_tiny)
    packed, scale = reader.read(f"{EXPERT}.weight_packed"), reader.read(f"{EXPERT}.weight_scale").float()
    weight = plain.read(f"{EXPERT}.weight").float()
    shifts = torch.arange(0, 32, 4)
    q = ((packed[..., None] >> shifts) & 15).flatten(1) - 8
    assert q.shape == weight.shape
    assert int(q.min()) == -8 and int(q.max()) == 7
    error = (q * scale.repeat_interleave(128, dim=1) - weight).abs()
    assert bool((error <= 0.56 * scale.repeat_interleave(128, dim=1) + 1e-6).all())


def test_fused_experts_beside_quantized_attention(scout_tiny, tmp_path):
    """Only attention quantized, experts left fused in bf16: both kinds of rows in one folder."""
    quantized = checkpoints.compress(scout_tiny, tmp_path / "fp8", "fp8")
    tensors = {n: t for n, t in checkpoints.load(quantized).items() if ".feed_forward." not in n}
    tensors |= {n: t for n, t in checkpoints.load(scout_tiny).items() if ".feed_forward." in n}
    checkpoints.save(quantized, tensors)
    checkpoints.edit_config(quantized, lambda c: c["quantization_config"]["ignore"].append("re:.*feed_forward.*"))
    reader, plain = open_checkpoint(quantized), open_checkpoint(scout_tiny)
    assert reader.linear_format("language_model.model.layers.0.self_attn.q_proj").kind == "fp8"
    assert reader.linear_format(EXPERT) is None
    assert torch.equal(reader.read(f"{EXPERT}.weight"), plain.read(f"{EXPERT}.weight"))


def spoiled(int4, tmp_path, edit):
    folder = tmp_path / "model"
    shutil.copytree(int4, folder)
    tensors = checkpoints.load(folder)
    edit(tensors)
    checkpoints.save(folder, tensors)
    return folder


SPOILS = [
    (lambda t: t.pop(f"{EXPERT}.weight_scale"), "lacks 1 tensor.*weight_scale"),
    (lambda t: t.update({f"{EXPERT}.weight_zero_point": torch.zeros(1)}), "does not have: .*weight_zero_point"),
    (lambda t: t.update({f"{EXPERT}.weight_g_idx": torch.zeros(1)}), "weight_g_idx"),
    (
        lambda t: t.update({f"{EXPERT}.weight_scale": t[f"{EXPERT}.weight_scale"][:, :1]}),
        r"shape \[256, 1\].*\[256, 3\]",
    ),
    (lambda t: t.update({f"{EXPERT}.weight_packed": t[f"{EXPERT}.weight_packed"].long()}), "is I64.*I32"),
    (lambda t: t.update({f"{EXPERT}.weight_scale": t[f"{EXPERT}.weight_scale"].double()}), "is F64"),
    (lambda t: t.update({f"{EXPERT}.weight_shape": torch.tensor([384, 256])}), r"says \[384, 256\].*\[256, 384\]"),
]


@pytest.mark.parametrize("edit, said", SPOILS)
def test_spoiled_parts(int4, tmp_path, edit, said):
    with pytest.raises(CheckpointError, match=said):
        open_checkpoint(spoiled(int4, tmp_path, edit))


@pytest.mark.parametrize(
    "ignored, said",
    [("re:.*lm_head$", "lm_head"), ("re:vision_model.*", "vision_model")],
)
def test_modules_that_must_stay_unquantized(int4, tmp_path, ignored, said):
    folder = tmp_path / "model"
    shutil.copytree(int4, folder)
    checkpoints.edit_config(folder, lambda c: c["quantization_config"]["ignore"].remove(ignored))
    with pytest.raises(CheckpointError, match=said) as caught:
        open_checkpoint(folder)
    assert "lies there unquantized" in caught.value.message


def test_a_router_that_no_ignore_names(int4, tmp_path):
    """Early versions listed the classes "Linear" alone in `ignore`, and Llama4Router is one by inheritance only."""
    folder = tmp_path / "model"
    shutil.copytree(int4, folder)
    checkpoints.edit_config(folder, lambda c: c["quantization_config"]["ignore"].remove("re:.*router$"))
    reader = open_checkpoint(folder)
    assert reader.linear_format("language_model.model.layers.0.feed_forward.router") is None
    assert reader.linear_format(EXPERT).kind == "int4"


def test_a_group_size_that_does_not_divide(int4, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(int4, folder)
    checkpoints.edit_config(
        folder, lambda c: c["quantization_config"]["config_groups"]["group_0"]["weights"].update(group_size=72)
    )
    with pytest.raises(CheckpointError, match="group_size 72 does not divide"):
        open_checkpoint(folder)
