"""Our output loaded by transformers + compressed-tensors: nothing missing, and logits of the fake-quantized twin."""

import json

import pytest
import torch
from compressed_tensors.quantization import QuantizationConfig

from converters.detect import open_checkpoint
from quant import pipeline, reference
from quant.schemes import class_of, make_recipe, quantization_config
from tests import checkpoints

CASES = [
    ("scout_tiny", {"scheme": "int4"}),
    ("maverick_tiny", {"scheme": "mixed", "attention": "fp8"}),
    ("scout_tiny_text", {"scheme": "int4", "shared_experts": False, "attention": "fp8", "group_size": 64}),
    ("scout_tiny_text", {"scheme": "fp8"}),
]


def load_model(folder, **options):
    from transformers import Llama4ForCausalLM, Llama4ForConditionalGeneration

    multimodal = "vision_config" in json.loads((folder / "config.json").read_text())
    cls = Llama4ForConditionalGeneration if multimodal else Llama4ForCausalLM
    return cls.from_pretrained(folder, dtype=torch.bfloat16, output_loading_info=True, **options)


def fake_quantized(source, recipe):
    """The source checkpoint's own tensors, quantized and dequantized by the specification."""
    reader = open_checkpoint(source)
    prefix = "" if reader.arch.vision is not None else "language_model."
    tensors = checkpoints.load(source)

    def twin(name):
        weight = reader.read(name).contiguous()
        kind = recipe.kind_of(name)
        if kind == "int4":
            return reference.int4_dequantize(*reference.int4_quantize(weight, recipe.group_size, recipe.scale))
        return reference.fp8_dequantize(*reference.fp8_quantize(weight)) if kind == "fp8" else weight

    for stored, tensor in tensors.items():
        base = prefix + stored
        if base.endswith("experts.gate_up_proj"):
            root = base.removesuffix("gate_up_proj")
            pairs = [[twin(f"{root}{e}.{half}_proj.weight").T for half in ("gate", "up")] for e in range(len(tensor))]
            tensors[stored] = torch.stack([torch.cat(pair, 1) for pair in pairs])
        elif base.endswith("experts.down_proj"):
            root = base.removesuffix("down_proj")
            tensors[stored] = torch.stack([twin(f"{root}{e}.down_proj.weight").T for e in range(len(tensor))])
        elif class_of(base):
            tensors[stored] = twin(base)
    return tensors


@pytest.mark.parametrize(("fixture", "options"), CASES)
def test_logits_equal_the_fake_quantized_twin(fixture, options, request, tmp_path):
    source, recipe = request.getfixturevalue(fixture), make_recipe(**options)
    reader = open_checkpoint(source)
    pipeline.quantize(reader, tmp_path / "out", recipe, pipeline.Options(jobs=2))
    theirs, info = load_model(tmp_path / "out")
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    twin_folder = checkpoints.save(checkpoints.copy(source, tmp_path / "twin"), fake_quantized(source, recipe))
    twin, _ = load_model(twin_folder)
    for module in theirs.modules():  # the twin has unquantized activations
        module.quantization_enabled = False
    tokens = torch.arange(7, 47)[None] * 3
    with torch.no_grad():
        assert torch.equal(theirs(tokens).logits, twin(tokens).logits)


@pytest.mark.parametrize("attention", ["bf16", "fp8"])
@pytest.mark.parametrize(
    ("scheme", "shared"), [("int4", True), ("int4", False), ("fp8", True), ("fp8", False), ("mixed", True)]
)
def test_config_gives_every_module_its_scheme(scheme, shared, attention, maverick_tiny, scout_tiny_text):
    """As compressed-tensors itself matches the names of both model classes."""
    recipe = make_recipe(scheme, shared_experts=shared, attention=attention)
    config = QuantizationConfig(**quantization_config(recipe))
    for folder in (maverick_tiny, scout_tiny_text):
        reader = open_checkpoint(folder)
        for name in reader.tensors():
            stored = name if reader.arch.vision is not None else name.removeprefix("language_model.")
            if not stored.endswith(".weight") or "norm" in name or "embed" in name:
                continue
            classes = ("Llama4Router", "Linear") if name.endswith("router.weight") else ("Linear",)
            scheme_of = checkpoints.library_scheme(config, stored.removesuffix(".weight"), classes)
            kind = recipe.kind_of(name)
            if kind == "bf16":
                assert scheme_of is None, name
                continue
            assert scheme_of.weights.num_bits == (4 if kind == "int4" else 8), name
            assert scheme_of.format == ("pack-quantized" if kind == "int4" else "float-quantized")
            assert (scheme_of.input_activations is None) == (kind == "int4")
            if kind == "int4":
                assert scheme_of.weights.group_size == recipe.group_size
