"""quantization_config: matched as compressed-tensors matches it; anything unsupported is named."""

import copy
import json

import pytest
from compressed_tensors.quantization import QuantizationConfig
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from converters.arch_io import arch_from_config
from converters.names import canonical_rows, is_linear
from converters.quant_config import EMBEDDING, LINEAR, ROUTER, LinearFormat, parse_quantization
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
    return found


@pytest.mark.parametrize("kind, formats", [("int4", 1), ("int4-all", 1), ("fp8", 1), ("mixed", 2)])
def test_the_formats_that_this_project_writes(kind, formats):
    found = agrees(checkpoints.quantization_config(kind))
    assert len(found - {None}) == formats


def test_mixed_in_words():
    spec = parse_quantization(checkpoints.quantization_config("mixed"), "config.json")
    int4 = LinearFormat("int4", 4, "group", 128, True, False)
    fp8 = LinearFormat("fp8", 8, "channel", None, True, True, "float", packed=False)
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
    ("quantization_status", "frozen", "quantization_status 'frozen'"),
    ("kv_cache_scheme", {"num_bits": 8}, "quantized KV cache"),
    ("sparsity_config", {"format": "sparse-24-bitmask"}, "sparse-24-bitmask"),
    ("transform_config", {"config_groups": {"a": {}}}, "transforms"),
    ("config_groups", {}, "config_groups"),
    ("config_groups", {"W4A16": ["Linear"]}, "preset group 'W4A16'"),
    ("config_groups", {"group_0": 3}, "group_0 must be an object"),
    (G + "weights", None, "activations only"),
    (G + "weights.symmetric", False, "asymmetric"),
    (G + "weights.actorder", "group", "activation ordering"),
    (G + "weights.actorder", ["group"], "activation ordering"),
    (G + "weights.num_bits", 8, "8-bit int weights with strategy 'group'"),
    (G + "weights.num_bits", "4", "num_bits"),
    (G + "weights.type", "float", "4-bit float weights"),
    (G + "weights.strategy", "channel", "strategy 'channel'"),
    (G + "weights.strategy", "block", "strategy 'block'"),
    (G + "weights.strategy", "tensor_group", "tensor_group"),
    (G + "weights.dynamic", True, "dynamically quantized"),
    (G + "weights.group_size", 0, "group_size"),
    (G + "weights.group_size", 12, "multiple of 8"),
    (G + "format", "nvfp4-pack-quantized", "nvfp4-pack-quantized"),
    (G + "format", "int-quantized", "int-quantized"),
    (G + "input_activations", checkpoints.FP8_TOKEN, "INT4 weights with quantized activations"),
    (G + "input_activations", checkpoints.FP8_TOKEN | {"dynamic": False}, "static activation scales"),
    (G + "input_activations", checkpoints.FP8_TOKEN | {"type": "int"}, "8-bit int activations"),
    (G + "output_activations", {"num_bits": 8}, "output_activations"),
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


def test_per_tensor_fp8_is_named():
    config = checkpoints.quantization_config("fp8")
    change(config, G + "weights.strategy", "tensor")
    with pytest.raises(CheckpointError, match="8-bit float weights with strategy 'tensor'"):
        parse_quantization(config, "config.json")


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
        assert scheme is None or scheme.kind in ("int4", "fp8")
