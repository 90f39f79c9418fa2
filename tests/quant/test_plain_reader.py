"""Quantized checkpoints of others as floats: bit for bit what the compressed-tensors library makes of them."""

import pytest
import torch

from converters.conversion import How, convert
from converters.detect import open_checkpoint, open_source
from converters.targets import Options
from l4tool.core.errors import CheckpointError
from quant.plain_reader import PlainReader
from tests import checkpoints
from tests.converters.test_conversion import assert_same, tensors


def scheme(bits, number, strategy, **more):
    return {"num_bits": bits, "type": number, "strategy": strategy, "symmetric": True, "dynamic": False, **more}


SCHEMES = {
    "int4 asymmetric": (scheme(4, "int", "group", group_size=64, symmetric=False), "pack-quantized"),
    "int4 asymmetric channel": (scheme(4, "int", "channel", symmetric=False), "pack-quantized"),
    "int4 channel": (scheme(4, "int", "channel"), "pack-quantized"),
    "int4 groups of 32": (scheme(4, "int", "group", group_size=32), "pack-quantized"),
    "int4 activation order of calibration": (scheme(4, "int", "group", group_size=128, actorder="weight"),
                                             "pack-quantized"),
    "int8 packed": (scheme(8, "int", "group", group_size=128), "pack-quantized"),
    "int8 packed asymmetric": (scheme(8, "int", "channel", symmetric=False), "pack-quantized"),
    "int8": (scheme(8, "int", "channel"), "int-quantized"),
    "int8 asymmetric": (scheme(8, "int", "channel", symmetric=False), "int-quantized"),
    "int8 tensor": (scheme(8, "int", "tensor"), "int-quantized"),
    "fp8 tensor": (scheme(8, "float", "tensor"), "float-quantized"),
    "fp8 block": (scheme(8, "float", "block", block_structure=[128, 128]), "float-quantized"),
    "fp8 block that does not divide": (scheme(8, "float", "block", block_structure=[100, 96]), "naive-quantized"),
    "fp8 channel": (scheme(8, "float", "channel"), "float-quantized"),
}  # fmt: skip
RUNS = ("int4 groups of 32", "int4 activation order of calibration", "fp8 channel")  # what the engine takes


def config_of(name, activations=None):
    weights, stored_as = SCHEMES[name]
    group = {"targets": ["Linear"], "weights": weights, "input_activations": activations, "format": stored_as}
    return {
        "quant_method": "compressed-tensors", "quantization_status": "compressed", "format": stored_as,
        "config_groups": {"group_0": group}, "ignore": checkpoints.BASE_IGNORE,
    }  # fmt: skip


def decompressed(folder, module, config):
    """The library's floats of one module."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    scheme_ = checkpoints.library_scheme(QuantizationConfig(**config), module)
    stored = checkpoints.load(folder)
    parts = {name.removeprefix(f"{module}."): t for name, t in stored.items() if name.startswith(f"{module}.")}
    return BaseCompressor.get_value_from_registry(scheme_.format).decompress(parts, scheme_)["weight"]


MODULES = [
    "language_model.model.layers.1.feed_forward.experts.2.gate_proj",
    "language_model.model.layers.0.feed_forward.experts.0.down_proj",
    "language_model.model.layers.3.self_attn.k_proj",
    "language_model.model.layers.2.feed_forward.shared_expert.up_proj",
]


@pytest.mark.parametrize("name", SCHEMES)
def test_floats_are_the_librarys(name, scout_tiny, tmp_path):
    folder = checkpoints.compress_with(scout_tiny, tmp_path / "model", config_of(name))
    if name in RUNS:
        open_checkpoint(folder).close()
    else:
        with pytest.raises(CheckpointError, match="cannot be computed with") as error:
            open_checkpoint(folder)
        assert "l4tool convert" in error.value.hint
    reader = PlainReader(open_source(folder))
    for module in MODULES:
        expected = decompressed(folder, module, config_of(name)).to(torch.bfloat16)
        assert torch.equal(reader.read(f"{module}.weight"), expected), module
        for rows in (slice(0, 1), slice(5, 119), slice(101, 128)):
            assert torch.equal(reader.read(f"{module}.weight", rows), expected[rows]), (module, rows)
    convert(reader, tmp_path / "hf", Options("hf"), How())
    assert open_checkpoint(tmp_path / "hf").quantization is None
    assert_same({n: reader.read(n) for n in reader.tensors()}, tensors(tmp_path / "hf"))


@pytest.mark.parametrize("name", ["int8 packed", "fp8 block"])
def test_transformers_decompresses_to_the_same(name, scout_tiny, tmp_path):
    """The whole checkpoint, through its own loader: logits are equal. (It loads no packed zero points: 5.23.)"""
    from transformers import Llama4ForConditionalGeneration

    folder = checkpoints.compress_with(scout_tiny, tmp_path / "model", config_of(name))
    convert(PlainReader(open_source(folder)), tmp_path / "hf", Options("hf"), How())
    ids = torch.arange(100, 140)[None]
    with torch.no_grad():
        plain = Llama4ForConditionalGeneration.from_pretrained(tmp_path / "hf", dtype=torch.bfloat16)
        theirs = Llama4ForConditionalGeneration.from_pretrained(folder, dtype=torch.bfloat16)
        assert torch.equal(plain(input_ids=ids).logits, theirs(input_ids=ids).logits)


def test_inputs_in_the_order_of_their_activations(scout_tiny, tmp_path):
    """`actorder: group`, which newer libraries do not write any more: groups of inputs that do not lie together."""
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32

    config = config_of("int4 groups of 32")
    folder = checkpoints.compress_with(scout_tiny, tmp_path / "model", config)
    stored, expected = checkpoints.load(folder), {}
    for key in [key for key in stored if key.endswith(".weight_packed")]:
        module = key.removesuffix(".weight_packed")
        shape = torch.Size(stored[f"{module}.weight_shape"].tolist())
        order = torch.randperm(shape[1], generator=torch.Generator().manual_seed(len(module)))
        groups = torch.arange(shape[1]) // 32
        codes = unpack_from_int32(stored[key], 4, shape)
        if module in MODULES:
            expected[module] = decompressed(folder, module, config)[:, order]
        stored[key] = pack_to_int32(codes[:, order].contiguous(), 4)  # input j was input order[j] when it was grouped
        stored[f"{module}.weight_g_idx"] = groups[order].int()
    checkpoints.save(folder, stored)

    def reorder(c):
        c["quantization_config"]["config_groups"]["group_0"]["weights"]["actorder"] = "group"

    checkpoints.edit_config(folder, reorder)
    with pytest.raises(CheckpointError, match="activation ordering"):
        open_checkpoint(folder)
    reader = PlainReader(open_source(folder))
    for module, weight in expected.items():
        assert torch.equal(reader.read(f"{module}.weight"), weight)
        assert torch.equal(reader.read(f"{module}.weight", slice(9, 40)), weight[9:40])


def test_scales_of_activations_and_cache_are_left_out(scout_tiny, tmp_path):
    static = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True, "dynamic": False}
    config = config_of("fp8 tensor", static)
    folder = checkpoints.compress_with(scout_tiny, tmp_path / "model", config)
    stored = checkpoints.load(folder)
    stored |= {f"{module}.input_scale": torch.ones(1) for module in MODULES}
    stored["language_model.model.layers.0.self_attn.k_scale"] = torch.ones(1)
    checkpoints.save(folder, stored)
    checkpoints.edit_config(folder, lambda c: c["quantization_config"].update(kv_cache_scheme=static))
    reader = PlainReader(open_source(folder))
    assert torch.equal(reader.read(f"{MODULES[0]}.weight"), decompressed(folder, MODULES[0], config))


@pytest.mark.parametrize("kind", ["int4", "fp8", "mixed"])
def test_our_own_come_back_as_floats_too(kind, scout_tiny, tmp_path):
    """Names in `ignore` spelled out one by one, as llm-compressor writes them."""
    folder = checkpoints.compress(scout_tiny, tmp_path / "model", kind)
    explicit = [f"language_model.model.layers.{n}.feed_forward.router" for n in range(4)]

    def spell_out(c):
        ignore = c["quantization_config"]["ignore"]
        ignore.remove("re:.*router$")
        ignore += explicit

    checkpoints.edit_config(folder, spell_out)
    plain = PlainReader(open_source(folder))
    convert(plain, tmp_path / "experts", Options("hf-experts", text_only=True), How())
    found = tensors(tmp_path / "experts")
    assert_same({n: plain.read(n) for n in plain.tensors() if n.startswith("language_model.")}, found)
    config = checkpoints.quantization_config(kind)
    assert torch.equal(found[f"{MODULES[0]}.weight"], decompressed(folder, MODULES[0], config))
