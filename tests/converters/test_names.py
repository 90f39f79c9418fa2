"""The name table against transformers' own modules, and against the published sizes."""

import json
import math

import pytest
import torch

from converters.arch_io import arch_from_config
from converters.names import canonical_rows, canonical_shapes, hf_rows, is_linear
from tests.converters import published


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


def state_dict(config):
    from transformers import Llama4Config, Llama4ForCausalLM, Llama4ForConditionalGeneration, Llama4TextConfig

    with torch.device("meta"):
        if config["model_type"] == "llama4":
            return Llama4ForConditionalGeneration(Llama4Config(**config)).state_dict()
        return Llama4ForCausalLM(Llama4TextConfig(**config)).state_dict()


@pytest.mark.parametrize("fixture", ["scout_tiny", "maverick_tiny", "scout_tiny_text"])
def test_names_and_shapes_are_those_of_transformers(request, fixture):
    config = config_of(request.getfixturevalue(fixture))
    theirs = {name: tuple(tensor.shape) for name, tensor in state_dict(config).items()}
    rows = hf_rows(arch_from_config(config, "config.json"))
    assert {row.stored: row.shape for row in rows} == theirs
    assert len(rows) == len(theirs)


@pytest.mark.parametrize(
    "config, parameters_b, gigabytes",
    [(published.scout, 108.6, 217.3), (published.maverick, 401.6, 803)],
)
def test_published_sizes(config, parameters_b, gigabytes):
    rows = hf_rows(arch_from_config(config(), "config.json"))
    parameters = sum(math.prod(row.shape) for row in rows)
    assert round(parameters / 1e9, 1) == parameters_b
    assert float(f"{2 * parameters / 1e9:.4g}") == pytest.approx(gigabytes, abs=0.5 if gigabytes > 300 else 0.05)
    largest = max(2 * math.prod(row.shape) for row in rows)
    assert largest == (2 * 128 * 5120 * 16384 if config is published.maverick else 2 * 16 * 5120 * 16384)


def test_published_names_are_those_of_transformers():
    config = published.new_style(published.scout())
    theirs = {name: tuple(tensor.shape) for name, tensor in state_dict(config).items()}
    assert {row.stored: row.shape for row in hf_rows(arch_from_config(config, "config.json"))} == theirs


def test_parts_tile_the_stored_tensor(scout_tiny):
    for row in hf_rows(arch_from_config(config_of(scout_tiny), "config.json")):
        assert sum(math.prod(part.shape) for part in row.parts) == math.prod(row.shape), row.stored


@pytest.mark.parametrize("config", [published.scout, published.maverick])
def test_canonical_names_are_unique_and_the_same_in_both_tables(config):
    arch = arch_from_config(config(), "config.json")
    fused = [part for row in hf_rows(arch) for part in row.parts]
    shapes = canonical_shapes(arch)
    assert len(fused) == len(shapes)
    assert {part.name: part.shape for row in canonical_rows(arch) for part in row.parts} == shapes
    linear = [name for name in shapes if is_linear(name)]
    moe, dense = len(arch.text.moe_layers), arch.text.num_layers - len(arch.text.moe_layers)
    assert len(linear) == 4 * 48 + moe * 3 * (arch.text.num_experts + 1) + dense * 3
    assert not any("router" in name or "vision" in name or "norm" in name for name in linear)


def test_a_tied_lm_head_is_a_row_that_may_be_missing():
    config = published.scout()["text_config"] | {"tie_word_embeddings": True}
    arch = arch_from_config(config, "config.json")
    row = next(row for row in hf_rows(arch) if row.stored == "lm_head.weight")
    assert not row.required and not row.parts
    assert "language_model.lm_head.weight" not in canonical_shapes(arch)
