"""config.json → Arch: both styles, transformers as the oracle, and nothing but CheckpointError for bad ones."""

import copy
import json
import math
import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from converters.arch_io import arch_from_config, read_arch
from l4tool.core.arch import Arch, RopeScaling
from l4tool.core.errors import CheckpointError, InputMissing
from tests.converters import published

CONFIGS = [published.scout, published.maverick]


@pytest.mark.parametrize("config", CONFIGS)
def test_the_two_styles_give_equal_archs(config):
    assert arch_from_config(config(), "old") == arch_from_config(published.new_style(config()), "new")


def test_published_scout():
    arch = arch_from_config(published.scout(), "config.json")
    text, vision = arch.text, arch.vision
    assert text.rope_scaling == RopeScaling(16.0, 1.0, 1.0, 8192)
    assert text.attn_temperature_tuning is True and text.use_qk_norm is True
    assert text.moe_layers == tuple(range(48))
    assert [layer for layer, rope in enumerate(text.rope_layers) if not rope] == list(range(3, 48, 4))
    assert text.eos_token_ids == (200001, 200007, 200008) and text.pad_token_id == 200018
    assert (text.floor_scale, text.attn_scale, text.attention_chunk_size) == (8192.0, 0.1, 8192)
    assert vision is not None and vision.tokens_per_tile == 144
    assert (arch.boi_token_id, arch.eoi_token_id, arch.image_token_id) == (200080, 200081, 200092)
    assert arch.dtype == "bfloat16"


def test_published_maverick():
    text = arch_from_config(published.maverick(), "config.json").text
    assert text.moe_layers == tuple(range(1, 48, 2))
    assert text.rope_scaling is None and text.use_qk_norm is False and text.num_experts == 128


@pytest.mark.parametrize("config", [*CONFIGS, lambda: {"model_type": "llama4", "text_config": {}, "vision_config": {}}])
def test_values_and_defaults_are_those_of_transformers(config):
    from transformers import Llama4Config

    raw = config()
    accepted = copy.deepcopy(raw)
    if "attn_temperature_tuning" in accepted["text_config"]:  # transformers 5 refuses the published 4
        accepted["text_config"]["attn_temperature_tuning"] = True
    theirs = Llama4Config(**accepted)
    if not raw["vision_config"]:  # transformers' own vision defaults do not fit together
        raw["vision_config"] = published.scout()["vision_config"]
    ours = arch_from_config(raw, "config.json")
    text, t = ours.text, theirs.text_config
    for name in ("vocab_size", "hidden_size", "intermediate_size", "intermediate_size_mlp", "head_dim", "floor_scale",
                 "attn_scale", "rms_norm_eps", "max_position_embeddings", "use_qk_norm", "tie_word_embeddings",
                 "attention_chunk_size", "bos_token_id", "pad_token_id"):  # fmt: skip
        assert getattr(text, name) == getattr(t, name), name
    assert bool(t.attn_temperature_tuning) == text.attn_temperature_tuning
    assert (text.num_layers, text.num_heads) == (t.num_hidden_layers, t.num_attention_heads)
    assert (text.num_kv_heads, text.num_experts) == (t.num_key_value_heads, t.num_local_experts)
    assert list(text.moe_layers) == t.moe_layers
    assert [int(rope) for rope in text.rope_layers] == t.no_rope_layers
    assert text.rope_theta == t.rope_parameters["rope_theta"]
    assert (text.rope_scaling is None) == (t.rope_parameters["rope_type"] == "default")
    eos = t.eos_token_id if isinstance(t.eos_token_id, list) else [t.eos_token_id]
    assert list(text.eos_token_ids) == eos
    assert (ours.boi_token_id, ours.image_token_id) == (theirs.boi_token_id, theirs.image_token_id)


def test_text_only_style():
    multimodal = published.scout()
    flat = multimodal["text_config"] | {"architectures": ["Llama4ForCausalLM"]}
    arch = arch_from_config(flat, "config.json")
    assert arch.vision is None and arch.image_token_id is None
    assert arch.text == arch_from_config(multimodal, "config.json").text


def test_no_chunk_limit():
    config = published.scout()
    config["text_config"]["attention_chunk_size"] = None
    assert arch_from_config(config, "x").text.attention_chunk_size == 10485760


def test_stop_ids_of_the_generation_config_are_merged(tmp_path):
    config = published.scout()
    config["text_config"]["eos_token_id"] = 200001
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [200008, 200001, 200007]}')
    arch, raw = read_arch(tmp_path)
    assert arch.text.eos_token_ids == (200001, 200008, 200007)
    assert raw == config


TEXT_ERRORS = [
    ("num_attention_heads", 41, "num_attention_heads"),
    ("num_key_value_heads", 0, "num_key_value_heads"),
    ("head_dim", 127, "head_dim must be even"),
    ("head_dim", True, "head_dim"),
    ("hidden_size", "5120", "hidden_size"),
    ("hidden_size", -1, "hidden_size"),
    ("hidden_size", 5120.5, "hidden_size"),
    ("no_rope_layers", [1, 1, 1, 0], "at least 48 entries"),
    ("no_rope_layers", [2] * 48, "no_rope_layers"),
    ("moe_layers", [48], "moe_layers"),
    ("moe_layers", [1, 1], "twice"),
    ("layer_types", ["full_attention"] * 48, "layer_types"),
    ("hidden_act", "gelu", "SwiGLU"),
    ("attention_bias", True, "biases"),
    ("num_experts_per_tok", 2, "one expert"),
    ("rms_norm_eps", float("nan"), "rms_norm_eps"),
    ("eos_token_id", [200001, 300000], "eos_token_id"),
    ("rope_theta", float("inf"), "rope_theta"),
    ("rope_theta", 10**400, "rope_theta"),
    ("hidden_size", 10**400, "hidden_size"),
    ("rope_scaling", {"rope_type": "yarn", "factor": 2.0}, "rope_type"),
    ("rope_scaling", {"rope_type": "llama3", "factor": 0.0, "low_freq_factor": 1, "high_freq_factor": 4,
                      "original_max_position_embeddings": 8192}, "factor"),
    ("rope_scaling", {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4, "high_freq_factor": 1,
                      "original_max_position_embeddings": 8192}, "low_freq_factor"),
    ("rope_scaling", {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1, "high_freq_factor": 4},
     "original_max_position_embeddings"),
    ("rope_scaling", {"factor": 8.0}, "rope_type"),
    ("rope_scaling", [], "rope_scaling"),
]  # fmt: skip


@pytest.mark.parametrize("field, value, said", TEXT_ERRORS)
def test_bad_text_values(field, value, said):
    config = published.scout()
    config["text_config"][field] = value
    with pytest.raises(CheckpointError, match=said) as caught:
        arch_from_config(config, "folder/config.json")
    assert "folder/config.json" in caught.value.message


VISION_ERRORS = [
    ("hidden_size", 1400, "2-D rope"),
    ("image_size", 337, "image_size"),
    ("image_size", [336, 448], "image_size"),
    ("patch_size", 336, "pixel_shuffle_ratio"),
    ("pixel_shuffle_ratio", 0.3, "pixel_shuffle_ratio"),
    ("intermediate_size", 4096, "intermediate_size"),
    ("projector_input_dim", 1024, "projector_input_dim"),
    ("vision_output_dim", 7680, "vision_output_dim"),
    ("vision_feature_select_strategy", "full", "class token"),
    ("multi_modal_projector_bias", True, "bias"),
    ("hidden_act", "quick_gelu", "GELU"),
]


@pytest.mark.parametrize("field, value, said", VISION_ERRORS)
def test_bad_vision_values(field, value, said):
    config = published.scout()
    config["vision_config"][field] = value
    with pytest.raises(CheckpointError, match=said):
        arch_from_config(config, "config.json")


@pytest.mark.parametrize(
    "config, said",
    [
        ([], "must be an object"),
        ({}, "model_type"),
        ({"model_type": "llama"}, "Llama 4|model_type"),
        ({"model_type": "llama4"}, "text_config"),
        ({"model_type": "llama4", "text_config": {}}, "vision_config"),
        ({"model_type": "llama4", "text_config": 3, "vision_config": {}}, "text_config"),
        ({"model_type": "llama4_text", "dtype": "int8"}, "dtype"),
        ({"model_type": "llama4_text", "num_hidden_layers": 10**9}, "num_hidden_layers"),
    ],
)
def test_bad_tops(config, said):
    with pytest.raises(CheckpointError, match=said):
        arch_from_config(config, "config.json")


@pytest.mark.parametrize("content", ["", "{", "[1]", "null", '{"a": 1, "a": 2}', "[" * 100_000])
def test_files_that_are_no_json_objects(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        read_arch(tmp_path)


def test_files_that_are_not_text(tmp_path):
    with pytest.raises(InputMissing, match=r"config\.json"):
        read_arch(tmp_path)
    (tmp_path / "config.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        read_arch(tmp_path)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
    | st.sampled_from([0, 1, -1, 2**63, 10**400, 1e400, 0.5, 128, 1 << 20])
    | st.sampled_from(["llama3", "default", [], {}, [0], [1] * 48, [None]]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=4,
)  # fmt: skip


def _paths(value, prefix=()):
    """The way to every value inside an object."""
    for key in value:
        yield (*prefix, key)
        if isinstance(value[key], dict):
            yield from _paths(value[key], (*prefix, key))


@settings(max_examples=600, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data(), which=st.sampled_from(CONFIGS), new=st.booleans(), text_only=st.booleans())
def test_fuzzed_configs_give_an_arch_or_one_error(data, which, new, text_only):
    config = published.new_style(which()) if new else which()
    if text_only:
        config = config["text_config"]
    for _ in range(data.draw(st.integers(1, 3))):
        *way, last = data.draw(st.sampled_from(sorted(_paths(config), key=str)))
        inner = config
        for key in way:
            inner = inner[key]
        if data.draw(st.booleans()):
            inner.pop(last)
        else:
            inner[last] = data.draw(JSON_VALUES)
    generation = data.draw(st.none() | st.fixed_dictionaries({"eos_token_id": JSON_VALUES}))
    try:
        arch = arch_from_config(config, "config.json", generation)
    except CheckpointError as error:
        assert "config.json" in error.message
        return
    assert isinstance(arch, Arch)
    text = arch.text
    assert text.num_heads % text.num_kv_heads == 0 and text.head_dim % 2 == 0
    assert len(text.rope_layers) == text.num_layers
    assert all(0 <= layer < text.num_layers for layer in text.moe_layers)
    assert all(0 <= token < text.vocab_size for token in text.eos_token_ids)
    assert all(math.isfinite(x) for x in (text.rope_theta, text.attn_scale, text.floor_scale, text.rms_norm_eps))
    assert hash(arch) == hash(arch)


def test_mutated_bytes_of_a_config_file(tmp_path):
    raw = json.dumps(published.scout()).encode()
    rng = random.Random(0)
    path = tmp_path / "config.json"
    outcomes = set()
    for _ in range(300):
        spoiled = bytearray(raw)
        for _ in range(rng.randint(1, 3)):
            spoiled[rng.randrange(len(raw))] = rng.randrange(256)
        path.write_bytes(spoiled)
        try:
            outcomes.add(type(read_arch(tmp_path)[0]))
        except CheckpointError as error:
            assert "config.json" in error.message
            outcomes.add(CheckpointError)
    assert outcomes == {Arch, CheckpointError}
