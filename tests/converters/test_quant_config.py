"""quantization_config: matched as compressed-tensors matches it; anything unsupported is named."""

import copy
import json

import pytest
import torch
from compressed_tensors.quantization import QuantizationConfig
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from converters.arch_io import arch_from_config
from converters.names import canonical_rows, is_linear
from converters.quant_config import EMBEDDING, FP8_TOKEN, LINEAR, ROUTER, LinearFormat, parse_quantization
from l4tool.core.errors import CheckpointError
from tests import checkpoints
from tests.converters import published

BASE = "language_model.model.layers."
MODULES = [
    f"{BASE}0.self_attn.q_proj",
    f"{BASE}0.self_attn.k_proj",
    f"{BASE}1.self_attn.o_proj",
    f"{BASE}0.feed_forward.gate_proj",
    f"{BASE}1.feed_forward.experts.0.gate_proj",
    f"{BASE}1.feed_forward.experts.10.down_proj",
    f"{BASE}1.feed_forward.shared_expert.up_proj",
    "model.layers.1.feed_forward.experts.0.up_proj",
    "language_model.lm_head",
    "lm_head",
    "vision_model.model.layers.0.self_attn.q_proj",
    "multi_modal_projector.linear_1",
]
CLASSES = {f"{BASE}1.feed_forward.router": ROUTER, "language_model.model.embed_tokens": EMBEDDING}


def agrees(config):
    """Our format of every module equals the library's scheme of it."""
    spec, theirs = parse_quantization(copy.deepcopy(config), "config.json"), QuantizationConfig(**config)
    found = set()
    for name in [*MODULES, *CLASSES]:
        classes = CLASSES.get(name, LINEAR)
        ours, scheme = spec.format_of(name, classes), checkpoints.library_scheme(theirs, name, classes)
        found.add(ours)
        assert (ours is None) == (scheme is None), name
        if ours is not None:
            w = scheme.weights
            assert (ours.num_bits, ours.strategy, ours.group_size) == (w.num_bits, w.strategy, w.group_size), name
            assert ours.symmetric == w.symmetric
            assert ours.dynamic_activations == (scheme.input_activations is not None)
            assert ours.is_native and ours.packed == (scheme.format == "pack-quantized")
    return found


@pytest.mark.parametrize("kind, formats", [("int4", 1), ("int4-all", 1), ("fp8", 1), ("mixed", 2)])
def test_the_formats_that_this_project_writes(kind, formats):
    found = agrees(checkpoints.quantization_config(kind))
    assert len(found - {None}) == formats


def test_mixed_in_words():
    spec = parse_quantization(checkpoints.quantization_config("mixed"), "config.json")
    int4 = LinearFormat("int4", 4, "group", 128, True, None, packed=True)
    fp8 = LinearFormat("fp8", 8, "channel", None, True, FP8_TOKEN, packed=False)
    assert [spec.format_of(name) for name in MODULES] == [fp8] * 4 + [int4, int4, fp8, int4] + [None] * 4
    assert [spec.format_of(name, classes) for name, classes in CLASSES.items()] == [None, None]


TARGETS = [*MODULES, *CLASSES, "Linear", "Module", "Embedding", "Llama4Router", "linear", "self_attn",
           "re:.*self_attn.*", "re:self_attn", r"re:.*experts\.\d+\.", "re:.*experts.*gate_proj$", "re:model.*",
           "re:.*proj", "re:language_model.*", "re:", "re:.*lm_head"]  # fmt: skip


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    first=st.lists(st.sampled_from(TARGETS), min_size=1, max_size=4),
    second=st.lists(st.sampled_from(TARGETS), max_size=4),
    ignore=st.none() | st.lists(st.sampled_from(TARGETS), max_size=3),
)
def test_any_targets_and_ignores_match_as_the_library_matches(first, second, ignore):
    config = checkpoints.quantization_config("mixed")
    config["ignore"] = ignore
    config["config_groups"]["group_0"]["targets"] = first
    config["config_groups"]["group_1"]["targets"] = second
    agrees(config)


def test_explicit_names_for_a_whole_maverick():
    arch = arch_from_config(published.maverick(), "config.json")
    modules = [row.stored.removesuffix(".weight") for row in canonical_rows(arch) if is_linear(row.stored)]
    config = checkpoints.quantization_config("fp8")
    config["ignore"] += [name for name in modules if ".self_attn." in name]
    spec = parse_quantization(config, "config.json")
    assert sum(spec.format_of(name) is not None for name in modules) == len(modules) - 4 * 48


def change(config, way, value):
    *path, last = way.split(".")
    for key in path:
        config = config[key]
    config[last] = value


G = "config_groups.group_0."
UNSUPPORTED = [
    ("quant_method", "gptq", "quant_method 'gptq'"),
    ("quant_method", None, "quant_method None"),
    ("quantization_status", "calibration", "quantization_status 'calibration'"),
    ("sparsity_config", {"format": "sparse-24-bitmask"}, "sparse-24-bitmask"),
    ("transform_config", {"config_groups": {"a": {}}}, "transforms"),
    ("config_groups", {}, "config_groups"),
    ("config_groups", {"W4A16": ["Linear"]}, "preset group 'W4A16'"),
    ("config_groups", {"group_0": 3}, "group_0 must be an object"),
    (G + "weights", None, "activations only"),
    (G + "weights.actorder", ["group"], "activation ordering"),
    (G + "weights.actorder", "other", "activation ordering"),
    (G + "weights.num_bits", "4", "num_bits"),
    (G + "weights.num_bits", 1, "1-bit int weights"),
    (G + "weights.num_bits", 16, "16-bit int weights"),
    (G + "weights.type", "float", "4-bit float weights"),
    (G + "weights.type", "complex", "4-bit complex weights"),
    (G + "weights.strategy", "block", "block_structure must be two positive integers"),
    (G + "weights.strategy", "tensor_group", "tensor_group"),
    (G + "weights.dynamic", True, "dynamically quantized"),
    (G + "weights.scale_dtype", "torch.uint8", "scales as 'torch.uint8'"),
    (G + "weights.group_size", 0, "group_size"),
    (G + "format", "nvfp4-pack-quantized", "nvfp4-pack-quantized"),
    (G + "format", "float-quantized", "format 'float-quantized' for 4-bit int weights"),
    (G + "format", "marlin-24", "marlin-24"),
    (G + "format", "dense", "format 'dense'"),
    (G + "input_activations", checkpoints.FP8_TOKEN | {"dynamic": False}, "static 8-bit float activations"),
    (G + "input_activations", checkpoints.FP8_TOKEN | {"dynamic": "local"}, "8-bit float activations"),
    (G + "input_activations", checkpoints.FP8_TOKEN | {"strategy": "tensor_group"}, "strategy 'tensor_group'"),
    (G + "targets", "Linear", "targets must be a list"),
    (G + "targets", ["re:("], "not a regular expression"),
    ("ignore", [3], "ignore must be a list"),
    ("ignore", ["re:["], "not a regular expression"),
]


@pytest.mark.parametrize("way, value, said", UNSUPPORTED)
def test_what_cannot_be_read_is_named(way, value, said):
    config = checkpoints.quantization_config("int4")
    change(config, way, value)
    with pytest.raises(CheckpointError, match=said) as caught:
        parse_quantization(config, "folder/config.json")
    assert "folder/config.json" in caught.value.message


W = G + "weights."
TENSOR = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True, "dynamic": False}
BLOCKS = {"num_bits": 8, "type": "float", "strategy": "group", "group_size": 128, "symmetric": True, "dynamic": True}
INT8_TOKEN = checkpoints.FP8_TOKEN | {"type": "int"}
FOREIGN = [
    ("int4", {W + "symmetric": False}, "INT4, asymmetric, one scale for each 128 inputs"),
    ("int4", {W + "actorder": "group"}, "INT4, symmetric, one scale for each 128 inputs in a stored order"),
    ("int4", {W + "actorder": "dynamic"}, "INT4, symmetric, one scale for each 128 inputs in a stored order"),
    ("int4", {W + "group_size": 12}, "INT4, symmetric, one scale for each 12 inputs"),
    ("int4", {W + "strategy": None, W + "group_size": -1}, "INT4, symmetric, one scale for each output"),
    ("int4", {W + "strategy": None, W + "group_size": None}, "INT4, symmetric, one scale"),
    ("int4", {W + "num_bits": 8}, "INT8, symmetric, one scale for each 128 inputs"),
    ("int4", {W + "num_bits": 3, W + "strategy": "channel", W + "group_size": None},
     "INT3, symmetric, one scale for each output"),
    ("int4", {G + "format": "int-quantized"}, "INT4, symmetric, one scale for each 128 inputs"),
    ("int4", {G + "input_activations": INT8_TOKEN},
     "INT4, symmetric, one scale for each 128 inputs, activations in INT8 per token at run time"),
    ("fp8", {W + "strategy": "tensor", G + "input_activations": TENSOR},
     "FP8 (e4m3fn), one scale, activations in FP8, scale stored"),
    ("fp8", {W + "strategy": "block", W + "block_structure": [128, 64], G + "input_activations": BLOCKS},
     "FP8 (e4m3fn), one scale for each block of 128 × 64, activations in FP8 per 128 inputs at run time"),
    ("fp8", {W + "strategy": "block", W + "block_structure": "128x128", G + "input_activations": None},
     "FP8 (e4m3fn), one scale for each block of 128 × 128"),
    ("fp8", {W + "symmetric": False, G + "input_activations": None},
     "FP8 (e4m3fn), asymmetric, one scale for each output"),
    ("fp8", {W + "strategy": "group", W + "group_size": 64, G + "input_activations": INT8_TOKEN},
     "FP8 (e4m3fn), one scale for each 64 inputs, activations in INT8 per token at run time"),
]  # fmt: skip


@pytest.mark.parametrize("kind, changes, said", FOREIGN)
def test_what_can_only_be_dequantized(kind, changes, said):
    config = checkpoints.quantization_config(kind)
    for way, value in changes.items():
        change(config, way, value)
    form = parse_quantization(config, "config.json").format_of(MODULES[4])
    assert str(form) == said and not form.is_native


@pytest.mark.parametrize("stored_as", [None, "mixed-precision"])
@pytest.mark.parametrize("weights, activations", [
    (checkpoints.INT4, None), (checkpoints.INT4, INT8_TOKEN), (checkpoints.FP8, None),
    (checkpoints.FP8, checkpoints.FP8_TOKEN),
])  # fmt: skip
def test_a_group_without_a_format_is_stored_as_the_library_infers(weights, activations, stored_as):
    from compressed_tensors.compressors.format import infer_module_format

    config = checkpoints.quantization_config("int4") | {"format": "mixed-precision"}
    config["config_groups"]["group_0"] = {"targets": ["Linear"], "weights": weights, "input_activations": activations}
    theirs = infer_module_format(torch.nn.Linear, QuantizationConfig(**config).config_groups["group_0"])
    config["format"] = stored_as
    assert parse_quantization(config, "config.json").format_of(MODULES[4]).packed == (theirs == "pack-quantized")


def test_early_versions_call_a_compressed_checkpoint_frozen():
    config = checkpoints.quantization_config("int4")
    change(config, "quantization_status", "frozen")
    assert parse_quantization(config, "config.json").format_of(MODULES[4]).is_native


@pytest.mark.parametrize("way", ["kv_cache_scheme", G + "output_activations"])
def test_what_is_asked_of_activations_alone_is_noted(way):
    config = checkpoints.quantization_config("int4")
    change(config, way, TENSOR)
    spec = parse_quantization(config, "config.json")
    assert len(spec.for_activations) == 1 and spec.format_of(MODULES[4]).is_native


@pytest.mark.parametrize("order", [None, False, "weight", "static"])
def test_orders_that_only_steer_calibration_are_read(order):
    config = checkpoints.quantization_config("int4")
    change(config, G + "weights.actorder", order)
    assert parse_quantization(config, "config.json").format_of(MODULES[4]).kind == "int4"


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-2, 200)
    | st.floats()
    | st.sampled_from(["int", "re:(", "group", "Linear"]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["a", "targets"]), inner, max_size=2),
    max_leaves=4,
)


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data(), kind=st.sampled_from(["int4", "fp8", "mixed"]))
def test_fuzzed_configs_are_read_or_refused(data, kind):
    config = json.loads(json.dumps(checkpoints.quantization_config(kind)))
    for _ in range(data.draw(st.integers(1, 2))):
        inner = config
        while True:
            key = data.draw(st.sampled_from(sorted(inner)))
            if not isinstance(inner[key], dict) or not inner[key] or data.draw(st.booleans()):
                break
            inner = inner[key]
        inner[key] = data.draw(JSON)
        if not inner:
            break
    try:
        spec = parse_quantization(config, "config.json")
    except CheckpointError as error:
        assert "config.json" in error.message
        return
    for name in MODULES:
        scheme = spec.format_of(name)
        assert scheme is None or scheme.kind in ("fp8", *(f"int{bits}" for bits in range(2, 9)))
        assert scheme is None or str(scheme)
