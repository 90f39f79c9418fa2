"""`--format quanto`: what we write, optimum-quanto's own `requantize` loads."""

import json

import pytest
import torch
from optimum.quanto import HqqOptimizer, MaxOptimizer, QLinear, qint4, quantize_weight, requantize
from torch import nn

from converters.detect import open_checkpoint
from converters.writing.encoder import Scratch
from l4tool.core.errors import CheckpointError
from quant import pipeline, quanto
from quant.schemes import class_of, make_recipe
from tests import checkpoints


class Tree(nn.Module):
    """Modules and parameters under the canonical names: every Linear one of its own, the rest plain parameters."""

    def __init__(self, reader):
        super().__init__()
        for name, info in reader.tensors().items():
            parent, (*path, leaf) = self, name.split(".")
            linear = class_of(name) or name.endswith("router.weight")
            for part in path[: -1 if linear else None]:
                if not hasattr(parent, part):
                    parent.add_module(part, nn.Module())
                parent = getattr(parent, part)
            if linear:
                out, cols = info.shape
                parent.add_module(path[-1], nn.Linear(cols, out, bias=False, device="meta", dtype=info.dtype))
            else:
                parent.register_parameter(leaf, nn.Parameter(torch.empty(info.shape, dtype=info.dtype, device="meta")))


@pytest.mark.parametrize(
    ("fixture", "options"),
    [
        ("scout_tiny", {"scheme": "int4", "scale": "hqq"}),
        ("maverick_tiny", {"scheme": "mixed", "attention": "fp8"}),
    ],
)
def test_requantize_loads_it(fixture, options, request, tmp_path):
    source, out = request.getfixturevalue(fixture), tmp_path / "out"
    recipe = make_recipe(format="quanto", **options)
    reader = open_checkpoint(source)
    report = pipeline.quantize(reader, out, recipe, pipeline.Options())
    state = checkpoints.load(out)
    stored = set(state)
    qmap = json.loads((out / "quantization_map.json").read_text())
    model = Tree(reader)
    with quanto._python_unpack():  # else quanto compiles C++ for a minute
        requantize(model, dict(state), qmap, device=torch.device("cpu"))
    loaded = {name for name, module in model.named_modules() if isinstance(module, QLinear)}
    assert loaded == set(qmap) == {n.removesuffix(".weight") for n in reader.tensors() if recipe.kind_of(n) != "bf16"}
    assert not any("router" in name for name in qmap)
    own = set(model.state_dict()) - {f"{n}.{io}_scale" for n in loaded for io in ("input", "output")}
    assert own == stored
    with quanto._python_unpack():
        for name in sorted(loaded)[:: max(1, len(loaded) // 12)]:
            weight = reader.read(name + ".weight")
            back = model.get_submodule(name).weight.dequantize().detach()
            relative = float((back.double() - weight.double()).norm() / weight.double().norm())
            assert report["tensors"][name + ".weight"]["relative_error"] == pytest.approx(
                relative, rel=1e-3
            )  # its CPU kernel moves the shift
    with pytest.raises(CheckpointError, match="optimum-quanto"):
        open_checkpoint(out)


@pytest.mark.parametrize(("method", "optimizer"), [("absmax", MaxOptimizer), ("hqq", HqqOptimizer)])
def test_bytes_equal_quantos_own(method, optimizer):
    w = torch.randn(64, 256, generator=torch.Generator().manual_seed(0)).bfloat16()
    info = type("Info", (), {"name": "w", "shape": w.shape, "dtype": w.dtype})
    encoded = quanto.QuantoInt4(method).encode(w, info, "m.weight", 0, Scratch())
    with quanto._python_unpack():
        scale, shift = optimizer()(w, qtype=qint4, axis=0, group_size=128)
    theirs = quantize_weight(w, qint4, 0, scale=scale, shift=shift, group_size=128, optimized=False)
    state = {}
    theirs.save_to_state_dict(state, "m.weight.", False)
    assert {name: tensor.tolist() for name, tensor, _ in encoded.pieces} == {n: t.tolist() for n, t in state.items()}


@pytest.mark.parametrize("method", ["absmax", "hqq"])
def test_zero_and_constant_groups_stay_finite(method):
    w = torch.randn(4, 256).bfloat16()
    w[0], w[1, :128] = 0, 0.5
    info = type("Info", (), {"name": "w", "shape": w.shape, "dtype": w.dtype})
    for encoder in (quanto.QuantoInt4(method), quanto.QuantoFp8()):
        encoded = encoder.encode(w, info, "m.weight", 0, Scratch())
        assert all(tensor.float().isfinite().all() for _, tensor, _ in encoded.pieces)
        assert float(encoded.error[0]) == 0
        assert float(encoded.error.sum()) < 0.02 * float(encoded.square.sum())
